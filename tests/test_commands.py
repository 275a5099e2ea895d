"""The front of the command line: help, lists, a copy to begin with, and nearest names."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mh_lightning
from mh_lightning.commands import main
from mh_lightning.inventory import KINDS
from mh_lightning.packaged import CONFIGS, packaged
from mh_lightning.suggestions import with_suggestion

Refuses = Callable[..., str]
Capture = pytest.CaptureFixture[str]
SCREEN = 25  # lines


def test_help_is_short_and_tells_of_the_rest(capsys: Capture) -> None:
    for words in ([], ["--help"], ["-h"]):
        main(words)
        said = capsys.readouterr().out
        assert len(said.splitlines()) <= SCREEN and "--help_all" in said and "list methods" in said
    for command in ("fit", "validate", "test", "predict"):
        main([command, "--config", "quickstart.yaml", "--help"])
        said = capsys.readouterr().out
        assert len(said.splitlines()) <= 2 * SCREEN and f"{command} --help_all" in said
        assert max(map(len, said.splitlines())) <= 110


def test_the_options_that_help_shows_are_taken(run: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    main(["fit", "--help"])
    shown = [line.split("   ")[0].split() for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    words = [word for line in shown for word in line]
    assert "--data.class_order_seed" in words and "--num_threads" in words
    for option, value in (("--run_dir", str(tmp_path)), ("--trainer.devices", "1"), ("--ckpt_path", None)):
        place = words.index(option)
        words[place : place + 2] = [] if value is None else [option, value]
    place = words.index("--model.backbone.name")
    words[place : place + 2] = ["--model.backbone.name", "tf_efficientnet_lite0"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "quickstart.yaml", *words, "--print_config"])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "class_order_seed: 1993" in printed and "torch.optim.Adam" in printed and "key_mem_units: 100" in printed


def test_all_options_of_lightnings_trainer(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help_all"])
    assert ended.value.code in (0, None)
    assert "--trainer.gradient_clip_val" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_lists_have_a_line_each(kind: str, capsys: Capture) -> None:
    main(["list", kind])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    for line in lines:
        name, _, told = line.strip().partition(" ")
        assert name and told.strip(), line


def test_what_is_listed_is_there(capsys: Capture) -> None:
    main(["list", "methods"])
    assert "mh_lightning.methods.ExperienceReplay" in capsys.readouterr().out
    main(["list", "heads"])
    said = capsys.readouterr().out
    assert "mh_lightning.layers.MHLinear" in said and "ClassGaussians" not in said  # which gives no logits
    main(["list", "configs"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert "quickstart.yaml" in names and all((packaged(CONFIGS) / name).is_file() for name in names)


def test_a_starting_point(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    main(["init", str(folder)])
    assert "fit --config all_of_it.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["init", str(folder)])
    assert "is there and not empty; give a new folder" in capsys.readouterr().err
    command = [
        sys.executable,
        "-m",
        "mh_lightning",
        "fit",
        "--config",
        "all_of_it.yaml",
        "--trainer.accelerator",
        "cpu",
    ]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert (folder / "runs" / "all_of_it" / "version_0" / "results.json").exists()


def test_the_version_without_torch() -> None:
    ask = "import sys; from mh_lightning.commands import main; main(['--version']); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    assert told == [mh_lightning.__version__, "False"]


@pytest.mark.parametrize(
    ("sentence", "nearest"),
    [
        ("--model: module 'mh_lightning.methods' has no attribute 'SLAC' (see --help).", "SLCA"),
        ("--data: 'Digitz' is no class that is known here (see --help).", "Digits"),
        ("--model.optimizer: 'torch.optim.Adamm' is no class that is known here (see --help).", "torch.optim.Adam"),
        ("--trainer: Option 'precison' is not accepted (see --help).", "precision"),
        ("unrecognized arguments: --data.batchsize 3.", "--data.batch_size"),
        ("--config: File does not exist: 'quikstart.yaml' (see --help).", "quickstart.yaml"),
    ],
)
def test_nearest_names(sentence: str, nearest: str) -> None:
    assert with_suggestion(sentence).endswith(f"; did you mean {nearest}?")


def test_what_is_near_nothing_stays() -> None:
    sentence = "--model: 'Zebra' is no class that is known here (see --help)."
    assert with_suggestion(sentence) == sentence


def test_mistakes_on_the_command_line(refuses: Refuses, tiny_config: Path, tmp_path: Path) -> None:
    assert refuses("fit", tiny_config, "--data.init_args.increments", "3").endswith("did you mean increment?")
    tiny_config.write_text(tiny_config.read_text().replace("backbone: {", "backbone: pieces/none.yaml #"))
    said = refuses("fit", tiny_config)
    assert f"no such file as 'pieces/none.yaml' in {str(tmp_path)!r} or the working directory" in said
