"""npu-runtime doctor, in a process of its own with made-up packages before the installed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch_npu_texts import NO_CANN, NO_CANN_2_7, NO_START, OTHER_TORCH, TWO_ACCELERATORS

RUN = "import sys\nsys.argv[0] = 'npu-runtime'\nfrom npu_runtime.cli import main\nmain()"

TORCH = """
import os, sys
print("torch prints this while it is imported")
print("torch was imported", file=sys.stderr)
__version__ = {version!r}
class version:
    cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {cards} > 0)
    device_count = staticmethod(lambda: {cards})
    get_device_name = staticmethod(lambda index: f"card {{index}}")
    synchronize = staticmethod(lambda index: None)
if {autoload}:
    try:
        import torch_npu
    except Exception as error:
        raise RuntimeError(
            "Failed to load the backend extension: torch_npu. You can disable extension auto-loading with "
            "TORCH_DEVICE_BACKEND_AUTOLOAD=0."
        ) from error
"""
TORCH_NPU = """
import sys
torch = sys.modules["torch"]
class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda index: "Ascend910B4")
    synchronize = staticmethod(lambda index: None)
torch.npu = npu
"""


class Packages:
    """A folder that stands first on the path of a fresh Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, body: str, version: str | None = None, distribution: str | None = None) -> None:
        """A module, and the metadata of a distribution where a version is given."""
        (self.folder / f"{name}.py").write_text(body, "utf-8")
        if version is not None:
            self.add_metadata(distribution or name, version)

    def add_metadata(self, distribution: str, version: str) -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", "utf-8")

    def add_torch(
        self, version: str = "2.9.0+cpu", *, cuda: str | None = None, cards: int = 0, autoload: bool = False
    ) -> None:
        body = TORCH.format(version=version, cuda=cuda, cards=cards, autoload=autoload)
        self.add("torch", body, version)
        self.add("torchvision", "", "0.24.0")

    def add_npus(self, version: str = "2.9.0.post1+gitee7ba04", body: str = TORCH_NPU) -> None:
        self.add("torch_npu", body, version, "torch-npu")

    def block(self, *names: str) -> None:
        for name in names:
            self.add(name, f"raise ModuleNotFoundError('No module named {name}', name={name!r})")


