"""The command line as a user runs it, on a tiny stream."""

import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mh_lightning.cli import main
from mh_lightning.metrics import CALIBRATION
from tests.conftest import results_of, weights_of
from tests.products import products
from tests.test_configs import SMALL, write_images

Run = Callable[..., Path]
Refuses = Callable[..., str]


def assert_same_run(one: Path, other: Path) -> None:
    assert results_of(one) == results_of(other)
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_run_folder_holds_everything(run: Run, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("fit", tiny_config)
    assert folder.parts[-2:] == ("tiny", "version_0")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.csv",
        "results.json",
        "accuracy_matrix.png",
        "checkpoints/last.ckpt",
        "checkpoints/task_1.ckpt",
        "checkpoints/task_2.ckpt",
        "checkpoints/task_3.ckpt",
    } <= files
    results = json.loads((folder / "results.json").read_text())
    fractions = ("average_accuracy", "all_pairs_forward_transfer", "last_accuracy", "incremental_accuracy",
                 "last_accuracy_old", "last_accuracy_new", "last_accuracy_top5",
                 "incremental_accuracy_top5")  # fmt: skip
    assert all(0 <= results[name] <= 1 for name in fractions)
    pairs, clipped = results["all_pairs_backward_transfer"], results["all_pairs_backward_transfer_clipped"]
    assert -1 <= pairs <= clipped <= 1 and -1 <= results["backward_transfer"] <= 1
    assert "forward_transfer" not in results  # the untrained model was not evaluated
    matrix = torch.tensor(results["accuracy_matrix"])
    assert matrix.shape == (3, 3)
    assert results["average_accuracy"] == pytest.approx(matrix[-1].mean().item())
    assert matrix[0, 0] > 0.9  # the first task is learnt
    assert (results["num_tasks"], results["seed"]) == (3, 3)
    assert results["seconds"] > 0
    units = 8 * 6 * (16 + 1)
    assert results["parameters"] == {"total": units, "trainable": units}
    assert set(results["validation"]) >= {"accuracy_matrix", "average_accuracy", "by_task"}
    by_task = results["by_task"]
    assert [(row["task"], row["classes_seen"]) for row in by_task] == [(1, 2), (2, 4), (3, 6)]
    assert ["accuracy_old" in row for row in by_task] == [False, True, True]
    assert [row["accuracy_new"] for row in by_task] == pytest.approx(matrix.diagonal().tolist())
    for ending in ("", "_top5"):
        course = [row[f"accuracy{ending}"] for row in by_task]
        assert results[f"last_accuracy{ending}"] == course[-1]
        assert results[f"incremental_accuracy{ending}"] == pytest.approx(sum(course) / 3)
    for ending in ("_old", "_new"):
        assert results[f"last_accuracy{ending}"] == by_task[-1][f"accuracy{ending}"]
    printed = capsys.readouterr().out
    assert "Task 3 of 3: classes 4, 5" in printed
    assert "average accuracy" in printed
    assert "seen    old    new   top5  classes" in printed
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    column = header.index("test/last_accuracy_old")
    assert [row[column] != "" for row in rows if row[header.index("test/last_accuracy")]] == [False, True, True]


def test_five_classes_have_no_top5(run: Run, tiny_config: Path, tiny_stream: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_stream)
    for split in ("train", "test"):
        keep = tensors[f"y_{split}"] < 5
        for name in ("x", "y"):
            tensors[f"{name}_{split}"] = tensors[f"{name}_{split}"][keep]
    save_file(tensors, tmp_path / "five.safetensors")
    folder = run("fit", tiny_config, "--data.init_args.path", str(tmp_path / "five.safetensors"),
                 "--data.init_args.increment", "5")  # fmt: skip
    assert not any("top5" in path.read_text() for path in (folder / "results.json", folder / "metrics.csv"))
    results = results_of(folder)
    (row,) = results["by_task"]
    calibration = {name: row[name] for name in CALIBRATION}
    assert row == {
        "task": 1, "classes_seen": 5, "accuracy": row["accuracy"], "accuracy_new": row["accuracy"], **calibration
    }  # fmt: skip
    assert "last_accuracy_old" not in results


