"""Memory of large gradients, used again at the next step instead of being asked of the system.

On a CPU, fresh memory of some megabytes comes as pages that are made when they are first written to, which takes longer
than to compute what is written (docs/performance.md). Devices with an allocator of their own keep their memory anyway.
"""

from threading import Lock
from weakref import finalize

import torch
from torch import Tensor

from mh_lightning.compat.torch_names import users_of_storage

SMALLEST = 2**20  # bytes, from which it pays


class GradientMemory:
    """The memory of one parameter's gradient, as long as that gradient lives elsewhere, and after it."""

    def __init__(self) -> None:
        self.storage: torch.UntypedStorage | None = None
        self.lock = Lock()

    def empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A tensor of any values, in the memory of the last one if nothing else uses that any more.

        Args:
            like: gives type and device.
            shape: of the tensor.
        """
        with self.lock:
            tensor = like.new_empty(0)
            size = tensor.element_size() * torch.Size(shape).numel()
            if self.storage is not None and self.storage.nbytes() == size and users_of_storage(self.storage) == 1:
                return tensor.set_(self.storage, 0, shape)  # type: ignore[call-overload, no-any-return]
            tensor = like.new_empty(shape)
            self.storage = tensor.untyped_storage()
            return tensor


_memories: dict[int, GradientMemory] = {}


def memory_of(parameter: Tensor) -> GradientMemory | None:
    """That of a parameter's gradient, or None where it is too small to matter.

    Example:
        >>> weights = torch.nn.Parameter(torch.zeros(1024, 1024))
        >>> memory = memory_of(weights)
        >>> first = memory.empty(weights.detach(), (1024, 1024))
        >>> place = first.data_ptr()
        >>> memory.empty(weights.detach(), (1024, 1024)).data_ptr() == place  # in use
        False
        >>> memory_of(torch.nn.Parameter(torch.zeros(3))) is None
        True
    """
    if parameter.device.type != "cpu" or not parameter.is_leaf or parameter.nbytes < SMALLEST:
        return None
    found = _memories.get(id(parameter))
    if found is None:
        found = _memories[id(parameter)] = GradientMemory()
        finalize(parameter, _memories.pop, id(parameter), None)
    return found