class Answer:
    """What doctor gave."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def check(self, name: str) -> dict[str, Any]:
        (found,) = (check for check in self.json["checks"] if check["name"] == name)
        return dict(found)

    def verdict(self, name: str) -> str:
        return str(self.check(name)["verdict"])


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    folder = tmp_path / "packages"
    folder.mkdir()
    return Packages(folder)


@pytest.fixture
def doctor(packages: Packages, tmp_path: Path) -> Callable[..., Answer]:
    """Run doctor with the made-up packages, in an empty folder that must stay so."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments: str, before: str = "", **environment: str) -> Answer:
        paths = [str(packages.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "CUDA_VIS"))}
        done = subprocess.run(
            [sys.executable, "-c", f"{before}\n{RUN}", "doctor", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=work,
            env={**inherited, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert list(work.iterdir()) == []
        return Answer(done)

    return run


def test_here_every_group_is_told_and_the_cpu_runs(doctor: Callable[..., Answer]) -> None:
    answer = doctor("--json")
    assert answer.code == 0
    record = answer.json
    assert list(record) == ["record", "environment", "checks", "devices"]
    assert (record["record"], "versions" in record["environment"]) == ("doctor", True)
    assert list(dict.fromkeys(check["group"] for check in record["checks"])) == ["packages", "devices", "environment"]
    for check in record["checks"]:
        expected = ["group", "name", "verdict", "found", "advice"]
        assert list(check) == expected + (["does", "advised"] if check["group"] == "environment" else [])
        assert check["verdict"] in ("ok", "warn", "fail", "absent")
        assert check["advice"] or check["verdict"] in ("ok", "absent")
    names = [check["name"] for check in record["checks"]]
    assert len(set(names)) == len(names)
    for name in ("python", "torch", "torch_npu", "CANN", "driver", "npu-smi", "SoC", "onnxruntime", "numpy", "cpu"):
        assert name in names
    assert record["devices"]["cpu"] == {"available": True, "name": None, "error": None}
    assert {"cpu", "cuda:0", "npu:0"} <= set(record["devices"])


def test_npus_that_run_are_named_and_can_be_asked_for(packages: Packages, doctor: Callable[..., Answer]) -> None:
    packages.add_torch()
    packages.add_npus()
    answer = doctor("--device", "npu:1", "--json", ASCEND_RT_VISIBLE_DEVICES="4,7")
    assert answer.code == 0
    assert answer.json["devices"]["npu:1"] == {"available": True, "name": "Ascend910B4", "error": None}
    assert answer.check("torch_npu")["found"] == "2.9.0.post1+gitee7ba04, beside torch 2.9.0+cpu"
    assert answer.check("SoC")["found"] == "Ascend910B4"
    assert answer.check("visible devices")["found"] == "2 npu, ASCEND_RT_VISIBLE_DEVICES '4,7'"
    assert {answer.verdict(name) for name in ("torch", "torch_npu", "npu:0", "npu:1", "TASK_QUEUE_ENABLE")} == {"ok"}
    assert "error" not in answer.json
    text = doctor()
    assert text.code == 0
    assert text.out.splitlines()[-1] == "can run    cpu, npu:0 (Ascend910B4), npu:1 (Ascend910B4)"
    assert "torch prints" not in text.out


def test_an_index_that_is_not_there_exits_with_4_after_everything_is_told(
    packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add_npus()
    answer = doctor("--device", "npu:7", "--json")
    assert (answer.code, answer.json["exit_code"]) == (4, 4)
    assert answer.json["error"]["what"] == "there is no device of this index"
    assert answer.json["devices"]["npu:7"]["error"] == answer.json["error"]
    assert (answer.verdict("npu:0"), answer.verdict("npu:7")) == ("ok", "fail")
    text = doctor("--device", "npu:7")
    assert text.code == 4
    assert text.out.splitlines()[-1].startswith("can run    cpu, npu:0")
    assert "cannot run npu:7: there is no device of this index" in text.out
    assert text.out.count("cannot run") == 2  # cuda:0 and npu:7
    assert "error: there is no device of this index" in text.err


@pytest.mark.parametrize(
    ("body", "found", "hint"),
    [
        (f"raise ImportError({NO_CANN!r})", "libhccl.so", "set_env.sh"),
        (f"raise ImportError({NO_CANN_2_7!r})", "libhccl.so", "set_env.sh"),
        (f"raise RuntimeError({TWO_ACCELERATORS!r})", "Two accelerators", "+cpu --index-url"),
        (f"raise ImportError({OTHER_TORCH!r})", "undefined symbol", "torch-npu 2.9 of the installed torch"),
        ("raise KeyError('a bug of its own')", "a bug of its own", "reinstall torch_npu"),
    ],
    ids=["no-cann", "no-cann-2.7", "cuda-build", "other-torch", "bug"],
)
@pytest.mark.parametrize("autoload", [True, False])
def test_a_torch_npu_that_does_not_import_is_a_finding(
    body: str, found: str, hint: str, autoload: bool, packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch(autoload=autoload)
    packages.add_npus(body=body)
    answer = doctor("--device", "npu:0", "--json")
    assert (answer.code, answer.json["exit_code"]) == (4, 4)
    assert answer.json["devices"]["npu:0"]["error"] == answer.json["error"]
    check = answer.check("torch_npu")
    assert (check["verdict"], found in check["found"], hint in check["advice"]) == ("fail", True, True)
    assert answer.verdict("torch") == ("fail" if autoload else "ok")
    assert answer.verdict("numpy") == "ok"
    # A second import of torch after a failed one gives another error, or ends the process.
    assert answer.err.count("torch was imported") == 1
    described = doctor()
    assert (described.code, described.out.splitlines()[-1]) == (0, "can run    cpu")
    assert ("fail       torch, torch_npu: " in described.out) == autoload


def test_a_torch_npu_of_another_release_is_told_with_both(packages: Packages, doctor: Callable[..., Answer]) -> None:
    packages.add_torch("2.13.0+cpu")
    packages.add_npus()
    check = doctor("--json").check("torch_npu")
    assert (check["verdict"], "torch 2.13.0+cpu, torch-npu 2.9.0" in check["found"]) == ("fail", True)


def test_a_device_that_does_not_start_is_a_finding(packages: Packages, doctor: Callable[..., Answer]) -> None:
    packages.add_torch()
    fails = f"staticmethod(lambda index: (_ for _ in ()).throw(RuntimeError({NO_START!r})))"
    packages.add_npus(body=TORCH_NPU.replace("staticmethod(lambda index: None)", fails))
    answer = doctor("--device", "npu", "--json")
    assert answer.code == 4
    assert answer.json["error"]["what"] == "npu:0 does not start"
    assert "507033: Failed to start the device: aclrtSetDevice fails" in answer.json["error"]["got"]
    assert "npu-smi info" in answer.json["error"]["next"]
    assert "507033" in answer.check("npu:0")["found"]


def test_where_torch_sees_no_npu_the_advice_is_not_to_run_doctor(
    packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add_npus(body=TORCH_NPU.replace("lambda: 2", "lambda: 0"))
    error = doctor("--device", "npu:0", "--json").json["error"]
    assert (error["what"], "/dev/davinci" in error["next"]) == ("torch sees no npu device on this machine", True)
    hidden = doctor("--device", "npu:0", "--json", ASCEND_RT_VISIBLE_DEVICES="9").json["error"]
    assert "unset ASCEND_RT_VISIBLE_DEVICES" in hidden["next"]
    assert "npu-runtime doctor" not in f"{error} {hidden}"


def test_a_cuda_build_is_fine_alone_and_fails_beside_torch_npu(
    packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch("2.9.0", cuda="12.8", cards=2)
    alone = doctor("--device", "cuda:1", "--json", CUDA_VISIBLE_DEVICES="0,1")
    assert (alone.code, alone.check("torch build")["found"]) == (0, "CUDA 12.8")
    assert alone.json["devices"]["cuda:1"]["name"] == "card 1"
    assert alone.check("visible devices")["found"] == "2 cuda, CUDA_VISIBLE_DEVICES '0,1'"
    packages.add_npus(body=f"raise RuntimeError({TWO_ACCELERATORS!r})")
    beside = doctor("--json").check("torch build")
    assert (beside["verdict"], "torch==2.9.0+cpu" in beside["advice"]) == ("fail", True)


def test_a_cuda_build_is_told_where_torch_does_not_import(packages: Packages, doctor: Callable[..., Answer]) -> None:
    packages.add_torch("2.9.0", autoload=True)
    packages.add("version", "from typing import Optional\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    packages.add_npus(body=f"raise RuntimeError({TWO_ACCELERATORS!r})")
    check = doctor("--json").check("torch build")
    assert (check["verdict"], "CUDA 12.8 beside torch_npu" in check["found"]) == ("fail", True)


def test_a_cuda_build_without_cards_and_a_cpu_build_are_told_apart(
    packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch("2.9.0", cuda="12.8")
    none = doctor("--device", "cuda:0", "--json").json["error"]
    assert ("0 devices" in none["got"], "nvidia-smi" in none["next"]) == (True, True)
    packages.add("torch", TORCH.format(version="2.9.0+cpu", cuda=None, cards=0, autoload=False))
    built = doctor("--device", "cuda:0", "--json").json["error"]
    assert ("built without CUDA" in built["got"], "CUDA build" in built["next"]) == (True, True)


def test_a_torch_of_which_parts_are_missing_is_a_finding(packages: Packages, doctor: Callable[..., Answer]) -> None:
    packages.add("torch", "import no_such_part_of_torch", "2.9.0")
    answer = doctor("--json")
    check = answer.check("torch")
    assert (answer.code, check["verdict"], "no_such_part_of_torch" in check["found"]) == (0, "fail", True)
    assert answer.check("torchvision")["found"].endswith("not tried without torch")


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_without_torch_the_rest_is_told(doctor: Callable[..., Answer]) -> None:
    for before in (BLOCKED.format(blocked=("torch",)), "import sys\nsys.modules['torch'] = None"):
        answer = doctor("--json", before=before)
        assert (answer.code, answer.verdict("torch"), answer.verdict("torch build")) == (0, "absent", "absent")
        assert answer.verdict("onnxruntime") == "ok"
        assert answer.json["devices"]["cpu"]["available"] is True
    answer = doctor("--device", "npu:0", "--json", before=before)
    assert (answer.code, "pip install 'npu-export[npu]'" in answer.json["error"]["next"]) == (4, True)


def test_with_numpy_click_and_rich_alone_nothing_runs_and_all_is_told(tmp_path: Path) -> None:
    """In a Python without the installed packages, which are linked in one by one."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("numpy", "click", "rich", "pygments", "markdown_it", "mdurl", "typing_extensions", "npu_runtime"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin)
        place = place.parent if spec.submodule_search_locations else place
        (folder / place.name).symlink_to(place)
        if (libraries := place.with_name(f"{name}.libs")).exists():
            (folder / libraries.name).symlink_to(libraries)

    def run(*arguments: str) -> Answer:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-S", "-c", RUN, "doctor", *arguments]
        return Answer(subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment))

    answer = run("--json")
    assert answer.code == 0, answer.err
    assert {answer.verdict(name) for name in ("torch", "torch_npu", "onnxruntime", "timm", "transformers")} == {
        "absent"
    }
    asked = run("--device", "cpu")
    assert (asked.code, asked.out.splitlines()[-1]) == (4, "can run    nothing")
    assert "pip install 'npu-export[onnx]'" in asked.err


ONNXRUNTIME = "get_available_providers = lambda: ['CANNExecutionProvider', 'CPUExecutionProvider']"


def test_two_onnxruntimes_fail_and_one_is_named_with_its_providers(
    packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add("onnxruntime", ONNXRUNTIME, "1.31.1")
    one = doctor("--json").check("onnxruntime")
    assert (one["verdict"], one["found"]) == ("ok", "onnxruntime 1.31.1: CANNExecutionProvider, CPUExecutionProvider")
    assert "listed without CANN as well" in one["advice"]
    packages.add_metadata("onnxruntime-gpu", "1.31.1")
    two = doctor("--json").check("onnxruntime")
    assert (two["verdict"], two["advice"].split(",")[0]) == ("fail", "pip uninstall -y onnxruntime onnxruntime-gpu")


@pytest.mark.parametrize(("numpy", "verdict"), [("2.2.6", "fail"), ("1.26.4", "ok")])
def test_numpy_2_fails_beside_onnxruntime_cann(
    numpy: str, verdict: str, packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add_metadata("onnxruntime-cann", "1.22.0")
    packages.add_metadata("numpy", numpy)
    check = doctor("--json").check("numpy")
    assert (check["verdict"], check["advice"]) == (verdict, "pip install 'numpy<2'" if verdict == "fail" else None)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("raise ImportError('numpy.core.multiarray failed to import')", "multiarray"),
        ("raise SystemError('initialization failed')", "initialization failed"),
        ("", "an empty module"),
    ],
)
def test_an_onnxruntime_that_does_not_work_is_a_finding(
    body: str, found: str, packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add("onnxruntime", body, "1.31.1")
    check = doctor("--json").check("onnxruntime")
    assert (check["verdict"], found in check["found"]) == ("fail", True)


@pytest.mark.parametrize(
    ("body", "verdict", "advice"),
    [
        ("", "ok", None),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "warn", "the exporter copes with it"),
        ("raise OSError('libtorch_cuda.so: cannot open shared object file')", "warn", "timm imports it"),
        ("raise AttributeError('partially initialized module')", "warn", "timm imports it"),
    ],
)
def test_a_torchvision_of_another_torch_is_a_warning(
    body: str, verdict: str, advice: str | None, packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add("torchvision", body)
    answer = doctor("--json")
    check = answer.check("torchvision")
    assert (answer.code, check["verdict"]) == (0, verdict)
    assert advice is None or advice in check["advice"]


@pytest.mark.parametrize(("timm", "verdict"), [("1.0.15", "warn"), ("1.0.16", "ok"), ("1.0.31", "ok")])
def test_an_exporters_package_older_than_supported_is_a_warning(
    timm: str, verdict: str, packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add_metadata("timm", timm)
    assert doctor("--json").verdict("timm") == verdict


def test_an_npu_smi_on_the_path_is_asked(packages: Packages, doctor: Callable[..., Answer], tmp_path: Path) -> None:
    packages.add_torch()
    (tmp_path / "npu-smi").write_text("#!/bin/sh\necho 'dcmi module initialize failed. ret is -8005'\nexit 1\n")
    (tmp_path / "npu-smi").chmod(0o755)
    check = doctor("--json", PATH=os.pathsep.join((str(tmp_path), os.environ["PATH"]))).check("npu-smi")
    assert (check["verdict"], "dcmi module initialize failed" in check["found"]) == ("fail", True)


def test_a_row_of_the_table_is_not_cut_and_its_brackets_are_kept(
    packages: Packages, doctor: Callable[..., Answer]
) -> None:
    packages.add_torch()
    packages.add_npus()
    answer = doctor(PYTORCH_NPU_ALLOC_CONF="expandable_segments:False", OMP_NUM_THREADS="[red]" + "1" * 40)
    rows = [line.split("  ") for line in answer.out.splitlines()]
    (allocation,) = (row for row in rows if row[0] == "PYTORCH_NPU_ALLOC_CONF")
    assert [cell.strip() for cell in allocation if cell.strip()] == [
        "PYTORCH_NPU_ALLOC_CONF",
        "warn",
        "expandable_segments:Fal…",
        "expandable_segments:True",
        "expandable segments fragment memory less",
    ]
    assert "[red]111" in answer.out
    assert "warn       PYTORCH_NPU_ALLOC_CONF: set it to expandable_segments:True" in answer.out


def test_the_environment_is_left_as_it_was(packages: Packages, doctor: Callable[..., Answer]) -> None:
    packages.add_torch()
    packages.add_npus()
    before = (
        "import atexit, os, sys\nwas = dict(os.environ)\n"
        "atexit.register(lambda: print('changed' if dict(os.environ) != was else 'the same', file=sys.stderr))"
    )
    assert doctor("--device", "npu:0", "--json", before=before).err.endswith("the same\n")


def test_an_unknown_device_is_wrong_usage(call: Callable[..., Any]) -> None:
    result = call("npu-runtime", "doctor", "--device", "tpu", "--json")
    assert (result.code, result.json["exit_code"], result.json["error"]["what"]) == (2, 2, "unknown device")


def test_the_help_lists_doctor(call: Callable[..., Any]) -> None:
    assert "What this machine can run" in call("npu-runtime", "--help").out
    assert "Exit with 4 unless this one can run" in call("npu-runtime", "doctor", "--help").out
