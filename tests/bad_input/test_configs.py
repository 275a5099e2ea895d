"""Bad configurations and options."""

from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.bad_input.table import DATA, HEAD, MODEL, OPTIMIZER, TINY, TRAINER, Place, Row, check, place, table

__all__ = ["place"]


def option(name: str, value: str, sentence: str) -> Row:
    """An option of the command line."""
    short = value if len(value) < 30 else f"{value[:10]}... of {len(value)}"
    return Row(f"{name}={short!r}", [f"{name}={value}"], sentence)


def text(name: str, content: str | bytes, sentence: str) -> Row:
    """A file in place of the configuration."""
    return Row(name, lambda place: ["--config", place.write("bad.yaml", content)], sentence)


def part(name: str, key: str, value: Any, sentence: str) -> Row:
    """The good configuration with another part."""
    return Row(name, lambda place: ["--config", place.changed(**{key: value})], sentence)


def model(**options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load(TINY)["model"]
    settings["init_args"] |= options
    return settings


def scheduler(name: str, **options: Any) -> dict[str, Any]:
    return model(lr_scheduler={"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": options})


def callback(name: str, **options: Any) -> list[str]:
    return [f"{TRAINER}callbacks", yaml.safe_dump([{"class_path": name, "init_args": options}])]


def executing(place: Place) -> list[Any]:
    touch = f"!!python/object/apply:os.mkdir ['{place.folder}/executed']\n"
    return ["--config", place.write("tag.yaml", place.config.read_text() + f"run_dir: {touch}")]


LETTERS = "abcdefghijklmnopqrstuv"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{one}: &{one} [*{two}, *{two}]\n" for one, two in zip(LETTERS[1:], LETTERS[:-1], strict=True)
)
FILES = (
    text("broken YAML", "model: [1, {a: ", "is no YAML in line"),
    text("list", "- 1\n- 2\n", "holds no options by name"),
    text("scalar", "hello", "holds no options by name"),
    text("empty", "", "holds no options by name"),
    text("binary", bytes(range(256)), "is no text in UTF-8"),
    text("UTF-16", TINY.encode("utf-16"), "is no text in UTF-8"),
    text("key twice", "seed_everything: 1\n" + TINY, "'seed_everything' is given twice, in line 1"),
    text("nested key twice", TINY.replace("batch_size: 4", "batch_size: 4, increment: 2"), "'increment' is given"),
    text("alias of itself", "a: &a [*a]\n" + TINY, "nested too deeply"),
    text("nested deeply", "model: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    text("billion laughs", LAUGHS, "more than 1000000 values"),
    text("unknown key", TINY + "nonsense: 7\n", "nonsense"),
    Row("tag of Python", executing, "could not determine a constructor for the tag"),
    Row("no file", ["--config", "/nowhere.yaml"], "--config: File does not exist: '/nowhere.yaml'"),
    Row("folder", lambda place: ["--config", place.folder], "--config: Path is not a file"),
    Row("no command", [""], "invalid choice|subcommand"),
    Row("no configuration", ["fit"], "nothing to learn; give a stream and a method"),
    Row("includes itself", lambda place: ["--config", place.write("me.yaml", "model: me.yaml\n")], "loop detected"),
    part("trainer is a list", "trainer", [{"accelerator": "cpu"}], "trainer must hold options by name"),
    part("trainer is null", "trainer", None, "trainer must hold options by name, got None"),
    part("data is a word", "data", "hello", "--data: 'hello' is no class"),
    part("options are a list", "data", {"class_path": "mh_lightning.data.TensorFile", "init_args": [1]}, "--data: "),
    part("class is null", "model", {"class_path": None}, "--model: "),
    part("step size 0", "model", scheduler("StepLR", step_size=0), "model.init_args.lr_scheduler: .*zero"),
    part("unknown optimizer", "model", model(optimizer={"class_path": "torch.optim.Adamm"}), "--model.optimizer: .*mm"),
)  # fmt: skip

OPTIONS = (
    option("--model", "os.system", "--model: .*'os.system' is not allowed"),
    option("--model", "mh_lightning.methods", "--model: .*not correspond to a subclass of ContinualMethod"),
    option("--data", "subprocess.Popen", "--data: .*'subprocess.Popen' is not allowed"),
    option(f"{MODEL}backbone", "subprocess.Popen", "--model.backbone: .*'subprocess.Popen' is not allowed"),
    option(f"{MODEL}head", "os.system", "--model.head: .*'os.system' is not allowed"),
    option(f"{MODEL}optimizer", "os.system", "--model.optimizer: .*'os.system' is not allowed"),
    option(f"{MODEL}optimizer", "null", "model.init_args.optimizer"),
    option(f"{TRAINER}callbacks", "[os.system]", "--trainer.callbacks: .*os.system"),
    option(f"{TRAINER}callbacks", "[torch.nn.Linear]", "--trainer.callbacks: .*torch.nn.Linear"),
    option(f"{HEAD}key_mem_units", "1000000000000", "model.init_args.head needs more memory.*12.0 TB at once"),
    option(f"{HEAD}key_mem_units", "0", "key_mem_units must be at least 1"),
    option(f"{HEAD}key_mem_units", "many", "key_mem_units: .*many"),
    option(f"{HEAD}gamma_alpha", ".nan", "gamma_alpha must be a number, got NaN"),
    option(f"{HEAD}gamma_alpha", ".inf", "gamma_alpha must be finite, or be 'auto', got inf"),
    option(f"{HEAD}gamma_alpha", "cold", "gamma_alpha must be finite, or be 'auto', got 'cold'"),
    option(f"{HEAD}beta_k", "-.inf", "beta_k must be finite, got -inf"),
    option(f"{HEAD}tau_mu", "1" + 30 * "0", "tau_mu must lie in"),
    option(f"{HEAD}psi_fn", "", "psi_fn must be one of"),
    option(f"{OPTIMIZER}lr", ".nan", "lr must be a number, got NaN"),
    option(f"{OPTIMIZER}lr", "null", "--model.optimizer.lr: Expected a <class 'float'>"),
    option(f"{DATA}batch_size", "0", "data.batch_size must be at least 1"),
    option(f"{DATA}batch_size", "null", "data.init_args.batch_size must not be null"),
    option(f"{HEAD}device", "nonsense", "model.init_args.head: .*nonsense"),
    option(f"{DATA}batch_size", "1.5", "--data.batch_size: .*1.5"),
    option(f"{DATA}num_classes", "1000000000000", r"data.num_classes must lie in \[1, 1000000\]"),
    option(f"{DATA}validation_fraction", ".nan", "validation_fraction must be a number, got NaN"),
    option(f"{DATA}validation_fraction", ".inf", r"validation_fraction must lie in \[0, 1\), got inf"),
    option(f"{DATA}split_fractions", "[0.5, 0.5]", "data.split_fractions must be three fractions"),
    option(f"{DATA}class_order", "[[0]]", "--data.class_order: "),
    option(f"{DATA}path", "", "data.path='' is no file"),
    option(f"{DATA}path", "\0", "path must not hold a null character"),
    option(f"{DATA}path", "a" * 300, "'a*' cannot be read or written .File name too long"),
    option(f"{DATA}path", "null", "required: path"),
    option(f"{DATA}path", "/dev/zero", "data.path='/dev/zero' is no file"),
    option(f"{DATA}perturbations", "[1]", "--data.perturbations: "),
    option("--seed_everything", ".nan", "--seed_everything: "),
    option("--experiment", "\0", "experiment must not hold a null character"),
    option("--num_threads", "10000000", r"num_threads must lie in \[1, 1024\]"),
    option("--pictures", "maybe", "--pictures: .*maybe"),
    option(f"{TRAINER}devices", "0", "trainer: .*devices='0'"),
    option(f"{TRAINER}devices", "x", "trainer: .*devices"),
    option(f"{TRAINER}strategy", "nonsense", "trainer: .*strategy='nonsense'"),
    option(f"{TRAINER}accelerator", "nonsense", "trainer: .*accelerator='nonsense'"),
    option(f"{TRAINER}accelerator", "tpu", "trainer: .*(torch_xla|[tT][pP][uU])"),
    option(f"{TRAINER}precision", "17", "--trainer.precision: "),
    option(f"{TRAINER}limit_train_batches", "-1", "trainer: .*limit_train_batches"),
    option(f"{TRAINER}max_steps", "-5", "trainer: .*max_steps"),
    option(f"{TRAINER}profiler", "zzz", "trainer: .*profiler"),
    option(f"{TRAINER}logger", "zzz", "--trainer.logger: "),
    Row("early stopping on nothing", callback("lightning.pytorch.callbacks.EarlyStopping", monitor="nothing"),
        "trainer.callbacks: Early stopping conditioned on metric `nothing`", trained=True),
    Row("checkpoints by nothing", callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="nothing"),
        "monitor='nothing'", trained=True),
    Row("rates without a logger", callback("lightning.pytorch.callbacks.LearningRateMonitor"), "LearningRateMonitor"),
)  # fmt: skip


