"""What the V2 runner is handed: lengths on the host and on the device, the form chosen for it, counters that are honest."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from vllm_dspark import metrics

pytest.importorskip("vllm")
from v2_world import WIDTH, World
from vllm.config.compilation import CUDAGraphMode
from vllm.utils import torch_utils
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm.v1.worker.gpu.spec_decode import adaptive_verification as av

from vllm_dspark.engine import counting, v2_form, v2_start
from vllm_dspark.engine.v2_policy import HostVerification, device_verification
from vllm_dspark.verification import history, scheduler
from vllm_dspark.verification.cost import CostTable
from vllm_dspark.verification.survival import logit


@pytest.fixture(autouse=True)
def nothing_to_pin_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, also where another vLLM's files are read that takes this machine for none it knows."""
    monkeypatch.setattr(torch_utils, "is_pin_memory_available", lambda: False)
    monkeypatch.setattr(torch_utils, "PIN_MEMORY", False)


def scheduled(world: World, drafts: int = WIDTH, prefill: int = 0) -> tuple[dict[str, int], dict[str, list[int]]]:
    tokens = dict.fromkeys(world.names, 1 + drafts)
    return tokens | ({"prompt": prefill} if prefill else {}), dict.fromkeys(world.names, [-1] * drafts)


def test_on_the_host_every_length_is_exact() -> None:
    world = World(policy="fixed", names=("a", "two", "off"))
    world.rounds.announce("two", {"dspark_max_draft_tokens": 2})
    world.rounds.announce("off", {"dspark_policy": "off"})
    world.play(2, 0.9)
    world.states.req_id_to_index["prompt"] = 3
    manager = HostVerification(world.rounds, world.runner)
    tokens, drafts = scheduled(world, prefill=9)
    assert manager.get_num_tokens(tokens, drafts) == 3 + 9 + WIDTH + 2
    counts = np.array([WIDTH + 1] * 3 + [9], dtype=np.int32)
    planned = np.array([WIDTH] * 3 + [0], dtype=np.int32)
    begins = np.concatenate([[0], np.cumsum(planned + 1)]).astype(np.int32)
    ran, logits = manager.compact_batch(planned, counts, begins)
    assert ran is counts
    assert ran.tolist() == [WIDTH + 1, 3, 1, 9]
    assert logits.tolist() == [0, WIDTH + 1, WIDTH + 4, WIDTH + 5, WIDTH + 6]
    assert planned.tolist() == [WIDTH] * 3 + [0]  # grammars are laid out by what was scheduled
    order = ["a", "two", "off", "prompt"]
    on_device, queries, total = manager.reallocate_drafts(order, torch.arange(4))
    assert on_device.tolist() == logits.tolist()
    assert queries is world.runner.input_buffers.query_start_loc
    assert total == WIDTH + 2
    with pytest.raises(RuntimeError, match="please report"):
        manager.reallocate_drafts(order[::-1], torch.arange(4))
    assert HostVerification(world.rounds, world.runner, (None,)).reallocate_drafts([], torch.arange(0))[3] is None


class Native:
    """What ours uses of vLLM's manager."""

    def __init__(self, world: World) -> None:
        self.req_states, self.num_bonus_tokens, self._max_total_logits = world.states, 1, 10_000
        self._confidence_probs = torch.full((8, WIDTH), 0.5)
        self._batch_budget: Any = None

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: Any) -> Any:
        self.ranked = self._confidence_probs.clone()
        return self._batch_budget


