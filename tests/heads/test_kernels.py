"""Starts what must not share this process: the kernels' tests under Triton's interpreter, and real compilations.

Triton decides when it is imported whether kernels are interpreted, so ``tests/heads/kernels`` runs in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def python(*arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip


def interpreted(*arguments: str) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, interpret=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_interpreted():
    interpreted("tests/heads/kernels")


def test_interpreted_in_the_v2_speculator():
    pytest.importorskip("vllm")
    interpreted("-k", "fused_stage", "tests/test_v2_speculator.py")


@pytest.mark.slow
def test_interpreted_in_every_combination():
    interpreted("-m", "slow", "tests/heads/kernels/test_parity.py")


def compiled(*arguments: str) -> None:
    """Every kernel compiles without spills, within the device's shared memory and registers; the table is printed."""
    done = python("-W", "ignore", "-m", "vllm_dspark.heads.kernels.resources", *arguments, interpret=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert f"\n{target} " in done.stdout


def test_compiled_for_gpus_that_are_not_here():
    compiled("--quick", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def test_a_launch_asks_for_weights_before_it_waits_for_the_last_one():
    """Sixteen bytes at a time, a whole tile of them; where launches cannot overlap there is nothing to wait for."""
    script = """
from vllm_dspark.heads.kernels.resources import KNOWN, TARGETS, Case, compile_for, launch_of
for target in ("sm_80", "sm_90"):
    kernel, arguments, _ = launch_of(Case("step", 1), KNOWN[target])
    before, wait, after = compile_for(TARGETS[target], kernel, arguments).asm["ptx"].partition("griddepcontrol.wait")
    print(target, len(wait) > 0, before.count("ld.global.v4"), after.count("ld.global.v4"))
"""
    done = python("-W", "ignore", "-c", script, interpret=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.split("\n")[:2] == ["sm_80 False 16 0", "sm_90 True 8 8"]


@pytest.mark.slow
def test_all_launches_compiled():
    compiled()


def test_the_benchmark_runs_dry():
    """Every arm on tiny shapes, and the predicted table for the real ones; with torch and Triton alone."""
    script = """
import runpy, sys
sys.modules.update(dict.fromkeys(("vllm", "pydantic", "transformers", "wrapt", "prometheus_client", "safetensors")))
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/kernels.py", run_name="__main__")
"""
    done = python("-c", script, "--dry", "--batch", "1", "64", interpret=True)
    assert done.returncode == 0, done.stdout[-4000:]
    ran = [line for line in done.stdout.splitlines() if line.startswith("dry ") and "agree" in line]
    assert len(ran) >= 14
    assert all(line.endswith("100.0%") for line in ran), "\n".join(ran)
    assert "fused int8" in done.stdout
