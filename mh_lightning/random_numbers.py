"""The generators that random numbers of a run come from: seeded, noted down and put back."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def global_seed() -> int | None:
    """The seed of the run, as `lightning.seed_everything` has set it."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def seed_from(*parts: int) -> int:
    """A seed that follows from that of the run, 0 without one, and from what else it depends on."""
    return int(np.random.SeedSequence([global_seed() or 0, *parts]).generate_state(1)[0])


def seed_all(*parts: int) -> None:
    """Seed the global generators of torch, NumPy and Python with what several numbers give together.

    Example:
        >>> seed_all(3, 1)
        >>> first = torch.rand(1)
        >>> seed_all(3, 1)
        >>> bool(first == torch.rand(1))
        True
    """
    torch_seed, numpy_seed, python_seed = np.random.SeedSequence(parts).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))  # noqa: NPY002  # transforms of other packages draw from it
    random.seed(int(python_seed))


def state_of_generators(device: torch.device | None = None) -> dict[str, Any]:
    """Where the global generators are, as plain values and tensors.

    Args:
        device: a GPU whose generator counts, too.
    """
    version, words, gauss = random.getstate()
    kind, numpy_words, *numpy_rest = np.random.get_state()  # noqa: NPY002
    assert kind == "MT19937"
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [torch.from_numpy(np.asarray(numpy_words).astype(np.int64)), *numpy_rest],
        "python": [version, torch.tensor(words), gauss],
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def put_generators_back(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Let the global generators go on from a `state_of_generators`."""
    torch.set_rng_state(state["torch"])
    words, *rest = state["numpy"]
    np.random.set_state(("MT19937", words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def drawing_from(*parts: int) -> Iterator[None]:
    """Draw from generators with this seed, and leave the global ones as they were.

    Example:
        >>> with drawing_from(3, 1):
        ...     first = torch.rand(1)
        >>> with drawing_from(3, 1):
        ...     bool(first == torch.rand(1))
        True
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        words = [int(word) for word in np.random.SeedSequence(parts).generate_state(3)]
        torch.default_generator.manual_seed(words[0])
        np.random.seed(words[1])  # noqa: NPY002
        random.seed(words[2])
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
