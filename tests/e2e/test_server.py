"""examples/serve_cpu.sh: the OpenAI-compatible server on the bundled pair, its own request and others; the other examples."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).parents[2] / "examples"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, list[str]]]:
    """The example's server, up and asked once: its address, and what the example printed."""
    port = free_port()
    environment = {**os.environ, "PYTHON": sys.executable, "PORT": str(port)}
    command = [EXAMPLES / "serve_cpu.sh"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as server:
        assert server.stdout is not None
        printed: list[str] = []
        for line in server.stdout:
            printed.append(line)
            if "spec_decode_num_accepted_tokens_total" in line:
                break
        yield f"http://127.0.0.1:{port}", printed
        os.killpg(server.pid, signal.SIGTERM)


def test_the_example_serves_drafts_and_answers_its_own_request(served: tuple[str, list[str]]) -> None:
    answer = next(line for line in served[1] if line.startswith("{"))
    text = json.loads(answer)["choices"][0]["text"]
    assert "ones: 8 + 4 + 0 = 12, write 2, carry 1" in text  # 2718 + 314
    assert float(served[1][-1].rsplit(" ", 1)[1]) > 20  # accepted


def ask(address: str, **more: object) -> dict[str, object]:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8, "prompt": "Start at 2718", **more}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, object] = json.loads(answer.read())
    return found


def test_a_request_with_bad_options_of_its_own_is_refused_alone(served: tuple[str, list[str]]) -> None:
    address, _ = served
    for own, found in (({"dspark_policy": "often"}, "often"), ({"dspark_max_draft_tokens": -1}, "-1")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(address, vllm_xargs=own)
        assert refused.value.code == 400
        assert found in refused.value.read().decode()
    plain = ask(address)["choices"]
    assert ask(address, vllm_xargs={"dspark_policy": "off"})["choices"] == plain
    assert ask(address, vllm_xargs={"dspark_policy": "fixed", "dspark_max_draft_tokens": 2})["choices"] == plain


@pytest.mark.slow
def test_the_offline_example_prints_text_and_an_accepted_length() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "offline.py"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    length = re.search(r"accepted length[^:]*: ([\d.]+)", done.stdout)
    assert length is not None
    assert 1.5 < float(length[1]) <= 8


def test_the_demo_compares_both_arms() -> None:
    command = [Path(sys.executable).with_name("vllm-dspark"), "demo", "--json", "--domain", "records", "--head", "rnn",
               "--policy", "fixed", "--prompts", "2", "--rounds", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout)["rows"]
    assert row["identical"]
    assert row["accepted_length"] > 2
    assert row["speedup"] == pytest.approx(row["speed_with"] / row["speed_without"])
