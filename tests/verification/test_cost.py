"""The cost model is the profile's staircase, corrected by what steps really take."""

import dataclasses
import json

import numpy as np
import pytest

from vllm_dspark.verification import profile
from vllm_dspark.verification.cost import CostModel, CostTable, StepTiming

TABLE = CostTable(
    sizes=(1, 4, 8, 16, 64),
    seconds=(0.010, 0.011, 0.012, 0.020, 0.060),
    draft_sizes=(1, 8),
    draft_seconds=(0.002, 0.003),
    captured=8,
    per_context=1e-8,
    per_token_context=2e-9,
    draft_per_context=3e-9,
    context_only=1e-4,
)


def timing(model, tokens, factor=1.0, drafted=0, context=1000.0, requests=4):
    """A step that takes ``factor`` times what the table says."""
    fresh = CostModel(model.table, 64, 8)
    shape = StepTiming(tokens, requests, context, 1.0, None, drafted, 0.0)
    target, draft = fresh.step(shape)
    return dataclasses.replace(shape, target_seconds=target * factor, draft_seconds=draft * factor)


def test_staircase_pads_to_captured_sizes_and_interpolates_above():
    curve = TABLE.target_curve(128)
    assert curve[[1, 2, 4, 5, 8]].tolist() == [0.010, 0.011, 0.011, 0.012, 0.012]
    assert curve[9] == pytest.approx(0.020)  # leaving the captured graphs is a jump, never a blend
    assert curve[40] == pytest.approx(0.040)
    assert curve[128] == pytest.approx(0.060 + 64 * 0.040 / 48)


def test_context_terms():
    model = CostModel(TABLE, 64, 8)
    short, long = model.curve(4, 4, 4, 0.0), model.curve(4, 4, 4, 4e5)
    assert long[0] - short[0] == pytest.approx(4e5 * 1e-8 + 4 * 1e5 * 2e-9)
    assert long[4] - short[4] == pytest.approx(4e5 * 1e-8 + 8 * 1e5 * 2e-9)
    at = model.at(np.array([4.0, 8.0]), 4, 4e5, np.array([4e5, 8e5]))
    assert at == pytest.approx(long[[0, 4]])
    assert model.drafting(0, 0.0) == 0.0
    assert float(model.drafting(2, 1000.0)) == pytest.approx(model.drafting(2, 0.0) + 3e-6)


def test_one_step_has_the_same_price_as_among_others():
    model = CostModel(TABLE, 64, 8)
    tokens, contexts = np.array([1.0, 3.5, 20.0, 500.0]), np.array([1e3, 2e3, 3e3, 4e3])
    together = model.at(tokens, 4, 1e4, contexts).tolist()
    assert [float(model.at(*one)) for one in zip(tokens.tolist(), [4] * 4, [1e4] * 4, contexts, strict=True)] == together
    counts = np.array([0, 1, 5, 20])
    together = model.drafting(counts, contexts).tolist()
    assert [float(model.drafting(*one)) for one in zip(counts.tolist(), contexts.tolist(), strict=True)] == together


def test_steps_beyond_the_expected_size_still_have_a_price():
    model = CostModel(TABLE, 8, 2)
    assert np.isfinite(model.curve(500, 10, 4, 0.0)).all()


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_wrong_table_is_corrected_where_it_was_measured_and_nearby(factor):
    model = CostModel(TABLE, 64, 8)
    rng = np.random.default_rng(0)
    for _ in range(40):
        model.observe(timing(model, 8, factor * np.exp(0.05 * rng.standard_normal()), drafted=4))
    target, draft = model.step(timing(model, 8, drafted=4))
    assert target == pytest.approx(timing(model, 8, factor, 4).target_seconds, rel=0.04)
    assert draft == pytest.approx(timing(model, 8, factor, 4).draft_seconds, rel=0.04)
    near = model.curve(16, 0, 4, 0.0)[0] / CostModel(TABLE, 64, 8).curve(16, 0, 4, 0.0)[0]
    assert abs(np.log(near / factor)) < 0.6 * abs(np.log(factor))  # what was not measured follows part of the way
    assert model.target.error(0.5) < 0.15


def test_stalls_and_compilations_are_ignored():
    model = CostModel(TABLE, 64, 8)
    for _ in range(30):
        assert model.observe(timing(model, 8))
    before = model.curve(8, 0, 4, 1000.0)[0]
    assert not model.observe(timing(model, 8, 50.0))
    assert not model.observe(dataclasses.replace(timing(model, 8), target_seconds=float("nan")))
    assert not model.observe(dataclasses.replace(timing(model, 8), target_seconds=0.0))
    assert model.curve(8, 0, 4, 1000.0)[0] == before
    assert model.target.ignored == 1


