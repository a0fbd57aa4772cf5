"""Hosts on which no NPU runs, made with the vendor's torch_npu: what it says is told, with what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Look = Callable[..., dict[str, Any]]
TINY = Path(__file__).parent.parent / "tiny.py"
SET_ENVIRONMENT = "set_env.sh"
AUTOLOAD = pytest.mark.parametrize("autoload", ["1", "0"])
"""Whether `import torch` imports torch_npu, and fails with it."""

LOOK = """
import json
from npu_runtime import UnavailableError, load
from npu_runtime.devices import parse_device
from npu_runtime.devices.doctor import Machine, examine
artifact, device = sys.argv[1:]
try:
    load(artifact, device=device, allow_fallback=True).close()
    error = None
except UnavailableError as raised:
    error = raised.fields()
findings = examine(Machine(), parse_device(device))
told = findings.probes[device].error
print()
print(json.dumps({
    "load": error,
    "doctor": None if told is None else told.fields(),
    "checks": {check.name: check.verdict for checks in findings.checks.values() for check in checks},
    "advice": {check.name: check.advice for checks in findings.checks.values() for check in checks},
}))
"""


@pytest.fixture
def look(script: Run, artifact: Path) -> Look:
    """What `load` raises and what doctor finds in one process."""

    def run(device: str = "npu:0", **variables: object) -> dict[str, Any]:
        # What torch_npu prints as it ends may follow.
        lines = script(LOOK, artifact, device, **variables).stdout.splitlines()
        return dict(json.loads(next(line for line in lines if line.startswith('{"load"'))))

    return run


def refused(found: dict[str, Any], what: str, got: str | None, *advice: str) -> None:
    """`load` and doctor say the same, and the last line of nobody's log is in it."""
    error = found["load"]
    assert error is not None
    assert error["what"].startswith(what), error
    if got is not None:
        assert error["got"] == got
    for part in advice:
        assert part in error["next"], error
    assert "[ERROR]" not in str(error)
    assert found["doctor"]["what"] == error["what"]
    assert found["checks"]["npu:0"] == "fail"


def linked_copy(source: Path, copy: Path, *, without: str) -> Path:
    """A folder of links to what is in another, one name left out."""
    copy.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name != without:
            (copy / entry.name).symlink_to(entry)
    return copy


def libraries(environment: dict[str, str]) -> Path:
    """The folder of the emulated CANN's libraries."""
    return Path(environment["ASCEND_HOME_PATH"]) / "lib64"


