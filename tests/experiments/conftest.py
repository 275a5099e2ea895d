"""Series and searches whose runs take place in the test's own process."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from mh_lightning.experiments import workers


class InProcess:
    """Stands for a pool of one process."""

    def __init__(self, *settings: object) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **settings: bool) -> None: ...


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", InProcess)