def test_tensorboard_shows_tasks_and_the_inside_of_the_head(run: Run, tiny_config: Path) -> None:
    events = EventAccumulator(str(run("fit", tiny_config)))
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/accuracy",
        "test/average_accuracy",
        "test/forgetting",
        "validation/last_accuracy",
        "test/last_accuracy_new",
        "validation/incremental_accuracy_top5",
        "test_accuracy_by_task/task_3",
        "test_loss_by_task/task_1",
        "memory_head/head/scrambles",
        "memory_head/head/dead_units",
    } <= set(tags["scalars"])
    assert {"memory_head/head/usage", "memory_head/head/age"} <= set(tags["histograms"])
    assert "test/accuracy_matrix" in tags["images"]
    assert [event.step for event in events.Scalars("test/average_accuracy")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("test/last_accuracy_old")] == [2, 3]
    assert all(math.isfinite(event.value) for tag in tags["scalars"] for event in events.Scalars(tag))


def test_saved_and_printed_configurations_run_again(
    run: Run, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("fit", tiny_config)
    again = run("fit", first / "config.yaml", "--experiment", "again")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--config", str(tiny_config), "--print_config"])
    assert exit_info.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert_same_run(first, again)
    assert_same_run(first, run("fit", printed))


def test_another_seed_gives_another_run(run: Run, tiny_config: Path) -> None:
    one, other = weights_of(run("fit", tiny_config)), weights_of(run("fit", tiny_config, "--seed_everything", "4"))
    assert not torch.equal(one["head.M"], other["head.M"])


TOUCHED = ("--model.init_args.only_touched_units", "true")


@pytest.mark.parametrize("options", [(), (*TOUCHED, "--model.init_args.reset_optimizer", "false")])
def test_resumed_after_a_task_equals_uninterrupted(run: Run, tiny_config: Path, options: tuple[str, ...]) -> None:
    whole = run("fit", tiny_config, *options)
    resumed = run("fit", tiny_config, *options, "--ckpt_path", str(whole / "checkpoints" / "task_2.ckpt"))
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("lost", ["top-5 counts", "generators"])
def test_a_checkpoint_that_lacks_state_is_refused(
    run: Run, refuses: Refuses, tiny_config: Path, tmp_path: Path, lost: str
) -> None:
    checkpoint = torch.load(run("fit", tiny_config) / "checkpoints" / "task_2.ckpt", weights_only=True)
    if lost == "generators":
        del checkpoint["generators"]
    else:
        for counts in checkpoint["callbacks"]["ContinualMetrics"]["counts"].values():
            del counts["correct_top5"]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    assert "damaged" in refuses("fit", tiny_config, "--ckpt_path", str(tmp_path / "less.ckpt"))


def test_only_touched_units_are_stepped(run: Run, tiny_config: Path) -> None:
    no_batch = ("--data.init_args.batch_size", "1", "--model.init_args.head.init_args.scramble", "false")
    weights = {step: weights_of(run("fit", tiny_config, *no_batch, *step)) for step in ((), TOUCHED)}
    assert not torch.equal(weights[()]["head.M"], weights[TOUCHED]["head.M"])
    never_won = weights[TOUCHED]["head.key_counter"][0] == 0
    assert never_won.any()
    seeded = run("fit", tiny_config, *no_batch, "--model.init_args.optimizer.init_args.lr", "0")
    start = weights_of(seeded)["head.M"][0]
    assert torch.equal(weights[TOUCHED]["head.M"][0, never_won], start[never_won])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_only_touched_units_with_clipped_gradients(run: Run, tiny_config: Path, algorithm: str) -> None:
    clipped = ("--trainer.gradient_clip_val", "0.01", "--trainer.gradient_clip_algorithm", algorithm)
    with products(by_unit=True):
        sparse = run("fit", tiny_config, *TOUCHED, *clipped)
    with products(by_unit=False):
        dense = run("fit", tiny_config, *TOUCHED, *clipped)
    for name, value in weights_of(dense).items():
        torch.testing.assert_close(weights_of(sparse)[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("micro_batch", "accumulated"), [(8, 2), (6, 3), (3, 6)])
def test_accumulated_micro_batches_equal_one_batch(
    run: Run, tiny_config: Path, micro_batch: int, accumulated: int
) -> None:
    # 32 samples a task: the last step has less than a whole batch, and its last micro-batch may be smaller
    exact = ("--trainer.precision", "64-true", "--model.init_args.optimizer", "torch.optim.SGD",
             "--model.init_args.optimizer.init_args.lr", "0.5")  # fmt: skip
    whole = run("fit", tiny_config, *exact, "--data.init_args.batch_size", str(micro_batch * accumulated))
    halves = run("fit", tiny_config, *exact, "--data.init_args.batch_size", str(micro_batch),
                 "--trainer.accumulate_grad_batches", str(accumulated))  # fmt: skip
    for name, value in weights_of(whole).items():
        if value.is_floating_point():
            torch.testing.assert_close(weights_of(halves)[name], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(weights_of(halves)[name], value)


def test_validate_test_and_predict(run: Run, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = run("fit", tiny_config)
    checkpoint = ("--ckpt_path", str(fitted / "checkpoints" / "last.ckpt"))
    last_accuracy = results_of(fitted)["last_accuracy"]
    capsys.readouterr()
    run("test", tiny_config, *checkpoint)
    assert f"test samples of all classes: {100 * last_accuracy:.1f} %" in capsys.readouterr().out
    run("validate", tiny_config, *checkpoint)
    assert "validation samples of all classes" in capsys.readouterr().out
    rows = (run("predict", tiny_config, *checkpoint) / "predictions.csv").read_text().splitlines()
    assert rows[0] == "index,class,predicted_class,probability"
    columns = [row.split(",") for row in rows[1:]]
    assert len(columns) == 30
    assert [int(row[0]) for row in columns] == list(range(30))
    assert [row[1] for row in columns] == [str(label) for label in range(6)] * 5
    assert sum(row[1] == row[2] for row in columns) / 30 == pytest.approx(last_accuracy)


def commands_and_variables(launcher: str, arguments: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """What starts two processes: the processes to start, and their environment."""
    plain = [sys.executable, "train.py", *arguments]
    if launcher == "devices":
        return [(plain, {})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
           "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "MASTER_PORT": port}  # fmt: skip
    return [(plain, {**job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")]


@pytest.mark.parametrize(
    ("method", "options", "launcher"),
    [("FineTuning", TOUCHED, "SLURM"), ("ClosedForm", (), "devices")],  # torchrun is in tests/test_online.py
)
def test_two_processes_equal_one(
    run: Run, tiny_config: Path, tmp_path: Path, method: str, options: tuple[str, ...], launcher: str
) -> None:
    exact = ("--trainer.precision", "64-true", *options)
    if method == "ClosedForm":
        settings = yaml.safe_load(tiny_config.read_text())
        backbone = settings["model"]["init_args"]["backbone"]
        settings["model"] = {"class_path": f"mh_lightning.methods.{method}",
                             "init_args": {"backbone": backbone, "head": "mh_lightning.heads.ClassMeans"}}  # fmt: skip
        tiny_config.write_text(yaml.safe_dump(settings))
    root = Path(__file__).parents[1]
    arguments = [
        "fit",
        "--config",
        str(tiny_config),
        "--run_dir",
        str(tmp_path / "two"),
        "--trainer.devices",
        "2",
        *exact,
    ]
    processes = [
        subprocess.Popen(command, cwd=root, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True)
        for command, variables in commands_and_variables(launcher, arguments)
    ]
    for process in processes:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
    one, two = run("fit", tiny_config, *exact), tmp_path / "two" / "tiny" / "version_0"
    assert [path.name for path in two.parent.iterdir()] == ["version_0"]
    for name, value in weights_of(one).items():
        if value.is_floating_point():
            torch.testing.assert_close(weights_of(two)[name], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(weights_of(two)[name], value)
    ours, theirs = results_of(one), results_of(two)
    assert torch.allclose(torch.tensor(ours["accuracy_matrix"]), torch.tensor(theirs["accuracy_matrix"]))
    assert ours["average_accuracy"] == pytest.approx(theirs["average_accuracy"])
    assert ours["by_task"] == theirs["by_task"] and "accuracy_top5" in ours["by_task"][0]


def test_nothing_is_written_by_a_trial_run(run: Run, tiny_config: Path) -> None:
    folder = run("fit", tiny_config, "--trainer.fast_dev_run", "true")
    assert not list(folder.rglob("*.ckpt"))
    assert not (folder / "results.json").exists()


def test_the_sanity_check_changes_nothing(run: Run, tiny_config: Path) -> None:
    plain, checked = run("fit", tiny_config), run("fit", tiny_config, "--trainer.num_sanity_val_steps", "2")
    assert_same_run(plain, checked)
    checkpoint = str(plain / "checkpoints" / "task_2.ckpt")
    resumed = run("fit", tiny_config, "--trainer.num_sanity_val_steps", "2", "--ckpt_path", checkpoint)
    assert_same_run(plain, resumed)


def test_what_is_drawn_at_random_is_resumed_too(run: Run, tiny_config: Path) -> None:
    options = ("--model.init_args.head.init_args.random_memories", "true")
    whole = run("fit", tiny_config, *options)
    assert weights_of(whole)["head.scrambling_count"].sum() > 5
    checkpoint = str(whole / "checkpoints" / "task_1.ckpt")
    assert_same_run(whole, run("fit", tiny_config, *options, "--ckpt_path", checkpoint))


def test_a_run_cut_short_says_so_and_goes_on(run: Run, tiny_config: Path) -> None:
    with pytest.warns(UserWarning, match="ended after task 2 of 3"):
        cut = run("fit", tiny_config, "--trainer.max_steps", "9")  # four steps a task: one of task 3
    assert results_of(cut)["tasks_trained"] == 2
    resumed = run("fit", tiny_config, "--ckpt_path", str(cut / "checkpoints" / "last.ckpt"))
    assert_same_run(run("fit", tiny_config), resumed)


def test_a_run_on_part_of_the_batches_is_whole(run: Run, tiny_config: Path) -> None:
    part = ("--trainer.limit_train_batches", "0.5")
    whole = run("fit", tiny_config, *part)
    assert {path.stem for path in (whole / "checkpoints").iterdir()} == {"last", "task_1", "task_2", "task_3"}
    checkpoint = str(whole / "checkpoints" / "task_1.ckpt")
    assert_same_run(whole, run("fit", tiny_config, *part, "--ckpt_path", checkpoint))


def test_resuming_a_finished_run_gives_its_results(run: Run, tiny_config: Path) -> None:
    whole = run("fit", tiny_config)
    again = results_of(run("fit", tiny_config, "--ckpt_path", str(whole / "checkpoints" / "last.ckpt")))
    assert again == results_of(whole)


def test_a_logger_of_ones_own_leaves_the_run_folder_where_it_is(run: Run, tiny_config: Path, tmp_path: Path) -> None:
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "elsewhere"))
    folder = run("fit", tiny_config, *logger)
    assert {"results.json", "config.yaml", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert list((tmp_path / "elsewhere").rglob("metrics.csv"))


def test_a_refused_run_leaves_no_folder(refuses: Refuses, tiny_config: Path, tmp_path: Path) -> None:
    refuses("fit", tiny_config, "--data.init_args.increment", "4")
    assert not list((tmp_path / "refused").rglob("version_*"))


def test_checkpoints_and_progress_bar_can_be_left_out_or_replaced(run: Run, tiny_config: Path) -> None:
    bar = ("--trainer.enable_progress_bar", "true", "--trainer.callbacks+=TQDMProgressBar")
    folder = run("fit", tiny_config, "--trainer.enable_checkpointing", "false", *bar)
    assert not list(folder.rglob("*.ckpt"))
    assert (folder / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.init_args.head.init_args.upd_k", "grad_not_WTA"], ["model.init_args.head", "upd_m", "upd_k"]),
        (["--model.init_args.head.init_args.distance", "manhattan"], ["distance", "manhattan", "euclidean"]),
        (["--model.init_args.head.class_path", "torch.nn.Linearr"], ["model.head", "Linearr"]),
        (["--model.init_args.head.init_args.unit", "3"], ["model.head", "unit"]),
        (["--model.init_args.backbone.init_args.num_features", "5"], ["num_features", "5", "16"]),
        (["--model.init_args.backbone.class_path", "mh_lightning.backbones.Nothing"], ["backbone", "Nothing"]),
        (["--model.init_args.optimizer.init_args.lr", "-1"], ["model.init_args.optimizer", "-1"]),
        (["--model.init_args.optimizer.init_args.lr", "1e37"], ["learning rate"]),
        (["--data", "mh_lightning.data.Nothing"], ["data", "Nothing"]),
        (["--data.init_args.path", "/nowhere.npz"], ["data.path", "/nowhere.npz"]),
        (["--data.init_args.increment", "4"], ["data.increment", "4", "6 classes"]),
        (["--data.init_args.increment", "two"], ["data.increment", "two"]),
        (["--data.init_args.class_order", "[0, 1]"], ["data.class_order", "[0, 1]"]),
        (["--data.init_args.epochs_per_task", "0"], ["data.epochs_per_task", "0"]),
        (["--data.init_args.nonsense", "1"], ["data", "nonsense"]),
        (["--trainer.max_epochs", "5"], ["trainer.max_epochs", "5", "3 tasks"]),
        (["--trainer.reload_dataloaders_every_n_epochs", "2"], ["reload_dataloaders_every_n_epochs", "2"]),
        (["--trainer.devices", "many"], ["trainer", "devices"]),
        (["--trainer.nonsense", "1"], ["trainer.nonsense"]),
        (["--config", "/nowhere.yaml"], ["config", "/nowhere.yaml"]),
        (["--seed_everything", "-3"], ["seed_everything", "-3"]),
        (["--trainer.val_check_interval", "0.5"], ["trainer.val_check_interval", "0.5"]),
        (["--trainer.val_check_interval", "1"], ["trainer.val_check_interval", "1"]),  # batch, where 1.0 is all
        (["--trainer.limit_val_batches", "1"], ["trainer.limit_val_batches", "1", "max_test_samples"]),
        (["--trainer.limit_val_batches", "2"], ["trainer.limit_val_batches", "2", "max_test_samples"]),
        (["--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches", "0"]),
        (
            ["--model.init_args.head", "torch.nn.Conv2d", "--model.init_args.head.init_args.kernel_size", "1"],
            ["model.init_args.head", "(16,)"],
        ),
        ([*TOUCHED, "--model.init_args.head", "torch.nn.Linear"], ["only_touched_units", "Memory Head"]),
        (["--experiment", ""], ["experiment"]),
        (["--ckpt_path", "/nowhere.ckpt"], ["ckpt_path", "/nowhere.ckpt"]),
        (["--run_dir", "/proc/nowhere"], ["run_dir", "/proc/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_sentence(refuses: Refuses, tiny_config: Path, options: list[str], words: list[str]) -> None:
    sentence = refuses("fit", tiny_config, *options)
    assert all(word in sentence for word in words), sentence
    assert len(sentence) < 400


def test_broken_images_and_weights_are_named_before_training(refuses: Refuses, tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "configs" / "streams" / "image_folder.yaml"
    images, weights = tmp_path / "images", tmp_path / "weights.pth"
    write_images(images)
    weights.write_bytes(b"no weights")
    here = ("--config", "methods/memory_head_500.yaml", "--data.init_args.root", str(images), *SMALL)
    backbone = "--model.init_args.backbone.init_args."
    assert "resnet999" in refuses("fit", config, *here, f"{backbone}name", "resnet999")
    assert "weights.pth" in refuses("fit", config, *here, f"{backbone}checkpoint_path", str(weights))
    assert "missing.pth" in refuses("fit", config, *here, f"{backbone}checkpoint_path", str(tmp_path / "missing.pth"))
    assert "resnet18" in refuses("fit", config, *here, f"{backbone}name", "resnet18")
    broken = images / "train" / "pear" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert str(broken) in refuses("fit", config, *here)
    broken.unlink()
    for image in (images / "test" / "plum").iterdir():
        image.unlink()
    assert "plum" in refuses("fit", config, *here)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("y_test", 7, ["test labels", "0 to 5", "7"]), ("x_train", float("nan"), ["train inputs", "NaN", "sample 4"])],
)
def test_broken_tensors_are_named_before_training(
    refuses: Refuses, tiny_config: Path, tiny_stream: Path, tmp_path: Path, name: str, value: float, words: list[str]
) -> None:
    entries = load_file(tiny_stream)
    entries[name][4] = value
    path = tmp_path / "broken.safetensors"
    save_file(entries, path)
    sentence = refuses("fit", tiny_config, "--data.init_args.path", str(path))
    assert all(word in sentence for word in words), sentence


def test_sizes_that_do_not_add_up_are_those_that_were_given(refuses: Refuses, tiny_config: Path) -> None:
    sizes = {"increment": "4"}
    sentence = refuses("fit", tiny_config, "--data.init_args.increment", "4")
    assert "data.increment=4 classes do not add up" in sentence and "data.last_task_size=2" in sentence
    assert "first_task_size" not in sentence
    sizes |= {"first_task_size": "1", "last_task_size": "2"}
    sentence = refuses("fit", tiny_config, *(f"--data.init_args.{name}={size}" for name, size in sizes.items()))
    assert all(f"data.{name}={size}" in sentence for name, size in sizes.items())


def test_a_checkpoint_of_other_classes_is_told_by_their_number(
    run: Run, refuses: Refuses, tiny_config: Path, tiny_stream: Path, tmp_path: Path
) -> None:
    checkpoint = str(run("fit", tiny_config) / "checkpoints" / "task_1.ckpt")
    tensors = load_file(tiny_stream)
    for split in ("train", "test"):
        keep = tensors[f"y_{split}"] < 4
        tensors |= {f"{name}_{split}": tensors[f"{name}_{split}"][keep] for name in ("x", "y")}
    save_file(tensors, tmp_path / "four.safetensors")
    for command in ("fit", "test"):
        sentence = refuses(command, tiny_config, "--ckpt_path", checkpoint, "--data.init_args.path",
                           str(tmp_path / "four.safetensors"))  # fmt: skip
        assert "model tells 6 classes apart, and the data have 4" in sentence
        assert "(1, 8" not in sentence


@pytest.mark.parametrize("module", ["mh_lightning", "mh_lightning.cli"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_package_is_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mh_lightning", "fit", "--config", "/nowhere.yaml"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 2
    assert "/nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("found", [True, False])
def test_classes_of_the_working_directory_are_found(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: bool
) -> None:
    name = f"my_methods_{found}"
    (tmp_path / f"{name}.py").write_text("from mh_lightning.methods import FineTuning\nclass Mine(FineTuning): pass\n")
    monkeypatch.chdir(tmp_path if found else tmp_path.parent)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", os.getcwd())])
    arguments = ["fit", "--config", str(tiny_config), "--model", f"{name}.Mine", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mh-lightning", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, f"class_path: {name}.Mine" in capsys.readouterr().out) == (
        (0, True) if found else (2, False)
    )


class CtrlC(Callback):
    """The user stops the run in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("epoch", "hint"), [(1, "the same command with --ckpt_path last goes on"), (0, "there is no checkpoint yet")]
)
def test_ctrl_c_says_how_to_go_on(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], epoch: int, hint: str
) -> None:
    before = signal.getsignal(signal.SIGINT)
    options = [f"--trainer.callbacks+={__name__}.CtrlC", f"--trainer.callbacks.epoch={epoch}"]
    try:
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(tiny_config), "--run_dir", str(tmp_path), "--pictures", "false", *options])
    finally:
        signal.signal(signal.SIGINT, before)  # which the trainer turns off
    assert ended.value.code == 128 + signal.SIGINT
    assert f"stopped by Ctrl-C; {hint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.max_time", "00:00:00:00"], "the time of trainer.max_time was over"),
        (["--trainer.max_steps", "1"], "trainer.max_steps=1 was reached"),
        (["--trainer.limit_val_batches", "0"], "trainer.limit_val_batches=0 leaves evaluation out"),
        (["--trainer.fast_dev_run", "true"], None),
    ],
)
def test_no_results_are_explained_by_what_was_given(
    run: Run, tiny_config: Path, recwarn: pytest.WarningsRecorder, options: list[str], told: str | None
) -> None:
    folder = run("fit", tiny_config, "--pictures", "false", *options)
    assert not (folder / "results.json").exists()
    warned = [str(one.message) for one in recwarn if "No task was evaluated" in str(one.message)]
    assert warned == ([] if told is None else [f"No task was evaluated, so there is no results.json: {told}."])


def test_the_progress_bar_tells_the_task(run: Run, tiny_config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run("fit", tiny_config, "--trainer.enable_progress_bar", "true")
    captured = capfd.readouterr()
    assert "Task 2 of 3, epoch 1 of 2" in captured.out + captured.err


def test_delta_above_the_units_is_clamped_with_a_warning(run: Run, tiny_config: Path) -> None:
    with pytest.warns(UserWarning, match="delta=99 is more than key_mem_units=8"):
        run("fit", tiny_config, "--model.init_args.head.init_args.delta", "99")


def test_wrong_checkpoints_are_refused(run: Run, refuses: Refuses, tiny_config: Path, tmp_path: Path) -> None:
    checkpoint = run("fit", tiny_config) / "checkpoints" / "task_1.ckpt"
    damaged, foreign, evil = (tmp_path / name for name in ("damaged.ckpt", "foreign.ckpt", "evil.ckpt"))
    damaged.write_bytes(checkpoint.read_bytes()[:3000])
    torch.save({"state_dict": {}}, foreign)
    torch.save({"state_dict": {}, "architecture": RunsCode(tmp_path / "executed")}, evil)
    content = torch.load(checkpoint, weights_only=True)
    del content["configuration"]  # as fits in Python save them
    unconfigured = tmp_path / "unconfigured.ckpt"
    torch.save(content, unconfigured)
    for path, options, words in (
        (damaged, [], ["ckpt_path", "damaged"]),
        (foreign, [], ["ckpt_path", "no checkpoint of mh_lightning"]),
        (evil, [], ["ckpt_path", "never loaded"]),
        (checkpoint, ["--model.init_args.head.init_args.key_mem_units", "9"], ["key_mem_units 8 -> 9"]),
        (unconfigured, ["--model.init_args.head.init_args.key_mem_units", "9"], ["head.K", "(1, 8, 16)", "(1, 9, 16)"]),
        (checkpoint, ["--model.init_args.head", "torch.nn.Linear"], ["mh_lightning.MHLinear -> torch.nn.Linear"]),
        (unconfigured, ["--model.init_args.head", "torch.nn.Linear"], ["MHLinear", "Linear"]),
        (checkpoint, ["--data.init_args.increment", "3"], ["increment 2 -> 3"]),
        (unconfigured, ["--data.init_args.increment", "3"], ["class_groups"]),
        (unconfigured, ["--data.init_args.validation_fraction", "0.3"], ["validation_fraction 0.2", "0.3"]),
        (unconfigured, ["--data.init_args.batch_size", "8"], ["batch_size 16", "8"]),
        (checkpoint, ["--seed_everything", "5"], ["seed_everything 3 -> 5"]),
        (unconfigured, ["--seed_everything", "5"], ["seed_everything 3", "5"]),
        (unconfigured, ["--model.init_args.optimizer.init_args.lr", "0.5"], ["lr=0.01", "0.5"]),
    ):
        sentence = refuses("fit", tiny_config, "--ckpt_path", str(path), *options)
        assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "executed").exists()


class RunsCode:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)
