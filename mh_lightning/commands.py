"""The front of the command line: help, lists and copies at once, and all that needs a trainer by `mh_lightning.cli`."""

import os
import sys
from collections.abc import Sequence

HELP = """\
{name} COMMAND …      continual learning with Memory Heads

  fit       learn a stream                 {name} fit --config quickstart.yaml
  test      evaluate a checkpoint          {name} test --config quickstart.yaml --ckpt_path last
  validate  the same, with validation samples
  predict   classify the test samples      {name} predict --config quickstart.yaml --ckpt_path last
            or any images, with any run    {name} predict --from runs/quickstart/version_0 --images FOLDER
  test      … or a folder for each class   {name} test --from runs/quickstart/version_0 --images FOLDER
  export    for other programs             {name} export --from runs/quickstart/version_0 --output model.onnx
  list      what there is                  {name} list methods, or streams, heads, data, backbones, configs …
  init      copy a starting point          {name} init my_experiment

  {name} fit --help         the options that a person needs
  {name} fit --help_all     all of them, those of Lightning's trainer included
  {name} --version

Many runs, tables with intervals, and searches: python -m mh_lightning.experiments --help
Features that are kept: python -m mh_lightning.data.features --help
"""

RUN_HELP = """\
{name} {command} --config FILE [--config FILE …] [--OPTION VALUE …]

  {name} {command} --config streams/digits.yaml --config methods/ncm.yaml

Configurations name a stream and a method; options override them, in any order, and later ones win.
FILE is one of your own, or the name of one that comes with the package ({name} list configs).

What people change
  --seed_everything 1                          seed of all that is drawn
  --data.increment 5                           classes a task
  --data.epochs_per_task 3 --data.batch_size 16
  --data.class_order_seed 1993                 another order of the classes
  --data.validation_fraction 0.2               hold a part of the training samples out, and report it
  --model.optimizer Adam --model.optimizer.lr 0.01
  --model.head mh_lightning.MHLinear --model.head.key_mem_units 100
  --model.backbone.name resnet18               any timm model

Where results go
  --run_dir runs --experiment NAME             the run folder is runs/NAME/version_N
  --pictures false                             faster, for many short runs
  --ckpt_path last                             {ckpt_path}

After that
  {name} fit --continue-from runs/NAME …       teach its model more, new classes too
  {name} predict --from runs/NAME --images FOLDER

On what machine
  --trainer.accelerator cpu --trainer.devices 2 --trainer.precision bf16-mixed
  --num_threads 1                              fastest for tiny models and batches
  --trainer.fast_dev_run true                  one batch of each, leaving no files

See what there is
  {name} list streams       also methods, heads, data, backbones, callbacks, metrics, tables, configs
  {name} {command} --config FILE --print_config   the configuration that results
  {name} {command} --data.help Digits             all options of a class; also --model.help
  {name} {command} --help_all                     all options, those of Lightning's trainer included
"""

CKPT_PATH = {"fit": "go on with the newest run of the same name, where it stopped"}
RUNS = ("fit", "validate", "test", "predict")
WITH_TRAINED = ("predict", "test", "export")  # of a model --from somewhere, without its data


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user ends it with one sentence and exit code 2.

    Args:
        args: by default those of the process.

    Example:
        >>> main(["list", "metrics"])  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        accuracy_matrix ...
    """
    words = list(sys.argv[1:] if args is None else args)
    name = "python train.py" if sys.argv[0].endswith("train.py") else "mh-lightning"
    first, *others = words or ["--help"]
    if first in ("-h", "--help", "help"):
        print(HELP.format(name=name), end="")
    elif first == "--version":
        from mh_lightning import __version__

        print(__version__)
    elif first == "export" or (first in WITH_TRAINED and any(word.partition("=")[0] == "--from" for word in others)):
        _with_trained(first, others)
    elif first in RUNS and any(word in ("-h", "--help") for word in others):
        told = CKPT_PATH.get(first, "the newest checkpoint of the experiment, or a path")
        print(RUN_HELP.format(name=name, command=first, ckpt_path=told), end="")
    elif first in ("list", "init"):
        from mh_lightning import inventory

        inventory.main(words)
    elif not first.startswith("-") and first not in RUNS:
        from mh_lightning.suggestions import closest

        nearest = closest(first, (*RUNS, "export", "list", "init"))
        hint = f"did you mean {nearest}?" if nearest else f"`{name} --help` has the commands."
        print(f"error: there is no command {first!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    else:
        try:
            from mh_lightning import cli
        except KeyboardInterrupt:
            print("stopped by Ctrl-C; nothing had begun; give the same command again", file=sys.stderr)
            raise SystemExit(130) from None
        # without arguments it finds the classes of the working directory, too
        cli.main(None if args is None and "--help_all" not in words else
                 ["--help" if word == "--help_all" else word for word in words])  # fmt: skip


def _with_trained(command: str, words: list[str]) -> None:
    if not sys.flags.safe_path and not {"", os.getcwd()} & {*sys.path}:  # where classes of --trust are found
        sys.path.insert(0, os.getcwd())
    from mh_lightning.inference import commands
    from mh_lightning.library_errors import sentence_of

    try:
        raise SystemExit(commands.main(command, words))
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:  # a bug
            raise
        print(f"error: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
