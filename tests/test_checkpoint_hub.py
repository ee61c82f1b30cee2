"""Hub ids are described through huggingface_hub without downloading weights; each refusal says what to do.

The Hub is a small HTTP server on this machine that speaks the part of the protocol which matters: HEAD and GET of
`/{id}/resolve/{revision}/{file}` with ETag, X-Repo-Commit, error codes and byte ranges.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_checkpoints import write_drafter

from vllm_dspark.checkpoint import (
    CheckpointAccessError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptWeightsError,
    HubUnreachableError,
    MissingShardError,
    NotADrafterError,
    NoWeightsError,
    load_spec,
)

REPO = "tiny/drafter"
COMMIT = "c0ffee" + "0" * 34
URL = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """A fake Hub: repositories are folders, `refused` maps a repository to (status, X-Error-Code)."""

    endpoint: str = ""
    repos: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, file, revision) of everything asked of a repository."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes sent per file."""
    tokens: set[str] = field(default_factory=set)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Serve one HEAD or GET."""
        match = URL.fullmatch(request.path)
        self.tokens.add(request.headers.get("authorization") or "none")
        if match is None:
            return self._refuse(request, 404, "")
        repo, revision, name = match["repo"], match["revision"], match["file"]
        self.requests.append((request.command, name, revision))
        if repo in self.refused:
            return self._refuse(request, *self.refused[repo])
        if repo not in self.repos:
            return self._refuse(request, 404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(request, 404, "RevisionNotFound")
        path = self.repos[repo] / name
        if not path.is_file():
            return self._refuse(request, 404, "EntryNotFound")
        self._send(request, name, path.read_bytes())

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
            request.send_header("X-Error-Message", code)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, name: str, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range") or "")
        etag = sha256(content).hexdigest()
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            request.send_response(200)
        request.send_header("ETag", f'"{etag}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            # Counted first: the client may have its answer before this thread goes on.
            self.sent[name] = self.sent.get(name, 0) + len(content)
            request.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub that huggingface_hub talks to, with a fresh cache and no saved token."""
    fake = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            fake.answer(self)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    # What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE set when huggingface_hub is imported.
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # Its retries wait for seconds.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield fake
    server.shutdown()
    server.server_close()


def publish(hub: Hub, folder: Path, **options: Any) -> Path:
    """A drafter on the Hub whose weights are much larger than their header."""
    hub.repos[REPO] = write_drafter(folder, vocab_size=4096, **options)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 2_000_000
    return hub.repos[REPO]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["deepspec", "speculators"])
def test_a_hub_drafter_is_described_like_its_folder_without_its_weights(
    hub: Hub, tmp_path: Path, layout: str, shards: int
) -> None:
    folder = publish(hub, tmp_path / "repo", layout=layout, shards=shards)
    spec, local = load_spec(REPO), load_spec(folder)
    assert spec.tensors == local.tensors
    assert len(spec.tensors) > 25
    assert (spec.model, spec.revision, spec.commit) == (REPO, None, COMMIT)
    assert spec.num_draft_tokens == local.num_draft_tokens
    weights = {name: size for name, size in hub.sent.items() if name.endswith(".safetensors")}
    assert len(weights) == shards
    # huggingface_hub asks for the first 100 kB of each file, which holds the header.
    assert all(0 < size <= 100_001 for size in weights.values())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # What is read after config.json is of the version config.json was.
    assert {revision for _, name, revision in hub.requests if name != "config.json"} == {COMMIT}


def test_cached_weights_are_read_from_the_cache_and_work_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(hub, tmp_path / "repo", shards=2)
    for path in folder.iterdir():
        huggingface_hub.hf_hub_download(REPO, path.name)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = load_spec(REPO)
    assert len(hub.requests) == asked
    assert spec.tensors == load_spec(folder).tensors
    assert spec.commit == COMMIT


def test_a_cached_config_of_a_drafter_whose_weights_are_not_cached_is_not_enough_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, tmp_path / "repo")
    load_spec(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match=r"OfflineModeIsEnabled.*lacks what is needed"):
        load_spec(REPO)


def test_revision_token_and_cache_folder_are_passed_on(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "repo")
    spec = load_spec(REPO, revision=COMMIT, token="hf_secret", cache_dir=tmp_path / "elsewhere")
    assert (spec.revision, spec.commit) == (COMMIT, COMMIT)
    assert {revision for _, _, revision in hub.requests} == {COMMIT}
    assert hub.tokens == {"Bearer hf_secret"}
    assert list((tmp_path / "elsewhere").rglob("config.json"))
    assert not (tmp_path / "cache").exists()


