"""Files that are there as a whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def as_a_whole(path: Path) -> Iterator[Path]:
    """A place beside a file to write it to, which takes the file's place at the end and is removed after an error.

    Of several processes that write the same file, the last one's stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> with as_a_whole(path) as partial:
        ...     _ = partial.write_text("1 2 3")
        ...     path.exists()
        False
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('1 2 3', ['numbers.txt'])
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
