"""Heads as estimators of scikit-learn, for people who have features: arrays in, classes and probabilities out.

`partial_fit` learns a stream, batch after batch, whose classes may come later than the first call; `fit` learns anew.
"""

from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from mh_lightning import heads
from mh_lightning.errors import UserError, require
from mh_lightning.growth import grown
from mh_lightning.layers import MHLinear
from mh_lightning.optimizer import memory_head_optimizer

__all__ = [
    "KernelMemoryClassifier",
    "MemoryHeadClassifier",
    "NearestClassMean",
    "RandomFeatureClassifier",
    "RegularisedDiscriminantClassifier",
    "RidgeClassifier",
    "StreamingLDA",
]

ROWS_AT_ONCE = 256


class HeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A head as a classifier of scikit-learn.

    Attributes:
        head_: the head, a `torch.nn.Module`.
        classes_: labels, (C,), in the order in which columns of probabilities have them: sorted those that `fit`, or
            the first call of `partial_fit`, knows, and then as they come.
        n_features_in_: n.
    """

    random_state: Any = None
    head_: Any

    @abstractmethod
    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        """A head that has learnt nothing."""

    @abstractmethod
    def _learn(self, x: Tensor, targets: Tensor, epochs: int) -> None:
        """Learn features (b, n), float32, of classes (b,)."""

    @abstractmethod
    def _logits(self, x: Tensor) -> Tensor:
        """Of features (b, n): (b, C), whose softmax are probabilities."""

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:  # noqa: N803
        """Learn features (b, n) of labels (b,), and forget what was learnt before."""
        for name in ("head_", "classes_"):
            if hasattr(self, name):
                delattr(self, name)
        return self._learn_more(X, y, None, self._epochs())

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:  # noqa: N803
        """Learn features (b, n) of labels (b,) after what was learnt before.

        Args:
            X: features, (b, n).
            y: labels, (b,), also ones that were never met.
            classes: labels that will come; the first call need not know them.
        """
        return self._learn_more(X, y, classes, 1)

    def _epochs(self) -> int:
        return 1

    def _learn_more(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None, epochs: int) -> Self:  # noqa: N803
        x, labels = validate_data(self, X, y, dtype=np.float32, reset=not hasattr(self, "head_"))
        check_classification_targets(labels)
        labels = column_or_1d(labels)
        known = unique_labels(labels) if classes is None else unique_labels(labels, classes)
        if hasattr(self, "classes_") and (known.dtype.kind in "US") != (self.classes_.dtype.kind in "US"):
            raise UserError(
                f"y: labels were of {self.classes_.dtype} before, and are of {known.dtype} now; give one kind."
            )
        before = {name: vars(self).get(name) for name in ("head_", "classes_")}
        try:
            self._learn_labels(x, labels, known, epochs)
        except Exception:
            for name, value in before.items():
                if value is None:
                    self.__dict__.pop(name, None)
                else:
                    setattr(self, name, value)
            raise
        return self

    def _learn_labels(self, x: Any, labels: Any, known: Any, epochs: int) -> None:
        if not hasattr(self, "head_"):
            self.classes_ = known
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head_ = self._make_head(x.shape[1], len(known), seed)
            self._seed, self._calls = seed, 0
        else:
            new = known[~np.isin(known, self.classes_)]
            if len(new):
                self.classes_ = np.concatenate([self.classes_, new])
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self._seed + len(self.classes_))
                    self.head_ = grown(self.head_, len(self.classes_))
        order = np.argsort(self.classes_, kind="stable")
        targets = order[np.searchsorted(self.classes_, labels, sorter=order)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._calls)
            self._learn(torch.from_numpy(x), torch.from_numpy(targets), epochs)
        self._calls += 1

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """Probabilities (b, C) of features (b, n), in the order of `classes_`."""
        check_is_fitted(self, "head_")
        x = torch.from_numpy(validate_data(self, X, dtype=np.float32, reset=False))
        # products round by their size, and what is answered to a sample must not depend on how many are asked
        filled = torch.cat([x, x[:1].expand(-len(x) % ROWS_AT_ONCE, -1)])
        with torch.no_grad():
            logits = torch.cat([self._logits(rows) for rows in torch.split(filled, ROWS_AT_ONCE)])[: len(x)]
            return torch.softmax(logits.double(), dim=1).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Labels (b,) of features (b, n)."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]  # type: ignore[no-any-return]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "head_")


class ClosedFormClassifier(HeadClassifier):
    """A head in closed form, of `mh_lightning.heads`: one pass, and the order of samples changes next to nothing."""

    def _learn(self, x: Tensor, targets: Tensor, epochs: int) -> None:
        self.head_.update(x, targets)
        self.head_.settle()

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head_.calibrated(x)
        return logits


class KernelMemoryClassifier(ClosedFormClassifier):
    """`mh_lightning.heads.KernelMemoryUnits`: the one to start with.

    Args:
        key_mem_units: m, at least 1.
        max_bytes: of its state.
        width: of the kernel, in squared distances to neighbours.
        normalization: of features: "sqrt", "l2" or, for points, "none".
        random_state: of what is drawn.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = KernelMemoryClassifier(normalization="none", random_state=0)
        >>> for label in range(3):  # one class after the other
        ...     model = model.partial_fit(X[y == label], y[y == label])
        >>> bool(model.score(X, y) > 0.95)
        True
    """

    def __init__(
        self,
        key_mem_units: int = 1000,
        max_bytes: int = 10_000_000,
        width: float = 1.4,
        normalization: str = "sqrt",
        random_state: Any = None,
    ) -> None:
        self.key_mem_units, self.max_bytes, self.width = key_mem_units, max_bytes, width
        self.normalization, self.random_state = normalization, random_state

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        return heads.KernelMemoryUnits(
            num_features, num_classes, self.key_mem_units, self.max_bytes, self.width,
            normalization=self.normalization, seed=seed,
        )  # fmt: skip


class RidgeClassifier(ClosedFormClassifier):
    """`mh_lightning.heads.RidgeRegression`: one ridge regression, its penalty by generalised cross-validation.

    Args:
        normalization: of features: "sqrt" or "l2".
        random_state: of the samples that probabilities are calibrated on.
    """

    def __init__(self, normalization: str = "sqrt", random_state: Any = None) -> None:
        self.normalization, self.random_state = normalization, random_state

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        return heads.RidgeRegression(num_features, num_classes, self.normalization)


class RandomFeatureClassifier(ClosedFormClassifier):
    """`mh_lightning.heads.RandomFeatureRidge`: ridge regression on random features, as RanPAC.

    Args:
        num_projections: M, at least 1.
        kind: "relu" or "fourier".
        normalization: of features: "sqrt", "l2" or "none".
        random_state: of the projection.
    """

    def __init__(
        self,
        num_projections: int = 2000,
        kind: str = "relu",
        normalization: str = "sqrt",
        random_state: Any = None,
    ) -> None:
        self.num_projections, self.kind = num_projections, kind
        self.normalization, self.random_state = normalization, random_state

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        return heads.RandomFeatureRidge(
            num_features, num_classes, self.num_projections, self.kind, normalization=self.normalization, seed=seed
        )


class RegularisedDiscriminantClassifier(ClosedFormClassifier):
    """`mh_lightning.heads.RegularisedDiscriminant`: a Gaussian a class, with low-rank covariances.

    Args:
        rank: of each class's own part, at least 1.
        normalization: of features: "sqrt", "l2" or "none".
        random_state: of the samples that probabilities are calibrated on.
    """

    def __init__(self, rank: int = 64, normalization: str = "sqrt", random_state: Any = None) -> None:
        self.rank, self.normalization, self.random_state = rank, normalization, random_state

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        return heads.RegularisedDiscriminant(num_features, num_classes, self.rank, normalization=self.normalization)


class StreamingLDA(ClosedFormClassifier):
    """`mh_lightning.heads.StreamingLinearDiscriminant`: streaming linear discriminant analysis.

    Args:
        shrinkage: of the covariance, in [0, 1].
        random_state: of the samples that probabilities are calibrated on.
    """

    def __init__(self, shrinkage: float = 1e-4, random_state: Any = None) -> None:
        self.shrinkage, self.random_state = shrinkage, random_state

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        return heads.StreamingLinearDiscriminant(num_features, num_classes, self.shrinkage)


class NearestClassMean(ClosedFormClassifier):
    """`mh_lightning.heads.ClassMeans`: the class whose mean is nearest.

    Args:
        random_state: of the samples that probabilities are calibrated on.
    """

    def __init__(self, random_state: Any = None) -> None:
        self.random_state = random_state

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        return heads.ClassMeans(num_features, num_classes)


class MemoryHeadClassifier(HeadClassifier):
    """`mh_lightning.MHLinear`, which learns by gradient, on standardised features.

    Features are standardised by the mean and the deviation of the first samples, those of the first call of
    `partial_fit`, or of all in `fit`.

    Args:
        key_mem_units: m, at least 1.
        delta: units blended for a sample, at least 1.
        epochs: passes of `fit`, at least 1; `partial_fit` makes one.
        batch_size: at least 1.
        learning_rate: of Adam, above 0, at most 1.
        random_state: of the weights and the order of the samples.
    """

    def __init__(
        self,
        key_mem_units: int = 100,
        delta: int = 5,
        epochs: int = 20,
        batch_size: int = 16,
        learning_rate: float = 0.01,
        random_state: Any = None,
    ) -> None:
        self.key_mem_units, self.delta, self.epochs = key_mem_units, delta, epochs
        self.batch_size, self.learning_rate, self.random_state = batch_size, learning_rate, random_state

    def _epochs(self) -> int:
        return self.epochs

    def _make_head(self, num_features: int, num_classes: int, seed: int) -> nn.Module:
        for name in ("key_mem_units", "delta", "epochs", "batch_size"):
            require(name, getattr(self, name), at_least=1, whole=True)
        require("learning_rate", self.learning_rate, above=0, at_most=1)
        self._standard: tuple[Tensor, Tensor] | None = None
        return MHLinear(num_features, num_classes, key_mem_units=self.key_mem_units,
                        delta=min(self.delta, self.key_mem_units))  # fmt: skip

    def _standardised(self, x: Tensor) -> Tensor:
        assert self._standard is not None
        mean, deviation = self._standard
        return (x - mean) / deviation

    def _learn(self, x: Tensor, targets: Tensor, epochs: int) -> None:
        if self._standard is None:
            deviation = x.std(dim=0, correction=0)
            self._standard = x.mean(dim=0), torch.where(deviation > 0, deviation, 1.0)
        x = self._standardised(x)
        self.head_.train()
        optimizer = memory_head_optimizer(self.head_, torch.optim.Adam, lr=self.learning_rate)
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x)), self.batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(self.head_(x[rows]), targets[rows])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        self.head_.eval()

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head_(self._standardised(x))
        return logits
