"""Predictions to look at: a page of small pictures, each with its class and how sure the model is."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mh_lightning.data.images import read_image
from mh_lightning.data.learnt_stream import LearntStream
from mh_lightning.errors import write_at_once
from mh_lightning.inference.folders import Answers

MOST = 1000  # pictures of a page
SIDE = 160  # pixels
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem; background: #fafafa; color: #222 }
main { display: flex; flex-wrap: wrap; gap: 12px }
figure { width: 160px; margin: 0; padding: 8px; background: #fff; border: 1px solid #ddd; border-radius: 6px }
figure.wrong { border-color: #c33 }
img { width: 100%; height: 160px; object-fit: contain; background: #f2f2f2 }
figcaption b, figcaption small { display: block; overflow-wrap: anywhere }
.bar { height: 4px; background: #e4e4e4; margin: 4px 0 } .bar i { display: block; height: 100%; background: #2a7 }
small { color: #666 }
"""


def write_page(
    answers: Answers, folder: Path, learnt: LearntStream, path: Path, true: Sequence[str] = (), most: int = MOST
) -> None:
    """Write a page of HTML that needs no other file.

    Args:
        answers: of a model.
        folder: that the files lie in.
        learnt: names of the classes, and how files become pictures.
        path: of the page.
        true: class of each file, where it is known; wrong answers come first, and say it.
        most: pictures; of more files, the first are shown, and the page says so.
    """
    best = answers.probabilities.argmax(axis=1)
    rows = list(range(len(answers.files)))
    if true:
        rows.sort(key=lambda row: true[row] == learnt.class_names[best[row]])
    figures = []
    for row in rows[:most]:
        label, probability = learnt.class_names[best[row]], float(answers.probabilities[row, best[row]])
        wrong = bool(true) and true[row] != label
        note = f"<small>it is {html.escape(true[row])}</small>" if wrong else ""
        name = html.escape(answers.files[row].as_posix())
        figures.append(
            f'<figure{" class=wrong" if wrong else ""}><img src="{_thumbnail(folder / answers.files[row], learnt)}" '
            f'alt="{name}" loading="lazy"><figcaption><b>{html.escape(label)}</b>'
            f'<div class="bar"><i style="width:{100 * probability:.0f}%"></i></div>'
            f"{100 * probability:.0f} % sure{note}<small>{name}</small></figcaption></figure>"
        )
    shown = f"{len(rows)} images" if len(rows) <= most else f"the first {most} of {len(rows)} images"
    failed = "".join(f"<li>{html.escape(reason)}</li>" for reason in answers.unreadable)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Predictions</title><style>{STYLE}</style>'
        f"<h1>Predictions</h1><p>{shown} of {html.escape(str(folder))}</p><main>{''.join(figures)}</main>"
        + (f"<h2>Not read</h2><ul>{failed}</ul>" if failed else "")
        + "</html>\n"
    )
    write_at_once(path, page)


def _thumbnail(path: Path, learnt: LearntStream) -> str:
    picture = read_image(str(path), learnt.reading)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if max(picture.size) < SIDE:  # small pictures are shown by their pixels
        factor = SIDE / max(picture.size)
        picture = picture.resize([max(1, round(side * factor)) for side in picture.size], Image.Resampling.NEAREST)
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
