"""Noise, what verification is told, and logits that are not numbers."""

import pytest
import torch
from parity import POISON, KernelCase, build, check, run

from vllm_dspark.heads import noise

SALTED = {"temperatures": (0.0, 0.7, 1.0, 1.6)}


def murmur3_bytes(data: bytes) -> int:
    """MurmurHash3 x86 32-bit with seed 0, from its definition over bytes."""

    def rotate(x: int, n: int) -> int:
        return (x << n | x >> (32 - n)) & 0xFFFFFFFF

    h = 0
    for at in range(0, len(data), 4):
        k = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 & 0xFFFFFFFF
        h ^= rotate(k, 15) * 0x1B873593 & 0xFFFFFFFF
        h = (rotate(h, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor & 0xFFFFFFFF
    return h ^ h >> 16


def test_the_hash_is_murmur3():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
    positions = torch.randint(0, 2**40, (64,), generator=generator)
    tokens = torch.randint(0, 2**31, (64,), generator=generator)
    hashes = noise.murmur3(seeds, positions, tokens).tolist()
    for seed, position, token, found in zip(seeds.tolist(), positions.tolist(), tokens.tolist(), hashes, strict=True):
        rest = (position & 0xFFFFFFFF).to_bytes(4, "little") + token.to_bytes(4, "little")
        assert found == murmur3_bytes(seed.to_bytes(8, "little", signed=True) + rest)


def test_noise_is_standard_gumbel():
    g = noise.gumbel(torch.tensor([[7]]), torch.arange(200)[:, None], torch.arange(1000)[None], 0).double().flatten()
    assert abs(g.mean() - 0.5772157) < 0.01
    assert abs(g.var() - torch.pi**2 / 6) < 0.02
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert abs((g <= x).double().mean() - torch.exp(-torch.exp(torch.tensor(-x)))) < 0.005


@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize("kind", ["none", "vanilla"])
@pytest.mark.parametrize("batch", [1, 6])
def test_salted_draws_are_the_specifications(batch, kind, reduced):
    """Tokens as the torch noise decides them, keyed by target id, request seed and position."""
    case = KernelCase(kind, batch=batch, slots=4, vocab=301, rank=16, reduced=reduced, temperatures=(0.7, 0.0, 1.0, 1.6))
    ids = torch.arange(301) if case.target_ids is None else case.target_ids
    slots = torch.arange(4)[:, None]
    g = noise.gumbel(case.seeds[case.slot_of][:, None, None], case.positions[:, :, None] - 1, ids[None, None], slots)
    case.noise = torch.exp(-g.double())
    assert check(case, run(case, build(case), injected=False)) == 0
    assert check(case, run(case, build(case, fused=False), injected=False)) == 0


def test_a_position_drafted_again_in_an_earlier_slot_draws_anew():
    """Else what the first draft led to would be known of the second: the noise of two slots must be independent."""
    first, second = (noise.gumbel(torch.tensor([7]), torch.tensor([30]), torch.arange(20000), k).double() for k in (3, 1))
    assert abs(torch.corrcoef(torch.stack((first, second)))[0, 1]) < 0.03
    logits = 2 * torch.randn(301, generator=torch.Generator().manual_seed(2))
    case = KernelCase("none", batch=200, slots=2, vocab=301, temperatures=(1.0,))
    case.logits = logits.expand(200, 2, 301)
    case.positions = torch.full((200, 2), 31)  # both slots at one position
    tokens = run(case, build(case), injected=False).tokens
    agree, q = (tokens[:, 0] == tokens[:, 1]).double().mean(), torch.softmax(logits, -1)
    assert abs(agree - q.square().sum()) < 0.1


def test_a_request_draws_the_same_wherever_it_stands():
    """Neither the row, nor the other rows, nor the launch shape decides the draw."""
    case = KernelCase("vanilla", batch=21, slots=3, vocab=301, rank=16, temperatures=(1.0,))
    together = run(case, build(case), injected=False).tokens
    assert together.unique().numel() > 10
    case.real = torch.zeros(21, dtype=torch.bool)
    case.real[13] = True
    alone = run(case, build(case), injected=False).tokens
    assert torch.equal(alone[13], together[13])
    assert bool((alone[~case.real] == POISON).all())


@pytest.mark.parametrize("processed_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["vanilla", "rnn"])
def test_tokens_are_drawn_from_what_verification_is_told(kind, processed_dtype):
    """To the bit, although the processed logits are rounded: with them and the noise the draw can be repeated."""
    case = KernelCase(kind, torch.bfloat16, 6, slots=4, vocab=301, rank=16, processed_dtype=processed_dtype, **SALTED)
    outcome = run(case, build(case))
    rows = case.sampled
    told = outcome.processed[case.slot_of][rows].float()
    assert bool((told[..., 1:] != told[..., :-1]).any())
    scores = told / case.temperature[rows][:, None, None] - case.noise[rows].log()
    assert torch.equal(scores.argmax(-1), outcome.tokens[rows])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("batch", [2, 4])
def test_greedy_rows_are_not_rounded_with_the_sampled_ones(batch, fused):
    case = KernelCase("none", batch=batch, slots=1, vocab=97, processed_dtype=torch.bfloat16, temperatures=(0.0, 1.0))
    case.logits.zero_()
    case.logits[:, :, 5], case.logits[:, :, 9] = 1.0, 1.001  # one number in bfloat16
    assert bool((run(case, build(case, fused)).tokens[~case.sampled] == 9).all())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_bias_is_capped_and_scaled_as_vllm_does(batch, fused):
    case = KernelCase("vanilla", batch=batch, slots=1, vocab=97, rank=16, soft_cap=2.0, scale=0.5, temperatures=(1.0,))
    outcome = run(case, build(case, fused))
    tensors = case.tensors()
    bias = tensors["markov_head.markov_w1.weight"][case.anchors] @ tensors["markov_head.markov_w2.weight"].T
    z = case.logits[:, 0].double() + torch.tanh(bias / 2) * 2 * 0.5
    assert bias.abs().max() > 4, "nothing would be capped"
    torch.testing.assert_close(outcome.processed[case.slot_of, 0].double(), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "eager"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampled", [True, False], ids=["mixed", "greedy"])
def test_logits_that_are_not_numbers_are_reported_by_row(sampled, value, fused):
    case = KernelCase("vanilla", batch=5, slots=3, vocab=97, padded=(3,), temperatures=(0.0, 1.0))
    assert not bool(run(case, build(case, fused), sampled).broken.any())
    case.logits[1, 1, 40] = value
    case.logits[3, 0, 2] = value  # padded
    case.logits[4, 2, :] = value
    outcome = run(case, build(case, fused), sampled)
    assert outcome.broken.tolist() == [0, 1, 0, 0, 1]
    assert bool(((outcome.tokens >= 0) & (outcome.tokens < 97))[case.real].all())


@pytest.mark.parametrize("batch", [2, 5, 40])
@pytest.mark.parametrize("w2_format", ["int8", "fp8"])
def test_hidden_states_that_are_not_numbers_are_reported_through_eight_bits(w2_format, batch):
    """Also where tensor cores are given the code in integers, which know no NaN."""
    case = KernelCase("gated", torch.bfloat16, batch, slots=2, rank=32, vocab=97, w2_format=w2_format, temperatures=(0.0, 1.0))
    sound = run(case, build(case))
    assert not bool(sound.broken.any())
    case.hidden[1, 1, 3] = float("nan")
    outcome = run(case, build(case))
    assert outcome.broken.tolist() == [int(row == 1) for row in range(batch)]
    others = torch.arange(batch) != 1
    assert torch.equal(outcome.tokens[others], sound.tokens[others])


def test_minus_infinity_is_a_logit():
    case = KernelCase("vanilla", batch=2, slots=2, vocab=97, temperatures=(0.0, 1.0))
    case.logits[:, :, 10:] = float("-inf")
    outcome = run(case, build(case))
    assert not bool(outcome.broken.any())
    assert bool((outcome.tokens < 10).all())


def test_ties_go_to_the_lowest_id():
    case = KernelCase("none", batch=2, slots=2, vocab=301, temperatures=(0.0,))
    case.logits.zero_()
    case.logits[0, :, [17, 40, 250]] = 3.0
    case.logits[1, :, 100:] = -0.0  # equal to +0
    assert run(case, build(case)).tokens.tolist() == [[17, 17], [0, 0]]
