r"""What follows from the accuracy matrix.

A is a (t, v) tensor: :math:`A_{ij}`, in [0, 1], is the accuracy on task j's test data after training task i. For a
stream of T tasks that has come to task t, its leading (t, t) part gives the metrics so far; v is less than t only where
there is data of the first v tasks alone, and means are over these. A mean over no pair of tasks (t = 1) is 0.

Sources: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017 (transfer); Chaudhry et
al., "Riemannian Walk for Incremental Learning", ECCV 2018 (forgetting); Zhang et al., "SLCA", ICCV 2023 (last and
incremental accuracy).
"""

from torch import Tensor


def average_accuracy(matrix: Tensor) -> Tensor:
    r"""Mean accuracy over the tasks seen: :math:`\frac1t \sum_j A_{tj}`.

    Args:
        matrix: (t, v).

    Example:
        >>> import torch
        >>> average_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(0.7000)
    """
    return matrix[-1].mean()


def forgetting(matrix: Tensor) -> Tensor:
    r"""What was lost since the best: :math:`\frac1{t-1} \sum_{j<t} (\max_{i<t} A_{ij} - A_{tj})`.

    Args:
        matrix: (t, v).

    Example:
        >>> import torch
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
        >>> import torch
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
        >>> import torch
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
        >>> import torch
        >>> last_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]), torch.tensor([10, 30]))
        tensor(0.8000)
    """
    return (matrix[-1] * samples).sum() / samples.sum()


def incremental_accuracy(matrix: Tensor, samples: Tensor) -> Tensor:
    """Mean over the tasks so far of the last accuracy at each.

    Args:
        matrix: (t, v).
        samples: test samples of each task, (v,).

    Example:
        >>> import torch
        >>> incremental_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]), torch.tensor([10, 30]))
        tensor(0.9000)
    """
    seen = matrix.new_ones(matrix.shape).tril() * samples
    return ((matrix * seen).sum(dim=1) / seen.sum(dim=1)).mean()
