r"""What follows from the accuracy matrix.

A is a (t, v) tensor: :math:`A_{ij}`, in [0, 1], is the accuracy on task j's test data after training task i. For a
stream of T tasks that has come to task t, its leading (t, t) part gives the metrics so far; v is less than t only where
there is data of the first v tasks alone, and means are over these. Where there is no pair of tasks to compare (t = 1),
the mean over them is 0, and an accuracy over no samples is NaN.

Where evaluation is spaced, A has a row for each evaluation only, and `after` tells the number of tasks trained at each,
t at the last. A mean over pairs (i, j) is then over the evaluations i that exist, and what compares with an accuracy
that was never measured is left out: see `forgetting` and the transfers. If that leaves no pair, nobody knows: NaN.

Sources: of forgetting and the transfers see there; Zhang et al., "SLCA", ICCV 2023 (last and incremental accuracy);
Zhou et al., "PyCIL", SCIENCE CHINA Information Sciences 2023 (old and new classes, top-5).
"""

from collections.abc import Sequence

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


def forgetting(matrix: Tensor, after: Sequence[int] | None = None) -> Tensor:
    r"""What was lost since the best: :math:`\frac1{t-1} \sum_{j<t} (\max_{i<t} A_{ij} - A_{tj})`.

    Where evaluation is spaced, the mean is over the tasks that were learnt by the last evaluation but one: nobody knows
    how good the model was at the others when it had just learnt them.

    Source: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018.

    Args:
        matrix: (t, v), or (evaluations, v).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(0.5000)
        >>> forgetting(torch.tensor([[0.8, 1.0, 0.0, 0.0], [0.5, 0.9, 0.7, 0.9]]), after=[2, 4])
        tensor(0.2000)
    """
    trained = _trained(matrix, after)
    if len(matrix) == 1:
        return _mean_over_pairs(matrix.new_zeros(0), trained[-1] > 1)
    earlier = matrix[:, : trained[-2]]
    return (earlier[:-1].amax(dim=0) - earlier[-1]).mean()


def backward_transfer(matrix: Tensor, after: Sequence[int] | None = None) -> Tensor:
    r"""Change since a task was learnt, at the last evaluation: :math:`\frac1{t-1} \sum_{j<t} (A_{tj} - A_{jj})`.

    Where evaluation is spaced, :math:`A_{jj}` exists for the tasks j that an evaluation followed, and the mean is over
    these.

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, BWT.

    Args:
        matrix: (t, v), or (evaluations, v).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> backward_transfer(torch.tensor([[0.9, 0.3, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]))
        tensor(-0.2500)
        >>> backward_transfer(torch.tensor([[0.8, 1.0, 0.0, 0.0], [0.5, 0.9, 0.7, 0.9]]), after=[2, 4])
        tensor(-0.1000)
    """
    trained = _trained(matrix, after)
    learnt = _learnt_columns(matrix, trained[:-1])
    return _mean_over_pairs(matrix[-1, learnt] - matrix[range(len(learnt)), learnt], trained[-1] > 1)


def forward_transfer(matrix: Tensor, untrained: Tensor, after: Sequence[int] | None = None) -> Tensor:
    r"""What the task before tells of the next one: :math:`\frac1{t-1} \sum_{1<j\le t} (A_{j-1,j} - b_j)`.

    :math:`b_j` is the accuracy on task j before any training. Where evaluation is spaced, :math:`A_{j-1,j}` exists for
    the tasks j before which an evaluation took place, and the mean is over these.

    Source: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017, FWT.

    Args:
        matrix: (t, v), or (evaluations, v).
        untrained: the accuracies :math:`b_j` of the model before the first task, (v,).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> matrix = torch.tensor([[0.9, 0.3, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]])
        >>> forward_transfer(matrix, untrained=torch.tensor([0.0, 0.1, 0.2]))
        tensor(0.1000)
    """
    before = [trained for trained in _trained(matrix, after) if trained < matrix.shape[1]]  # the column of the next
    gained = matrix[range(len(before)), before] - untrained[before]
    return _mean_over_pairs(gained, matrix.shape[1] > 1)


