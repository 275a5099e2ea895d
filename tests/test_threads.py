"""The number of threads reaches every library that computes."""

import torch
from threadpoolctl import threadpool_info, threadpool_limits

from mh_lightning.functional.ridge import Spectrum
from mh_lightning.threads import use_threads


def test_every_library_has_as_many() -> None:
    Spectrum.of(torch.eye(2))  # which SciPy's BLAS computes
    before = torch.get_num_threads()
    with threadpool_limits():  # which puts the others back
        for count in (2, 1):
            use_threads(count)
            pools = threadpool_info()
            assert len(pools) > 1 and {pool["num_threads"] for pool in pools} == {count}
            assert torch.get_num_threads() == count
    torch.set_num_threads(before)
