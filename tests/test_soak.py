"""Many runs killed at random moments: ``python -m pytest -m soak -n 0 -s tests/test_soak.py``."""

import random
from pathlib import Path

import pytest

from tests.interrupted import Interrupted, every_configuration

KILLS = 10  # of each configuration


@pytest.mark.soak
@every_configuration
def test_killed_again_and_again_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    kills = rounds = 0
    while kills < KILLS:
        folder = tmp_path / str(rounds)
        folder.mkdir()
        run = Interrupted(name, folder)
        kills += run.kill_at_random(seed + rounds, KILLS)
        run.assert_equal_in_the_end()
        rounds += 1
    print(f"{name}: {kills} kills of {rounds} runs, seed {seed}")
