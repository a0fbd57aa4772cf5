"""The real huggingface_hub against a server that speaks the hub's resolve endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from npu_export.errors import CheckpointError
from npu_export.hub import fetch_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "tests/tiny-vit"
PATH = re.compile(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """A repository with the revisions `main`, `v1` and COMMIT, all of one content."""

    files: dict[str, bytes]
    broken: set[str] = field(default_factory=set)
    """Files for which the server answers 500."""
    cut: bool = False
    """Close the connection amid a file."""
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    stop: Callable[[], None] = lambda: None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            match = PATH.fullmatch(self.path)
            if match is None:
                return self._refuse(404, "RepoNotFound")
            revision, name = match.groups()
            if revision not in ("main", "v1", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            if name in hub.broken:
                return self._refuse(500, None)
            if name not in hub.files:
                return self._refuse(404, "EntryNotFound")
            content = hub.files[name]
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if hub.cut else content)

        def _refuse(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    hub = Hub({"model.safetensors": (tiny_checkpoint / "model.safetensors").read_bytes()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()
        hub.stop = lambda: None

    hub.endpoint, hub.stop = f"http://127.0.0.1:{server.server_port}", stop
    yield hub
    hub.stop()


@pytest.fixture
def export_tiny(
    hub: Hub, run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `npu-export --model tiny-vit` against the hub, with a cache of this test's own."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HTTP"))}
        environment = {
            **inherited,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
            **settings,
        }
        return run_command("npu-export", "--model", "tiny-vit", *arguments, env=environment)

    return run


@pytest.fixture
def in_process(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The hub and an empty cache for this process's huggingface_hub; seconds it would have slept."""
    slept: list[float] = []
    point_at(hub.endpoint, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process's huggingface_hub ask there; it reads HF_ENDPOINT only when it is imported."""
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def weights_of(artifact: Path) -> dict[str, Any]:
    manifest = json.loads((artifact / "manifest.json").read_text("utf-8"))
    weights: dict[str, Any] = manifest["provenance"]["weights"]
    return weights


def test_without_weights_the_encoders_own_come_from_the_hub_and_then_from_its_cache(
    hub: Hub, export_tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ("--format", "onnx", "--output")
    first = export_tiny(*arguments, str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    recorded = weights_of(tmp_path / "first")
    assert recorded["source"] == f"hf:{REPOSITORY}@{COMMIT}"
    assert recorded["random_seed"] is None
    assert recorded["files"][0]["sha256"] == hashlib.sha256(hub.files["model.safetensors"]).hexdigest()

    hub.stop()
    second = export_tiny(*arguments, str(tmp_path / "second"), HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    assert weights_of(tmp_path / "second") == recorded

    third = export_tiny("--weights", f"hf:{REPOSITORY}@{COMMIT}", "--dry-run", "--json", HF_HUB_OFFLINE="1")
    assert third.returncode == 0, third.stderr
    assert json.loads(third.stdout)["weights"] == recorded["source"]


def test_weights_in_neither_cache_nor_hub_are_refused_with_what_was_tried(
    hub: Hub, export_tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    hub.stop()
    run = export_tiny("--output", str(tmp_path / "out"), HF_HUB_OFFLINE="1")
    assert run.returncode == 1
    assert str(tmp_path / "home" / "hub") in run.stderr
    assert hub.endpoint in run.stderr
    assert "--weights" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_asked_once(hub: Hub, in_process: list[float]) -> None:
    hub.stop()
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch_checkpoint(REPOSITORY)
    tried = str(raised.value.got).splitlines()
    assert [line.partition(" ")[0] for line in tried] == ["cache", "cache", "hub"]
    assert "Connection refused" in tried[-1]
    assert sum(in_process) < 30


def test_a_proxy_that_does_not_answer_is_named(
    hub: Hub, in_process: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import close_session

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, hub.endpoint)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    point_at("http://hub.invalid", monkeypatch)
    hub.stop()
    close_session()
    try:
        with pytest.raises(CheckpointError, match="could be had") as raised:
            fetch_checkpoint(REPOSITORY)
    finally:
        close_session()
    assert "hub http://hub.invalid" in str(raised.value.got)


def test_a_download_that_breaks_off_is_refused(hub: Hub, in_process: list[float]) -> None:
    hub.cut = True
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch_checkpoint(REPOSITORY)
    assert "model.safetensors" in str(raised.value.got)


def test_a_repository_with_only_a_pickle_works(hub: Hub, in_process: list[float], tiny_checkpoint: Path) -> None:
    state = load_file(tiny_checkpoint / "model.safetensors")
    torch.save(state, tiny_checkpoint.parent / "pytorch_model.bin")
    hub.files = {"pytorch_model.bin": (tiny_checkpoint.parent / "pytorch_model.bin").read_bytes()}
    checkpoint = fetch_checkpoint(REPOSITORY)
    assert checkpoint.source == f"hf:{REPOSITORY}@{COMMIT}"
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_a_revision_is_asked_for_and_its_commit_is_recorded(hub: Hub, in_process: list[float]) -> None:
    assert fetch_checkpoint(REPOSITORY, "v1").source == f"hf:{REPOSITORY}@{COMMIT}"
    assert all("/resolve/v1/" in request or f"/resolve/{COMMIT}/" in request for request in hub.requests)
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch_checkpoint(REPOSITORY, "v2")
    assert raised.value.where == "revision v2"


@pytest.mark.parametrize("repository", ["tests/absent", "no such id/at/all", ""])
def test_a_repository_that_does_not_exist_is_refused(hub: Hub, in_process: list[float], repository: str) -> None:
    with pytest.raises(CheckpointError, match="could be had"):
        fetch_checkpoint(repository)


def test_a_repository_without_weights_is_refused(hub: Hub, in_process: list[float]) -> None:
    hub.files = {"config.json": b"{}"}
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch_checkpoint(REPOSITORY)
    assert str(raised.value.got).count("not there") == 4


def test_settings_come_from_the_hub_with_the_weights(hub: Hub, in_process: list[float]) -> None:
    hub.files |= {"config.json": b'{"hidden_size": 64}', "preprocessor_config.json": b'{"size": 32}'}
    for _ in range(2):
        checkpoint = fetch_checkpoint(REPOSITORY)
        assert checkpoint.config == {"hidden_size": 64}
        assert checkpoint.preprocessor == {"size": 32}
    assert sum(request.startswith("GET") for request in hub.requests) == 3


def test_settings_that_the_hub_does_not_hold_are_none(hub: Hub, in_process: list[float]) -> None:
    checkpoint = fetch_checkpoint(REPOSITORY)
    assert checkpoint.config is None
    assert checkpoint.preprocessor is None


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_that_cannot_be_fetched_are_not_taken_for_absent(hub: Hub, in_process: list[float], name: str) -> None:
    hub.broken = {name}
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch_checkpoint(REPOSITORY)
    assert f"{name}: " in str(raised.value.got)