def all_pairs_backward_transfer(matrix: Tensor, clip: bool = False, after: Sequence[int] | None = None) -> Tensor:
    r"""Change since a task was learnt, at all later times: mean over j < i of :math:`A_{ij} - A_{jj}`.

    Where evaluation is spaced, :math:`A_{jj}` exists for the tasks j that an evaluation followed, and the mean is over
    these.

    Source: Díaz-Rodríguez et al., "Don't forget, there is more than forgetting: new metrics for Continual Learning",
    2018, BWT; the published online streams of the Memory Head report it as backward transfer.

    Args:
        matrix: (t, v), or (evaluations, v).
        clip: report at least 0, as the code published with the Memory Head does.
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> all_pairs_backward_transfer(torch.tensor([[0.9, 0.3, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]))
        tensor(-0.2667)
        >>> all_pairs_backward_transfer(torch.tensor([[0.8, 1.0, 0.0, 0.0], [0.5, 0.9, 0.7, 0.9]]), after=[2, 4])
        tensor(-0.1000)
    """
    trained = _trained(matrix, after)
    matrix = matrix[:, _learnt_columns(matrix, trained)]
    later, earlier = matrix.new_ones(matrix.shape).tril(-1).nonzero(as_tuple=True)
    transfer = _mean_over_pairs(matrix[later, earlier] - matrix.diagonal()[earlier], trained[-1] > 1)
    return transfer.clamp_min(0) if clip else transfer


def all_pairs_forward_transfer(matrix: Tensor, after: Sequence[int] | None = None) -> Tensor:
    r"""Accuracy on tasks before they are learnt: mean over j > i of :math:`A_{ij}`.

    Source: Díaz-Rodríguez et al., 2018, FWT; see `all_pairs_backward_transfer`.

    Args:
        matrix: (t, v), or (evaluations, v).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> all_pairs_forward_transfer(torch.tensor([[0.9, 0.3, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 0.9]]))
        tensor(0.2000)
    """
    return _mean_over_pairs(matrix[~_seen(matrix, after)], matrix.shape[1] > 1)


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


def last_accuracy_old(matrix: Tensor, samples: Tensor, after: Sequence[int] | None = None) -> Tensor:
    r"""Accuracy over the test samples of all tasks before the last: :math:`\sum_{j<t} n_j A_{tj} / \sum_{j<t} n_j`.

    In a class-incremental stream these are the old classes. After the first task there are none: NaN, where the code
    published with PyCIL has 0.

    Args:
        matrix: (t, v), or (evaluations, v).
        samples: test samples :math:`n_j` of each task, (v,).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> matrix = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.9, 0.0], [0.2, 0.6, 0.7]])
        >>> last_accuracy_old(matrix, torch.tensor([10, 30, 20]))
        tensor(0.5000)
    """
    earlier = _trained(matrix, after)[-1] - 1
    return last_accuracy(matrix[:, :earlier], samples[:earlier])


def last_accuracy_new(matrix: Tensor, after: Sequence[int] | None = None) -> Tensor:
    r"""Accuracy on the test samples of the last task: :math:`A_{tt}`.

    In a class-incremental stream these are the new classes. Where there is no data of this task (v < t): NaN.

    Args:
        matrix: (t, v), or (evaluations, v).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> last_accuracy_new(torch.tensor([[1.0, 0.0], [0.5, 0.9]]))
        tensor(0.9000)
    """
    return matrix[-1, _trained(matrix, after)[-1] - 1 :].mean()


def incremental_accuracy(matrix: Tensor, samples: Tensor, after: Sequence[int] | None = None) -> Tensor:
    """Mean over the evaluations so far, by default one a task, of the last accuracy at each.

    Args:
        matrix: (t, v), or (evaluations, v).
        samples: test samples of each task, (v,).
        after: tasks trained at each evaluation, by default 1 to t.

    Example:
        >>> incremental_accuracy(torch.tensor([[1.0, 0.0], [0.5, 0.9]]), torch.tensor([10, 30]))
        tensor(0.9000)
    """
    seen = _seen(matrix, after).to(matrix.dtype) * samples
    return ((matrix * seen).sum(dim=1) / seen.sum(dim=1)).mean()


def _trained(matrix: Tensor, after: Sequence[int] | None) -> Sequence[int]:
    return range(1, len(matrix) + 1) if after is None else after


def _learnt_columns(matrix: Tensor, trained: Sequence[int]) -> list[int]:
    """Columns of the tasks that were learnt last before the evaluations, as far as there is data of them."""
    return [number - 1 for number in trained if number <= matrix.shape[1]]


def _mean_over_pairs(values: Tensor, exist: bool) -> Tensor:
    """The mean of what was measured, NaN if nothing of what exists was; 0 where there is nothing to measure."""
    return values.mean() if exist else values.new_zeros(())


def _seen(matrix: Tensor, after: Sequence[int] | None) -> Tensor:
    """Whether a column's task was learnt when a row was measured, (rows, v)."""
    trained = torch.tensor(_trained(matrix, after), device=matrix.device)
    return torch.arange(matrix.shape[1], device=matrix.device) < trained[:, None]