def test_one_step_moves_the_prediction_by_at_most_a_tenth():
    for factor in (0.5, 0.9, 1.2, 2.0):
        model = CostModel(TABLE, 64, 8)
        before = model.step(timing(model, 8))[0]
        model.observe(timing(model, 8, factor))
        assert abs(np.log(model.step(timing(model, 8))[0] / before)) <= 0.1 + 1e-9


def test_a_lasting_change_is_no_stall():
    model = CostModel(TABLE, 64, 8)
    for _ in range(50):
        model.observe(timing(model, 8))
    for _ in range(60):
        model.observe(timing(model, 8, 3.0))
    assert model.step(timing(model, 8))[0] == pytest.approx(timing(model, 8, 3.0).target_seconds, rel=0.1)


def test_uncertainty_shrinks_where_measured_and_less_elsewhere():
    model = CostModel(TABLE, 64, 8)
    here, far = model.target.weights(8), model.target.weights(64)
    for _ in range(30):
        model.observe(timing(model, 8))
    assert model.target.variance(here) < 0.1 * model.target.variance(far)
    assert model.target.variance(far) <= CostModel(TABLE, 64, 8).target.variance(far)


def test_state_survives_json_and_foreign_state_is_refused():
    model = CostModel(TABLE, 64, 8)
    for _ in range(20):
        model.observe(timing(model, 8, 1.2, drafted=2))
    other = CostModel(TABLE, 64, 8)
    other.load_state(json.loads(json.dumps(model.state())))
    assert other.curve(8, 3, 4, 10.0) == pytest.approx(model.curve(8, 3, 4, 10.0), rel=0.02)
    with pytest.raises(ValueError, match="wanted"):
        CostModel(TABLE, 4096, 8).load_state(model.state())


KEY = {"vllm": "0.32.0", "device": "cpu", "capture_sizes": [1, 2, 4]}


def test_table_round_trip(tmp_path, caplog):
    TABLE.save(tmp_path / "t.json", KEY)
    assert CostTable.load(tmp_path / "t.json", KEY) == TABLE
    assert CostTable.load(tmp_path / "t.json") == TABLE
    assert CostTable.load(tmp_path / "absent.json", KEY) is None
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "ignoring"),
        (lambda text: "[]", "not a cost table"),
        (lambda text: text.replace('"schema": 1', '"schema": 7'), "schema 7"),
        (lambda text: text.replace("0.32.0", "0.33.0"), "another vllm"),
        (lambda text: text.replace('"per_context"', '"per_kontext"'), "ignoring"),
        (lambda text: text.replace("0.011", "-0.011"), "positive"),
        (lambda text: text.replace('"kind": "cost table"', '"kind": "trace"'), "kind"),
    ],
)
def test_a_corrupt_or_foreign_file_is_one_warning_and_none(tmp_path, caplog, damage, says):
    path = tmp_path / "t.json"
    TABLE.save(path, KEY)
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    assert CostTable.load(path, KEY) is None
    assert len(caplog.records) == 1
    assert says in caplog.text


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    TABLE.save(path, KEY)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dataclasses.replace(TABLE, label="new").save(path, KEY)
    assert CostTable.load(path, KEY) == TABLE
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": (4, 1, 8, 16, 64)},
        {"sizes": (0, 4, 8, 16, 64)},
        {"seconds": (0.1,)},
        {"seconds": (0.1, 0.1, 0.1, 0.1, float("nan"))},
        {"draft_seconds": (0.0, 0.1)},
        {"per_context": -1.0},
    ],
)
def test_absurd_tables_are_refused(change):
    with pytest.raises(ValueError, match="cost table"):
        dataclasses.replace(TABLE, **change)


def test_fit_recovers_a_table_from_noisy_samples_with_stalls():
    rng = np.random.default_rng(3)
    truth = CostModel(dataclasses.replace(TABLE, context_only=0.0), 64, 8)
    samples = []
    for tokens in TABLE.sizes:
        for context in (128.0, 4000.0, 64000.0):
            for repeat in range(9):
                drafted = min(tokens, 8)
                shape = StepTiming(tokens, 1, context, 1.0, tokens * context, drafted, context)
                target, draft = truth.step(shape)
                noise = np.exp(0.02 * rng.standard_normal(2)) * (30 if repeat == 4 else 1)
                samples.append(dataclasses.replace(shape, target_seconds=target * noise[0], draft_seconds=draft * noise[1]))
    found = profile.fit(samples, captured=8)
    assert found.seconds == pytest.approx(TABLE.seconds, rel=0.06)
    assert found.per_token_context == pytest.approx(2e-9, rel=0.3)
    assert found.draft_per_context == pytest.approx(3e-9, rel=0.3)


