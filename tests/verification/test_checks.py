"""When a round goes without drafts only to be measured."""

from vllm_dspark.verification.checks import Checks


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
    assert not checks.due(64, doubtful=False, now=1500)
    assert checks.due(64, doubtful=False, now=1503), "another size"


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
