"""Installed, but another method is configured: every symbol of vLLM's that we could replace stands as vLLM made it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3NextConfig

from vllm_dspark import demo
from vllm_dspark.engine import hooks

pytestmark = pytest.mark.e2e
ENTRANCE = "vllm.engine.arg_utils.EngineArgs.create_speculative_config"  # reads the method, so it has to stand before

PROGRAM = """
import inspect, json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
from vllm_dspark.engine import hooks
from vllm_dspark.plugin import register

given = json.loads(sys.argv[1])
before = {hook.name: hooks.resolve(hook) for hook in hooks.HOOKS}
register()
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

touched, methods = {}, {}

def stands(owner, name):
    return inspect.getattr_static(owner, name) if inspect.isclass(owner) else getattr(owner, name)

def look(name):
    touched[name] = sorted(hook for hook, (owner, symbol, found) in before.items() if stands(owner, symbol) != found)

for name, options in given["configured"].items():
    config = EngineArgs(**options).create_engine_config()
    methods[name] = config.speculative_config and config.speculative_config.method
    look(name)
for name, options in given["run"].items():
    engine = LLM(**options)
    (output,) = engine.generate(["1 + 1 = 2. 1 + 1 = 2. 1 + 1 ="], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 8
    methods[name] = options.get("speculative_config", {}).get("method")
    look(name)
print(json.dumps({"touched": touched, "methods": methods}))
"""


def options(target: Path, **speculative: Any) -> dict[str, Any]:
    common = {"model": str(target), "max_model_len": 128, "enforce_eager": True, "max_num_seqs": 4}
    return {**common, "speculative_config": {"num_speculative_tokens": 2, **speculative}} if speculative else common


def looked_at(configured: dict[str, Any], run: dict[str, Any] | None = None) -> dict[str, Any]:
    given = json.dumps({"configured": configured, "run": run or {}})
    done = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(folder: Path, config: Any, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, target = tmp_path_factory.mktemp("methods"), demo.TARGET
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    eagle = write(folder / "eagle", LlamaConfig(**sizes, num_hidden_layers=1), "LlamaForCausalLM")
    eagle3 = write(folder / "eagle3", LlamaConfig(**sizes, num_hidden_layers=1), "LlamaForCausalLMEagle3")
    mtp = write(folder / "mtp", Qwen3NextConfig(**sizes, num_hidden_layers=4, head_dim=32), "Qwen3NextForCausalLM")
    draft = folder / "draft"  # whatever has "dspark" in its path is a DSpark drafter to vLLM
    draft.symlink_to(target)
    ngram = options(target, method="ngram", prompt_lookup_max=2)
    configured = {
        "none": options(target),
        "eagle": options(target, method="eagle", model=str(eagle)),
        "eagle3": options(target, method="eagle3", model=str(eagle3)),
        "mtp": {**options(mtp, method="mtp"), "skip_tokenizer_init": True},
        "draft_model": options(target, method="draft_model", model=str(draft)),
    }
    return looked_at(configured, {"ngram": ngram})


@pytest.mark.parametrize("method", ["none", "eagle", "eagle3", "mtp", "draft_model", "ngram"])
def test_another_method_leaves_every_symbol_as_vllm_made_it(found: dict[str, Any], method: str) -> None:
    assert (found["methods"][method] or "none") == method
    assert found["touched"][method] == [ENTRANCE]


def test_dspark_replaces_what_the_ledger_says() -> None:
    """The same look sees every replacement, so it would have seen one above."""
    dspark = options(demo.TARGET, method="dspark", model=str(demo.drafter("vanilla")))
    seen = looked_at({"dspark": dspark})
    assert seen["touched"]["dspark"] == sorted(hook.name for hook in hooks.HOOKS if hook.replace is not None)
