"""Launch shapes cover the vocabulary, fit the buffers and the device, for every batch and device."""

import pytest

from vllm_dspark.heads.kernels.launch import ALIGN, INTERPRETER, KNOWN, MAX_PARTS, power_of_two, step_launch

DEVICES = {**KNOWN, "interpreter": INTERPRETER}


@pytest.mark.parametrize("vocab", [2, 97, 1024, 32003, 151936, 262144])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("weight_bytes", [0, 1, 2, 4])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_id_is_in_exactly_one_part(device, weight_bytes, sampled, vocab):
    for batch in (1, 2, 3, 8, 16, 17, 32, 64, 65, 128, 256, 257, 1024):
        for rank in (16, 64, 256, 512):
            launch = step_launch(device, batch, vocab, rank, weight_bytes, "vanilla", sampled)
            assert launch.chunk % ALIGN == 0
            assert (launch.parts - 1) * launch.chunk < vocab <= launch.parts * launch.chunk
            assert launch.parts <= MAX_PARTS
            for size in (launch.block_rows, launch.block_vocab):
                assert size == power_of_two(size)
            assert launch.block_rows == 1 or launch.block_vocab >= 16


@pytest.mark.parametrize("device", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("weight_bytes", [1, 2])
def test_one_wave_of_programs_whose_shares_are_even(device, weight_bytes, sampled):
    """At serving shapes no program runs after the others, and the largest part is within 7 % of the mean."""
    for batch in (1, 4, 16, 64, 256):
        for vocab in (151936, 262144):
            launch = step_launch(device, batch, vocab, 256, weight_bytes, "vanilla", sampled)
            programs = -(-batch // launch.block_rows) * launch.parts
            assert programs <= device.processors * launch.resident
            assert launch.chunk * launch.parts <= 1.07 * vocab
            assert programs >= 0.9 * device.processors


def test_only_small_vanilla_batches_are_one_launch_a_step():
    def fused(batch, kind):
        return step_launch(KNOWN["sm_90"], batch, 151936, 256, 2, kind, False).fused

    assert [fused(batch, "vanilla") for batch in (1, 16, 17, 256)] == [True, True, False, False]
    assert fused(1, "none")
    assert not fused(1, "gated")
    assert not fused(1, "rnn")


def test_one_or_two_sampled_rows_are_streamed_in_every_format():
    """Greedy ones pad a tensor-core block beside eight bits."""

    def rows(batch, weight_bytes, sampled):
        return step_launch(KNOWN["sm_90"], batch, 151936, 256, weight_bytes, "vanilla", sampled).block_rows

    assert [rows(1, 2, sampled) for sampled in (False, True)] == [1, 1]
    assert [rows(2, 1, sampled) for sampled in (False, True)] == [16, 1]
    assert rows(3, 1, True) == 16


def test_launches_overlap_with_our_own_on_hopper_and_later():
    """The launch after another library's kernel starts when that has ended, but lets ours after it start early."""
    assert KNOWN["sm_90"].follow(True) == {"OVERLAP": True, "launch_pdl": True}
    assert KNOWN["sm_90"].follow(False) == {"OVERLAP": True, "launch_pdl": False}
    for name in ("sm_80", "sm_89", "gfx942"):
        assert KNOWN[name].follow(True) == {"OVERLAP": False}, "an option that is unknown there"
