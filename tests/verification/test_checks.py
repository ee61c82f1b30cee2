"""When a round goes without drafts, or with drafts, only to be measured."""

import pytest

from vllm_dspark.verification.checks import Checks, Trials


def test_a_size_that_nothing_can_be_measured_of_is_asked_for_rarely():
    checks = Checks()
    asked = [now for now in range(1000) if checks.due(8, doubtful=False, now=now)]
    assert asked[0] == 3
    assert 10 <= len(asked) <= 1000 / 64 + 1


def test_a_size_is_left_alone_once_it_was_measured():
    checks = Checks()
    asked = []
    for now in range(1500):
        if checks.due(8, doubtful=False, now=now):
            asked.append(now)
            checks.measured(8, 0.010, 0.010, now)
    assert asked == [3, 1003]
    assert not checks.due(8, doubtful=False, now=1500)
    assert [now for now in range(1500, 1510) if checks.due(64, doubtful=False, now=now)] == [1503], "another size"


def test_a_load_that_changes_is_not_measured():
    checks = Checks()
    assert not any(checks.due(1 + now % 4 // 2, doubtful=False, now=now) for now in range(1000))
    assert any(checks.due(2, doubtful=False, now=now) for now in range(1000, 1003)), "one that lasts is"


def test_a_step_far_shorter_than_expected_is_soon_measured_again():
    checks = Checks()
    asked = []
    for now in range(40):
        if checks.due(8, doubtful=False, now=now):
            asked.append(now)
            checks.measured(8, 0.005 if len(asked) < 4 else 0.010, 0.010, now)
    assert asked == [3, 6, 9, 12]


def test_doubt_alone_asks_even_where_some_draft_in_any_case():
    checks = Checks()
    assert not any(checks.due(None, doubtful=False, now=now) for now in range(100))
    assert sum(checks.due(None, doubtful=True, now=now) for now in range(100, 200)) in range(10, 20)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (8, [0, 4, 10, 20, 36, 62, 104, 171, 278, 450, 725, 1165]),
        (1, [0, 4, 12, 28, 60, 124, 252, 508, 1020]),
    ],
)
def test_trials_become_rare_however_little_they_teach(tokens, expected):
    trials = Trials()
    tried = []
    for now in range(1500):
        if trials.due(tokens, 0.05, now):
            tried.append(now)
            trials.tried(tokens, 0.05, now)
    assert tried == expected
    assert trials.due(64, 0.05, 1500), "another size"


def test_trials_become_rare_though_the_best_choice_goes_to_and_fro():
    """Sometimes few would draft, and what that takes is known better."""
    trials, tried = Trials(), 0
    for now in range(1500):
        deviation = 0.08 if now % 8 < 4 else 0.05
        if trials.due(8, deviation, now):
            trials.tried(8, deviation, now)
            tried += 1
    assert tried < 30


def test_a_size_is_tried_again_as_soon_as_much_less_is_known_of_it():
    trials = Trials()
    for now in (0, 4, 12, 28):
        trials.tried(8, 0.05, now)
    assert not trials.due(8, 0.07, 29)
    assert trials.due(8, 0.08, 29)
    trials.tried(8, 0.08, 29)
    assert not trials.due(8, 0.08, 32)
    assert trials.due(8, 0.08, 33), "from the beginning"
