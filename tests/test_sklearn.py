"""Heads as estimators of scikit-learn."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mh_lightning.heads import KernelMemoryUnits
from mh_lightning.sklearn import (
    HeadClassifier,
    KernelMemoryClassifier,
    MemoryHeadClassifier,
    NearestClassMean,
    RandomFeatureClassifier,
    RegularisedDiscriminantClassifier,
    RidgeClassifier,
    StreamingLDA,
)

ESTIMATORS: list[Callable[..., HeadClassifier]] = [
    lambda **more: KernelMemoryClassifier(normalization="none", random_state=0, **more),
    lambda **more: RidgeClassifier(random_state=0, **more),
    lambda **more: RandomFeatureClassifier(200, normalization="none", random_state=0, **more),
    lambda **more: RegularisedDiscriminantClassifier(4, random_state=0, **more),
    lambda **more: StreamingLDA(random_state=0, **more),
    lambda **more: NearestClassMean(random_state=0, **more),
    lambda **more: MemoryHeadClassifier(random_state=0, **more),
]
X, Y = load_digits(return_X_y=True)
TRAIN, TEST = train_test_split(np.arange(len(Y)), random_state=0, stratify=Y)


@parametrize_with_checks([make() for make in ESTIMATORS])
def test_is_an_estimator_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("make", ESTIMATORS)
def test_learns_classes_as_they_come(make: Callable[..., HeadClassifier]) -> None:
    names = np.array([f"digit {label}" for label in range(10)])[Y]
    model = make()
    order = [9, 3, 0, 1, 8, 2, 7, 4, 5, 6]
    for label in order:
        rows = TRAIN[Y[TRAIN] == label]
        model.partial_fit(X[rows], names[rows])
    assert model.classes_.tolist() == [f"digit {label}" for label in order]
    probabilities = model.predict_proba(X[TEST])
    assert probabilities.shape == (len(TEST), 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert model.predict(X[TEST]).tolist() == model.classes_[probabilities.argmax(axis=1)].tolist()
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X[TEST]), probabilities)
    whole = make().partial_fit(X[TRAIN], names[TRAIN])
    if not isinstance(model, MemoryHeadClassifier):
        assert model.score(X[TEST], names[TEST]) > whole.score(X[TEST], names[TEST]) - 0.02 > 0.83
    elsewhere = make().fit(X[TRAIN], names[TRAIN])
    assert elsewhere.classes_.tolist() == sorted(set(names)) and elsewhere.score(X[TEST], names[TEST]) > 0.85


def test_the_gradient_head_does_not_forget_all() -> None:
    model = MemoryHeadClassifier(random_state=0)
    for task in range(5):
        rows = TRAIN[Y[TRAIN] // 2 == task]
        model.partial_fit(X[rows], Y[rows], classes=range(10))
    assert model.score(X[TEST], Y[TEST]) > 0.5 > 0.25


def test_works_in_pipelines_and_searches() -> None:
    pipeline = make_pipeline(StandardScaler(), KernelMemoryClassifier(normalization="none", random_state=0))
    search = GridSearchCV(pipeline, {"kernelmemoryclassifier__width": [0.01, 1.4]}, cv=2)
    search.fit(X[TRAIN[:400]], Y[TRAIN[:400]])
    assert search.best_params_ == {"kernelmemoryclassifier__width": 1.4}
    assert search.score(X[TEST], Y[TEST]) > 0.9


def test_is_the_head_itself() -> None:
    model = KernelMemoryClassifier(normalization="none", random_state=0).fit(X[TRAIN], Y[TRAIN])
    head = KernelMemoryUnits(64, 10, normalization="none", seed=int(model.head_.seed))
    head.update(torch.from_numpy(X[TRAIN]).float(), torch.from_numpy(Y[TRAIN]))
    wanted = head.probabilities(torch.from_numpy(X[TEST]).float()).numpy()
    np.testing.assert_allclose(model.predict_proba(X[TEST]), wanted, atol=1e-6)
    assert clone(model).get_params() == model.get_params()