def closed_form(name: str, features: list[float], sentence: str, **options: Any) -> Row:
    """Kernel memory units, all samples having these features."""

    def prepare(place: Place) -> list[Any]:
        x, y = torch.tensor([features] * 4), torch.tensor([0, 1, 0, 1])
        save_file(
            {"x_train": x, "y_train": y, "x_test": x.clone(), "y_test": y.clone()}, place.folder / "few.safetensors"
        )
        backbone = {"class_path": "mh_lightning.backbones.Identity", "init_args": {"num_features": 3}}
        head = {"class_path": "mh_lightning.heads.KernelMemoryUnits", "init_args": options}
        method = {"class_path": "mh_lightning.methods.ClosedForm", "init_args": {"backbone": backbone, "head": head}}
        config = place.changed(model=method)
        return ["--config", config, f"{DATA}path={place.folder / 'few.safetensors'}", f"{DATA}increment=1",
                "--run_dir", place.folder / "runs"]  # fmt: skip

    return Row(name, prepare, sentence, trained=not options)


CLOSED_FORM = (
    closed_form("features are NaN", [float("nan"), 0.0, 1.0], "NaN"),
    closed_form("too few bytes", [0.0, 0.0, 1.0], "max_bytes=10: .* need [0-9]+ bytes", max_bytes=10),
    closed_form("no width", [0.0, 0.0, 1.0], "width must lie in", width=0.0),
    closed_form("unknown normalization", [0.0, 0.0, 1.0], "normalization must be one of", normalization="max"),
)


@table(*FILES, *OPTIONS, *CLOSED_FORM)
def test_one_sentence(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check(row, place, capsys)
