from typing import Any

import pytest

from mh_lightning.errors import UserError
from mh_lightning.experiments.runs import Experiment
from mh_lightning.experiments.streams import group_by_stream


def experiment(name: str, **data: Any) -> Experiment:
    return Experiment(name, (), {"data": {"class_path": "mh_lightning.data.Digits", "init_args": {**data}}})


MANY = [
    experiment("five_tuning", increment=5, batch_size=8, class_order_seed=1),
    experiment("two_tuning", increment=2),
    experiment("five_mean", increment=5, batch_size=64, class_order_seed=2, epochs_per_task=1),
    experiment("two_mean", increment=2),
]


def test_experiments_are_grouped_by_what_is_learnt() -> None:
    five, two = group_by_stream(MANY, "_tuning")
    assert (five.title, five.experiments, five.baseline) == (
        "five (Digits)",
        ("five_tuning", "five_mean"),
        "five_tuning",
    )
    assert (two.title, two.experiments, two.baseline) == ("two (Digits)", ("two_tuning", "two_mean"), "two_tuning")


def test_a_whole_name_is_the_baseline_of_its_own_stream() -> None:
    assert [stream.baseline for stream in group_by_stream(MANY, "five_mean")] == ["five_mean", None]


@pytest.mark.parametrize(("baseline", "words"), [("ing", []), ("_replay", ["none of five_tuning, five_mean"])])
def test_baselines_must_be_found_once_in_each_stream(baseline: str, words: list[str]) -> None:
    experiments = [*MANY, experiment("five_prompting", increment=5)]
    with pytest.raises(UserError) as refused:
        group_by_stream(experiments, baseline)
    assert all(word in str(refused.value) for word in ["--baseline", baseline, *words])
