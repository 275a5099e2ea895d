"""A trained model as a file for other programs: images in, probabilities out."""

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mh_lightning.data.labelled import stacked
from mh_lightning.errors import UserError, reason_of, require, writing
from mh_lightning.files import as_a_whole
from mh_lightning.inference.images import as_input
from mh_lightning.inference.model import Model

Format = Literal["onnx", "torchscript", "exported_program"]
COMPARED = 100  # inputs on which the file's answers are compared with the model's
TOLERANCE = 1e-4  # of probabilities
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "exported_program": ".pt2"}
METADATA = "metadata.json"  # in the two formats of torch


class Answering(nn.Module):
    """Probabilities (b, C) of inputs (b, ...), as a graph that can be recorded.

    Args:
        model: whose answers they are.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.backbone, self.head = model.method.backbone, model.method.answering_head()

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities, float32."""
        logits: Tensor = self.head(self.backbone(x))
        return torch.softmax(logits.float(), dim=1)


def export(
    model: Model, path: str | Path, format: Format = "onnx", input_shape: Sequence[int] | None = None,
    opset: int | None = None,
) -> float:  # fmt: skip
    """Write a model as a file whose input is a batch of any size, and see that it answers as the model does.

    The input is what `metadata`'s transform makes of images; the classes of the output's columns are there, too: in the
    metadata of the ONNX file, else in its extra file ``metadata.json``.

    Args:
        model: that is written.
        path: of the file.
        format: "onnx", "torchscript" or "exported_program".
        input_shape: of one input, where the backbone does not tell it.
        opset: version of ONNX's operators, by default torch's choice.

    Returns:
        The largest difference between the file's probabilities and the model's, on 100 random inputs.

    Raises:
        UserError: if the model cannot be written so, or the file answers something else.
    """
    require("format", format, one_of=get_args(Format))
    suited = {suffix: name for name, suffix in SUFFIXES.items()}.get(Path(path).suffix, format)
    if suited != format:
        raise UserError(f"output={str(path)!r} is named as one of format={suited}, got format={format}; say which.")
    require("opset", opset, at_least=1, whole=True)
    if opset is not None and format != "onnx":
        raise UserError(f"opset={opset} is for format=onnx; leave it out.")
    path = Path(path)
    if format == "onnx" and any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UserError("format=onnx needs onnx, onnxscript and onnxruntime: pip install 'mh_lightning[export]'.")
    model = copy.deepcopy(model).cpu().eval()
    inputs = random_inputs(model, input_shape)
    about = metadata(model, inputs)
    with torch.no_grad():
        wanted = model(inputs).numpy()
    try:
        answering = Answering(model).eval().requires_grad_(False)
        with warnings.catch_warnings(), torch.no_grad(), writing(path), as_a_whole(path) as partial:
            warnings.simplefilter("ignore")
            WRITERS[format](answering, inputs[:3], partial, about, opset)
            difference = _difference(READERS[format](partial, inputs), wanted)
            _check(difference, format)
    except UserError:
        raise
    except Exception as error:  # whatever the recorder meets in somebody's module
        raise UserError(
            f"format={format}: {model.method.architecture()} cannot be exported so ({reason_of(error)}); try another "
            "format."
        ) from error
    return difference


def random_inputs(model: Model, input_shape: Sequence[int] | None) -> Tensor:
    """Inputs (100, ...): transformed random images, or normal numbers where the backbone takes none.

    Raises:
        UserError: if nothing tells their shape.
    """
    generator = np.random.default_rng(0)
    images = model.method.backbone.image_format()
    arguments = model.method.backbone.arguments() or {}
    if input_shape is not None and (images is not None or "num_features" in arguments):
        raise UserError("input_shape: the backbone tells what it takes; leave it out.")
    if images is not None:
        pixels = generator.integers(0, 256, (COMPARED, 8, 8, 3), dtype=np.uint8)
        big = [Image.fromarray(one).resize((images.size, images.size)) for one in pixels]
        return stacked([as_input(one, model.method.backbone, model.learnt) for one in big])
    shape = [arguments["num_features"]] if "num_features" in arguments else input_shape
    if shape is None:
        raise UserError("input_shape: the backbone does not tell what it takes; give the shape of one input.")
    return torch.from_numpy(generator.standard_normal((COMPARED, *shape), dtype=np.float32))


def metadata(model: Model, inputs: Tensor) -> dict[str, str]:
    """What a user of the file needs to know."""
    transform = model.learnt.transform(model.method.backbone)
    return {
        "class_names": json.dumps(model.class_names),
        "transform": str(transform) if transform is not None else "none",
        "input_shape": json.dumps(list(inputs.shape[1:])),
        "architecture": model.method.architecture(),
        "mh_lightning": version("mh_lightning"),
    }


def _dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def _write_onnx(model: nn.Module, inputs: Tensor, path: Path, about: dict[str, str], opset: int | None) -> None:
    program: Any = torch.onnx.export(
        model, (inputs,), dynamo=True, dynamic_shapes=_dynamic(), input_names=["images"],
        output_names=["probabilities"], opset_version=opset, verbose=False,
    )  # fmt: skip
    if opset is not None and program.model.opset_imports[""] != opset:
        raise UserError(
            f"opset={opset}: torch writes {program.model.opset_imports['']} here; give that, or leave it out."
        )
    program.model.metadata_props.update(about)
    program.save(str(path))


def _write_torchscript(model: nn.Module, inputs: Tensor, path: Path, about: dict[str, str], opset: int | None) -> None:
    traced = torch.jit.trace(model, inputs, check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(about)})


def _write_exported(model: nn.Module, inputs: Tensor, path: Path, about: dict[str, str], opset: int | None) -> None:
    program = torch.export.export(model, (inputs,), dynamic_shapes=_dynamic())
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: json.dumps(about)})


def _ask_onnx(path: Path, inputs: Tensor) -> NDArray[np.float32]:
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    parts = [session.run(None, {name: part.numpy()})[0] for part in _parts(inputs)]
    return np.concatenate(parts)


def _ask_torchscript(path: Path, inputs: Tensor) -> NDArray[np.float32]:
    module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return torch.cat([module(part) for part in _parts(inputs)]).numpy()


def _ask_exported(path: Path, inputs: Tensor) -> NDArray[np.float32]:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return torch.cat([module(part) for part in _parts(inputs)]).numpy()


def _parts(inputs: Tensor) -> Sequence[Tensor]:
    return [inputs[:1], inputs[1:3], inputs[3:]]


def _difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")


def _check(difference: float, format: str) -> None:
    if not difference <= TOLERANCE:
        raise UserError(
            f"format={format}: the file's probabilities differ from the model's by up to {difference:.1g}, more than "
            f"{TOLERANCE}; try another format."
        )


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, dict[str, str], int | None], None]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "exported_program": _write_exported,
}
READERS: dict[str, Callable[[Path, Tensor], NDArray[np.float32]]] = {
    "onnx": _ask_onnx,
    "torchscript": _ask_torchscript,
    "exported_program": _ask_exported,
}
