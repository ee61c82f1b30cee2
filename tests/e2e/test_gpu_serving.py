"""The serving benchmark in its dry mode: every arm that a CPU can run, from configs to tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving.report import FIXED, NATIVE, NONE, PLUGIN

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_serving.py"


def test_dry_mode(tmp_path: Path) -> None:
    out = tmp_path / "dry.json"
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert len(record["cells"]) == 4
    assert list(record["left_out"]) == [NATIVE]
    for cell in record["cells"]:
        assert set(cell["tokens_per_second"]) == {NONE, FIXED, PLUGIN}
        assert set(cell["plugin_over"]) == {NONE, FIXED}
        for arm, parts in cell["per_step"].items():
            assert parts["step"] >= parts["target"] > 0
            if arm != PLUGIN:  # which drafts only where it pays
                assert (parts["draft"] > parts["sequential"] > 0) == (arm == FIXED)
