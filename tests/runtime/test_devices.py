from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_npu_texts import NO_CANN, NO_CANN_2_7, NO_START, OTHER_TORCH, TWO_ACCELERATORS

from npu_runtime import UnavailableError, UsageError, load
from npu_runtime.devices import CPU, Device, parse_device, require_device, torch_import
from npu_runtime.devices.accelerator import Accelerator
from npu_runtime.devices.cann import read_cann_error
from npu_runtime.devices.device import KINDS
from npu_runtime.devices.probe import probe_device


def a_package(folder: Path, name: str, body: str, version: str | None = None) -> None:
    """A package that a fresh Python finds in the folder, with metadata where a version is given."""
    (folder / f"{name}.py").write_text(body, "utf-8")
    if version is not None:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")


def probed(folder: Path, device: str, **environment: str) -> dict[str, str]:
    """What a fresh Python, with these packages before all others, says of a device."""
    code = f"""
import json
from npu_runtime.devices.device import parse_device
from npu_runtime.devices.probe import probe_device
probe = probe_device(parse_device({device!r}))
print(json.dumps(probe.error.fields() if probe.error else {{"name": probe.name}}))
"""
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert done.returncode == 0, done.stderr
    import json

    fields: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return fields


def test_each_kind_of_device_is_spelled_and_listed() -> None:
    assert [str(parse_device(text)) for text in ("cpu", "cuda", "cuda:3", "npu", "npu:12")] == [
        "cpu",
        "cuda:0",
        "cuda:3",
        "npu:0",
        "npu:12",
    ]
    assert {parse_device(kind).traits.name for kind in KINDS} == set(KINDS)


def test_the_cpu_is_always_there_and_needs_no_torch(tmp_path: Path) -> None:
    assert probe_device(CPU).available
    a_package(tmp_path, "torch", "raise ImportError('torch was imported')")
    assert probed(tmp_path, "cpu") == {"name": None}


def test_no_torch_is_told_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    a_package(tmp_path, "torch", "raise ModuleNotFoundError('No module named torch', name='torch')")
    for device in ("cuda", "npu"):
        error = probed(tmp_path, device)
        assert "needs the package torch" in error["what"]
        assert "pip install 'npu-export[" in error["next"]


def test_no_torch_npu_is_told_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    a_package(tmp_path, "torch", "")
    a_package(tmp_path, "torch_npu", "raise ModuleNotFoundError('No module named torch_npu', name='torch_npu')")
    error = probed(tmp_path, "npu")
    assert "needs the package torch_npu" in error["what"]
    assert "npu-export[npu]" in error["next"]


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        (f"raise ImportError({NO_CANN!r})", "set_env.sh"),
        (f"raise ImportError({NO_CANN_2_7!r})", "set_env.sh"),
        (f"raise RuntimeError({TWO_ACCELERATORS!r})", "pip install torch==2.9.0+cpu --index-url"),
        (f"raise ImportError({OTHER_TORCH!r})", "install the torch-npu 2.9 of the installed torch"),
    ],
    ids=["no-cann", "no-cann-2.7", "cuda-build", "other-torch"],
)
@pytest.mark.parametrize("autoload", [True, False])
def test_a_torch_npu_that_does_not_import_says_what_to_do(tmp_path: Path, body: str, hint: str, autoload: bool) -> None:
    """With autoload `import torch` itself dies, and the CPU as well then needs to be told what to do."""
    torch = "import os\n"
    if autoload:
        torch += (
            "try:\n    import torch_npu\nexcept Exception as error:\n"
            "    raise RuntimeError('Failed to load the backend extension: torch_npu. You can disable extension "
            "auto-loading with TORCH_DEVICE_BACKEND_AUTOLOAD=0.') from error\n"
        )
    a_package(tmp_path, "torch", torch, "2.9.0")
    a_package(tmp_path, "torch_npu", body, "2.9.0.post1+gitee7ba04")
    error = probed(tmp_path, "npu")
    assert hint in error["next"]
    assert ("or set TORCH_DEVICE_BACKEND_AUTOLOAD=0" in error["next"]) == autoload
    assert "[ERROR]" not in str(error)
    assert error["what"].startswith("torch does not import, since torch_npu does not: " if autoload else "torch_npu is")


