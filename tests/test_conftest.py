import torch

from dit_sparse.kernels import block_select, block_stats


def test_what_the_library_allocates_is_poisoned() -> None:
    (mean,) = block_stats._outputs(torch.zeros(1, 1, 16, 8), 1, "mean")
    counts, _ = block_select._outputs(torch.zeros(1, 1, 2, 3), 2)
    assert mean.isnan().all()
    assert (counts == torch.iinfo(torch.int32).max).all()


def test_the_seed_is_the_same_in_every_test() -> None:
    assert torch.initial_seed() == 0
