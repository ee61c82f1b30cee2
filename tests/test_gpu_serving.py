"""The parts of benchmarks/gpu_serving.py that need no engine."""

import json
from pathlib import Path
from typing import Any

import gpu_serving
import pytest
from rich.console import Console
from serving import acceptance, models, report
from serving.report import FIXED, NATIVE, NONE, PLUGIN

from vllm_dspark.checkpoint import TargetFacts, check_pair, load_spec


@pytest.mark.parametrize(("domain", "tokens"), [("code", 5.283), ("math", 5.653), ("chat", 3.503)])
def test_rates_add_up_to_the_papers_length(domain: str, tokens: float) -> None:
    rates = acceptance.rates(domain, 7)
    assert 1 + sum(rates) == pytest.approx(tokens, abs=1e-3)
    assert rates == sorted(rates, reverse=True)
    assert acceptance.rates(domain, 3) == rates[:3]


def test_conditional_rates_at_the_ends() -> None:
    assert acceptance.conditional(1.0, 7) == pytest.approx(0.0, abs=1e-9)
    assert acceptance.conditional(8.0, 7) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="yield 1 to 8 tokens"):
        acceptance.conditional(8.5, 7)


@pytest.mark.parametrize("sizes", [models.TINY, models.QWEN3_8B], ids=["tiny", "8B"])
def test_the_pair_fits_and_takes_no_space(tmp_path: Path, sizes: models.Sizes) -> None:
    target, drafter = models.write(tmp_path, sizes)
    spec = load_spec(drafter)
    facts = TargetFacts(
        model=str(target), vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers
    )
    check_pair(spec, facts, 7)
    assert (spec.block_size, spec.head, spec.rank, spec.confidence) == (7, "vanilla", sizes.rank, "markov")
    assert spec.target_layer_ids == sizes.target_layer_ids
    assert sum(512 * file.stat().st_blocks for file in tmp_path.rglob("*.*")) < 1 << 20


def test_arms_are_configured_by_public_options_alone(tmp_path: Path) -> None:
    assert gpu_serving.speculative(NONE, tmp_path, {}) is None
    native, fixed, plugin = (gpu_serving.speculative(arm, tmp_path, {"a": 1}) or {} for arm in (NATIVE, FIXED, PLUGIN))
    assert native == {**fixed, "enable_adaptive_verification": True}
    assert not fixed.pop("enable_adaptive_verification")
    assert plugin == {**fixed, "dspark": {"a": 1}}


def test_the_plugin_takes_turns_with_every_other_arm() -> None:
    arms = [NONE, FIXED, NATIVE, PLUGIN]
    assert gpu_serving.turns(arms, 2) == [[PLUGIN, NONE], [PLUGIN, FIXED], [PLUGIN, NATIVE]]
    assert gpu_serving.turns(arms, 3) == [[PLUGIN, NONE, FIXED], [PLUGIN, NATIVE]]
    assert gpu_serving.turns(arms, 4) == [[PLUGIN, NONE, FIXED, NATIVE]]
    assert gpu_serving.turns([NONE, NATIVE], 2) == [[NONE, NATIVE]]
    assert gpu_serving.turns([PLUGIN], 1) == [[PLUGIN]]
    with pytest.raises(ValueError, match="1 engine at a time"):
        gpu_serving.turns(arms, 1)
    assert ["".join(gpu_serving.rotated("abc", repeat)) for repeat in range(4)] == ["abc", "bca", "cab", "abc"]


def test_ratios_are_within_a_repeat() -> None:
    """A machine that slows down in the second repeat changes speeds, not ratios."""
    found = report.figures([{PLUGIN: [200.0, 100.0, 210.0], NONE: [100.0, 50.0, 100.0]}, {PLUGIN: [220.0], FIXED: [110.0]}])
    assert found["plugin_over"][NONE] == {"median": 2.0, "least": 2.0, "most": 2.1}
    assert found["plugin_over"][FIXED]["median"] == 2.0
    assert found["tokens_per_second"][PLUGIN] == {"median": 205.0, "least": 100.0, "most": 220.0}
    with pytest.raises(ValueError, match="zip"):
        report.ratios([1.0], [1.0, 2.0])


def cell(load: int, context: int, none: float, native: float) -> dict[str, Any]:
    figures = report.figures([{PLUGIN: [100.0], NONE: [100.0 / none]}, {PLUGIN: [100.0], NATIVE: [100.0 / native]}])
    parts = dict.fromkeys(("tokens", *report.PARTS), 1.0)
    return {"domain": "code", "context": context, "concurrency": load, **figures, "per_step": {PLUGIN: parts}}


def test_targets() -> None:
    """0.99 of no speculation and of native adaptive everywhere; more than native adaptive at few requests and at 32k."""
    good = [cell(1, 1024, 2.0, 1.1), cell(64, 1024, 0.99, 0.99), cell(64, 32768, 1.0, 1.01)]
    assert report.below_target(good) == []
    assert report.below_target([{"domain": "code", "context": 1024, "concurrency": 1, "skipped": "no room"}]) == []
    for bad in (cell(16, 1024, 2.0, 1.0), cell(64, 32768, 2.0, 0.995), cell(64, 1024, 0.98, 1.0), cell(64, 1024, 1.0, 0.98)):
        assert len(report.below_target([bad])) == 1


def test_tables_show_what_there_is_and_what_was_skipped() -> None:
    skipped = {"domain": "code", "context": 32768, "concurrency": 256, "skipped": "needs 9 tokens of cache, 3 fit"}
    console = Console(record=True, width=220)
    first = {"cells": [cell(4, 1024, 2.0, 1.1)], "left_out": {NATIVE: "needs CUDA graphs"}, "dry": False}
    report.show(report.merged([{"cells": [skipped]} | {name: first[name] for name in ("left_out", "dry")}, first]), console)
    text = console.export_text()
    assert "needs 9 tokens of cache" in text
    assert "2.00 (2.00–2.00)" in text
    assert "native adaptive: needs CUDA graphs" in text
    assert "every cell measured is within the targets" in text


def test_results_are_written_whole(tmp_path: Path) -> None:
    report.save(tmp_path / "deep" / "found.json", {"cells": []})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["found.json"]
    assert {"date", "machine", "cells"} <= set(json.loads((tmp_path / "deep" / "found.json").read_text()))
