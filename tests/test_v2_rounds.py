"""The policy behind the V2 runner: it decides from earlier rounds alone, alike on every rank, and keeps to its limits."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from v2_world import FLAT, STEEP, WIDTH, World

from vllm_dspark.engine import v2_rounds
from vllm_dspark.verification import scheduler
from vllm_dspark.verification.cost import CostTable
from vllm_dspark.verification.survival import logit, sigmoid

SWITCH = CostTable((1, 4096), (0.010, 0.5), (1, 512), (0.004, 0.0041))


def test_verifies_everything_where_that_is_free_and_good() -> None:
    world = World()
    lengths = world.play(60, 0.95)
    assert (lengths[20:] == WIDTH).mean() > 0.9
    assert all(drafting for drafting, _ in world.log[20:])


def test_the_block_forward_is_skipped_where_nothing_pays() -> None:
    world = World(STEEP, names=tuple("abcdefgh"))
    lengths = world.play(400, 0.4)
    assert lengths[20:].mean() < 0.05
    assert np.mean([drafting for drafting, _ in world.log[100:]]) < 0.03  # probes
    assert world.policy.explain()["probing_share"] <= 0.01


def test_drafting_stops_when_acceptance_falls_and_resumes_when_it_returns() -> None:
    world = World(SWITCH)
    assert world.play(60, 0.95)[20:].mean() > 2
    assert world.play(200, 0.02)[60:].mean() < 0.2
    assert world.play(300, 0.95)[-100:].mean() > 2


def test_a_budget_does_not_depend_on_what_the_round_itself_drafted() -> None:
    """Two worlds alike but for one round's confidences: they part only after that round was verified."""
    for on_device in (False, True):
        worlds = [World(SWITCH, on_device=on_device) for _ in range(2)]
        for step in range(80):
            high, low = (0.9, 0.9) if step != 50 else (0.999, 0.05)
            hits = np.array([2, 1])
            for world, confidence in zip(worlds, (high, low), strict=True):
                world.step(confidence, hits)
        one, two = (world.log for world in worlds)
        assert one[:52] == two[:52]  # round 50 drafts at the end of step 50, step 51 verifies it
        assert worlds[0].policy.history.recent.tolist() != worlds[1].policy.history.recent.tolist()


def test_the_host_waits_for_nothing_before_it_asks_for_a_round() -> None:
    """What has landed is looked at once the device has work again."""
    world, opened = World(policy="fixed"), list[bool]()
    asked = world.rounds.begin
    send, asking = world.rounds._landing.send, [False]

    def begin(*args: Any) -> bool:
        asking[0] = True
        try:
            return asked(*args)
        finally:
            asking[0] = False

    def watched(*tensors: Any) -> Any:
        parcel = send(*tensors)
        return SimpleNamespace(open=lambda: opened.append(asking[0]) or parcel.open())

    world.rounds.begin, world.rounds._landing.send = begin, watched  # type: ignore[method-assign]
    world.play(10, 0.9)
    assert len(opened) == 2 * 9 - 1  # the first step had no drafts to judge
    assert not any(opened)


def test_ranking_uses_what_the_policy_believes_of_a_confidence() -> None:
    """Temperatures, and how far each position and each request was off so far; slots are the runner's."""
    world = World(names=("bold", "shy"))
    for _ in range(60):
        world.step(0.6, np.array([0, WIDTH]))
    world.policy.sts.temperatures[:] = [1.0, 2.0, 0.5, 1.0]
    world.rounds.verify(dict.fromkeys(world.names, 5), dict.fromkeys(world.names, [-1] * 4), ranked_later=True)
    flight = world.rounds._verifying
    world.states.req_id_to_index = {"shy": 1, "bold": 5}
    scale, shift = world.rounds.corrections(8, WIDTH)
    raw = np.full((2, WIDTH), 0.6)
    wanted = world.policy.history.conditional(flight.slots, logit(raw) / world.policy.sts.temperatures)
    assert sigmoid(scale * logit(raw) + shift[[5, 1]]) == pytest.approx(wanted, abs=1e-6)
    assert wanted[1, 0] > wanted[0, 0] + 0.2
    assert not shift[[0, 2, 3, 4, 6, 7]].any()