@pytest.mark.parametrize(
    ("torch", "torch_npu", "fits"),
    [
        ("2.9.0+cpu", "2.9.0.post1+gitee7ba04", True),
        ("2.9.1", "2.9.0", True),
        ("2.13.0", "2.9.0.post1", False),
        ("2.9.0", "2.10.0", False),
    ],
)
def test_torch_npu_of_another_release_than_torch_is_refused(
    monkeypatch: pytest.MonkeyPatch, torch: str, torch_npu: str, fits: bool
) -> None:
    monkeypatch.setattr(torch_import, "version", {"torch": torch, "torch-npu": torch_npu}.__getitem__)
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    if fits:
        torch_import.import_torch_npu()
    else:
        with pytest.raises(UnavailableError, match="belongs to another torch") as caught:
            torch_import.import_torch_npu()
        assert (torch in str(caught.value.got), torch_npu in str(caught.value.got)) == (True, True)


def test_no_devices_and_a_wrong_index_name_the_variable_that_selects_them(tmp_path: Path) -> None:
    body = """
class cuda:
    is_available = staticmethod(lambda: COUNT > 0)
    device_count = staticmethod(lambda: COUNT)
    get_device_name = staticmethod(lambda index: f"card {index}")
    synchronize = staticmethod(lambda index: None)
class version:
    cuda = "12.8"
__version__ = "2.9.0"
"""
    a_package(tmp_path, "torch", f"COUNT = 0\n{body}")
    error = probed(tmp_path, "cuda:0", CUDA_VISIBLE_DEVICES="")
    assert ("sees no cuda device" in error["what"], "CUDA_VISIBLE_DEVICES=" in error["got"]) == (True, True)
    a_package(tmp_path, "torch", f"COUNT = 2\n{body}")
    error = probed(tmp_path, "cuda:2", CUDA_VISIBLE_DEVICES="4,7")
    assert error["expected"] == "cuda:0, cuda:1"
    assert error["got"] == "cuda:2, CUDA_VISIBLE_DEVICES=4,7"
    assert probed(tmp_path, "cuda:1") == {"name": "card 1"}


@pytest.mark.parametrize(
    ("said", "got", "hint"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be", "CUDA error: out of memory", "npu-runtime doctor"),
        (
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use 'spawn'",
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use 'spawn'",
            "get_context('spawn')",
        ),
    ],
)
def test_a_device_that_is_listed_and_does_not_start_is_told(tmp_path: Path, said: str, got: str, hint: str) -> None:
    body = f"""
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda index: "card")
    def synchronize(index):
        raise RuntimeError({said!r})
"""
    a_package(tmp_path, "torch", body)
    error = probed(tmp_path, "cuda:0")
    assert (error["what"], error["got"], hint in error["next"]) == ("cuda:0 does not start", got, True)


def test_what_torch_npu_says_of_a_failed_call_is_told_on_one_line() -> None:
    failed = read_cann_error(NO_START)
    assert failed is not None
    own = "aclrtSetDevice fails, as EMULATED_CANN_FAULTS asks"
    assert failed.code == 507033
    assert failed.text == f"c10_npu::SetDevice(device) gives error 507033: Failed to start the device: {own}"
    bare = read_cann_error("f:x.cpp:1 NPU function error: aclInit, error code is 1\n[Error]: \n")
    assert bare is not None
    assert bare.text == "aclInit gives error 1"
    assert read_cann_error("No NPUs are available\n[ERROR] 2026") is None
    assert read_cann_error("") is None


def test_a_torch_without_cuda_says_that_it_is_built_without(tmp_path: Path) -> None:
    body = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    a_package(tmp_path, "torch", body + "class version:\n    cuda = None\n__version__ = '2.13.0+cpu'\n")
    assert "built without CUDA" in probed(tmp_path, "cuda")["got"]


@pytest.mark.parametrize("backend", [None, "onnx", "torchscript", "eager"])
def test_loading_on_a_device_that_is_not_here_exits_with_4(tiny_artifact: Path, backend: str | None) -> None:
    if probe_device(Device("npu", 0)).available:
        pytest.skip("an NPU is here")
    with pytest.raises(UnavailableError) as caught:
        load(tiny_artifact, device="npu:0", backend=backend)
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_a_process_forked_after_the_device_was_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = object.__new__(Accelerator)
    accelerator.device, accelerator._process = Device("npu", 0), os.getpid()
    accelerator.check_process()
    monkeypatch.setattr(os, "getpid", lambda: accelerator._process + 1)
    with pytest.raises(UsageError, match="forked after npu:0 was started") as caught:
        accelerator.check_process()
    assert "spawn" in str(caught.value.hint)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown device"):
        require_device("npu:01x")
