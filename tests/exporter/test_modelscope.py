"""The real modelscope against a server that speaks its hub's file endpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import REPOSITORY, SINGLE, Hub, assert_holds, serve, sharded
from watching import ended_steps

from npu_export.checkpoint import Checkpoint
from npu_export.errors import CheckpointError
from npu_export.modelscope import MODELSCOPE
from npu_export.network import plan_weights
from npu_export.provenance import describe_provenance
from npu_export.weights import find_weights

TESTS = Path(__file__).parent.parent


@pytest.fixture
def hub(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub and an empty cache, for this process's modelscope and for commands; no second try is made."""
    pytest.importorskip("modelscope.hub.file_download", reason="the package modelscope is not installed")
    config = pytest.importorskip("modelscope_hub.config", reason="this modelscope has its endpoint built in")
    with serve({SINGLE: (tiny_checkpoint / SINGLE).read_bytes()}) as hub:
        for name in [name for name in os.environ if name.upper().startswith(("MODELSCOPE_", "HTTP", "ALL_PROXY"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("MODELSCOPE_DOWNLOAD_MAX_RETRIES", "0")
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 0)  # read when it was imported
        monkeypatch.setattr(config, "_default_config", None)
        yield hub


def fetch(what: str = REPOSITORY) -> Checkpoint:
    return find_weights(tiny.TINY, f"ms:{what}")


def refused(what: str = REPOSITORY) -> list[str]:
    """What was tried, line by line, where no weights could be had."""
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch(what)
    return str(raised.value.got).splitlines()


def test_modelscope_is_imported_only_when_it_is_asked_for() -> None:
    code = (
        "import sys, tiny; from npu_export.weights import find_weights, is_remote\n"
        "find_weights(tiny.TINY, 'random:0'); assert is_remote('ms:tests/tiny-vit')\n"
        "print([name for name in sys.modules if name.startswith('modelscope')])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_the_command_fetches_from_the_hub_and_says_nothing_beside_its_plan(
    hub: Hub, run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    arguments = ("--model", "tiny-vit", "--weights", f"ms:{REPOSITORY}", "--dry-run", "--json")
    run = run_command("npu-export", *arguments)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["weights"] == f"ms:{REPOSITORY}@master"
    assert len(ended_steps(run.stderr)) == 1, run.stderr
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == [SINGLE]
    quiet = run_command("npu-export", *arguments, "--quiet")
    assert (quiet.returncode, quiet.stderr, quiet.stdout) == (0, "", run.stdout)


def test_a_file_of_the_cache_is_used_without_any_request_and_recorded_alike(
    hub: Hub, state: Mapping[str, torch.Tensor]
) -> None:
    first = describe_provenance(plan_weights(tiny.TINY, fetch(), "auto"), "0" * 64).weights
    assert first.source == f"ms:{REPOSITORY}@master"
    assert [file.sha256 for file in first.files] == [hashlib.sha256(hub.files[SINGLE]).hexdigest()]
    hub.requests.clear()
    cached = fetch()
    assert hub.requests == []
    assert_holds(cached, state)
    assert describe_provenance(plan_weights(tiny.TINY, cached, "auto"), "0" * 64).weights == first


def test_the_client_is_silent_and_its_loggers_are_as_before(
    hub: Hub, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelscope.hub.file_download import model_file_download

    # The variable of before MODELSCOPE_ENDPOINT, of which the client warns, and a second try, which it logs.
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.endpoint)
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_TIMES", 1)
    logger, logged = logging.getLogger("modelscope_hub"), BufferingHandler(100)
    level = logger.level
    logger.addHandler(logged)
    try:
        fetch()
        hub.cut = {SINGLE}
        assert f"hub {hub.endpoint}: {SINGLE}: " in refused(f"{REPOSITORY}@v1")[-1]
        assert (capfd.readouterr(), logged.buffer) == (("", ""), [])
        assert logger.level == level
        # Without our own care the same download shows a bar and logs.
        with pytest.raises(ConnectionError):
            model_file_download(REPOSITORY, SINGLE, "v1", endpoint=hub.endpoint, cache_dir=str(tmp_path / "b"))
        assert SINGLE in capfd.readouterr().err
        assert SINGLE in logged.buffer[0].getMessage()
    finally:
        logger.removeHandler(logged)


def test_a_hub_that_does_not_answer_is_asked_once(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    tried = refused()
    assert [line.partition(" ")[0] for line in tried] == ["cache"] * 4 + ["hub"]
    assert tried[0] == f"cache {tmp_path / 'cache'}: {SINGLE}: not there"
    assert tried[-1].startswith(f"hub {hub.endpoint}: config.json: NetworkError")


@pytest.mark.parametrize("what", ["tests/absent", REPOSITORY, f"{REPOSITORY}@v2"])
def test_a_repository_a_file_or_a_revision_that_does_not_exist_is_refused(hub: Hub, what: str) -> None:
    hub.files = {"config.json": b"{}"}
    tried = refused(what)
    assert [line.partition(" ")[0] for line in tried] == ["cache"] * 4 + ["hub"] * 4
    assert all(line.endswith(": not there") for line in tried)
    assert refused(f"{REPOSITORY}/absent.pt")[-1] == f"hub {hub.endpoint}: absent.pt: not there"


def test_a_repository_that_may_not_be_read_is_refused_with_the_reason(hub: Hub) -> None:
    hub.status = {"config.json": 403}
    assert "403" in refused()[-1]


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_that_cannot_be_fetched_are_not_taken_for_absent(hub: Hub, name: str) -> None:
    hub.status = {name: 500}
    for _ in range(2):
        assert f"hub {hub.endpoint}: {name}: " in refused()[-1]
    hub.status, hub.files[name] = {}, b'{"a": 1}'
    checkpoint = fetch()
    assert {"a": 1} in (checkpoint.config, checkpoint.preprocessor)


def test_a_download_that_breaks_off_is_refused_and_the_next_run_resumes_it(
    hub: Hub, state: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    hub.cut = {SINGLE}
    for _ in range(2):
        assert f"hub {hub.endpoint}: {SINGLE}: " in refused()[-1]
        assert not list(tmp_path.rglob(SINGLE))
    hub.cut = set()
    assert_holds(fetch(), state)
    assert hub.requests[-1] == f"GET master {SINGLE} bytes={len(hub.files[SINGLE]) // 2}-"


@pytest.mark.parametrize("broken", ["absent", "cut"])
def test_a_sharded_repository_is_refused_until_it_can_be_had_whole(
    hub: Hub, state: Mapping[str, torch.Tensor], broken: str
) -> None:
    hub.files = files = sharded(state)
    lost = list(files)[2]
    if broken == "absent":
        hub.files = {name: content for name, content in files.items() if name != lost}
    else:
        hub.cut = {lost}
    for _ in range(2):
        assert f"hub {hub.endpoint}: {lost}: " in refused()[-1]
    hub.files, hub.cut = files, set()
    checkpoint = fetch()
    assert_holds(checkpoint, state)
    assert [file.name for file in checkpoint.files] == list(files)
    hub.stop()
    assert_holds(fetch(), state)


@pytest.mark.parametrize("name", ["other.safetensors", "sub/folder/model.safetensors"])
def test_a_file_of_a_repository_is_named_with_its_revision(
    hub: Hub, state: Mapping[str, torch.Tensor], name: str
) -> None:
    hub.files = {SINGLE: b"other weights", name: hub.files[SINGLE]}
    for _ in range(2):
        checkpoint = fetch(f"{REPOSITORY}/{name}@v1")
        assert checkpoint.source == f"ms:{REPOSITORY}/{name}@v1"
        assert_holds(checkpoint, state)
    assert {request.split()[1] for request in hub.requests} == {"v1", "-"}  # dashes: which cloud it is in
    assert fetch(f"{REPOSITORY}/{name}").source == f"ms:{REPOSITORY}/{name}@master"


def test_weights_of_an_older_cache_are_used_but_never_as_those_of_a_revision(
    hub: Hub, state: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    older = tmp_path / "cache" / "models" / REPOSITORY
    older.mkdir(parents=True)
    (older / SINGLE).write_bytes(hub.files[SINGLE])
    hub.stop()
    checkpoint = fetch()
    assert checkpoint.source == f"ms:{REPOSITORY}"
    assert_holds(checkpoint, state)
    assert "does not say its revision" in refused(f"{REPOSITORY}@v1")[-2]


def test_where_the_client_looks_is_said_without_its_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODELSCOPE_CACHE", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    assert MODELSCOPE.place(True) == f"cache {Path.home() / '.cache' / 'modelscope'}"
    assert MODELSCOPE.place(False) == "hub https://www.modelscope.cn"