def test_outcomes_belong_to_the_round_they_judge() -> None:
    world = World(policy="fixed")
    told: list[tuple[list[int], list[int]]] = []
    original = world.policy.judged

    def judged(flight: Any, verified: Any, accepted: Any) -> None:
        told.append((verified.tolist(), accepted.tolist()))
        original(flight, verified, accepted)

    world.policy.judged = judged  # type: ignore[method-assign]
    for hits in ([0, 0], [3, 1], [4, 0], [2, 2], [0, 0]):
        world.step(0.9, np.array(hits))
    assert told == [([], []), ([4, 4], [3, 1]), ([4, 4], [4, 0]), ([4, 4], [2, 2])]


def test_requests_keep_their_own_limits() -> None:
    world = World(names=("a", "off", "two", "always"))
    for name, options in (("off", {"dspark_policy": "off"}), ("two", {"dspark_max_draft_tokens": 2}),
                          ("always", {"dspark_policy": "fixed"})):  # fmt: skip
        world.rounds.announce(name, options)
    lengths = world.play(40, 0.95)
    assert lengths[20:].mean(axis=0) == pytest.approx([WIDTH, 0, 2, WIDTH], abs=0.3)
    world.rounds.verify(dict.fromkeys(world.names, 5), dict.fromkeys(world.names, [-1] * 4), ranked_later=True)
    _, shift = world.rounds.corrections(8, WIDTH)
    assert (shift == v2_rounds.FIRST).all(axis=1).tolist() == [False] * 3 + [True] + [False] * 4
    assert world.step(0.95, room=1).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(("policy", "wanted"), [("fixed", WIDTH), ("off", 0)])
def test_fixed_and_off_need_no_costs(policy: str, wanted: int) -> None:
    world = World(None, policy=policy)
    assert (world.play(10, 0.5)[1:] == wanted).all()
    assert all(drafting == bool(wanted) for drafting, _ in world.log)


def test_requests_that_went_or_changed_places_take_no_drafts_of_others() -> None:
    world = World(policy="fixed", names=("a", "b", "c"))
    world.play(3, 0.9)
    world.names = ["c", "a", "new"]
    assert world.step(0.9).tolist() == [WIDTH, WIDTH, 0]  # the new one had no round yet
    assert world.step(0.9).tolist() == [WIDTH] * 3
    world.names = ["x"]
    assert world.step(0.9).tolist() == [0]


def test_drafts_of_a_request_that_was_preempted_are_not_verified() -> None:
    """It came back under its name, but what it drafted was in a slot that is another's now."""
    world = World(policy="fixed")
    world.play(3, 0.9)
    world.rounds.announce("a", None)
    assert world.step(0.9).tolist() == [0, WIDTH]
    assert world.step(0.9).tolist() == [WIDTH, WIDTH]


def test_a_request_that_comes_back_under_its_name_brings_its_own_options() -> None:
    """The batch looks as it did, but one of its requests is another."""
    world = World(policy="fixed")
    world.rounds.announce("a", {"dspark_max_draft_tokens": 1})
    world.play(3, 0.9)
    assert world.step(0.9).tolist() == [1, WIDTH]
    world.rounds.announce("a", {"dspark_policy": "off"})
    world.play(2, 0.9)
    assert world.step(0.9).tolist() == [0, WIDTH]
    world.rounds.announce("a", None)
    world.play(2, 0.9)
    assert world.step(0.9).tolist() == [WIDTH, WIDTH]


@pytest.mark.parametrize(("most", "drafting"), [(0, False), (2, True)])
def test_nobody_drafts_more_than_the_scheduler_can_use(most: int, drafting: bool) -> None:
    world = World(policy="fixed")
    world.play(2, 0.9)
    assert world.rounds.begin(world.batch(), most) == drafting
    world.rounds.end(torch.full((2, WIDTH), 0.9))
    assert world.step(0.9).tolist() == [most, most]


def test_other_engines_wait_for_the_block_forward() -> None:
    world = World(None, policy="off", always=True)
    assert (world.play(5, 0.9) == 0).all()
    assert all(drafting for drafting, _ in world.log)


