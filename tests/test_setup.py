"""What the policy starts with: temperatures from the options, a file or the checkpoint."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_dspark.options import DSparkOptions
from vllm_dspark.verification import calibration


@pytest.fixture(scope="module")
def temperatures() -> Any:
    pytest.importorskip("vllm")
    from vllm_dspark.engine import setup

    return setup.temperatures


def checkpoint(**declared: Any) -> Any:
    return SimpleNamespace(to_dict=lambda: declared)


def test_without_any_they_are_one(temperatures):
    assert temperatures(DSparkOptions(), checkpoint(), 3) == 1.0


def test_the_checkpoints_count_unless_the_user_gives_some(temperatures, tmp_path):
    declared = checkpoint(confidence_temperatures=[1.1, 1.2, 1.3])
    assert temperatures(DSparkOptions(), declared, 3).tolist() == [1.1, 1.2, 1.3]
    assert temperatures(DSparkOptions(temperatures=2.0), declared, 3).tolist() == [2.0, 2.0, 2.0]
    assert temperatures(DSparkOptions(temperatures=[1.0, 2.0, 3.0]), declared, 3).tolist() == [1.0, 2.0, 3.0]
    calibration.save(tmp_path / "t.json", np.array([1.5, 1.6, 1.7]), {})
    assert temperatures(DSparkOptions(temperatures=str(tmp_path / "t.json")), declared, 3).tolist() == [1.5, 1.6, 1.7]


@pytest.mark.parametrize("given", [[1.0, 2.0], "nowhere.json"])
def test_those_that_do_not_fit_are_refused(temperatures, given):
    with pytest.raises(ValueError, match="temperatures") as refused:
        temperatures(DSparkOptions(temperatures=given), checkpoint(), 3)
    assert "3" in str(refused.value)


def test_a_file_for_another_width_is_refused(temperatures, tmp_path):
    calibration.save(tmp_path / "t.json", np.ones(7), {})
    assert json.loads((tmp_path / "t.json").read_text())
    with pytest.raises(ValueError, match="not a file of 3 temperatures"):
        temperatures(DSparkOptions(temperatures=str(tmp_path / "t.json")), checkpoint(), 3)


def engine(device: str = "cpu", ranks: int = 1, connector: Any = None, hidden: int = 192, batched: int = 4096) -> Any:
    return SimpleNamespace(
        kv_transfer_config=connector, device_config=SimpleNamespace(device_type=device),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batched),
        model_config=SimpleNamespace(get_hidden_size=lambda: hidden, dtype=SimpleNamespace(itemsize=4)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, (8192, 512)),
        ({"hidden": 4096}, (682, 512)),  # 32 MiB of 48 KiB each
        ({"hidden": 8192}, (512, 512)),
        ({"batched": 64}, (8192, 64)),
        ({"device": "cuda"}, (512, 512)),
        ({"ranks": 2}, (512, 512)),
        ({"connector": object()}, (0, 0)),
    ],
)
def test_how_much_context_waits_to_be_written(given, limits):
    """What ended requests have left need not be written, so a CPU lets it wait; never more than is small."""
    pytest.importorskip("vllm")
    from vllm_dspark.engine import setup

    assert setup.deferred_tokens(engine(**given), layers=3) == limits
