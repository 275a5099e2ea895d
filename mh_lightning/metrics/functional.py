r"""What follows from the accuracy matrix.

A is a (t, v) tensor: :math:`A_{ij}`, in [0, 1], is the accuracy on task j's test data after training task i. For a
stream of T tasks that has come to task t, its leading (t, t) part gives the metrics so far; v is less than t only where
there is data of the first v tasks alone, and means are over these. A mean over no pair of tasks (t = 1) is 0, and an
accuracy over no samples is NaN.

Sources: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017 (transfer); Chaudhry et
al., "Riemannian Walk for Incremental Learning", ECCV 2018 (forgetting); Zhang et al., "SLCA", ICCV 2023 (last and
incremental accuracy); Zhou et al., "PyCIL", SCIENCE CHINA Information Sciences 2023 (old and new classes, top-5).
"""

import torch
from torch import Tensor


def most_likely(logits: Tensor, k: int) -> Tensor:
    """The classes of the k largest logits, the largest first: among equals it is the one that `argmax` finds.

    Args:
        logits: (samples, C).
        k: at most C.

    Returns:
        (samples, k), all different in a row.

    Example:
        >>> most_likely(torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.0, 0.4]]), 2)
        tensor([[1, 2],
                [0, 2]])
    """
    largest = logits.topk(k, dim=1).indices
    first = logits.argmax(dim=1, keepdim=True)
    others = torch.where(largest == first, largest[:, :1], largest)[:, 1:]  # where ties are, the two change places
    return torch.cat([first, others], dim=1)


def average_accuracy(matrix: Tensor) -> Tensor:
    r"""Mean accuracy over the tasks seen: :math:`\frac1t \sum_j A_{tj}`.

    Args:
        matrix: (t, v).

    Example:
        >>> average_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(0.7000)
    """
    return matrix[-1].mean()


def forgetting(matrix: Tensor) -> Tensor:
    r"""What was lost since the best: :math:`\frac1{t-1} \sum_{j<t} (\max_{i<t} A_{ij} - A_{tj})`.

    Args:
        matrix: (t, v).

    Example:
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(0.5000)
    """
    if len(matrix) == 1:
        return matrix.new_zeros(())
    earlier = matrix[:, : len(matrix) - 1]
    return (earlier[:-1].amax(dim=0) - earlier[-1]).mean()


def backward_transfer(matrix: Tensor, clip: bool = False) -> Tensor:
    r"""Change since a task was learnt: mean over j < i of :math:`A_{ij} - A_{jj}`.

    Args:
        matrix: (t, v).
        clip: report at least 0, as the code published with the Memory Head does.

    Example:
        >>> backward_transfer(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(-0.5000)
    """
    later, earlier = matrix.new_ones(matrix.shape).tril(-1).nonzero(as_tuple=True)
    if len(later) == 0:
        return matrix.new_zeros(())
    transfer = (matrix[later, earlier] - matrix.diagonal()[earlier]).mean()
    return transfer.clamp_min(0) if clip else transfer


def forward_transfer(matrix: Tensor) -> Tensor:
    r"""Accuracy on tasks before they are learnt: mean over j > i of :math:`A_{ij}`.

    Args:
        matrix: (t, v).

    Example:
        >>> forward_transfer(torch.tensor([[1.0, 0.2], [0.5, 0.9]]))
        tensor(0.2000)
    """
    before, task = matrix.new_ones(matrix.shape).triu(1).nonzero(as_tuple=True)
    if len(task) == 0:
        return matrix.new_zeros(())
    return matrix[before, task].mean()


def last_accuracy(matrix: Tensor, samples: Tensor) -> Tensor:
    r"""Accuracy over the test samples of all tasks seen: :math:`\sum_j n_j A_{tj} / \sum_j n_j`.

    Args:
        matrix: (t, v).
        samples: test samples :math:`n_j` of each task, (v,).

    Example:
        >>> last_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]), torch.tensor([10, 30]))
        tensor(0.8000)
    """
    return (matrix[-1] * samples).sum() / samples.sum()


def last_accuracy_old(matrix: Tensor, samples: Tensor) -> Tensor:
    r"""Accuracy over the test samples of all tasks before the last: :math:`\sum_{j<t} n_j A_{tj} / \sum_{j<t} n_j`.

    In a class-incremental stream these are the old classes. After the first task there are none: NaN, where the code
    published with PyCIL has 0.

    Args:
        matrix: (t, v).
        samples: test samples :math:`n_j` of each task, (v,).

    Example:
        >>> matrix = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.9, 0.0], [0.2, 0.6, 0.7]])
        >>> last_accuracy_old(matrix, torch.tensor([10, 30, 20]))
        tensor(0.5000)
    """
    earlier = len(matrix) - 1
    return last_accuracy(matrix[:, :earlier], samples[:earlier])


def last_accuracy_new(matrix: Tensor) -> Tensor:
    r"""Accuracy on the test samples of the last task: :math:`A_{tt}`.

    In a class-incremental stream these are the new classes. Where there is no data of this task (v < t): NaN.

    Args:
        matrix: (t, v).

    Example:
        >>> last_accuracy_new(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(0.9000)
    """
    return matrix[-1, len(matrix) - 1 :].mean()


def incremental_accuracy(matrix: Tensor, samples: Tensor) -> Tensor:
    """Mean over the tasks so far of the last accuracy at each.

    Args:
        matrix: (t, v).
        samples: test samples of each task, (v,).

    Example:
        >>> incremental_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]), torch.tensor([10, 30]))
        tensor(0.9000)
    """
    seen = matrix.new_ones(matrix.shape).tril() * samples
    return ((matrix * seen).sum(dim=1) / seen.sum(dim=1)).mean()
