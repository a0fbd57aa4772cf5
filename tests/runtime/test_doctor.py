"""The looks of npu-runtime doctor, on machines that files, variables and a script make up."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from npu_runtime.devices.cores import cpu_count
from npu_runtime.devices.device import CPU, Device
from npu_runtime.devices.doctor import ascend, packages, variables, visible
from npu_runtime.devices.doctor.check import Check, VariableCheck, release
from npu_runtime.devices.doctor.machine import Machine, Package
from npu_runtime.devices.probe import Probe
from npu_runtime.errors import UnavailableError

HERE = Package("2.9.0", True, None)
ABSENT = Package(None, False, None)
BROKEN = Package("2.9.0", True, UnavailableError("torch_npu is installed and does not import", hint="mend it"))

SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.2                   Version: 25.5.2                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 5     910B4               | OK            | 89.9        39                0    / 0             |
| 0                         | 0000:41:00.0  | 0           0    / 0          2922 / 32768         |
+===========================+===============+====================================================+
| 6     910B4               | {health:<13} | 90.1        40                0    / 0             |
| 0                         | 0000:42:00.0  | 0           0    / 0          2922 / 32768         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 5       0                 | 34112         | python                   | 1290                    |
| No running processes found in NPU 6                                                            |
+===========================+===============+====================================================+
"""


class NoDevices(dict[Device, Probe]):
    """Probes of a machine whose accelerators do not run."""

    def __missing__(self, device: Device) -> Probe:
        return Probe(str(device), None, UnavailableError(f"no {device}"))


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    """A machine with nothing but what is given, and no device unless its name is; nothing is imported."""

    def make(*, npus: int = 0, timeout_s: float = 10, torch: Package = HERE, **given: Any) -> Machine:
        environ = {"PATH": os.pathsep.join((str(tmp_path / "bin"), "/usr/bin", "/bin")), **given.pop("environ", {})}
        made = Machine(environ, ascend=tmp_path / "Ascend", timeout_s=timeout_s)
        vars(made).update({"torch": torch, "torch_npu": ABSENT, "torch_cuda": None, "onnxruntime": ABSENT, **given})
        probes = {Device("npu", index): Probe(f"npu:{index}", "Ascend910B4", None) for index in range(npus)}
        made.probe = lambda device: NoDevices(probes)[device]  # type: ignore[method-assign]
        made.count = lambda kind: npus if kind == "npu" else 0  # type: ignore[method-assign]
        return made

    return make


@pytest.fixture
def npu_smi(tmp_path: Path) -> Callable[[str], None]:
    """Put a script in the place of npu-smi."""

    def write(body: str) -> None:
        file = tmp_path / "bin" / "npu-smi"
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\n{body}\n", "utf-8")
        file.chmod(0o755)

    return write


def only(checks: Iterable[Check]) -> Check:
    (check,) = checks
    return check


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text, "utf-8")


def verdict_of(name: str, value: str | None, machine: Machine) -> Check:
    if value is not None:
        machine.environ[name] = value
    return next(check for check in variables.check_variables(machine) if check.name == name)


@pytest.mark.parametrize(
    ("version", "verdict"), [((3, 9), "warn"), ((3, 10), "ok"), ((3, 13), "ok"), ((3, 14), "warn"), ((4, 0), "warn")]
)
def test_pythons_that_are_not_tested_are_a_warning(
    version: tuple[int, int], verdict: str, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 1, "final", 0))
    check = only(packages.check_python(machine()))
    assert (check.verdict, bool(check.advice)) == (verdict, verdict == "warn")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("2.9.0.post1+gitee7ba04", (2, 9, 0)), ("2.13.0+cpu", (2, 13, 0)), ("8.5.RC1", (8, 5)), ("x", ())],
)
def test_a_version_is_compared_by_its_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert release(text) == numbers


@pytest.mark.parametrize(("version", "verdict"), [("2.6.0", "warn"), ("2.7.0", "ok"), ("2.13.0+cpu", "ok")])
def test_a_torch_older_than_supported_is_a_warning(version: str, verdict: str, machine: Callable[..., Machine]) -> None:
    assert only(packages.check_torch(machine(torch=Package(version, True, None)))).verdict == verdict