def test_on_the_device_the_host_only_fixes_the_budget() -> None:
    world = World(names=("a", "always", "off"), on_device=True)
    world.rounds.announce("always", {"dspark_policy": "fixed"})
    world.rounds.announce("off", {"dspark_policy": "off"})
    world.play(30, 0.95)
    manager: Any = Native(world)
    manager.__class__ = device_verification(Native)
    manager.rounds = world.rounds
    tokens, drafts = scheduled(world)
    assert manager.get_num_tokens(tokens, drafts) == 3 + 2 * WIDTH
    caps, sure, budget = manager._batch_budget
    assert caps == {"a": WIDTH, "always": WIDTH, "off": 0}
    assert sure == {"a": 1, "always": 1, "off": 1}
    assert budget == 2 * WIDTH
    manager.reallocate_drafts(world.names, torch.arange(3))
    assert manager.ranked.eq(0.5).all()  # nothing is left out, so nothing is ranked
    manager._max_total_logits = 6
    assert manager.get_num_tokens(tokens, drafts) == 3 + 3
    world.policy.history.positions[:], world.policy.history.factor[:] = 1.0, 0.5
    world.policy.sts.temperatures[:] = 2.0
    manager._confidence_probs[0] = 0.8
    manager.reallocate_drafts(world.names, torch.arange(3))
    assert manager.ranked[1].eq(1.0).all()  # "always" comes first
    believed = 1.0 + float(world.policy.history.shift[world.rounds._verifying.slots[0]])
    assert manager.ranked[0].tolist() == pytest.approx([1 / (1 + np.exp(-believed - 0.5 * np.log(4.0) / 2))] * WIDTH, abs=1e-6)
    assert manager.ranked[3:].eq(0.5).all()
    assert manager._confidence_probs[1].eq(0.5).all()  # the confidences themselves stay
    manager.record_confidences(torch.full((3, WIDTH), 0.25), SimpleNamespace(idx_mapping=torch.tensor([2, 0, 1]), num_reqs=3))
    assert manager._confidence_probs[:3].eq(0.25).all()
    del manager.rounds  # as in the steps by which some kernels are warmed up
    manager.record_confidences(torch.full((3, WIDTH), 0.75), SimpleNamespace(idx_mapping=torch.tensor([2, 0, 1]), num_reqs=3))
    assert manager._confidence_probs[:3].eq(0.75).all()
    assert list(manager.batches_to_profile([1, 2])) == []


