"""Runs engines one after the other in one process, and writes down what each drafted. A program:

    python -m e2e.arms REQUEST.json RESULT.json

REQUEST: ``v2`` (run on the V2 runner, interpreted) and ``arms``: name -> ``options`` of ``vllm.LLM``, ``batches``, each with
``prompts`` and sampling parameters, and what is :func:`planted` in the policy. RESULT: name -> one entry per batch, see
:func:`run_arm`. Imports are most of an engine's start-up, so arms that may share a process do.
"""

import contextlib
import functools
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock


class Notebook:
    """Blocks drafted by the engine that runs now: anchor, tokens, confidences."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, list[int], list[float] | None]] = []
        self.checks: list[dict[str, Any]] = []
        self.skipped = 0

    def write(self, anchors: Any, tokens: Any, confidences: Any) -> None:
        values = [None] * len(tokens) if confidences is None else confidences.tolist()
        self.blocks += zip(anchors.tolist(), tokens.tolist(), values, strict=True)

    def take(self) -> dict[str, Any]:
        taken = {"blocks": self.blocks, "checks": self.checks, "skipped": self.skipped}
        self.blocks, self.checks, self.skipped = [], [], 0
        return taken


def watch_v1(notebook: Notebook) -> None:
    from vllm_dspark.heads import sequential

    draft_block = sequential.draft_block

    def watched(stage: Any, hidden: Any, logits: Any, anchors: Any, *rest: Any, **more: Any) -> Any:
        drafts = draft_block(stage, hidden, logits, anchors, *rest, **more)
        notebook.write(anchors, drafts.tokens, drafts.confidences)
        return drafts

    sequential.draft_block = watched


def watch_v2(notebook: Notebook) -> None:
    """Blocks of any speculator of the DFlash family, vLLM's own too."""
    from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

    propose = DFlashSpeculator.propose

    @functools.wraps(propose)  # the ledger looks at its signature
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = propose(self, *args, **kwargs)
        if getattr(self, "context_only", False):
            notebook.skipped += not kwargs.get("dummy_run")
        elif not kwargs.get("dummy_run"):
            anchors = self.input_buffers.input_ids[self._anchor_idx[: len(drafts)]]
            head = getattr(self.model, "confidence_head", None)
            shown = drafts[:, : getattr(self, "asked", None)]  # ours hands on the first k of a block
            notebook.write(anchors, shown, None if head is None else self.draft_token_confidence_probs[: len(drafts)])
        return drafts

    DFlashSpeculator.propose = watched


def check_against_reference(notebook: Notebook) -> None:
    """Redraft every block of ours with ``heads.reference`` in double precision, made to draw the tokens that were drawn."""
    import torch

    from vllm_dspark.engine.models import DraftHeads
    from vllm_dspark.heads import reference

    original = DraftHeads.sample_sequential

    def checked(self: Any, speculator: Any, num_reqs: int, head_hidden: Any) -> bool:
        done = original(self, speculator, num_reqs, head_hidden)
        slots = speculator.num_speculative_steps
        rows = speculator.sample_idx_mapping[: num_reqs * slots : slots]
        if (rows < 0).any():
            return done
        hidden = head_hidden[speculator.sample_indices[: num_reqs * slots]]
        logits = self.compute_draft_logits(hidden).double().view(num_reqs, slots, -1)
        tokens = speculator.draft_tokens[:num_reqs]
        ids = self.target_ids if self.target_ids is not None else torch.arange(logits.shape[-1])
        position = torch.full((self.target_vocab_size,), -1).index_copy(0, ids, torch.arange(len(ids)))
        temperature = speculator.temperature[rows].double()
        noise = torch.ones_like(logits).scatter_(2, position[tokens].unsqueeze(-1), 1e-300)
        tensors = {name: value.double() for name, value in self.state_dict().items() if "_head." in name}
        kind = "none" if self.markov_head is None else self.markov_head.kind
        anchors = speculator.input_buffers.input_ids[speculator._anchor_idx[:num_reqs]]
        block = reference.draft_block(
            tensors, kind, hidden.double().view(num_reqs, slots, -1), logits, anchors, temperature, noise, self.target_ids,
            self.target_vocab_size,
        )  # fmt: skip
        check = {
            "tokens": num_reqs * slots,
            "sampled": int((temperature > 0).sum()) * slots,
            "different": int((block.tokens != tokens).sum()),
            "confidence_error": float((block.confidences - speculator.block_confidences[:num_reqs]).abs().max()),
        }
        if speculator.draft_logits is not None and (temperature > 0).any():
            drawn = temperature > 0
            kept = speculator.draft_logits[rows[drawn]].double() / temperature[drawn, None, None]
            check["q_error"] = float((kept.softmax(-1) - block.probabilities[drawn]).abs().max())
        notebook.checks.append(check)
        return done

    DraftHeads.sample_sequential = checked