def test_a_cuda_build_fails_beside_torch_npu_alone(machine: Callable[..., Machine]) -> None:
    beside = only(packages.check_torch_build(machine(torch_cuda="12.8", torch_npu=HERE)))
    assert (beside.verdict, "torch==2.9.0+cpu" in str(beside.advice)) == ("fail", True)
    assert only(packages.check_torch_build(machine(torch_cuda="12.8"))).found == "CUDA 12.8"
    assert only(packages.check_torch_build(machine(torch_npu=HERE))).verdict == "ok"


FILES = {
    "a toolkit's": ("x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.5.1\n"),
    "an own one": ("ascend_toolkit_install.info", "version=8.5.1\ninnerversion=V100R001C23B210\n"),
    "a list of runtimes": ("version.cfg", "# all\nruntime_running_version=[7.0.0.5.242:7.0.RC1][7.7.0.1.220:8.5.1]\n"),
    "a part's": ("runtime/version.info", "Version=8.5.1\nversion_dir=8.5.1\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_version_of_cann_is_read_where_set_env_points(
    name: str, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    file, text = FILES[name]
    home = tmp_path / "elsewhere"
    write(home / file, text)
    for variable in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        check = only(ascend.check_cann(machine(environ={variable: str(home)})))
        assert (check.verdict, check.found, check.advice) == ("ok", f"8.5.1 in {home}", None)


@pytest.mark.parametrize("place", ["ascend-toolkit/latest", "cann"])
def test_a_cann_that_is_installed_and_not_sourced_names_its_script(
    place: str, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    folder = tmp_path / "Ascend" / place
    write(folder / "aarch64-linux" / "ascend_toolkit_install.info", "version=8.5.1\n")
    (folder / "set_env.sh").touch()
    for environ in ({}, {"ASCEND_TOOLKIT_HOME": str(tmp_path / "gone")}):
        check = only(ascend.check_cann(machine(environ=environ)))
        assert (check.verdict, check.advice) == ("warn", f"source {folder / 'set_env.sh'}")
        assert check.found.startswith(f"8.5.1 in {folder}, but ")


@pytest.mark.parametrize(
    ("torch_npu", "npus", "verdict"), [(ABSENT, 0, "absent"), (BROKEN, 0, "fail"), (HERE, 0, "fail"), (HERE, 2, "warn")]
)
def test_what_an_npu_needs_fails_only_where_torch_npu_is_and_no_npu_runs(
    torch_npu: Package, npus: int, verdict: str, machine: Callable[..., Machine]
) -> None:
    made = machine(torch_npu=torch_npu, npus=npus)
    cann, driver = only(ascend.check_cann(made)), only(ascend.check_driver(made))
    assert (cann.verdict, driver.verdict) == (verdict, verdict)
    assert (cann.found, str(cann.advice).partition(" (")[0]) == (
        "set_env.sh was not sourced",
        "install CANN and source its set_env.sh",
    )
    assert "/dev/davinci" in str(driver.advice)
    # It is a tool: nothing runs through it.
    assert only(ascend.check_npu_smi(made)).verdict == {"absent": "absent"}.get(verdict, "warn")


def test_the_version_that_torch_npu_tells_of_cann_comes_first(
    tmp_path: Path, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    write(home / "x86_64-linux" / "ascend_toolkit_install.info", "version=8.5.1\n")
    environ = {"ASCEND_HOME_PATH": str(home)}
    told: dict[str, object] = {}

    class Module:
        def __init__(self, name: str) -> None:
            self.name = name

        def get_cann_version(self) -> object:
            answer = told[self.name]
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(ascend.importlib, "import_module", Module)
    for answers, version in (
        (("8.5.2", "8.5.3"), "8.5.2"),
        ((AttributeError(), "8.5.3"), "8.5.3"),
        ((UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), "not known"), "8.5.1"),
        ((None, RuntimeError("The path does not exist")), "8.5.1"),
    ):
        told.update(zip(("torch_npu.npu.utils", "torch_npu.utils.collect_env"), answers, strict=True))
        assert only(ascend.check_cann(machine(environ=environ, torch_npu=HERE))).found == f"{version} in {home}"
    # That of 2.9 would walk through the working folder, wherever that is.
    told["torch_npu.utils.collect_env"] = "1.2.3"
    assert only(ascend.check_cann(machine(torch_npu=HERE))).found == "set_env.sh was not sourced"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version=24.1.rc1\nascendhal_version=7.35.19\nInnerversion=V100R001C15\n", "24.1.rc1"),
        ("Version=7.35.23\npackage_version=25.5.2\n", "25.5.2"),
        ("ascendhal_version=7.35.19\n", None),
        ("", None),
    ],
)
def test_the_version_of_the_driver_is_read(
    text: str, version: str | None, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    write(tmp_path / "Ascend" / "driver" / "version.info", text)
    check = only(ascend.check_driver(machine(torch_npu=HERE)))
    assert (check.verdict, check.found == version) == (("ok", True) if version else ("fail", False))


def test_npu_smi_tells_version_and_health(npu_smi: Callable[[str], None], machine: Callable[..., Machine]) -> None:
    npu_smi(f"cat <<'END'\n{SMI.format(health='OK')}\nEND")
    made = machine()
    check = only(ascend.check_npu_smi(made))
    assert (check.verdict, check.found, check.advice) == ("ok", "25.5.2: 5 910B4 OK, 6 910B4 OK", None)
    soc = only(ascend.check_soc(made))
    assert (soc.verdict, soc.found) == ("ok", "910B4, as npu-smi names it")


def test_an_npu_smi_that_tells_no_version_is_read_all_the_same(
    npu_smi: Callable[[str], None], machine: Callable[..., Machine]
) -> None:
    npu_smi("echo '| 0       310P3     | OK              | 16.2         42                0    / 0   |'")
    assert only(ascend.check_npu_smi(machine())).found == "no version: 0 310P3 OK"


def test_a_card_that_is_not_well_is_a_warning(npu_smi: Callable[[str], None], machine: Callable[..., Machine]) -> None:
    npu_smi(f"cat <<'END'\n{SMI.format(health='Alarm')}\nEND")
    check = only(ascend.check_npu_smi(machine()))
    assert (check.verdict, check.found) == ("warn", "25.5.2: 5 910B4 OK, 6 910B4 Alarm")
    assert "-i 6" in str(check.advice)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("echo 'dcmi module initialize failed. ret is -8005'; exit 255", "exits with 255: dcmi module initialize"),
        ("echo 'dcmi module initialize failed. ret is -8005'", "lists no device: dcmi module initialize"),
        ("printf '\\377\\376' >&2; exit 1", "exits with 1"),
        ("exit 3", "exits with 3: without a word"),
    ],
)
def test_an_npu_smi_that_fails_is_a_failure_unless_an_npu_runs(
    body: str, found: str, npu_smi: Callable[[str], None], machine: Callable[..., Machine]
) -> None:
    npu_smi(body)
    check = only(ascend.check_npu_smi(machine()))
    assert (check.verdict, found in check.found, bool(check.advice)) == ("fail", True, True)
    assert only(ascend.check_npu_smi(machine(torch_npu=HERE, npus=1))).verdict == "warn"


