"""examples/serve_cpu.sh: the OpenAI-compatible server on the bundled pair, and the request it makes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).parents[2] / "examples"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_example_serves_drafts_and_answers_its_own_request() -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PORT": str(free_port())}
    done = subprocess.run(
        [EXAMPLES / "serve_cpu.sh", "--once"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    text = json.loads(answer)["choices"][0]["text"]
    assert "ones: 8 + 4 + 0 = 12, write 2, carry 1" in text  # 2718 + 314
    counters = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("vllm:spec_decode_num_"))
    accepted = sum(float(value) for name, value in counters.items() if "accepted_tokens_total" in name)
    assert accepted > 20


@pytest.mark.slow
def test_the_offline_example_prints_text_and_an_accepted_length() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "offline.py"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    length = re.search(r"accepted length[^:]*: ([\d.]+)", done.stdout)
    assert length is not None
    assert 1.5 < float(length[1]) <= 8


def test_the_demo_compares_both_arms() -> None:
    command = [Path(sys.executable).with_name("vllm-dspark"), "demo", "--json", "--domain", "records", "--head", "rnn",
               "--prompts", "2", "--rounds", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout)["rows"]
    assert row["identical"]
    assert row["accepted_length"] > 2
    assert row["speedup"] == pytest.approx(row["speed_with"] / row["speed_without"])
