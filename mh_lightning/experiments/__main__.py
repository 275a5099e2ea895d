"""``python -m mh_lightning.experiments run|search|tables``: many runs of the command line."""

import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_fr

from mh_lightning.config_files import MODE
from mh_lightning.errors import UserError
from mh_lightning.experiments.cells import Cells, Planned, planned, whole
from mh_lightning.experiments.report import rebuild_report
from mh_lightning.experiments.runs import seeds_of
from mh_lightning.experiments.search import run_search
from mh_lightning.experiments.series import run_series
from mh_lightning.library_errors import sentence_of
from mh_lightning.packaged import config_file

PARSER: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "parser_mode": MODE}


def _parser() -> ArgumentParser:
    run = ArgumentParser(
        description="Run experiments with several seeds and write tables.",
        **PARSER,
    )
    run.add_argument("--table", action="config", help="YAML file that names streams, methods and these options.")
    run.add_argument("--streams", nargs="+", default=[], help="Names of configs/streams, or YAML files.")
    run.add_argument("--methods", nargs="+", default=[], help="Names of configs/methods, or YAML files, for each.")
    run.add_argument("--cells", type=list[Cells], default=[], help="More streams and methods, with overrides.")
    run.add_argument(
        "--configs",
        nargs="+",
        default=[],
        help="YAML files, or quoted patterns such as 'x_*.yaml'; each file is a whole experiment.",
    )
    run.add_argument("--output", type=str, required=True, help="Folder for the tables and the figure.")
    run.add_argument("--class_order_seeds", nargs="+", default=[], help="Run each seed with each class order.")
    run.add_argument("--baseline", type=str, help="Experiment to compare with, or the end of one name in each stream.")
    run.add_argument("--run_dir", type=str, default="runs", help="Folder of the run folders.")
    run.add_argument("--title", type=str, help="Title of the tables.")
    run.add_argument("--reference", type=Path_fr | None, help="CSV file: experiment, value, source.")

    search = ArgumentParser(
        description="Search for hyper-parameters on validation data.",
        **PARSER,
    )
    search.add_argument("--config", nargs="+", required=True, help="YAML files of the experiment, a stream first.")
    search.add_argument("--space", type=str, required=True, help="YAML file of the options and their ranges.")
    search.add_argument("--trials", type=int, required=True, help="Trials in the storage at the end.")
    search.add_argument("--storage", type=str, required=True, help="Journal file, or a database's URL.")
    search.add_argument("--output", type=str, required=True, help="YAML file for the best values.")
    search.add_argument("--run_dir", type=str, help="Keep the trials' run folders here.")

    tables = ArgumentParser(
        description="Write the tables and the figure again, from series.json and runs.csv; nothing is run.",
        **PARSER,
    )
    tables.add_argument("folders", nargs="+", help="Folders that run has written with --output.")

    parser = ArgumentParser(prog="python -m mh_lightning.experiments", **PARSER)
    subcommands = parser.add_subcommands()
    for name, one in (("run", run), ("search", search)):
        one.add_argument("--seeds", nargs="+", required=True, help="Numbers, or ranges such as 0-9.")
        one.add_argument("--overrides", nargs="+", default=[], help="Options of fit for all, as key=value.")
        one.add_argument("--metric", type=str, default="average_accuracy", help="Of results.json.")
        one.add_argument("--workers", type=int, default=1, help="Processes that run at the same time.")
        subcommands.add_subcommand(name, one)
    subcommands.add_subcommand("tables", tables)
    return parser


def parse(words: Sequence[str]) -> Namespace:
    """The options of a command line.

    Raises:
        ArgumentError: if the parser refuses any of it.
    """
    # argparse takes an override with its dashes for an option of its own
    bare = [re.sub(r"^--(?=\w+\.[\w.]+\+?=)", "", word) for word in words]
    split = [part for word in bare for part in (word.split("=", 1) if word.startswith("--table=") else [word])]
    tables = [word for before, word in pairwise(["", *split]) if before == "--table"]
    others = [word for before, word in pairwise(["", *split]) if "--table" not in (before, word)]
    # first, so that the command line overrides them; and once alone, since its overrides are added to theirs
    named = [part for table in tables for part in ("--table", config_file(table))]
    given = _parser().parse_args([*others[:1], *named, *others[1:]])
    if tables and given.subcommand == "run":
        alone = _parser().parse_args(["run", *named, "--seeds", "0", "--output", "unused"]).run
        asked = any(word.partition("=")[0] == "--overrides" for word in others)
        given.run.overrides_of_table = _words(alone.overrides, "overrides")
        given.run.overrides = given.run.overrides if asked else []
        given.run.beside = Path(named[-1]).parent
    return given


def _words(value: Any, option: str) -> list[str]:
    """The texts and numbers of an option, as a table may write them.

    Raises:
        UserError: if there is something else.
    """
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in given):
        raise UserError(f"--{option}: a table must give texts or numbers there, in a list, got {value!r}.")
    return [str(one) for one in given]


def experiments_of(given: Namespace) -> list[Planned]:
    """What the options of `run` ask for.

    Raises:
        UserError: if they do not fit.
    """
    streams, methods, configs = (_words(given[name], name) for name in ("streams", "methods", "configs"))
    if bool(streams) != bool(methods):
        raise UserError("--streams and --methods go together; give both, or --configs with whole experiments.")
    found = [one for pattern in configs for one in whole(pattern)]
    found += [one for some in (Cells(streams, methods), *given.cells) for one in planned(some, given.get("beside"))]
    if not found:
        raise UserError("nothing to run; give --table, --streams and --methods, or --configs.")
    first, last = given.get("overrides_of_table") or [], _words(given.overrides, "overrides")
    return [replace(one, overrides=(*first, *one.overrides, *last)) for one in found]


def _run(given: Namespace, words: Sequence[str]) -> int:
    return run_series(
        experiments_of(given),
        seeds_of(_words(given.seeds, "seeds"), "--seeds"),
        Path(given.output),
        seeds_of(_words(given.class_order_seeds, "class_order_seeds"), "--class_order_seeds"),
        given.workers,
        Path(given.run_dir),
        given.baseline,
        given.metric,
        given.title,
        None if given.reference is None else Path(given.reference.absolute),
        ("python", "-m", "mh_lightning.experiments", *words),
    )


def _search(given: Namespace) -> int:
    return run_search(
        [Path(config_file(config)) for config in given.config],
        Path(config_file(given.space)),
        given.trials,
        seeds_of(given.seeds, "--seeds"),
        given.storage,
        Path(given.output),
        given.metric,
        given.overrides,
        given.workers,
        None if given.run_dir is None else Path(given.run_dir),
    )


def _tables(given: Namespace) -> int:
    for folder in given.folders:
        rebuild_report(Path(folder))
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: its words, by default those of the process.

    Returns:
        0, 1 if a run failed, 2 for a mistake in the arguments, 130 if it was stopped.
    """
    words = list(sys.argv[1:] if args is None else args)
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    try:
        given = parse(words)
        match given.subcommand:
            case "run":
                code = _run(given.run, words)
            case "search":
                code = _search(given.search)
            case _:
                code = _tables(given.tables)
    except (UserError, ArgumentError, UnicodeDecodeError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return min(code, 1)


if __name__ == "__main__":
    sys.exit(main())