def test_vllms_manager_spends_our_budget_on_the_drafts_we_believe_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own compaction and ranking, on a CPU: as many drafts as we allot, the best of them by our calibration."""
    ranked: list[int] = []

    def assign(*given: Any) -> None:
        ranked.append(given[3])
        av._assign_draft_token_budget(*given)

    monkeypatch.setattr(av, "_assign_draft_token_budget_compiled", assign)
    names = tuple(f"r{index}" for index in range(6))
    world = World(CostTable((1, 6, 64), (0.010, 0.0101, 0.06), (1, 64), (0.0005, 0.0006)), names=names, on_device=True)
    world.rounds.announce("r1", {"dspark_policy": "off"})
    world.rounds.announce("r2", {"dspark_max_draft_tokens": 1})
    sure = np.linspace(0.35, 0.95, 6)[:, None] * np.linspace(1.0, 0.8, WIDTH)
    for _ in range(40):
        world.step(sure)
    manager: Any = object.__new__(device_verification(av.AdaptiveVerificationManager))
    queries = torch.zeros(9, dtype=torch.int32)
    vars(manager).update(
        rounds=world.rounds, req_states=world.states, num_speculative_steps=WIDTH, num_bonus_tokens=1,
        _max_total_logits=10_000, query_start_loc=queries, _confidence_probs=torch.ones(8, WIDTH),
        _batch_draft_capacity=torch.empty(8, dtype=torch.int32), _num_non_draft_tokens=torch.empty(8, dtype=torch.int32),
        _cu_num_logits=torch.empty(9, dtype=torch.int32), _copy_admitted_drafts_to_host=False,
    )  # fmt: skip
    manager.warm_up()
    assert ranked == [1, 3, 5]
    assert manager._batch_budget is None
    batch = SimpleNamespace(idx_mapping=torch.arange(6), num_reqs=6)
    manager.record_confidences(torch.tensor(sure, dtype=torch.float32), batch)
    total = manager.get_num_tokens(*scheduled(world))
    budget = world.rounds.allotment.budget
    assert 3 < budget < 6 * WIDTH - 5, "nothing is trimmed"
    assert total == 6 + budget
    planned, tokens = np.full(6, WIDTH, dtype=np.int32), np.full(6, 1 + WIDTH, dtype=np.int32)
    host, _ = manager.compact_batch(planned, tokens, np.arange(0, 7 * (1 + WIDTH), 1 + WIDTH, dtype=np.int32))
    assert host.sum() == total
    logits, starts, drafts, *_ = manager.reallocate_drafts(list(names), torch.arange(6))
    lengths = (logits[1:] - logits[:-1] - 1).numpy()
    assert drafts == budget == lengths.sum()
    assert starts[6] == total
    flight = world.rounds._verifying
    believed = world.policy.history.conditional(flight.slots, logit(sure[flight.rows]) / world.policy.sts.temperatures)
    wanted = scheduler.asynchronous(history.survivals(believed), budget, world.rounds.allotment.caps)
    assert lengths[flight.rows].tolist() == wanted.tolist()
    assert lengths[1] == 0
    assert lengths[2] <= 1
    assert len(set(lengths.tolist())) > 2


def test_where_vllm_refuses_lengths_on_the_device_they_are_chosen_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(**_: Any) -> Any:
        raise ValueError("backend X allows none")

    monkeypatch.setattr(logging.getLogger("vllm.dspark"), "propagate", True)
    assert v2_start.create_verification(refuses)(vllm_config=None) is None
    assert "backend X allows none" in caplog.text
    assert v2_start.create_verification(lambda **_: None)(vllm_config=None) is None


def config(
    graphs: CUDAGraphMode = CUDAGraphMode.NONE, policy: str = "adaptive", backend: str | None = None, **more: Any
) -> Any:
    parallel = {"pipeline_parallel_size": 1, "prefill_context_parallel_size": 1, "enable_batch_sharded_sampling": False}
    parallel |= {name: more.pop(name) for name in parallel if name in more}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(is_hybrid=more.pop("is_hybrid", False), return_sampling_mask=False),
        speculative_config=SimpleNamespace(enable_adaptive_verification=False),
        compilation_config=SimpleNamespace(cudagraph_mode=graphs),
        attention_config=SimpleNamespace(backend=backend and SimpleNamespace(name=backend)),
        lora_config=more.pop("lora", None), additional_config={"dspark": {"policy": policy}},
    )  # fmt: skip


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms

    made = SimpleNamespace(is_cuda=lambda: True, is_device_capability_family=lambda family: family == 90)
    monkeypatch.setattr(platforms, "current_platform", made)


FULL = CUDAGraphMode.FULL_AND_PIECEWISE


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("given", "kind", "why"),
    [
        ({"graphs": FULL}, "device", "graphs"),
        ({"graphs": FULL, "policy": "fixed"}, "whole", "not set"),
        ({"graphs": FULL, "lora": object()}, "whole", "LoRA"),
        ({"graphs": FULL, "backend": "FLASHINFER"}, "whole", "FLASHINFER"),
        ({}, "host", "no full CUDA graphs"),
        ({"graphs": FULL, "pipeline_parallel_size": 2}, "fixed", "pipeline"),
        ({"graphs": FULL, "is_hybrid": True}, "fixed", "recurrent"),
        ({"graphs": FULL, "enable_batch_sharded_sampling": True}, "fixed", "sharded"),
    ],
)
def test_the_form_follows_from_the_configuration_and_is_said_once(
    given: dict[str, Any], kind: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm.dspark"), "propagate", True)
    made = config(**given)
    with caplog.at_level(logging.INFO, logger="vllm.dspark"):
        v2_form.choose(made)
        v2_form.choose(made)
    assert v2_form.form(made).kind == kind
    assert made.speculative_config.enable_adaptive_verification == (kind == "device")
    assert len(caplog.records) == 1
    assert why in caplog.text


def test_trimmed_drafts_are_not_rejected_ones() -> None:
    scheduled = {"a": [-1] * 4, "b": [-1] * 4, "c": [-1] * 4}
    assert counting.left_out(scheduled, {"b": 3}, {"a": 4, "b": 2}) == {"a": 0, "b": 3, "c": 4}
    seen: list[Any] = []
    update = counting.update_from_output(lambda self, scheduler, output: seen.append(scheduler.num_invalid_spec_tokens))
    step = SimpleNamespace(scheduled_spec_decode_tokens=scheduled, num_invalid_spec_tokens=None)
    update(None, step, SimpleNamespace())
    update(None, step, SimpleNamespace(dspark_verified={"a": 1}))
    assert seen == [None, {"a": 3, "b": 4, "c": 4}]


@pytest.mark.parametrize(("ahead", "least"), [(True, 2), (False, 1)])
def test_no_drafts_are_scheduled_while_none_will_be_made(ahead: bool, least: int) -> None:
    """vLLM's own table of drafts by requests says so; the step after those under way is the first that can know."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=3, async_scheduling=ahead))
    scheduler = SimpleNamespace(vllm_config=config, dynamic_sd_lookup=None, running=["a"])
    update = counting.update_from_output(lambda *_: "kept")
    assert update(scheduler, None, SimpleNamespace(dspark_resting=least)) == "kept"
    assert scheduler.dynamic_sd_lookup == [0] * 4
    update(scheduler, None, SimpleNamespace())  # another engine's output
    assert scheduler.dynamic_sd_lookup == [0] * 4
    update(scheduler, None, SimpleNamespace(dspark_resting=least - 1))
    assert scheduler.dynamic_sd_lookup is None
    scheduler.running = []
    update(scheduler, None, SimpleNamespace(dspark_resting=99))
    assert scheduler.dynamic_sd_lookup is None  # whoever comes next may draft at once
    own = SimpleNamespace(vllm_config=config, dynamic_sd_lookup=[0, 4, 4, 2], running=["a"])
    for rounds in (99, 0):
        update(own, None, SimpleNamespace(dspark_resting=rounds))
        assert own.dynamic_sd_lookup == [0, 4, 4, 2]


