"""The policy on the V2 runner, its kernels interpreted: it changes what is drafted and verified, never what is generated."""

from pathlib import Path
from typing import Any

import pytest

from vllm_dspark import demo

from .test_v2 import COMMON, Arm, Results, arm, pair, run, text

pytestmark = pytest.mark.e2e

TOKENS, OFF, MORE = 48, 64, 48
FREE = {"sizes": [1, 4096], "seconds": [0.010, 0.0101], "draft_sizes": [1, 512], "draft_seconds": [0.001, 0.0011]}
TRIMS = {"sizes": [1, 64], "seconds": [0.010, 0.110], "draft_sizes": [1, 64], "draft_seconds": [0.001, 0.0011]}
STEEP = {"sizes": [1, 64], "seconds": [0.001, 0.5], "draft_sizes": [1, 64], "draft_seconds": [0.010, 0.011]}


def adaptive(**more: Any) -> Arm:
    return pair("gated", dspark={"policy": "adaptive", **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("v2-policy")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    own = [text(TOKENS, extra_args=given) for given in ({"dspark_policy": "off"}, {"dspark_max_draft_tokens": 2})]
    arms = {
        "plain": arm({**COMMON, "model": str(demo.TARGET)}, text(TOKENS), text(OFF + MORE)),
        "measured": arm(adaptive(profile_seconds=2.0, cache_dir=str(folder / "cache")), text(TOKENS)),
        "free": {**arm(adaptive(), text(TOKENS), *own), "costs": FREE},
        "trims": {**arm(adaptive(), text(TOKENS)), "costs": TRIMS},
        "steep": {**arm(adaptive(), text(TOKENS)), "costs": STEEP},
        "off": arm(pair("gated", dspark={"policy": "off"}), text(TOKENS)),
        "late": {**arm({**pair("gated"), "enable_prefix_caching": False}, text(OFF + MORE)), "off_until": OFF},
        "breaks": {**arm(adaptive(), text(TOKENS)), "costs": TRIMS, "raises": 4},
    }
    return run(folder, True, arms)


@pytest.fixture(scope="module")
def log(results: Results, folder: Path) -> str:
    return (folder / "v2-plugin.log").read_text(errors="replace")


@pytest.mark.parametrize("name", ["measured", "free", "trims", "steep", "off", "breaks"])
def test_greedy_output_is_that_without_speculation(results: Results, name: str) -> None:
    for batch in results[name]:
        assert batch["token_ids"] == results["plain"][0]["token_ids"]


def test_step_times_are_measured_and_kept(folder: Path, results: Results, log: str) -> None:
    assert "step times: measuring" in log
    kept = [path.name for path in (folder / "cache").glob("steps-*.json")]
    assert kept or "the machine was busy" in log


def test_the_form_of_verification_is_said_before_weights_load(log: str) -> None:
    said, loaded = log.index("drafts to verify are chosen per request"), log.rindex("sequential stage: eager torch")
    assert said < loaded


def test_budgets_trim(results: Results) -> None:
    """Drafts are made in whole blocks; how many are verified follows the costs."""
    free, trims = results["free"][0], results["trims"][0]
    assert free["drafted"] / free["drafts"] > 5
    assert 1 <= trims["drafted"] / trims["drafts"] < 4
    assert len(trims["blocks"]) >= trims["drafts"]
    rates = [sum(batch["accepted_at"]) / batch["drafted"] for batch in (free, trims)]
    assert rates[1] > rates[0] + 0.1  # the doubtful ones went


def test_the_block_forward_is_skipped_where_nothing_pays(results: Results) -> None:
    steep, off = results["steep"][0], results["off"][0]
    assert steep["skipped"] > 0.8 * TOKENS
    assert off["skipped"] >= TOKENS
    assert off["blocks"] == []
    assert off["drafts"] == off["drafted"] == 0


def test_requests_have_their_own_policy(results: Results) -> None:
    _, off, two = results["free"]
    assert off["blocks"] == []
    assert off["drafted"] == 0
    assert two["accepted_at"][1] > 0 == sum(two["accepted_at"][2:])


def test_drafting_resumes_with_undiminished_acceptance(results: Results, folder: Path) -> None:
    """The drafter's context was kept up: it drafts what it drafts when a prefill writes the same context."""
    late, plain = results["late"][0], results["plain"][1]
    assert late["token_ids"] == plain["token_ids"]
    assert late["skipped"] >= OFF - 2
    starts = [ids + out[:OFF] for ids, out in zip(late["prompt_ids"], late["token_ids"], strict=True)]
    again = {"prompts": starts, "sampling": {"max_tokens": MORE}}
    (folder / "again").mkdir()
    fixed = run(folder / "again", True, {"again": arm(pair("gated"), again)})["again"][0]
    assert fixed["token_ids"] == [out[OFF:] for out in late["token_ids"]]
    assert late["drafts"] > 30
    rates = [[count / batch["drafts"] for count in batch["accepted_at"]] for batch in (late, fixed)]
    assert rates[0] == pytest.approx(rates[1], abs=0.06)


def test_a_policy_that_breaks_is_off_with_one_warning(results: Results, log: str) -> None:
    assert log.count("the adaptive policy cannot decide (ZeroDivisionError") == 1
    assert results["breaks"][0]["skipped"] > 20


def test_counters_tell_what_became_of_the_drafts(results: Results) -> None:
    """Trimmed drafts are not in vLLM's counters; ours have them too, a step late."""
    trims, off = results["trims"][0], results["off"][0]
    shown = trims["shown"]
    assert shown["accepted"] == pytest.approx(sum(trims["accepted_at"]), abs=7)
    assert shown["accepted"] + shown["rejected"] == pytest.approx(trims["drafted"], abs=28)
    assert shown["trimmed"] > 0
    assert (off["shown"]["accepted"], off["shown"]["rejected"], off["shown"]["trimmed"]) == (0, 0, 0)
    assert 0 < off["shown"]["undrafted"] <= 4 * 7 * 2  # then the scheduler has been told that nobody drafts
    assert off["shown"]["skipped"] >= TOKENS - 2
