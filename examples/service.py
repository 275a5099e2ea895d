"""A learner that runs for years: it learns labelled images as they come, and answers meanwhile.

    python examples/service.py --from runs/digits --folder learner

Copy images into learner/learn/<class>/, known or new, and into learner/ask/: what was learnt goes to learner/learnt,
answers come to learner/answers as JSON, and what cannot be read goes to learner/refused with a sentence that says why.
With `--port 8000` (pip install "mh_lightning[service]"), images also come by HTTP on 127.0.0.1: POST /learn/CLASS and
POST /ask with the image's bytes.

A file is learnt once, whatever happens: the model is saved as a whole, with the digests of the files that it has learnt
last, before these files are moved. So one that was moved is learnt for good, and of one that was not, the digest tells.
"""

import argparse
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import mh_lightning
from mh_lightning.errors import UserError
from mh_lightning.heads import ClosedFormHead
from mh_lightning.inference.images import as_image

BATCH = 64  # files that are learnt before the model is saved
QUIET = 0.2  # seconds without anything to do, and without a write to a file that is to be read
PARTIAL = ".part"  # of a file that is being written


class Learner:
    """A model, and the folders that it serves.

    Args:
        folder: of the model's file and of all that comes and goes.
        source: a run, a checkpoint or a saved model to start from, where the folder has none yet.
    """

    def __init__(self, folder: Path, source: str | None) -> None:
        self.folder, self.file = folder, folder / "model.mh"
        self.lock = threading.Lock()
        for name in ("learn", "learnt", "ask", "answers", "refused"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            if source is None:
                raise UserError(f"--from: there is no model in {str(folder)!r} yet; name a run to start from.")
            mh_lightning.load(source).save(self.file)
        self.model = mh_lightning.load(self.file)
        method = self.model.method
        if not isinstance(method.head, ClosedFormHead) or method.backbone.image_format() is None:
            raise UserError(
                f"--from: {method.architecture()} does not learn images in one pass; give a head in closed form on a "
                "backbone of images."
            )

    def turn(self) -> int:
        """Learn and answer what is there; return how many files that were."""
        return self._learn([*self._files("learn")][:BATCH]) + self._answer([*self._files("ask")][:BATCH])

    def _files(self, name: str) -> Iterator[Path]:
        for path in sorted((self.folder / name).rglob("*")):
            ready = path.is_file() and path.suffix != PARTIAL and not path.name.startswith(".")
            if ready and time.time() - path.stat().st_mtime > QUIET:
                yield path

    def _learn(self, paths: list[Path]) -> int:
        """Learn files, save, and only then move them."""
        known = set(self.model.notes.get("last", []))
        digests = {path: self._digest(path) for path in paths}
        new = [path for path in paths if digests[path] not in known and self._is_readable(path, labelled=True)]
        if new:
            with self.lock:
                self.model.learn(new, [path.parent.name for path in new])
                self.model.notes["last"] = [digests[path] for path in new]
                self.model.save(self.file)
        for path in paths:
            if path in new or digests[path] in known:
                self._move(path, "learnt")
        return len(paths)

    def _answer(self, paths: list[Path]) -> int:
        for path in paths:
            if self._is_readable(path, labelled=False):
                answer = self.ask(path)
                self._write(
                    self.folder / "answers" / f"{'_'.join(path.relative_to(self.folder / 'ask').parts)}.json",
                    json.dumps(answer).encode(),
                )
                path.unlink()
        return len(paths)

    def ask(self, path: Path) -> dict[str, float | str]:
        """The class of an image, and its probability."""
        with self.lock:
            (label,), probabilities = self.model.predict(path)
        return {"class": label, "probability": round(float(probabilities.max()), 6)}

    def _is_readable(self, path: Path, labelled: bool) -> bool:
        try:
            if labelled and path.parent.parent != self.folder / "learn":
                raise UserError(f"{path.name} lies in no folder of a class; give learn/<class>/{path.name}.")
            as_image(path, self.model.learnt)
        except UserError as error:
            self._write(self.folder / "refused" / f"{path.name}.txt", f"{error}\n".encode())
            self._move(path, "refused")
            return False
        return True

    def _digest(self, path: Path) -> str:
        name = path.relative_to(self.folder).as_posix()
        return hashlib.sha256(f"{name} ".encode() + path.read_bytes()).hexdigest()

    def _move(self, path: Path, name: str) -> None:
        target = (
            self.folder / name / path.parent.name / path.name if name == "learnt" else self.folder / name / path.name
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():  # an image of the same name came before
            target = target.with_name(f"{target.stem}_{uuid.uuid4().hex[:8]}{target.suffix}")
        shutil.move(path, target)

    @staticmethod
    def _write(target: Path, content: bytes) -> None:
        """A file that is there as a whole, and on disk."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}{PARTIAL}")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)


def serve_http(learner: Learner, port: int) -> None:
    """Take images by HTTP on 127.0.0.1, in a thread of its own."""
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request

    app = FastAPI(title="learner")

    @app.post("/learn/{label}", status_code=202)
    async def learn(label: str, request: Request) -> dict[str, str]:
        if not label.replace("_", "").replace("-", "").replace(" ", "").isalnum():
            raise HTTPException(422, "a class is named by letters, digits, spaces, - and _")
        name = f"{uuid.uuid4().hex}.image"
        learner._write(learner.folder / "learn" / label / name, await request.body())
        return {"file": name, "class": label}

    @app.post("/ask")
    async def ask(request: Request) -> dict[str, float | str]:
        path = learner.folder / f".{uuid.uuid4().hex}{PARTIAL}"
        path.write_bytes(await request.body())
        try:
            return learner.ask(path)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            path.unlink()

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()


def main() -> None:
    """Learn until somebody stops it, in any way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", help="a run to start from")
    parser.add_argument("--folder", type=Path, default=Path("learner"), help="of the model, and what comes and goes")
    parser.add_argument("--port", type=int, help="of HTTP on 127.0.0.1")
    parser.add_argument("--once", action="store_true", help="end when there is nothing more to do")
    options = parser.parse_args()
    try:
        learner = Learner(options.folder, options.source)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    if options.port is not None:
        serve_http(learner, options.port)
    print(f"ready: {len(learner.model.class_names)} classes", flush=True)
    while True:
        if not learner.turn():
            waiting = any(path.is_file() for name in ("learn", "ask") for path in (options.folder / name).rglob("*"))
            if options.once and not waiting:
                return
            time.sleep(QUIET)


if __name__ == "__main__":
    main()
