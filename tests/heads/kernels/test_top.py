"""The ids that compete: the best of every group, exactly, for every shape and type of the base logits."""

import pytest
import torch
from parity import DEVICE

from vllm_dspark.heads.candidates import group_count, top_ids
from vllm_dspark.heads.kernels import top as kernels
from vllm_dspark.heads.kernels.launch import device_of
from vllm_dspark.heads.kernels.top import POOL_ROWS, choose


def chosen_by(base: torch.Tensor, top: int, index: torch.Tensor | None = None) -> torch.Tensor:
    batch, slots, _ = base.shape
    chosen = torch.full((batch + 1, slots, top), -7, dtype=torch.int32, device=DEVICE)
    pool = torch.full((POOL_ROWS * group_count(top),), 123456789 << 32, dtype=torch.int64, device=DEVICE)
    choose(base.to(DEVICE), None if index is None else index.to(DEVICE), top, pool, chosen, device_of(DEVICE))
    assert bool((chosen[batch] == -7).all())
    return chosen[:batch].cpu().long()


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize(("vocab", "top"), [(97, 1), (97, 97), (1024, 20), (1501, 3), (5003, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_chosen_ids_are_the_specifications(dtype, vocab, top):
    """Equal logits, plenty in bfloat16, go to the lower id."""
    base = logits(2, 3, vocab + 1, dtype=dtype)[..., 1:]  # rows that do not start at a multiple of 16 bytes
    found = chosen_by(base, top).sort(-1).values
    for k in range(3):
        assert torch.equal(found[:, k], top_ids(base[:, k], top).sort(-1).values)
    if vocab <= group_count(top):
        values = base.float()
        torch.testing.assert_close(
            values.gather(-1, found).sort(-1).values, values.topk(top).values.sort(-1).values, rtol=0, atol=0
        )


def test_few_of_the_best_are_missed_and_the_best_never():
    base = logits(4, 2, 20011)
    found, best = chosen_by(base, 32), base.topk(32).indices
    assert group_count(32) < 20011
    hit = (best[..., None] == found[..., None, :]).any(-1)
    assert bool(hit[..., 0].all())
    assert hit.double().mean() > 0.95


def test_padded_rows_are_left_alone():
    base = logits(3, 2, 97)
    found = chosen_by(base, 8, torch.tensor([2, -1, 0]))
    assert bool((found[1] == -7).all())
    assert torch.equal(found[[0, 2]], chosen_by(base, 8)[[0, 2]])


def test_more_rows_than_the_pool_holds(monkeypatch):
    base = logits(5, 3, 301)
    expected = chosen_by(base, 4)
    monkeypatch.setattr(kernels, "POOL_ROWS", 4)
    assert torch.equal(chosen_by(base, 4), expected)


def test_what_is_no_number_competes():
    """So that the step meets it and reports it."""
    base = logits(1, 1, 301)
    base[0, 0, [5, 200]] = torch.tensor([float("nan"), -float("nan")])
    base[0, 0, 77], base[0, 0, 9] = float("inf"), -float("inf")
    found = set(chosen_by(base, 4).flatten().tolist())
    assert {5, 200, 77} <= found
    assert set(top_ids(base[0], 4).flatten().tolist()) == found


def test_rows_without_a_finite_logit_still_choose():
    base = torch.full((1, 2, 97), float("-inf"))
    assert chosen_by(base, 5).tolist() == [[[0, 1, 2, 3, 4]] * 2]
    base[:] = 0.0
    base[..., 1::2] = -0.0
    assert chosen_by(base, 5).sort(-1).values.tolist() == [[[0, 1, 2, 3, 4]] * 2]