@contextlib.contextmanager
def planted(arm: dict[str, Any]) -> Iterator[None]:
    """While an arm runs: ``costs`` are its step times, once and for all; ``off_until`` so many tokens, nothing is drafted;
    ``raises``: the policy breaks after so many decisions.
    """
    from vllm_dspark.engine import profiling, v2_rounds
    from vllm_dspark.verification import choice
    from vllm_dspark.verification.cost import CostTable

    with contextlib.ExitStack() as stack:
        if "costs" in arm:
            table = CostTable(**{name: tuple(values) for name, values in arm["costs"].items()})
            stack.enter_context(mock.patch.object(profiling, "known", return_value=table))
            stack.enter_context(mock.patch.multiple(v2_rounds, EAGER=0, EVERY=1 << 40))
        if "off_until" in arm:
            inputs = v2_rounds.Rounds._inputs

            def young(self: Any, batch: Any, *rest: Any) -> Any:
                given, rows, clean = inputs(self, batch, *rest)
                given.limits[(batch.seq_lens_cpu_upper_bound[rows].numpy() - batch.prefill_len_np[rows]) < arm["off_until"]] = 0
                return given, rows, clean

            stack.enter_context(mock.patch.object(v2_rounds.Rounds, "_inputs", young))
        if "raises" in arm:
            left, choose = iter(range(arm["raises"])), choice.choose
            broken = lambda *given: choose(*given) if next(left, None) is not None else 1 / 0  # noqa: E731
            stack.enter_context(mock.patch.object(choice, "choose", broken))
        yield


def run_arm(options: dict[str, Any], batches: list[dict[str, Any]], notebook: Notebook) -> list[dict[str, Any]]:
    """Per batch: generated ids, accepted drafts by position, rounds, the blocks drafted, the checks made."""
    from vllm import LLM

    from vllm_dspark.engine.session import Run, _Runs

    engine: Any = LLM(**{"disable_log_stats": False, "seed": 0, **options})
    runs, results = _Runs(), []
    for batch in batches:
        sampling = {"temperature": 0.0, "ignore_eos": True, **batch["sampling"]}
        runs.begin(engine, batch["prompts"], batch.get("concurrency") or len(batch["prompts"]), sampling)
        run = runs.go_on(engine, math.inf)
        assert isinstance(run, Run)
        result = {"token_ids": run.token_ids, "accepted_at": run.accepted_at, "drafts": run.drafts, "drafted": run.drafted}
        result |= {"prompt_ids": [_ids(engine, prompt) for prompt in batch["prompts"]], "shown": _shown()}
        results.append({**result, **notebook.take()})
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    return results


def _ids(engine: Any, prompt: Any) -> list[int]:
    return list(engine.get_tokenizer()(prompt)["input_ids"]) if isinstance(prompt, str) else prompt


def _shown() -> dict[str, float]:
    """What is exported of the last engine of this process that drafts."""
    from prometheus_client import REGISTRY

    engines: dict[int, dict[str, float]] = {}
    for family in REGISTRY.collect():
        for sample in family.samples if family.name.startswith("dspark_") else ():
            labels = dict(sample.labels)
            engines.setdefault(int(labels.pop("engine")), {}).update(dict.fromkeys(labels.values(), sample.value))
    return engines[max(engines)] if engines else {}


def main(request: str, result: str) -> None:
    given = json.loads(Path(request).read_text())
    os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    if given["v2"]:
        import interpreted

        interpreted.install()
        if os.environ.get("VLLM_DSPARK") == "0":
            interpreted.mix_slots()
    from vllm_dspark.plugin import register

    register()
    notebook = Notebook()
    watches: list[Callable[[Notebook], None]] = [watch_v2, check_against_reference] if given["v2"] else [watch_v1]
    for watch in watches:
        watch(notebook)
    done = {}
    for name, arm in given["arms"].items():
        with planted(arm):
            done[name] = run_arm(arm["options"], arm["batches"], notebook)
    Path(result).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