def test_fit_tells_requests_and_verification_from_tokens():
    """Steps of equally many tokens that differ in requests, and in whether they verify."""
    table = CostTable(
        (1, 256), (0.010, 0.030), (1, 32), (0.003, 0.007), per_request=5e-5, verifying=8e-4, verifying_per_request=6e-5
    )
    truth = CostModel(table, 512, 64)
    samples = []
    for requests in (1, 2, 4, 8, 16, 32):
        for k in (0, 1, 3, 7):
            drafted = requests if k else 0
            shape = StepTiming(requests * (1 + k), requests, requests * 64.0, 1.0, None, drafted, drafted * 64.0)
            target, draft = truth.step(shape)
            samples.append(dataclasses.replace(shape, target_seconds=target, draft_seconds=draft))
    found = profile.fit(samples)
    assert found.per_context == found.per_token_context == 0.0  # every request had the same context
    assert found.per_request == pytest.approx(5e-5, rel=0.05)
    assert found.verifying == pytest.approx(8e-4, rel=0.05)
    assert found.verifying_per_request == pytest.approx(6e-5, rel=0.05)


def test_a_busy_machine_is_noticed_and_its_slow_steps_do_not_count():
    def sample(tokens, seconds):
        return StepTiming(tokens, 1, 64.0, seconds, None, 1, 64.0, 0.003)

    quiet = [sample(tokens, 0.01 * slow) for tokens in (1, 4, 8) for slow in (1.0, 1.02, 1.1, 9.0)]
    busy = [sample(tokens, 0.01 * slow) for tokens in (1, 4, 8) for slow in (1.0, 1.02, 2.0, 3.0)]
    assert not profile.disturbed(quiet)
    assert profile.disturbed(busy)
    assert profile.fit(busy).seconds == pytest.approx([0.01] * 3, rel=0.02)


def test_a_step_far_too_short_is_believed_and_one_far_too_long_is_not():
    table = CostTable((1, 64), (0.010, 0.020), (1, 64), (0.002, 0.003))
    short, long = CostModel(table, 64, 64), CostModel(table, 64, 64)
    shape = StepTiming(4, 4, 0.0, 1.0)
    before, _ = short.step(shape)
    assert not long.observe(dataclasses.replace(shape, target_seconds=6 * before))
    assert long.step(shape)[0] == before
    assert short.observe(dataclasses.replace(shape, target_seconds=before / 6))
    assert short.step(shape)[0] < 0.6 * before
    for _ in range(30):
        short.observe(dataclasses.replace(shape, target_seconds=before / 6))
    assert short.step(shape)[0] == pytest.approx(before / 6, rel=0.2)


def test_a_surprise_leaves_no_size_less_certain_than_it_was_at_first():
    corrector = CostModel(TABLE, 512, 64).target
    row, far = corrector.weights(32), corrector.weights(512)
    for _ in range(300):
        corrector.update(row, 0.0)
    known = corrector.variance(row)
    first = far @ corrector.prior @ far
    assert corrector.update(row, -1.5)
    assert corrector.mean @ row < -0.4, "believed"
    assert known < corrector.variance(row) < corrector.variance(far) <= first


def test_an_early_error_is_shared_and_a_late_one_is_not():
    table = CostTable((1, 64), (0.010, 0.020), (1, 64), (0.002, 0.003))
    model = CostModel(table, 64, 64)
    drafting = StepTiming(16, 4, 0.0, 1.0, None, 4, 0.0, 1.0)

    def timing(shape, slow):
        target, draft = model.step(shape)
        return dataclasses.replace(shape, target_seconds=slow * target, draft_seconds=slow * draft)

    early = model.shared_error(timing(drafting, 1.3), 4)
    assert 0.5 * np.log(1.3) < early < np.log(1.3)
    for _ in range(200):
        for shape in (drafting, StepTiming(4, 4, 0.0, 1.0)):
            model.observe(timing(shape, 1.0))
    assert abs(model.shared_error(timing(drafting, 1.3), 4)) < 0.5 * early


def test_fit_needs_samples():
    with pytest.raises(ValueError, match="wanted at least one"):
        profile.fit([StepTiming(4, 4, 0.0, 0.01)])


def test_isotonic_is_the_nearest_monotone_sequence():
    assert profile.isotonic(np.array([1.0, 3.0, 2.0, 4.0]), np.ones(4)).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert profile.isotonic(np.array([3.0, 1.0]), np.array([1.0, 3.0])).tolist() == [1.5, 1.5]


def test_measuring_the_same_step_for_long_does_not_make_the_correction_swing():
    """Curves are rebuilt now and then; what was learned since counts, or the same error is corrected again and again."""
    table = CostTable((1, 64), (0.010, 0.020), (1, 64), (0.002, 0.003))
    model, rng = CostModel(table, 64, 64), np.random.default_rng(0)
    worst = 0.0
    for step in range(3000):
        model.observe(StepTiming(32, 32, 0.0, 0.015 * float(np.exp(0.03 * rng.standard_normal()))))
        if step > 100:
            worst = max(worst, abs(model.step(StepTiming(32, 32, 0.0, 1.0))[0] / 0.015 - 1.0))
    assert worst < 0.05
