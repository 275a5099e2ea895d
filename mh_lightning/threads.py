"""How many threads compute, in PyTorch and in the libraries that NumPy and SciPy call."""

import torch
from threadpoolctl import threadpool_limits


def use_threads(count: int) -> None:
    """Let each library that has been loaded compute with so many threads.

    PyTorch's own setting does not reach SciPy's BLAS, whose processes side by side would have threads for all cores,
    each, and wait for one another.

    Example:
        >>> before = torch.get_num_threads()
        >>> use_threads(1)
        >>> torch.get_num_threads()
        1
        >>> use_threads(before)
    """
    torch.set_num_threads(count)
    threadpool_limits(count)
