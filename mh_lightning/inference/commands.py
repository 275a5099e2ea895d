"""``mh-lightning predict|test|export --from RUN …``: a trained model by the command line, without its data."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import get_args

import torch

from mh_lightning.errors import UserError, require
from mh_lightning.inference.contact_sheet import write_page
from mh_lightning.inference.export import Format, export
from mh_lightning.inference.folders import answers_of_folder, report, true_classes, write_table
from mh_lightning.inference.loading import load
from mh_lightning.inference.model import Model

UNREAD = 1  # exit code, if some images could not be read
WHAT = {
    "predict": "Classify all images of a folder.",
    "test": "Tell how many images of a folder are classified right; its folders are named like the classes.",
    "export": "Write a model as a file for other programs: images in, probabilities out.",
}


def parser_of(command: str) -> ArgumentParser:
    """Of the words after a command."""
    parser = ArgumentParser(prog=f"mh-lightning {command}", description=WHAT[command], allow_abbrev=False)
    add = parser.add_argument
    add("--from", dest="source", required=True, metavar="RUN", help="run or its folder, checkpoint, or saved model")
    add("--trust", action="append", default=[], metavar="PACKAGE", help="whose classes the file may name, too")
    if command == "export":
        add("--output", required=True, metavar="FILE", help="such as model.onnx")
        add("--format", choices=get_args(Format), default="onnx", help="of the file")
        add("--opset", type=int, help="version of ONNX's operators, by default torch's choice")
        add("--input_shape", type=int, nargs="+", help="of one input, where the backbone does not tell it")
        return parser
    add("--images", required=True, metavar="FOLDER", help="of image files, at any depth, or one file")
    add("--output", default="predictions.csv", metavar="FILE", help="table; a page beside it, with .html, to look at")
    add("--features", action="store_true", help="the backbone's features in the table, too")
    add("--no_page", action="store_true", help="no page of pictures")
    add("--batch_size", type=int, default=64, help="images at once")
    add("--device", default="cpu", help="such as cuda")
    return parser


def main(command: str, words: list[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        UserError: if something cannot be used.
    """
    options = parser_of(command).parse_args(words)
    if command == "export":
        model = load(options.source, trust=options.trust)
        difference = export(model, options.output, options.format, options.input_shape, options.opset)
        print(f"{options.output}: answers as the model does, but for {difference:.1g}, on 100 inputs")
        return 0
    require("batch_size", options.batch_size, at_least=1)
    return _ask(command, load(options.source, trust=options.trust, device=_device(options.device)), options)


def _ask(command: str, model: Model, options: Namespace) -> int:
    images, table = Path(options.images), Path(options.output)
    folder, only = (images.parent, images.name) if images.is_file() else (images, None)
    if table.suffix == ".html":
        raise UserError(f"output={str(table)!r} would be the page's name; give the table's, such as predictions.csv.")
    answers = answers_of_folder(model, folder, options.batch_size, only=only)
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
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name!r} is not there ({str(error).splitlines()[0]}); cpu always is.") from error