def test_an_npu_smi_that_hangs_is_given_up_with_what_it_started(
    npu_smi: Callable[[str], None], machine: Callable[..., Machine], tmp_path: Path
) -> None:
    npu_smi(f"sleep 60 &\necho $! > {tmp_path}/child\nwait")
    start = time.monotonic()
    check = only(ascend.check_npu_smi(machine(timeout_s=0.5)))
    assert time.monotonic() - start < 10
    assert (check.verdict, "no answer within 0.5 s" in check.found) == ("fail", True)
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what npu-smi started still runs")


def test_an_npu_smi_that_does_not_start_says_why(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    write(tmp_path / "bin" / "npu-smi", "#!/no/such/shell\n")
    (tmp_path / "bin" / "npu-smi").chmod(0o755)
    check = only(ascend.check_npu_smi(machine()))
    assert (check.verdict, "does not start" in check.found) == ("fail", True)


def test_the_soc_is_what_torch_calls_the_devices(machine: Callable[..., Machine]) -> None:
    assert only(ascend.check_soc(machine(torch_npu=HERE, npus=2))).found == "Ascend910B4"
    assert only(ascend.check_soc(machine())).verdict == "absent"


@pytest.mark.parametrize("value", [None, "0", "3", "0,1", "1,3,10"])
def test_lists_of_npus_that_cann_reads_are_fine(value: str | None, machine: Callable[..., Machine]) -> None:
    made = machine(torch_npu=HERE)
    assert verdict_of("ASCEND_RT_VISIBLE_DEVICES", value, made).verdict == "ok"
    assert only(visible.check_visible(made)).verdict == "ok"


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        ("1,0", "ascending order: 0,1"),
        ("10,9", "ascending order: 9,10"),
        ("0,0", "once: 0"),
        ("1,1,0", "once: 0,1"),
        ("0, 1", "whole numbers"),
        ("0,1,", "whole numbers"),
        ("-1", "whole numbers"),
        ("a", "whole numbers"),
        ("0.5", "whole numbers"),
        ("٣", "whole numbers"),
        ("", "hides every NPU"),
    ],
)
@pytest.mark.parametrize("torch_npu", [HERE, ABSENT])
def test_lists_of_npus_that_cann_does_not_read_to_the_end_fail_everywhere(
    value: str, advice: str, torch_npu: Package, machine: Callable[..., Machine]
) -> None:
    made = machine(torch_npu=torch_npu)
    variable = verdict_of("ASCEND_RT_VISIBLE_DEVICES", value, made)
    assert (variable.verdict, advice in str(variable.advice)) == ("fail", True)
    devices = only(visible.check_visible(made))
    assert (devices.verdict, advice in str(devices.advice)) == ("fail", True)