def test_a_cached_tokenizer_is_found_and_none_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = publish(hub, tmp_path / "repo")
    (folder / "tokenizer.json").write_text("{}")
    assert load_spec(REPO).tokenizer is None
    assert "tokenizer.json" not in hub.sent
    cached = huggingface_hub.hf_hub_download(REPO, "tokenizer.json")
    assert load_spec(REPO).tokenizer == cached


# -- refusals --


def test_a_repository_that_is_not_there_is_named_with_what_to_check(hub: Hub) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        load_spec("tiny/nothing")
    message = str(caught.value)
    assert all(word in message for word in ("'tiny/nothing'", "neither an existing folder", hub.endpoint, "HF_TOKEN"))


@pytest.mark.parametrize("name", ["tiny drafter", "tiny/drafter!", "-tiny/x"])
def test_a_name_that_is_no_hub_id_is_refused_without_a_request(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="neither an existing folder nor a Hub id 'owner/name'"):
        load_spec(name)
    assert hub.requests == []


def test_a_revision_that_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "repo")
    with pytest.raises(CheckpointNotFoundError, match="'tiny/drafter' has no revision 'v9'"):
        load_spec(REPO, revision="v9")


def test_a_gated_repository_asks_for_terms_and_token(hub: Hub) -> None:
    hub.refused[REPO] = (403, "GatedRepo")
    with pytest.raises(CheckpointAccessError) as caught:
        load_spec(REPO)
    assert all(word in str(caught.value) for word in (REPO, "gated", f"{hub.endpoint}/{REPO}", "HF_TOKEN"))


def test_a_failing_hub_without_a_cached_copy_names_the_id_and_the_ways_out(hub: Hub) -> None:
    hub.refused[REPO] = (503, "")
    with pytest.raises(HubUnreachableError) as caught:
        load_spec(REPO)
    assert all(word in str(caught.value) for word in (REPO, hub.endpoint, "local folder", "HF_HUB_OFFLINE", "HF_TOKEN"))


def test_an_unreachable_hub_names_the_id_and_the_ways_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(HubUnreachableError) as caught:
        load_spec(REPO)
    assert all(word in str(caught.value) for word in (REPO, nowhere, "local folder", "HF_HUB_OFFLINE=1", "HF_TOKEN"))


def test_an_empty_cache_offline_is_told_apart_from_a_missing_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match=r"'tiny/drafter'.*cache .* lacks what is needed"):
        load_spec(REPO)
    assert hub.requests == []


FAULTS: list[Any] = [
    pytest.param({"config.json": None}, ConfigError, r"no config\.json", id="no-config"),
    pytest.param({"config.json": b"{"}, ConfigError, "not valid JSON", id="corrupt-config"),
    pytest.param({"model.safetensors": None}, NoWeightsError, "neither model.safetensors nor", id="no-weights"),
    pytest.param({"model.safetensors": b"\x05"}, CorruptWeightsError, "unreadable header", id="no-header"),
    pytest.param({"model.safetensors": b"\x10" + b"\0" * 7 + b"!" * 16}, CorruptWeightsError, "header", id="bad-header"),
    pytest.param(
        {"model.safetensors": None, "model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'},
        MissingShardError,
        r"lacks gone\.safetensors",
        id="missing-shard",
    ),
]


@pytest.mark.parametrize(("files", "error", "words"), FAULTS)
def test_a_broken_repository_is_told_by_its_fault(
    hub: Hub, tmp_path: Path, files: dict[str, bytes | None], error: type[CheckpointError], words: str
) -> None:
    folder = publish(hub, tmp_path / "repo")
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        load_spec(REPO)
    assert type(caught.value) is error
    assert "drafter" in str(caught.value)


def test_a_hub_model_that_is_no_drafter_is_refused_before_its_weights_are_looked_at(hub: Hub, tmp_path: Path) -> None:
    folder = publish(hub, tmp_path / "repo")
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    with pytest.raises(NotADrafterError, match="Qwen3ForCausalLM"):
        load_spec(REPO)
    assert {name for _, name, _ in hub.requests} == {"config.json"}


def test_the_environment_variables_of_the_hub_are_honoured(hub: Hub, tmp_path: Path) -> None:
    folder = publish(hub, tmp_path / "repo")
    code = f"from vllm_dspark.checkpoint import load_spec; print(len(load_spec({REPO!r}).tensors))"
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_env", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(load_spec(folder).tensors)
    assert "Bearer hf_env" in hub.tokens
    assert list((tmp_path / "home").rglob("config.json"))
