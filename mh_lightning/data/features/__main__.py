"""Look after feature caches: ``python -m mh_lightning.data.features ls|verify|rm FOLDER [ENTRY ...]``."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track
from rich.table import Table

from mh_lightning.data.features.store import DAMAGED, Entry, is_intact, open_shard
from mh_lightning.errors import UserError


def entries_of(folder: Path) -> list[Entry]:
    """The entries of a cache's folder.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; give the feature_cache.folder of your configuration.")
    return [
        entry for entry in map(Entry, sorted(path for path in folder.iterdir() if path.is_dir())) if entry.description()
    ]


def list_entries(entries: list[Entry], console: Console) -> None:
    """Show what there is."""
    table = Table("entry", "image size", "views", "numbers", "images", "size on disk")
    table.columns[0].no_wrap, table.columns[0].overflow = True, "ignore"  # names are what rm takes
    table.columns[0].min_width = max((len(entry.folder.name) for entry in entries), default=0)
    for entry in entries:
        told = entry.description()
        images = 0
        for path in entry.shards():
            try:
                images += len(open_shard(path).digests)
            except (OSError, *DAMAGED):
                continue  # `verify` names it
        size = told.get("settings", {}).get("image_size", "")
        told_values = [str(value) for value in (size, told.get("views", ""), told.get("dtype", ""))]
        table.add_row(entry.folder.name, *told_values, f"{images:,}", decimal(entry.size_on_disk))
    console.print(table)


def verify(entries: list[Entry], console: Console) -> int:
    """Compute all checksums, name the damaged shards, and return how many they are."""
    paths = [path for entry in entries for path in entry.shards()]
    damaged = []
    for path in track(paths, "Checking", console=console, transient=True):
        try:
            if not is_intact(open_shard(path)):
                damaged.append(path)
        except DAMAGED:
            damaged.append(path)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be read ({error.strerror}); mend its permissions.") from error
    for path in damaged:
        console.print(f"damaged: {path} (its images are extracted again when they are needed)", soft_wrap=True)
    console.print(f"{len(paths) - len(damaged)} of {len(paths)} shards are intact.")
    return len(damaged)


def remove(entries: list[Entry], names: list[str], console: Console) -> None:
    """Delete entries by their names.

    Raises:
        UserError: if there is none of a name; then nothing is deleted.
    """
    by_name = {entry.folder.name: entry for entry in entries}
    chosen = [*by_name] if names == ["all"] else names
    for name in chosen:
        if name not in by_name:
            raise UserError(f"entry {name!r} is not in the cache, which holds {', '.join(by_name) or 'nothing'}.")
    for name in chosen:
        size = by_name[name].size_on_disk
        by_name[name].remove()
        console.print(f"deleted {name} ({decimal(size)})", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 1 if something is damaged and 2 after a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m mh_lightning.data.features", description="Look after feature caches."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (
        ("ls", "show the entries: backbone, images, size on disk"),
        ("verify", "compute the checksums of all shards"),
        ("rm", "delete entries"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("folder", type=Path, help="the feature_cache.folder of a configuration")
        if name == "rm":
            command.add_argument("entries", nargs="+", metavar="entry", help="names that ls shows, or 'all'")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        entries = entries_of(options.folder.expanduser())
        if options.command == "ls":
            list_entries(entries, console)
        elif options.command == "verify":
            return int(verify(entries, console) > 0)
        else:
            remove(entries, options.entries, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