def test_more_npus_named_than_seen_is_a_warning(machine: Callable[..., Machine]) -> None:
    made = machine(torch_npu=HERE, npus=2, environ={"ASCEND_RT_VISIBLE_DEVICES": "1,3,8"})
    assert only(visible.check_visible(made)).verdict == "warn"
    made.environ["ASCEND_RT_VISIBLE_DEVICES"] = "1,3"
    assert only(visible.check_visible(made)).found == "2 npu, ASCEND_RT_VISIBLE_DEVICES '1,3'"


VALUES = {
    "TORCH_DEVICE_BACKEND_AUTOLOAD": ((None, "0", "1"), ()),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": ((None, "1"), ("0",)),
    "TORCH_NPU_USE_COMPATIBLE_IMPL": ((None, "0", "1"), ()),
    "TASK_QUEUE_ENABLE": ((None, "1"), ("0", "2", "3", "many", "")),
    "CPU_AFFINITY_CONF": ((None, "1,npu0:0-11", "2"), ()),
    "PYTORCH_NPU_ALLOC_CONF": ((None, "expandable_segments:True"), ("expandable_segments:False",)),
    "PYTORCH_ALLOC_CONF": ((None, "expandable_segments:True"), ()),
    "ASCEND_LAUNCH_BLOCKING": ((None, "0"), ("1",)),
    "OMP_NUM_THREADS": ((None, "1", "1,1"), ("0", "-1", "many", "", "100000")),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_slow_or_change_results_are_warnings_with_advice(
    name: str, machine: Callable[..., Machine]
) -> None:
    fine, wrong = VALUES[name]
    for value in (*fine, *wrong):
        check = verdict_of(name, value, machine(torch_npu=HERE))
        assert (check.verdict, bool(check.advice)) == (("warn", True) if value in wrong else ("ok", False)), value
        assert check.found == ("unset" if value is None else value or "empty")
        assert isinstance(check, VariableCheck)
        assert (bool(check.does), bool(check.advised)) == (True, True)


@pytest.mark.parametrize(("version", "verdict"), [("2.9.0.post9", "ok"), ("2.13.0", "fail")])
def test_two_settings_of_the_allocator_stop_a_torch_npu_that_reads_both(
    version: str, verdict: str, machine: Callable[..., Machine]
) -> None:
    made = machine(
        torch_npu=Package(version, True, None), environ={"PYTORCH_ALLOC_CONF": "", "PYTORCH_NPU_ALLOC_CONF": ""}
    )
    assert verdict_of("PYTORCH_ALLOC_CONF", None, made).verdict == verdict
    del made.environ["PYTORCH_NPU_ALLOC_CONF"]
    assert verdict_of("PYTORCH_ALLOC_CONF", None, made).verdict == "ok"


def test_the_npus_variables_do_not_matter_without_torch_npu(machine: Callable[..., Machine]) -> None:
    environ = {name: wrong[0] for name, (_, wrong) in VALUES.items() if wrong}
    found = {check.name: check for check in variables.check_variables(machine(environ=environ))}
    assert {check.verdict for name, check in found.items() if name != "OMP_NUM_THREADS"} == {"absent"}
    assert found["TASK_QUEUE_ENABLE"].found == "0"
    assert found["OMP_NUM_THREADS"].verdict == "warn"


def test_as_many_threads_as_cores_are_fine(machine: Callable[..., Machine]) -> None:
    assert verdict_of("OMP_NUM_THREADS", str(cpu_count()), machine()).verdict == "ok"
    assert verdict_of("OMP_NUM_THREADS", str(cpu_count() + 1), machine()).verdict == "warn"


def test_the_search_path_is_to_hold_canns_libraries(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    (tmp_path / "lib64").mkdir()
    path = f"/nowhere::{tmp_path / 'lib64'}"
    lacking = verdict_of("LD_LIBRARY_PATH", path, machine(torch_npu=HERE))
    assert (lacking.verdict, lacking.found) == ("warn", "no libascendcl.so in it")
    assert "set_env.sh" in str(lacking.advice)
    (tmp_path / "lib64" / "libascendcl.so").touch()
    holding = verdict_of("LD_LIBRARY_PATH", path, machine(torch_npu=HERE))
    assert (holding.verdict, holding.found) == ("ok", str(tmp_path / "lib64"))


def test_the_cpu_runs_where_a_backend_imports(machine: Callable[..., Machine]) -> None:
    def cpu(**given: Package) -> Probe:
        return visible.probe_devices(machine(**given), None)["cpu"]

    assert cpu(torch=HERE).available
    assert cpu(torch=ABSENT, onnxruntime=HERE).available
    nothing = cpu(torch=ABSENT).error
    assert nothing is not None
    assert "pip install" in str(nothing.hint)
    broken = cpu(torch=BROKEN).error
    assert (broken is not None, broken and broken.hint) == (True, "mend it")


def test_a_device_that_is_not_here_fails_only_where_it_is_asked_for_or_meant(machine: Callable[..., Machine]) -> None:
    def verdicts(made: Machine, asked: Device | None = None) -> dict[str, str]:
        probes = visible.probe_devices(made, asked)
        return {check.name: check.verdict for check in visible.check_devices(made, probes, asked)}

    assert verdicts(machine()) == {"cpu": "ok", "cuda:0": "absent", "npu:0": "absent"}
    assert verdicts(machine(torch_npu=BROKEN)) == {"cpu": "ok", "cuda:0": "absent", "npu:0": "fail"}
    asked = Device("cuda", 3)
    assert verdicts(machine(), asked) == {"cpu": "ok", "cuda:0": "absent", "npu:0": "absent", "cuda:3": "fail"}
    assert verdicts(machine(npus=2, torch_npu=HERE), CPU) == {
        "cpu": "ok",
        "cuda:0": "absent",
        "npu:0": "ok",
        "npu:1": "ok",
    }
