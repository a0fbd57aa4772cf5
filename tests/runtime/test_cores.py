from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from npu_runtime.devices.cores import cpu_count, quota_cores

V2 = "0::/a/b\n"
GROUPS = "sys/fs/cgroup"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a made-up machine."""
    return tmp_path


def plant(root: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        pytest.param(V2, {"a/b/cpu.max": "200000 100000\n"}, 2, id="its own"),
        pytest.param(V2, {"a/b/cpu.max": "max 100000\n"}, None, id="no limit"),
        pytest.param(V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3, id="of the one around it"),
        pytest.param(V2, {"a/b/cpu.max": "800000 100000\n", "cpu.max": "400000 100000\n"}, 4, id="the least"),
        pytest.param(V2, {"cpu.max": "100000 100000\n"}, 1, id="of a container, whose own path is not mounted"),
        pytest.param("0::/../b\n", {"b/cpu.max": "100000 100000\n"}, 1, id="a path from outside of a namespace"),
        pytest.param(V2, {"a/b/cpu.max": "150000 100000\n"}, 2, id="rounded up"),
        pytest.param(V2, {"a/b/cpu.max": "1000 100000\n"}, 1, id="at least one"),
        pytest.param(V2, {"unified/a/b/cpu.max": "100000 50000\n"}, 2, id="beside version 1"),
        pytest.param(
            "4:cpu,cpuacct:/d\n1:name=systemd:/\n",
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/d/cpu.cfs_period_us": "100000\n"},
            3,
            id="version 1",
        ),
        pytest.param(
            "4:cpuacct:/d\n3:cpu:/d\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            1,
            id="version 1 in a container",
        ),
        pytest.param(
            "3:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "-1\n", "cpu/d/cpu.cfs_period_us": "100000\n"}, None, id="-1"
        ),
        pytest.param("3:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "100000\n"}, None, id="no period"),
        pytest.param("3:cpuset:/d\n", {"cpuset/d/cpu.max": "100000 100000\n"}, None, id="another controller"),
    ],
)
def test_the_least_quota_of_the_cgroups_around_the_process_counts(
    cgroup: str, files: Mapping[str, str], cores: int | None, root: Path
) -> None:
    plant(root, {"proc/self/cgroup": cgroup, **{f"{GROUPS}/{name}": text for name, text in files.items()}})
    assert quota_cores(root) == cores


@pytest.mark.parametrize(
    "content",
    ["", "many few\n", "100000\n", "100000 0\n", "0 100000\n", "-5 100000\n", "1 2 3\n", b"\xff\xfe", "9" * 5000],
)
def test_a_file_that_makes_no_sense_sets_no_limit(content: str | bytes, root: Path) -> None:
    plant(root, {"proc/self/cgroup": V2, f"{GROUPS}/a/b/cpu.max": content})
    assert quota_cores(root) is None
    plant(root, {f"{GROUPS}/a/cpu.max": "300000 100000"})
    assert quota_cores(root) == 3


def test_a_limit_too_large_for_a_float_is_one(root: Path) -> None:
    plant(root, {"proc/self/cgroup": V2, f"{GROUPS}/a/b/cpu.max": "9" * 400 + " 1"})
    assert quota_cores(root) == int("9" * 400)


@pytest.mark.parametrize("cgroup", [None, "", "nonsense\n", ":::::\n", "0:\n", b"\xff"])
def test_without_a_list_of_cgroups_there_is_no_quota(cgroup: str | bytes | None, root: Path) -> None:
    if cgroup is not None:
        plant(root, {"proc/self/cgroup": cgroup})
    plant(root, {f"{GROUPS}/elsewhere/cpu.max": "100000 100000"})
    assert quota_cores(root) is None


def test_a_folder_in_the_place_of_a_file_sets_no_limit(root: Path) -> None:
    plant(root, {"proc/self/cgroup": V2})
    (root / GROUPS / "a/b/cpu.max").mkdir(parents=True)
    assert quota_cores(root) is None


def run(code: str, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_cores_are_the_least_of_affinity_and_quota(root: Path) -> None:
    own = len(os.sched_getaffinity(0))
    assert cpu_count(root) == own
    plant(root, {"proc/self/cgroup": V2, f"{GROUPS}/a/b/cpu.max": f"{100000 * (own + 7)} 100000"})
    assert cpu_count(root) == own
    plant(root, {f"{GROUPS}/a/b/cpu.max": "100000 100000"})
    assert cpu_count(root) == 1
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    count = "from npu_runtime.devices import cpu_count; print(cpu_count())"
    assert run(one + count) == "1"


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python reads PYTHON_CPU_COUNT from 3.13 on")
def test_from_python_3_13_on_its_own_variable_stands_for_the_affinity() -> None:
    assert run("from npu_runtime.devices import cpu_count; print(cpu_count())", PYTHON_CPU_COUNT="1") == "1"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list threads")
@pytest.mark.parametrize(("cores", "threads", "expected"), [(1, None, 1), (1, 3, 3)])
def test_onnxruntime_takes_the_cores_of_the_process_unless_it_is_told_how_many(
    cores: int, threads: int | None, expected: int, tiny_artifact: Path
) -> None:
    code = f"""
import os
import npu_runtime.devices.cores as cores
cores.cpu_count = lambda: {cores}
cores._machine_cores = lambda: 8
import numpy as np, onnxruntime
from npu_runtime import load
before = len(os.listdir("/proc/self/task"))
encoder = load({str(tiny_artifact)!r}, backend="onnxruntime", batches=[1], threads={threads})
encoder(np.zeros((1, 3, 32, 32), np.float32))
print(1 + len(os.listdir("/proc/self/task")) - before)  # the caller works as well
"""
    assert run(code) == str(expected)


def test_torch_takes_no_more_threads_than_the_process_has_cores_and_fewer_where_it_was_told_so(
    tiny_artifact: Path,
) -> None:
    code = f"""
import sys, torch
import npu_runtime.backends.torch_session as session
from npu_runtime import load
told = []
for set, cores, threads in ((4, 2, None), (1, 2, None), (1, 2, 3)):
    torch.set_num_threads(set)
    session.cpu_count = lambda: cores
    load({str(tiny_artifact)!r}, backend="torchscript", threads=threads).close()
    told.append(torch.get_num_threads())
print(told)
"""
    assert run(code) == "[2, 1, 3]"