def test_vllms_statistics_count_what_was_verified() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = getattr(Scheduler.make_spec_decoding_stats, "__wrapped__", Scheduler.make_spec_decoding_stats)
    make = counting.make_spec_decoding_stats(original)
    scheduler, stats = SimpleNamespace(log_stats=True, num_spec_tokens=4), None
    for name, accepted in (("a", 1), ("b", 0), ("c", 0)):
        stats = make(
            scheduler, stats, num_draft_tokens=4, num_accepted_tokens=accepted, num_invalid_spec_tokens={"a": 2, "b": 4},
            request_id=name,
        )  # fmt: skip
    assert isinstance(stats, SpecDecodingStats)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (2, 6, 1)


def test_the_output_says_what_was_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that sampled, once its results have landed; any other output is handed on as it is."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    class Output(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            return SimpleNamespace(req_ids=["a", "b", "c"])

        def get_kv_connector_output(self) -> None:  # vLLM 0.33 wants it
            return None

    world = World(policy="fixed", names=("a", "b", "c"))
    given: list[Any] = [Output(), None, Output()]
    reporting = v2_start._reporting(lambda: given.pop(0), world.rounds)
    found = reporting().get_output()  # no drafts were scheduled yet
    assert not hasattr(found, "dspark_verified")
    assert found.dspark_resting == 0
    assert reporting() is None
    world.play(1, 0.9)
    world.step(0.9, np.array([4, 1, 0]))
    found = reporting().get_output()
    assert found.req_ids == ["a", "b", "c"]
    assert found.dspark_verified == dict.fromkeys("abc", WIDTH)
    assert found.dspark_resting == 0


def test_counters_are_shown_where_metrics_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client

    registry = CollectorRegistry(auto_describe=True)
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(metrics, "_collector", metrics.Collector())
    path = metrics.publish(2)
    metrics.publish(1)  # another engine of this process
    worker = metrics.open_board(path, 1)
    assert worker is not None
    worker.add(5, 3, 2, 7, True)
    worker.add(1, 1, 0, 0, False)
    shown = generate_latest(registry).decode()
    for outcome, count in (("accepted", 4), ("rejected", 2), ("trimmed", 2), ("undrafted", 7)):
        assert f'dspark_draft_tokens_total{{engine="1",outcome="{outcome}"}} {count}.0' in shown
    assert 'dspark_steps_total{drafting="skipped",engine="1"} 1.0' in shown
    assert 'engine="2"' in shown
    assert metrics.open_board(path, 9) is None
    assert metrics.open_board("/nowhere/at-all", 0) is None


def test_counters_reach_several_api_servers(tmp_path: Path) -> None:
    """vLLM has them merge what every process has written; the one that counts may have been forked before that was known."""
    program = """
import os, prometheus_client
from vllm_dspark import metrics
os.environ["PROMETHEUS_MULTIPROC_DIR"] = {folder!r}
assert metrics.publish(2) == ""
for engine in (0, 1):
    if os.fork() == 0:
        counters = metrics.open_board("", engine)
        counters.add(5, 3, 2, 7, True)
        counters.add(1, 1, 0, 0, False)
        os._exit(0)
    os.wait()
registry = prometheus_client.CollectorRegistry()
prometheus_client.multiprocess.MultiProcessCollector(registry)
print(prometheus_client.generate_latest(registry).decode())
"""
    done = subprocess.run(
        [sys.executable, "-c", "import prometheus_client.multiprocess\n" + program.format(folder=str(tmp_path))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for engine in (0, 1):
        for outcome, count in (("accepted", 4), ("rejected", 2), ("trimmed", 2), ("undrafted", 7)):
            assert f'dspark_draft_tokens_total{{engine="{engine}",outcome="{outcome}"}} {count}.0' in done.stdout
        assert f'dspark_steps_total{{drafting="skipped",engine="{engine}"}} 1.0' in done.stdout


def test_files_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import os; from vllm_dspark import metrics; print(metrics.publish(1), flush=True); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    left = Path(done.stdout.strip())
    assert left.exists()
    path = Path(metrics.Board.create(1))
    assert not left.exists()
    metrics.Board.create(1)
    assert path.exists()