@AUTOLOAD
def test_without_cann_its_missing_library_is_named(autoload: str, look: Look) -> None:
    found = look(LD_LIBRARY_PATH="", TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    said = "libhccl.so: cannot open shared object file: No such file or directory"
    what = f"torch does not import, since torch_npu does not: {said}" if autoload == "1" else "torch_npu is installed"
    refused(found, what, said, SET_ENVIRONMENT)
    assert ("TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found["load"]["next"]) == (autoload == "1")
    assert found["checks"]["torch"] == ("fail" if autoload == "1" else "ok")
    assert found["checks"]["torch_npu"] == "fail"


def test_without_cann_the_cpu_runs_once_torch_npu_is_not_loaded(command: Run, artifact: Path) -> None:
    refused = command("verify", artifact, "--device", "cpu", "--json", LD_LIBRARY_PATH="")
    error = json.loads(refused.stdout)["error"]
    assert (refused.returncode, "libhccl.so" in error["got"]) == (4, True)
    assert error["next"].endswith("; or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run without torch_npu")
    followed = command("verify", artifact, "--device", "cpu", LD_LIBRARY_PATH="", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert followed.returncode == 0, followed.stderr


def test_the_commands_exit_with_4_and_print_nothing_but_json(command: Run, artifact: Path) -> None:
    for arguments in (("doctor",), ("verify", artifact), ("bench", artifact), ("parity", artifact)):
        done = command(*arguments, "--device", "npu:0", "--json", LD_LIBRARY_PATH="")
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["exit_code"]) == (4, 4), arguments
        assert "libhccl.so" in answer["error"]["got"]
        assert "Traceback" not in done.stderr


def test_a_cann_that_lacks_a_library_is_not_whole(
    look: Look, emulated_npu: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    folder = linked_copy(libraries(emulated_npu()), tmp_path / "lib64", without="libhccl.so")
    found = look(LD_LIBRARY_PATH=folder)
    said = "libhccl.so: cannot open shared object file: No such file or directory"
    refused(found, "torch does not import", said, f"the CANN in {folder} is not whole", "install its toolkit")


def test_a_cann_older_than_torch_npu_is_told_by_the_function_that_it_lacks(
    look: Look, emulated_npu: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    source = libraries(emulated_npu())
    folder = linked_copy(source, tmp_path / "lib64", without="libascendcl.so")
    library = (source / "libascendcl.so").read_bytes()
    (folder / "libascendcl.so").write_bytes(library.replace(b"\0aclrtUnmapMem\0", b"\0aclrtUnmapped\0"))
    found = look(LD_LIBRARY_PATH=folder)
    assert found["load"]["got"].endswith("libtorch_npu.so: undefined symbol: aclrtUnmapMem")
    refused(found, "torch does not import", None, "this CANN is too old for torch-npu", SET_ENVIRONMENT)


def test_a_cann_of_an_old_version_is_taken_by_torch_npu_and_told_by_doctor(command: Run) -> None:
    done = command("doctor", "--device", "npu:0", "--json", EMULATED_CANN_VERSION="7.0.0")
    answer = json.loads(done.stdout)
    (cann,) = (check for check in answer["checks"] if check["name"] == "CANN")
    assert (done.returncode, cann["found"].split()[0]) == (0, "7.0.0")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "home",
            "ASCEND_HOME_PATH : {}/home does not exist. Please run 'source set_env.sh' in the CANN installation path.",
        ),
        (
            "runtime",
            "ASCEND_RUNTIME_PATH : {}/cann/runtime does not exist. Please check whether the runtime package has been "
            "installed. If exist, please run 'source set_env.sh' in the CANN installation path.",
        ),
        (
            "compiler",
            "ASCEND_COMPILER_PATH : {}/cann/compiler does not exist. Please check whether the compiler package has "
            "been installed. If exist, please run 'source set_env.sh' in the CANN installation path.",
        ),
        (
            "opp",
            "ASCEND_OPP_PATH : {}/opp does not exist. Please check whether the opp package has been installed. "
            "If exist, please run 'source set_env.sh' in the CANN installation path.",
        ),
    ],
)
def test_an_environment_that_names_no_whole_cann_is_told(
    name: str, said: str, look: Look, emulated_npu: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """torch_npu raises a bare Exception for these, which torch makes a RuntimeError of where it loads torch_npu."""
    autoload = "1" if name == "home" else "0"
    cann = linked_copy(libraries(emulated_npu()).parent, tmp_path / "cann", without=name)
    paths = {"ASCEND_HOME_PATH": tmp_path / "home" if name == "home" else cann}
    if name == "opp":
        paths["ASCEND_OPP_PATH"] = tmp_path / "opp"
    found = look(**paths, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    what = "torch does not import" if autoload == "1" else "torch_npu is installed and does not import"
    refused(found, what, said.format(tmp_path), SET_ENVIRONMENT, "the environment names no whole CANN")


def test_an_unset_home_is_a_remark_of_torch_npus_that_stays_off_stdout(
    artifact: Path, emulated_npu: Callable[..., dict[str, str]]
) -> None:
    """torch_npu prints `Warning: ASCEND_HOME_PATH environment variable is not set.` on stdout, and runs."""
    environment = emulated_npu()
    del environment["ASCEND_HOME_PATH"]
    for arguments in (["doctor"], ["verify", str(artifact), "--allow-fallback"]):
        line = [sys.executable, str(TINY), "npu-runtime", *arguments, "--device", "npu:0", "--json"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert "error" not in json.loads(done.stdout)
        assert "ASCEND_HOME_PATH environment variable is not set" in done.stderr


@AUTOLOAD
def test_a_torch_npu_of_another_python_is_told_by_the_file_that_it_lacks(
    autoload: str, look: Look, tmp_path: Path
) -> None:
    spec = find_spec("torch_npu")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    copy = linked_copy(package, tmp_path / "packages" / "torch_npu", without=f"_C{suffix}")
    (copy / "_C.cpython-36m-x86_64-linux-gnu.so").symlink_to(package / f"_C{suffix}")
    paths = os.pathsep.join([str(copy.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = look(PYTHONPATH=paths, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    what = "torch does not import" if autoload == "1" else "torch_npu is installed and does not import"
    refused(
        found, what, "No module named 'torch_npu._C'", "torch_npu holds _C.cpython-36m-x86_64-linux-gnu.so: install"
    )
    assert f"torch_npu/_C{suffix}" in found["load"]["expected"]


TWO = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        core = sys.modules.get("torch._C")
        if name == "torch_npu" and core is not None:
            core._get_accelerator = lambda *arguments: core.device("cuda")

sys.meta_path.insert(0, Finder())
"""


@AUTOLOAD
def test_a_torch_with_another_accelerator_is_told_with_the_build_to_install(
    autoload: str, look: Look, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(TWO, "utf-8")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = look(PYTHONPATH=paths, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    said = (
        "Two accelerators cannot be used at the same time in PyTorch: npu and cuda. You can install the cpu version of "
        "PyTorch to use your npu device, or use the cuda device with 'export TORCH_DEVICE_BACKEND_AUTOLOAD=0'."
    )
    what = "torch does not import" if autoload == "1" else "torch_npu is installed and does not import"
    refused(found, what, said, "pip install torch==2.", "+cpu --index-url https://download.pytorch.org/whl/cpu")


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (507033, "Failed to start the device"),
        (507899, "An internal error occurs in the Driver module"),
        (507901, "The internal host device communication (HDC) session is disconnected"),
    ],
)
def test_a_device_that_does_not_start_says_which_call_failed_and_what_its_code_means(
    code: int, meaning: str, look: Look
) -> None:
    found = look(EMULATED_CANN_FAULTS=f"aclrtSetDevice={code}")
    refused(found, "npu:0 does not start", None, "npu-smi info", "~/ascend/log", "/dev/davinci")
    assert found["load"]["got"].startswith(f"c10_npu::SetDevice(device) gives error {code}: {meaning}: ")
    assert found["checks"]["torch_npu"] == "ok"


def test_a_lost_device_is_told_where_waiting_for_it_fails(look: Look) -> None:
    found = look(EMULATED_CANN_FAULTS="aclrtSynchronizeDevice=507899")
    refused(found, "npu:0 does not start", None, "npu-smi info")
    assert found["load"]["got"].startswith("AclrtSynchronizeDeviceWithTimeout gives error 507899: An internal error")


def test_a_device_of_the_list_that_is_not_there_is_told_with_the_list(look: Look) -> None:
    found = look(EMULATED_CANN_FAULTS="aclrtSetDevice=107001", ASCEND_RT_VISIBLE_DEVICES="0")
    refused(found, "npu:0 does not start", None, "name those in ASCEND_RT_VISIBLE_DEVICES, or unset it")
    assert found["load"]["got"].startswith("c10_npu::SetDevice(device) gives error 107001: Invalid device ID: ")


def test_a_cann_that_does_not_begin_says_why(look: Look) -> None:
    found = look(EMULATED_CANN_FAULTS="aclInit=100039")
    refused(found, "npu:0 does not start", None, "take CANN's folder devlib", "off LD_LIBRARY_PATH")
    assert found["load"]["got"].startswith("aclInit gives error 100039: The dynamic library path configured before")


@pytest.mark.parametrize(
    "fault", [{"EMULATED_CANN_DEVICES": 0}, {"EMULATED_CANN_FAULTS": "aclrtGetDeviceCount=507899"}]
)
def test_no_device_is_told_with_where_to_look(fault: dict[str, object], look: Look) -> None:
    """torch_npu takes a driver that gives no count for one that counts none."""
    found = look(**fault)
    refused(found, "torch sees no npu device on this machine", "0 devices")
    assert "/dev/davinci" in found["doctor"]["next"]
    assert found["checks"]["torch_npu"] == "ok"


def test_a_number_that_is_too_high_is_told_with_those_that_are_there(look: Look) -> None:
    found = look("npu:5", EMULATED_CANN_DEVICES=2)
    assert found["load"] == found["doctor"]
    assert found["load"] == {
        "what": "there is no device of this index",
        "expected": "npu:0, npu:1",
        "got": "npu:5",
    }
    assert (found["checks"]["npu:0"], found["checks"]["npu:5"]) == ("ok", "fail")


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a driver's libascend_hal.so that counts two devices, by which torch_npu reads the list itself."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "driver.c"
    source.write_text("int drvGetDevNum(int *count) { *count = 2; return 0; }\n", "utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / "libascend_hal.so"), str(source)], check=True)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "count"),
    [("0,1", 2), ("1,0", 0), ("", 0), ("0,5", 1), ("x", 0)],
)
def test_a_list_of_devices_is_read_by_torch_npu_and_a_bad_one_told(
    value: str, count: int, driver: Path, look: Look, emulated_npu: Callable[..., dict[str, str]]
) -> None:
    paths = f"{driver}{os.pathsep}{libraries(emulated_npu())}"
    found = look(LD_LIBRARY_PATH=paths, ASCEND_RT_VISIBLE_DEVICES=value, EMULATED_CANN_DEVICES=max(count, 1))
    if count:
        assert (found["load"], found["checks"]["npu:0"]) == (None, "ok")
        assert ("npu:1" in found["checks"]) == (count == 2)
        assert (found["checks"]["visible devices"] == "warn") == ("5" in value)
    else:
        refused(found, "torch sees no npu device on this machine", f"0 devices, ASCEND_RT_VISIBLE_DEVICES={value}")
        assert "ASCEND_RT_VISIBLE_DEVICES" in found["doctor"]["next"]


def test_two_settings_of_the_allocator_are_a_failure_where_torch_npu_takes_but_one(
    command: Run, emulated_npu: Callable[..., dict[str, str]]
) -> None:
    both = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"), "expandable_segments:False")
    line = [sys.executable, "-c", "import torch; torch.ones(1, device='npu:0')"]
    used = subprocess.run(line, env=emulated_npu(**both), capture_output=True, text=True)
    text = "Both PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF have been set, please set only one of them."
    refused = text in used.stderr
    assert refused == (used.returncode != 0), used.stderr
    checks = json.loads(command("doctor", "--json", **both).stdout)["checks"]
    (check,) = (check for check in checks if check["name"] == "PYTORCH_ALLOC_CONF")
    assert (check["verdict"] == "fail") == refused
    assert (check["advice"] or "").startswith("unset PYTORCH_NPU_ALLOC_CONF:") == refused


def test_a_process_forked_after_the_device_was_started_is_told_to_spawn(script: Run, artifact: Path) -> None:
    """By torch_npu after a fork of multiprocessing alone; after os.fork it would hang."""
    code = """
import multiprocessing, os, torch
from npu_runtime import UnavailableError, load
artifact, device = sys.argv[1:]

def child(how):
    try:
        load(artifact, device=device)
    except UnavailableError as error:
        print(how, "told:", error.what, error.fields().get("got"), "->", error.hint, flush=True)

torch.ones(1, device=device)
process = multiprocessing.get_context("fork").Process(target=child, args=("multiprocessing",))
process.start()
process.join(60)
load(artifact, device=device, batches=[1], graph=False).close()
if os.fork() == 0:
    child("os.fork")
    os._exit(0)
os.wait()
"""
    out = script(code, artifact, "npu:1", EMULATED_CANN_DEVICES=2).stdout.splitlines()
    assert len(out) == 2
    assert out[0].startswith(
        "multiprocessing told: npu:1 does not start Cannot re-initialize NPU in forked subprocess."
    )
    assert out[1].startswith("os.fork told: the process was forked after npu:1 was started")
    assert all("multiprocessing.get_context('spawn')" in line for line in out)
