"""How long a run over many image files waits before it starts, when their features are in the cache.

    python -m benchmarks.many_images --files 200000

Makes a folder of so many small files in ten classes, lists it, and asks for their digests: at first, when each file is
read, and again, when path, size and time of change tell it; beside the second, the reading of all files that it saves.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import parser, report
from mh_lightning.data.features.file_digests import FileDigests, digests_of_files
from mh_lightning.data.images import ImageReading
from mh_lightning.data.listing import list_images

CLASSES = [f"class_{number}" for number in range(10)]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return the results."""
    given = parser(__doc__)
    given.add_argument("--files", type=int, default=100_000)
    given.add_argument("--bytes", type=int, default=4096, help="of each")
    options = given.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "images"
        for place in range(options.files):
            path = root / CLASSES[place % len(CLASSES)] / f"{place}.jpg"
            if place < len(CLASSES):
                path.parent.mkdir(parents=True)
            path.write_bytes(place.to_bytes(8, "little") * (options.bytes // 8))
            os.utime(path, (10**9, 10**9))
        listing, parts = seconds(lambda: list_images([root], CLASSES))
        paths, reading, files = list(parts[0].inputs), ImageReading(), FileDigests(Path(name) / "cache")
        first, digests = seconds(lambda: files.of(paths, reading))
        again, same = seconds(lambda: files.of(paths, reading))
        reread, _ = seconds(lambda: digests_of_files(paths, reading))
    assert digests == same
    found = {"list": listing, "first": first, "again": again, "read": reread}
    print(
        f"{again / reread:.2f} of the time that it takes to read all files, {options.files:,} of {options.bytes} bytes"
    )
    print(", ".join(f"{what} {1e6 * value / options.files:.1f} µs a file" for what, value in found.items()))
    return report(options, files=options.files, seconds=found)


if __name__ == "__main__":
    main()
