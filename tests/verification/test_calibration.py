"""Calibration learns what over-confidence hides, from judged drafts only."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dspark.verification import calibration
from vllm_dspark.verification.calibration import Rounds
from vllm_dspark.verification.online import OnlineSTS
from vllm_dspark.verification.survival import leading, logit, sigmoid, survival, usable

TRUE = np.linspace(1.6, 2.6, 7)


def rounds(count, seed, temperatures=TRUE, cut=True):
    """Over-confident rounds; ``cut`` verifies only while the raw survival exceeds 0.3, as a scheduler would."""
    rng = np.random.default_rng(seed)
    logits = np.linspace(2.0, 0.8, 7) + rng.normal(0, 1.5, (count, 7)) + rng.normal(0, 0.8, (count, 1))
    confidences = sigmoid(logits * temperatures)
    accepted = np.cumprod(rng.random((count, 7)) < sigmoid(logits), axis=1).sum(axis=1)
    shown = (np.cumprod(confidences, axis=1) > 0.3).sum(axis=1)
    verified = np.maximum(shown, 1) if cut else np.full(count, 7)
    return Rounds(confidences, verified, np.minimum(accepted, verified))


def mean_ece(temperatures):
    held_out = rounds(40_000, 99, cut=False)
    return float(np.mean([figure.ece for figure in calibration.quality(held_out, temperatures)]))


def learn_online(data, **options):
    sts = OnlineSTS(7, **options)
    for start in range(0, len(data.verified), 4):
        part = slice(start, start + 4)
        sts.observe(data.confidences[part], data.verified[part], data.accepted[part])
        sts.tick()
    return sts


def test_offline_sts_recovers_temperatures_from_censored_rounds():
    found = calibration.fit(rounds(20_000, 1))
    assert mean_ece(np.ones(7)) > 0.06
    assert mean_ece(found) < 0.01
    assert found[:4] == pytest.approx(TRUE[:4], rel=0.2)


def test_counting_cut_drafts_as_rejected_would_ruin_it():
    whole = rounds(20_000, 1, cut=False)
    verified = np.random.default_rng(0).integers(1, 8, 20_000)
    data = Rounds(whole.confidences, verified, np.minimum(whole.accepted, verified))
    wrong = Rounds(data.confidences, np.full_like(data.verified, 7), data.accepted)
    assert mean_ece(calibration.fit(wrong)) > 3 * mean_ece(calibration.fit(data))


@pytest.mark.parametrize("seed", range(4))
def test_online_sts_is_calibrated_after_2000_rounds(seed):
    sts = learn_online(rounds(2_000, seed))
    assert mean_ece(sts.temperatures) <= 0.015


def test_online_sts_follows_a_change():
    before, after = rounds(6_000, 3, np.full(7, 1.0)), rounds(6_000, 4, np.full(7, 2.5))
    sts = learn_online(before, half_life=1024)
    first = sts.temperatures.copy()
    for start in range(0, 6_000, 8):
        part = slice(start, start + 8)
        sts.observe(after.confidences[part], after.verified[part], after.accepted[part])
        sts.tick()
    assert first[0] == pytest.approx(1.0, abs=0.25)
    assert sts.temperatures[0] == pytest.approx(2.5, rel=0.25)


def test_without_enough_evidence_nothing_moves():
    sts = learn_online(rounds(150, 5), initial=1.7)
    assert sts.temperatures.tolist() == [1.7] * 7
    assert sts.evidence()[0] == pytest.approx(150, rel=0.03)


def test_right_confidences_stay_as_they_are():
    found = [learn_online(rounds(2_000, seed, np.ones(7), cut=False)).temperatures for seed in range(20, 24)]
    assert np.abs(np.log(found)).max() < 0.2


def test_a_position_without_evidence_follows_the_one_before():
    data = rounds(3_000, 8)
    shallow = Rounds(data.confidences, np.minimum(data.verified, 2), np.minimum(data.accepted, 2))
    sts = learn_online(shallow, initial=np.linspace(1.0, 1.3, 7))
    ratio = sts.temperatures / sts.initial
    assert ratio[1] > 1.3
    assert ratio[2:] == pytest.approx(np.full(5, ratio[1]), rel=0.01)


def test_only_drafts_that_were_reached_and_judged_are_evidence():
    sts = OnlineSTS(3)
    sts.observe(np.full((4, 3), 0.5), np.array([1, 2, 3, 3]), np.array([1, 2, 0, 3]))
    assert sts.evidence() == pytest.approx([4, 2, 1], rel=0.01)


def test_rounds_that_judged_nothing_and_nan_are_no_evidence():
    sts = OnlineSTS(3)
    nan = np.full((5, 3), np.nan)
    sts.observe(nan, np.full(5, 3), np.zeros(5, dtype=int))
    sts.observe(np.full((5, 3), 0.5), np.zeros(5, dtype=int), np.zeros(5, dtype=int))
    assert sts.evidence().tolist() == [0.0] * 3


def test_memory_is_bounded_and_state_survives_json():
    sts = learn_online(rounds(3_000, 6))
    state = sts.state()
    text = json.dumps(state)
    assert len(text) < 20_000
    other = OnlineSTS.from_state(json.loads(text))
    assert other.temperatures.tolist() == sts.temperatures.tolist()
    assert other.evidence() == pytest.approx(sts.evidence(), rel=1e-6)
    assert other.refit() == pytest.approx(sts.refit(), rel=1e-4)


@pytest.mark.parametrize("damage", [{"schema": 1}, {"judged": ""}, {"temperatures": [0.0] * 7}])
def test_foreign_online_state_is_refused(damage):
    state = learn_online(rounds(300, 7)).state() | damage
    with pytest.raises(ValueError, match="online calibration"):
        OnlineSTS.from_state(state)


def test_figures_of_known_cases():
    p, y = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, False, True, True])
    assert calibration.ece(p, y) == pytest.approx(0.1)
    assert calibration.auroc(p, y) == 1.0
    assert calibration.auroc(p, ~y) == 0.0
    assert calibration.auroc(np.full(4, 0.5), y) == 0.5
    assert calibration.brier(p, y) == pytest.approx(0.01)
    assert np.isnan(calibration.ece(p[:0], y[:0]))
    assert np.isnan(calibration.auroc(p, np.ones(4, dtype=bool)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(0.05, 20))
def test_survival_is_finite_and_never_rises(confidences, temperature):
    a = survival(np.array(confidences), temperature)
    assert np.isfinite(a).all()
    assert (np.diff(a, axis=1) <= 0).all()
    assert ((a >= 0) & (a <= 1)).all()


def test_survival_without_temperatures_is_the_plain_product():
    c = np.array([[0.9, 0.5, 1.0, 0.0]])
    assert survival(c) == pytest.approx(np.cumprod(c, axis=1))
    assert sigmoid(logit(c)) == pytest.approx(c, abs=1e-12)
    with pytest.raises(ValueError, match="positive"):
        survival(c, 0.0)


def test_unusable_confidences_are_found_where_they_start():
    c = np.array([[0.5, np.nan, 0.5], [0.5, 0.5, 0.5], [np.inf, 0.5, 0.5], [0.1, 0.2, -0.1]])
    assert usable(c).tolist() == [False, True, False, False]
    assert leading(c).tolist() == [1, 3, 0, 2]


def test_temperature_files(tmp_path, caplog):
    path = tmp_path / "temperatures.json"
    calibration.save(path, TRUE, {"drafter": "a"})
    assert calibration.load(path, 7, {"drafter": "a"}) == pytest.approx(TRUE)
    assert calibration.load(tmp_path / "absent.json", 7) is None
    assert not caplog.records
    assert calibration.load(path, 7, {"drafter": "b"}) is None
    assert calibration.load(path, 5) is None
    assert len(caplog.records) == 2


def test_temperatures_of_a_checkpoint_config():
    assert calibration.from_config({}, 3) is None
    assert calibration.from_config({"confidence_temperatures": 1.5}, 3).tolist() == [1.5] * 3
    with pytest.raises(ValueError, match="wanted one or 3"):
        calibration.from_config({"confidence_temperatures": [1.0, 2.0]}, 3)
    with pytest.raises(ValueError, match="positive"):
        calibration.from_config({"confidence_temperatures": [1.0, -2.0, 1.0]}, 3)
