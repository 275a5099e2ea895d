"""Options that must agree in a checkpoint are options that change a result, and the other way round."""

import pytest
from lightning.pytorch import Trainer

from mh_lightning.data.stream import ORDER_OPTIONS, SPLIT_OPTIONS
from mh_lightning.methods.trainer_checks import trainer_options
from mh_lightning.option_roles import Role, role_of


def test_what_a_trainer_cannot_change_in_a_run_changes_its_result() -> None:
    assert {role_of(f"trainer.{name}") for name in trainer_options(Trainer(logger=False, barebones=True))} == {
        Role.RESULT
    }


def test_what_a_stream_saves_identifies_it_or_changes_the_result() -> None:
    assert {role_of(f"data.{name}") for name in (*SPLIT_OPTIONS, *ORDER_OPTIONS)} == {Role.STREAM, Role.RESULT}


@pytest.mark.parametrize(
    ("option", "role"),
    [
        ("run_dir", Role.FREE),
        ("trainer.enable_progress_bar", Role.FREE),
        ("trainer.devices", Role.MACHINE),
        ("data.init_args.feature_cache.init_args.folder", Role.MACHINE),
        ("data.init_args.root", Role.CHANGEABLE),
        ("trainer.max_epochs", Role.CHANGEABLE),
        ("trainer.strategy.init_args.ddp_comm_hook", Role.RESULT),
        ("data.init_args.feature_cache.views", Role.RESULT),
        ("data.init_args.class_order_seed", Role.RESULT),
        ("data.init_args.split_seed", Role.STREAM),
        ("data.init_args.perturbations", Role.STREAM),
        ("data.class_path", Role.STREAM),
        ("model.init_args.head.class_path", Role.RESULT),
        ("seed_everything", Role.RESULT),
    ],
)
def test_roles(option: str, role: Role) -> None:
    assert role_of(option) is role
