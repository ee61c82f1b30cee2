"""The V2 runner, its kernels interpreted: what it drafts is what V1 drafts, what the reference drafts, what vLLM drafts."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from tiny_checkpoints import write_drafter
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Qwen3Config, Qwen3ForCausalLM

from vllm_dspark import demo
from vllm_dspark.engine.session import EngineProcess

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).resolve().parent.parent
VOCABULARY = 128
TINY = [[(7 * i + j * j) % (VOCABULARY - 2) for j in range(5 + 3 * i)] for i in range(6)]
# float32, so that batches of another shape round to the same tokens.
COMMON = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "block_size": 32, "dtype": "float32"}
FIXED: dict[str, Any] = {"dspark": {"policy": "fixed"}}  # every block is drafted and verified, on either runner

Arm = dict[str, Any]
Results = dict[str, list[dict[str, Any]]]


def pair(head: str, k: int = 7, **more: Any) -> Arm:
    speculative = {"method": "dspark", "model": str(demo.drafter(head)), "num_speculative_tokens": k, **FIXED, **more}
    return {**COMMON, "model": str(demo.TARGET), "speculative_config": speculative}


def text(tokens: int = 32, **sampling: Any) -> Arm:
    prompts = [demo.prompts(domain)[0] for domain in demo.DOMAINS]
    return {"prompts": prompts, "sampling": {"max_tokens": tokens, **sampling}}


def ids(tokens: int = 24, **sampling: Any) -> Arm:
    return {"prompts": TINY, "sampling": {"max_tokens": tokens, "detokenize": False, **sampling}}


def tiny(target: Path, drafter: Path | None, k: int = 0, **more: Any) -> Arm:
    options = {**COMMON, "model": str(target), "skip_tokenizer_init": True}
    if drafter is None:
        return options
    speculative = {"method": "dspark", "model": str(drafter), "num_speculative_tokens": k, **FIXED, **more}
    return {**options, "speculative_config": speculative}


def arm(options: Arm, *batches: Arm) -> Arm:
    return {"options": options, "batches": list(batches)}


def run(folder: Path, v2: bool, arms: dict[str, Arm], plugin: bool = True) -> Results:
    name = f"{'v2' if v2 else 'v1'}-{'plugin' if plugin else 'native'}"
    request, result, log = (folder / f"{name}.{end}" for end in ("request.json", "result.json", "log"))
    request.write_text(json.dumps({"v2": v2, "arms": arms}))
    environment = {**os.environ, "VLLM_DSPARK": str(int(plugin)), "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "e2e.arms", str(request), str(result)], env=environment, stdout=out, stderr=out, check=False
        )
    assert done.returncode == 0, "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    found: Results = json.loads(result.read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("v2")


@pytest.fixture(scope="module")
def targets(folder: Path) -> dict[str, Path]:
    """Random targets of both families, their embeddings spread so that the output varies."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    gemma = {
        "global_head_dim": 32, "num_global_key_value_heads": 2, "attention_k_eq_v": False, "pad_token_id": 0,
        "layer_types": ["full_attention"] * 4, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "enable_moe_block": False, "use_double_wide_mlp": False, "sliding_window": 64,
        "final_logit_softcapping": 30.0,
    }  # fmt: skip
    models = {"qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes)), "gemma4": Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **gemma))}
    for family, model in models.items():
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
        model.save_pretrained(folder / family)
    return {family: folder / family for family in models}


@pytest.fixture(scope="module")
def random_arms(folder: Path, targets: dict[str, Path]) -> dict[str, Arm]:
    """Random drafters: rank 0; the other slot layout on a reduced vocabulary; Gemma 4."""
    qwen = {"vocab_size": VOCABULARY, "block_size": 5}
    none = write_drafter(folder / "rank-0", head="none", **qwen)
    fill_in = write_drafter(
        folder / "fill-in", head="rnn", layout="speculators", sample_from_anchor=False, draft_vocab_size=90, **qwen
    )
    gemma = write_drafter(folder / "gemma4-drafter", head="gated", family="gemma4", **qwen)
    return {
        "rank 0": arm(tiny(targets["qwen3"], none, 5), ids()),
        "fill-in": arm(
            tiny(targets["qwen3"], fill_in, 4, draft_sample_method="probabilistic"), ids(), ids(temperature=0.8, seed=5)
        ),
        "gemma4": arm(tiny(targets["gemma4"], gemma, 5), ids()),
    }


PAIR_ARMS = {head: arm(pair(head), text()) for head in demo.HEADS} | {"k = 3": arm(pair("gated", 3), text())}
SAMPLED = arm(
    pair("vanilla", draft_sample_method="probabilistic"), text(temperature=1.0, seed=11), text(temperature=0.6, seed=3)
)


def with_stage(given: Arm, stage: str, **more: Any) -> Arm:
    """The same engine with another sequential stage."""
    speculative = given["options"]["speculative_config"]
    dspark = {**speculative["dspark"], "sequential_stage": stage, **more}
    options = {**given["options"], "speculative_config": {**speculative, "dspark": dspark}}
    return {**given, "options": options}


@pytest.fixture(scope="module")
def v2(folder: Path, targets: dict[str, Path], random_arms: dict[str, Arm]) -> Results:
    plain = {
        "plain": arm({**COMMON, "model": str(demo.TARGET)}, text()),
        "plain qwen3": arm(tiny(targets["qwen3"], None), ids()),
        "plain gemma4": arm(tiny(targets["gemma4"], None), ids()),
    }
    arms = {**PAIR_ARMS, "sampled": SAMPLED, **random_arms}
    fused = {f"fused {name}": with_stage(arms[name], "fused") for name in FUSED}
    few = {f"{stage} candidates": with_stage(SAMPLED, stage, candidates=40) for stage in ("eager", "fused")}
    return run(folder, True, {**plain, **arms, **fused, **few})


@pytest.fixture(scope="module")
def v1(folder: Path, random_arms: dict[str, Arm]) -> Results:
    greedy = {name: {**each, "batches": each["batches"][:1]} for name, each in random_arms.items()}
    return run(folder, False, {**PAIR_ARMS, **greedy})


@pytest.fixture(scope="module")
def native(folder: Path) -> Results:
    arms = json.loads(json.dumps({"vanilla": PAIR_ARMS["vanilla"], "sampled": SAMPLED}))
    for each in arms.values():
        del each["options"]["speculative_config"]["dspark"]  # which vLLM does not know
    return run(folder, True, arms, plugin=False)


PLAIN = {"rank 0": "plain qwen3", "fill-in": "plain qwen3", "gemma4": "plain gemma4"}
EVERY = [*PAIR_ARMS, *PLAIN]
FUSED = ["rnn", "fill-in"]


def blocks(result: dict[str, Any]) -> Counter[tuple[int, ...]]:
    return Counter((anchor, *tokens) for anchor, tokens, _ in result["blocks"])


@pytest.mark.parametrize("name", EVERY)
def test_greedy_output_is_that_without_speculation(v2: Results, name: str) -> None:
    assert v2[name][0]["token_ids"] == v2[PLAIN.get(name, "plain")][0]["token_ids"]
    assert v2[name][0]["drafts"] > 0


@pytest.mark.parametrize("name", EVERY)
def test_v2_drafts_what_v1_drafts(v1: Results, v2: Results, name: str) -> None:
    """Token for token, and as sure of it. V1 knows when a request will end, V2 learns of it up to two rounds later."""
    one, two = v1[name][0], v2[name][0]
    k, requests = len(two["accepted_at"]), len(two["token_ids"])
    sure = defaultdict(list)
    for anchor, tokens, confidences in one["blocks"]:
        sure[anchor, *tokens[:k]].append(confidences[:k])
    shorter = Counter((anchor, *tokens[:k]) for anchor, tokens, _ in one["blocks"])
    assert shorter <= blocks(two)
    beyond = (blocks(two) - shorter).total()
    assert beyond <= 2 * requests
    for fewer, more in zip([one["drafts"], *one["accepted_at"]], [two["drafts"], *two["accepted_at"]], strict=True):
        assert fewer <= more <= fewer + requests
    unlike = 0  # the same block may be drafted at several places, each as sure as it is
    for anchor, tokens, confidences in two["blocks"]:
        places = sure.get((anchor, *tokens))
        unlike += places is not None and not any(confidences == pytest.approx(place, abs=1e-4) for place in places)
    assert unlike <= beyond


@pytest.mark.parametrize("name", [*EVERY, "sampled"])
def test_every_block_is_the_references(v2: Results, name: str) -> None:
    checks = [check for batch in v2[name] for check in batch["checks"]]
    assert sum(check["tokens"] for check in checks) > 100
    assert sum(check["different"] for check in checks) == 0
    assert max(check["confidence_error"] for check in checks) < 1e-4


@pytest.mark.parametrize("name", ["sampled", "fill-in"])
def test_what_verification_sees_is_what_was_sampled_from(v2: Results, name: str) -> None:
    errors = [check["q_error"] for batch in v2[name] for check in batch["checks"] if "q_error" in check]
    assert len(errors) > 10
    assert max(errors) < 1e-5


def test_vanilla_drafts_what_vllm_drafts(v2: Results, native: Results) -> None:
    ours, theirs = v2["vanilla"][0], native["vanilla"][0]
    assert ours["accepted_at"] == theirs["accepted_at"]
    assert blocks(ours) == blocks(theirs)
    assert ours["token_ids"] == theirs["token_ids"]
    assert not theirs["checks"], "the plugin was on where it should not have been"


def test_sampled_drafts_use_vllms_noise(v2: Results, native: Results) -> None:
    """The same seeds give the same drafts and the same output as vLLM's own speculator (0.33's noise) at two temperatures."""
    for ours, theirs in zip(v2["sampled"], native["sampled"], strict=True):
        assert blocks(ours) == blocks(theirs)
        assert ours["token_ids"] == theirs["token_ids"]
        assert ours["token_ids"] != v2["plain"][0]["token_ids"]


@pytest.mark.parametrize("name", [*FUSED, "candidates"])
def test_the_fused_stage_drafts_what_the_torch_stage_drafts(v2: Results, name: str) -> None:
    """Interpreted kernels beside torch and vLLM's sampler, greedy and sampled: the same blocks, the same output."""
    torch_stage = "eager candidates" if name == "candidates" else name
    for eager, fused in zip(v2[torch_stage], v2[f"fused {name}"], strict=True):
        assert blocks(fused) == blocks(eager)
        assert fused["token_ids"] == eager["token_ids"]
        assert fused["accepted_at"] == eager["accepted_at"]


@pytest.mark.parametrize("name", ["fused fill-in"])
def test_verification_sees_what_the_fused_stage_sampled_from(v2: Results, name: str) -> None:
    errors = [check["q_error"] for batch in v2[name] for check in batch["checks"] if "q_error" in check]
    assert len(errors) > 10
    assert max(errors) < 1e-5


def test_the_engine_in_a_process_of_its_own(v2: Results) -> None:
    """As a server has it: the hooks have to find their way there with the configuration."""
    given = text()
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with EngineProcess(environment=environment, prepare=interpreted.PREPARE, **pair("rnn")) as engine:
        found = engine.generate(given["prompts"], max_tokens=given["sampling"]["max_tokens"])
        log = engine.log.read_text(errors="replace")
    assert found.token_ids == v2["rnn"][0]["token_ids"]
    assert list(found.accepted_at) == v2["rnn"][0]["accepted_at"]
    (line,) = [line for line in log.splitlines() if "DSpark on the V2 runner: rnn head" in line]
    assert "SpawnProcess" not in line  # where the engine would be without a process of its own


def test_the_reduced_vocabulary_and_the_shorter_block_are_drafted(v2: Results) -> None:
    assert len({token for _, tokens, _ in v2["fill-in"][0]["blocks"] for token in tokens}) > 5
    assert {len(tokens) for _, tokens, _ in v2["k = 3"][0]["blocks"]} == {3}
    # A block of three queries instead of the first three drafts of seven would be accepted less often.
    whole, first = v2["gated"][0], v2["k = 3"][0]
    assert first["accepted_at"][0] / first["drafts"] > 0.8 * whole["accepted_at"][0] / whole["drafts"]