def test_all_or_nothing_where_only_whole_steps_have_graphs() -> None:
    world = World(CostTable((1, 4, 64), (0.010, 0.012, 0.09), (1, 64), (0.001, 0.0012)), whole=True)
    lengths = world.play(200, 0.7)
    assert set(lengths.ravel().tolist()) <= {0, WIDTH}
    assert lengths.any()


def test_a_policy_that_breaks_warns_once_and_verifies_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    assert world.play(20, 0.95)[-1].sum() > 0

    def search(*_: Any) -> Any:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(scheduler, "search", search)
    monkeypatch.setattr(logging.getLogger("vllm.dspark"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.dspark"):
        lengths = world.play(40, 0.95)
    assert (lengths[1:] == 0).all()
    assert sum("ZeroDivisionError: planted" in record.message for record in caplog.records) == 1
    assert not world.log[-1][0]


class Ranks:
    """Rank 0 speaks, the others repeat; run one after the other."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.heard = 0

    def say(self, value: Any) -> Any:
        self.said.append(value)
        return value

    def hear(self, own: Any) -> Any:
        value = self.said[self.heard]
        self.heard += 1
        assert len(value) == len(own), "ranks time the same rounds"
        return value


def ranks(share: bool) -> list[World]:
    """Two ranks of one engine; the clock of the second runs three times as fast while drafting looks cheap to nobody."""
    group = Ranks()
    worlds = []
    for agree, noise in ((group.say, 1.0), (group.hear, 3.0)):
        world = World(SWITCH, names=tuple("abcd"), agree=agree if share else None, noise=noise)
        for confidence in (0.9, 0.3, 0.75):
            world.play(150, confidence)
        worlds.append(world)
    return worlds


def test_ranks_with_different_timings_decide_alike() -> None:
    one, two = ranks(share=True)
    assert one.log == two.log
    assert any(drafting for drafting, _ in one.log)
    assert one.policy.cost is not None and two.policy.cost is not None  # noqa: PT018
    assert one.policy.cost.target.updates > 10
    assert one.policy.cost.state() == two.policy.cost.state()


def test_ranks_that_do_not_share_their_timings_would_part() -> None:
    one, two = ranks(share=False)
    assert one.policy.cost is not None and two.policy.cost is not None  # noqa: PT018
    assert one.policy.cost.state() != two.policy.cost.state()


def test_times_are_learned_from_whole_rounds() -> None:
    world = World(CostTable((1, 4096), (0.020, 0.0202), (1, 512), (0.002, 0.0021)))
    world.truth = World().truth  # the engine is twice as fast as the table says
    world.play(64, 0.95)
    assert world.policy.cost is not None
    assert world.policy.cost.curve(2, 8, 2, 200.0)[8] == pytest.approx(0.010, rel=0.1)


def test_few_rounds_are_timed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(FLAT)
    world.play(v2_rounds.EAGER, 0.9)
    marks: list[float] = []
    monkeypatch.setattr(world, "mark", lambda: marks.append(world.now) or world.now)
    world.play(10 * v2_rounds.EVERY, 0.9)
    assert 0 < len(marks) <= 10 * 2 * 2


def test_drafts_are_counted_by_what_became_of_them() -> None:
    class Counters:
        def __init__(self) -> None:
            self.calls: list[tuple[int, ...]] = []

        def add(self, *numbers: int) -> None:
            self.calls.append(numbers)

    counters = Counters()
    world = World(names=("a", "off"), policy="fixed", max_draft_tokens=3, counters=counters)
    world.rounds.announce("off", {"dspark_policy": "off"})
    for hits in ([0, 0], [2, 0], [3, 0]):
        world.step(0.9, np.array(hits))
    world.step(0.9)
    assert counters.calls[0] == (0, 0, 0, 0, False)
    # verified, accepted, trimmed (the fourth draft of a), not drafted (all of "off"), skipped
    assert counters.calls[1:] == [(3, 2, 1, WIDTH, False), (3, 3, 1, WIDTH, False)]


def test_rounds_on_trial_show_that_drafting_pays_again() -> None:
    """After a loss of five rounds too many; a trial that has won gets back what it was charged for."""
    world = World()
    world.play(60, 0.95)
    ledger = world.policy.ledger
    ledger.balance, paid = ledger.limit - 0.05, ledger.probing
    lengths = world.play(40, 0.95)
    assert world.policy.counters["on trial"] in range(1, 6)
    assert (lengths[20:] == WIDTH).mean() > 0.9
    assert ledger.balance > 0
    assert ledger.probing == pytest.approx(paid)


# -- no drafts are scheduled while nobody drafts --

CROWD = tuple("abcdefgh")


def test_hardly_any_drafts_are_scheduled_where_nothing_pays() -> None:
    world = World(STEEP, names=CROWD)
    asked: list[int] = []
    begin = world.policy.begin_round
    world.policy.begin_round = lambda inputs: asked.append(world.rounds._round) or begin(inputs)  # type: ignore
    scheduled = world.serve(400, 0.4)
    assert np.mean([count > 0 for count in scheduled[100:]]) < 0.2
    assert len(asked) == sum(count > 0 for count in scheduled)
    assert world.policy.round == 400  # those that rest are rounds as well
    drafting = [drafting for drafting, _ in world.log]
    assert not any(now and not count for now, count in zip(drafting, scheduled, strict=True))
    assert 0 < sum(drafting) < 20  # probes come through
    assert world.policy.explain()["probing_share"] <= 0.01


def test_drafting_begins_again_though_no_drafts_were_scheduled() -> None:
    world = World(SWITCH, names=CROWD)
    world.serve(200, 0.02)
    assert not any(world.serve(60, 0.02)[-10:-4])
    scheduled = world.serve(400, 0.95)
    assert np.mean([count > 0 for count in scheduled[-100:]]) > 0.9
    assert np.mean([lengths for _, lengths in world.log[-100:]]) > 2


@pytest.mark.parametrize("under_way", [0, 1])
def test_where_drafting_pays_all_drafts_are_scheduled(under_way: int) -> None:
    world = World(names=CROWD)
    assert world.serve(60, 0.95, under_way) == [WIDTH] * 60


def test_a_rest_ends_with_those_it_was_for() -> None:
    world = World(STEEP, names=CROWD)
    world.serve(100, 0.4)
    world.step(0.4)
    while world.rounds.resting < 3:
        world.step(0.4)
    before = world.rounds.resting
    world.step(0.4, most=0)
    assert world.rounds.resting == before - 1
    world.names = list("ijklmnop")
    world.step(0.4, room=0, most=0)
    assert world.rounds.resting == 0
    assert world.log[-1] == (False, (0,) * 8)
    world.step(0.4, room=0)
    assert world.policy.explain()["reason"] != v2_rounds.RESTING


def test_steps_of_a_rest_are_timed_and_nothing_else_is_sent() -> None:
    world, sent = World(STEEP, names=CROWD), []
    world.serve(100, 0.4)
    send, timed = world.rounds._landing.send, []
    world.rounds._landing.send = lambda *tensors: sent.append(world.rounds._round) or send(*tensors)  # type: ignore
    world.policy.timed = lambda timing: timed.append(timing.tokens)  # type: ignore
    while world.rounds.resting < 20:
        world.step(0.4)
    sent.clear()
    for step in range(18):
        world.step(0.4, room=WIDTH if step == 0 else 0, most=0)
    assert len(sent) == 1  # the verdict on the round before the rest
    assert len(timed) >= 2
    assert set(timed) == {8}


def test_nobody_rests_where_other_engines_wait_for_the_block_forward() -> None:
    world = World(STEEP, names=CROWD, always=True)
    assert world.serve(60, 0.4) == [WIDTH] * 60


def test_without_anybody_who_may_draft_the_rest_has_no_end() -> None:
    world = World(None, policy="off")
    assert sum(count > 0 for count in world.serve(100, 0.5)) == 2  # until the first round's answer has come
    world.names.append("new")
    world.rounds.announce("new", {"dspark_policy": "fixed"})
    assert world.serve(20, 0.5)[-10:] == [WIDTH] * 10
