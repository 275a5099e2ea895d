"""Files that are there as a whole or not at all, and locks on folders."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout


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


def try_lock(path: Path) -> FileLock | None:
    """Take a lock, or None while another process has it; the system gives it back when its process ends, in any way.

    Raises:
        OSError: if the file cannot be made, or its disk has no locks.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / ".lock"
        >>> mine = try_lock(path)
        >>> try_lock(path) is None
        True
        >>> release(mine)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    except NotImplementedError as error:
        raise OSError(str(error)) from error
    return lock


def release(lock: FileLock) -> None:
    """Give a lock back, and remove its file."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
