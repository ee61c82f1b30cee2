"""The salted noise has the bits of vLLM's own sampler, loaded from its file where vLLM is installed."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from interpreted import mend_masks
from parity import DEVICE, KernelCase, build, run

from vllm_dspark.heads.kernels import noise
from vllm_dspark.heads.noise import slot_seeds


@pytest.fixture(scope="module")
def vllms():
    """vLLM's sampler module with the real Triton, whatever vLLM itself would make of this machine."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    path = Path(found.submodule_search_locations[0]) / "v1/worker/gpu/sample/gumbel.py"
    if not path.exists():
        pytest.skip("this vLLM keeps its sampler elsewhere")
    before = {name: sys.modules.get(name) for name in ("vllm", "vllm.triton_utils")}
    sys.modules["vllm"] = types.ModuleType("vllm")
    sys.modules["vllm.triton_utils"] = types.SimpleNamespace(tl=tl, triton=triton)  # type: ignore[assignment]
    try:
        spec = importlib.util.spec_from_file_location("vllms_gumbel", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["vllms_gumbel"] = module
        spec.loader.exec_module(module)
    finally:
        for name, old in before.items():
            sys.modules.pop(name) if old is None else sys.modules.__setitem__(name, old)
    if not hasattr(module, "murmur3_uniform32"):
        pytest.skip("this vLLM draws other noise")
    if DEVICE.type == "cpu":
        mend_masks()
    return module


@triton.jit
def _ours(seeds, positions, slot, uniforms, gumbels, N: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, N)
    prefix = noise.hash_prefix(tl.load(seeds + row), tl.load(positions + row), slot)
    tl.store(uniforms + row * N + i, noise.uniform(prefix, i))
    tl.store(gumbels + row * N + i, noise.gumbel(prefix, i))


def drawn(vllms, logits, rows, temperature, seeds, positions, k, drafting=True):
    """What vLLM's sampler draws for slot ``k``. 0.33's knows slots once it keeps logits; an older one is given their seeds."""
    more = {}
    if drafting and hasattr(vllms, "spec_step_seed"):
        kept = torch.zeros(len(temperature), k + 1, logits.shape[1], dtype=logits.dtype, device=DEVICE)
        more = {"logits_cache": kept, "logits_cache_col": torch.tensor(k, dtype=torch.int32, device=DEVICE)}
    elif drafting:
        seeds = slot_seeds(seeds, k)
    return vllms.gumbel_sample(
        logits.to(DEVICE), rows.to(DEVICE), temperature.to(DEVICE), seeds.to(DEVICE), positions.to(DEVICE),
        apply_temperature=True, is_drafting=drafting, **more,
    )  # fmt: skip


@pytest.mark.parametrize("slot", [0, 5])
def test_every_bit_of_the_noise(vllms, slot):
    """Zero logits at temperature 1 leave vLLM's noise itself: its maxima over blocks of 1,024 tokens, and their tokens."""
    rows, width = 64, 1024
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 2**20, (rows,), generator=generator)
    uniforms, gumbels = (torch.full((rows, width), float("nan"), device=DEVICE) for _ in range(2))
    _ours[(rows,)](seeds.to(DEVICE), positions.to(DEVICE), slot, uniforms, gumbels, N=width)
    assert bool(((uniforms > 0) & (uniforms <= 1)).all())
    caught = {}
    kernel = vllms._gumbel_sample_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(local_argmax, stride, local_max, *rest, **options):
                kernel[grid](local_argmax, stride, local_max, *rest, **options)
                caught.update(ids=local_argmax.clone(), values=local_max.clone())

            return launch

    noisy = torch.zeros(rows, width), torch.arange(rows), torch.ones(rows), seeds, positions, slot
    vllms._gumbel_sample_kernel = Spy()
    try:
        chosen = drawn(vllms, *noisy)
    finally:
        vllms._gumbel_sample_kernel = kernel
    assert torch.equal(gumbels.max(-1).values, caught["values"][:, 0])
    assert torch.equal(gumbels.argmax(-1), chosen)
    assert (drawn(vllms, *noisy, drafting=False) == chosen).float().mean() < 0.1, "draft noise must not be the target's"


def test_draws_are_vllms(vllms):
    """A drafter without a head: our tokens are those of vLLM's sampler on the same logits, greedy rows among them."""
    case = KernelCase("none", torch.bfloat16, 8, slots=3, vocab=1500, temperatures=(0.0, 0.7, 1.0, 1.6))
    case.processed_dtype = torch.bfloat16
    ours = run(case, build(case), injected=False)
    temperature = torch.zeros(case.batch + 3)
    temperature[case.slot_of] = case.temperature
    for k in range(case.slots):
        logits = case.logits[:, k].contiguous()
        theirs = drawn(vllms, logits, case.slot_of, temperature, case.seeds, case.positions[:, k] - 1, k)
        assert torch.equal(theirs.cpu(), ours.tokens[:, k])
