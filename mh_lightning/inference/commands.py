"""``mh-lightning predict|test|export --from RUN …``: a trained model by the command line, without its data."""

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch

from mh_lightning.errors import UserError, require
from mh_lightning.inference.contact_sheet import write_page
from mh_lightning.inference.folders import answers_of_folder, report, true_classes, write_table
from mh_lightning.inference.loading import load

UNREAD = 1  # exit code, if some images could not be read
WHAT = {
    "predict": "Classify all images of a folder.",
    "test": "Tell how many images of a folder are classified right; its folders are named like the classes.",
}


def parser_of(command: str) -> ArgumentParser:
    """Of the words after a command."""
    parser = ArgumentParser(prog=f"mh-lightning {command}", description=WHAT[command], allow_abbrev=False)
    parser.add_argument("--from", dest="source", required=True, metavar="RUN",
                        help="run folder, experiment's folder, checkpoint, or file of Model.save")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package, beside mh_lightning and torch.nn, whose classes the checkpoint may name")  # fmt: skip
    parser.add_argument("--images", required=True, metavar="FOLDER", help="of image files, at any depth")
    parser.add_argument("--output", default="predictions.csv", metavar="FILE", help="the table; beside it a page to "
                        "look at, of the same name with .html")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")
    parser.add_argument("--features", action="store_true", help="the backbone's features in the table, too")
    parser.add_argument("--no_page", action="store_true", help="no page of pictures")
    return parser


def main(command: str, words: list[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        UserError: if something cannot be used.
    """
    options = parser_of(command).parse_args(words)
    require("batch_size", options.batch_size, at_least=1)
    model = load(options.source, trust=options.trust, device=_device(options.device))
    folder, table = Path(options.images), Path(options.output)
    answers = answers_of_folder(model, folder, options.batch_size)
    true = true_classes(answers.files, model.class_names) if command == "test" else []
    write_table(answers, model.class_names, table, options.features, true)
    print(f"{len(answers.files)} predictions in {table}")
    if not options.no_page:
        page = table.with_suffix(".html")
        write_page(answers, folder, model.learnt, page, true)
        print(f"to look at: {page}")
    if command == "test":
        for name, value in report(answers, true, model.class_names).items():
            print(f"{name.replace('_', ' ')}: {value:.4f}")
    for reason in answers.unreadable:
        print(f"not read: {reason}", file=sys.stderr)
    return UNREAD if answers.unreadable else 0


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} is not there ({str(error).splitlines()[0]}); cpu always is.") from error
