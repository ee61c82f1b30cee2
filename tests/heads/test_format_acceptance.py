"""What eight-bit W2 and candidate lists cost in accepted drafts: the bundled pair, greedy, through the specification."""

import pytest
import torch
from reference_loop import Acceptance, ReferenceLoop

from vllm_dspark import demo
from vllm_dspark.heads.formats import ACCEPTED, WEIGHT_FORMATS, report, store

W2 = "markov_head.markov_w2.weight"
PROMPTS, TOKENS = 3, 64  # of each domain, and from each prompt


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, list[int]]]:
    """Prompts and the target's greedy continuation of each, longer by a block."""
    loop = ReferenceLoop(demo.TARGET, demo.drafter("vanilla"))
    found = []
    for prompt in [text for domain in demo.DOMAINS for text in demo.prompts(domain)[:PROMPTS]]:
        ids = loop.tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = loop.target.generate(ids, max_new_tokens=TOKENS + 8, do_sample=False, eos_token_id=None)
        found.append((prompt, out[0, ids.shape[1] :].tolist()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("head", demo.HEADS)
def test_formats_keep_acceptance(head, texts):
    """int8 within one point of native over all drafted positions, fp8 within two; one line each."""
    rates = {}
    for form in WEIGHT_FORMATS:
        loop = ReferenceLoop(demo.TARGET, demo.drafter(head))
        weight = loop.tensors[W2].bfloat16()
        stored = store(weight, form)
        loop.tensors[W2] = stored.dequantise()
        total = Acceptance(loop.slots)
        for prompt, continuation in texts:
            loop.run(prompt, continuation, TOKENS, total)
        rates[form] = sum(total.rates()) / loop.slots
        length = 1 + sum(total.rates())
        print(f"{head}: {report('W2', weight, stored)}; accepted length {length:.3f} in {total.rounds} rounds")
        assert total.rounds > 100
        assert abs(length - ACCEPTED[head][form]) < 0.02, "the lengths that are logged at load are out of date"
    assert abs(rates["int8"] - rates["native"]) < 0.01
    assert abs(rates["fp8"] - rates["native"]) < 0.02
    assert torch.isfinite(torch.tensor(list(rates.values()))).all()
