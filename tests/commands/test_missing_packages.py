"""What is imported, and what still works where packages are missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent.parent
EXPORTER_PACKAGES = ("timm", "transformers", "torchvision")

BLOCKED = """
import sys
blocked = {blocked!r}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in blocked:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
"""
REPORT_IMPORTS = """
import atexit, sys
def report():
    loaded = {wanted!r} & {{name.partition('.')[0] for name in sys.modules}}
    sys.stderr.write('loaded: ' + ' '.join(sorted(loaded)) + '\\n')
atexit.register(report)
"""
HEAVY = {
    *("torch", "onnxruntime", "onnx", "onnxscript", "PIL", "timm", "transformers", "torchvision", "matplotlib"),
    *("jinja2", "markupsafe"),
    *("rich", "click", "safetensors", "huggingface_hub"),
}


def run_python(*parts: str, arguments: Sequence[str | Path] = ()) -> subprocess.CompletedProcess[str]:
    code = "\n".join((f"import sys; sys.path.insert(0, {str(TESTS)!r})", *parts))
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def run_blocked(blocked: Sequence[str], *arguments: str | Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """A command line where these packages do not import."""
    program, *rest = arguments
    package = str(program).replace("-", "_")
    main = f"sys.argv[0] = {program!r}\nfrom {package}.cli import main\nmain()"
    return run_python(BLOCKED.format(blocked=tuple(blocked)), before, main, arguments=rest)


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a program has imported at its end."""
    run = run_python(REPORT_IMPORTS.format(wanted=HEAVY), code)
    line = run.stderr.splitlines()[-1]
    assert line.startswith("loaded:"), run.stderr
    return set(line.removeprefix("loaded:").split())


@pytest.fixture(scope="module")
def moved_artifact(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny artifact in a folder of another name. Not to be changed."""
    return Path(shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("elsewhere") / "renamed"))


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    assert loaded_by("import npu_runtime; npu_runtime.load; npu_runtime.Encoder") == set()


def test_importing_the_exporter_loads_nothing_heavy() -> None:
    assert loaded_by("import npu_export; assert npu_export.__all__ == ['export']") == set()


@pytest.mark.parametrize("arguments", ["npu-runtime --help", "npu-export --help", "npu-export --list"])
def test_help_and_list_load_no_torch(arguments: str) -> None:
    program, argument = arguments.split()
    package = program.replace("-", "_")
    loaded = loaded_by(f"from {package}.cli import main; sys.argv = [{program!r}, {argument!r}]; main()")
    assert loaded <= {"click", "rich"}


def test_an_onnx_artifact_runs_without_loading_torch(moved_artifact: Path) -> None:
    loaded = loaded_by(
        "import numpy, npu_runtime\n"
        f"encoder = npu_runtime.load({str(moved_artifact)!r})\n"
        "assert encoder(numpy.zeros((5, 3, 32, 32), numpy.float32)).shape == (5, 64)\n"
    )
    assert "onnxruntime" in loaded
    assert loaded <= {"onnxruntime"}


def test_a_torchscript_artifact_runs_without_loading_the_exporters_packages(moved_artifact: Path) -> None:
    loaded = loaded_by(
        "import numpy, npu_runtime\n"
        f"encoder = npu_runtime.load({str(moved_artifact)!r}, backend='torchscript')\n"
        "assert encoder(numpy.zeros((1, 3, 32, 32), numpy.float32)).shape == (1, 64)\n"
    )
    assert "torch" in loaded
    assert not loaded & {"timm", "transformers", "torchvision", "onnxruntime", "onnx"}


def test_a_moved_artifact_is_verified_without_the_exporters_packages(moved_artifact: Path) -> None:
    run = run_blocked(EXPORTER_PACKAGES, "npu-runtime", "verify", moved_artifact, "--json")
    assert run.returncode == 0, run.stderr
    record = json.loads(run.stdout)
    assert {(step["backend"], step["status"]) for step in record["steps"]} == {
        ("torchscript", "passed"),
        ("onnxruntime", "passed"),
    }
    assert record["passed"] is True


def test_the_ladder_without_the_exporters_packages_answers_to_the_stored_reference(moved_artifact: Path) -> None:
    run = run_blocked(EXPORTER_PACKAGES, "npu-runtime", "parity", moved_artifact, "--json")
    assert run.returncode == 0, run.stderr
    assert [(step["backend"], step["status"]) for step in json.loads(run.stdout)["steps"]] == [
        ("eager", "not run"),
        ("torchscript", "passed"),
        ("onnxruntime", "passed"),
    ]


def test_without_torch_verify_lists_torchscript_as_not_run(moved_artifact: Path) -> None:
    blocked = (*EXPORTER_PACKAGES, "torch")
    run = run_blocked(blocked, "npu-runtime", "verify", moved_artifact)
    assert run.returncode == 0, run.stderr
    assert "not run   torchscript fp32 on cpu: the backend torchscript needs the package torch" in run.stdout
    assert run.stdout.endswith("parity passed\n")
    named = run_blocked(blocked, "npu-runtime", "verify", moved_artifact, "--backend", "torchscript", "--json")
    assert named.returncode == 4
    assert "pip install 'npu-export[torch]'" in json.loads(named.stdout)["error"]["next"]


def test_where_no_backend_is_installed_verify_does_not_pass(moved_artifact: Path) -> None:
    blocked = (*EXPORTER_PACKAGES, "torch", "onnxruntime")
    run = run_blocked(blocked, "npu-runtime", "verify", moved_artifact, "--json")
    assert run.returncode == 4
    assert "not installed" in json.loads(run.stdout)["error"]["what"]


def test_embed_works_without_torch(moved_artifact: Path, photographs: Path, tmp_path: Path) -> None:
    arguments = ("npu-runtime", "embed", moved_artifact, photographs / "chelsea.jpg", "--output", tmp_path / "f.npy")
    run = run_blocked((*EXPORTER_PACKAGES, "torch"), *arguments)
    assert run.returncode == 0, run.stderr
    assert np.load(tmp_path / "f.npy").shape == (1, 64)
    without_pillow = run_blocked(("PIL",), *arguments, "--force", "--json")
    assert without_pillow.returncode == 4
    assert json.loads(without_pillow.stdout)["error"]["next"] == "pip install pillow"


def test_graphs_are_packed_without_torch_and_onnxruntime_and_torchscript_asks_for_torch(
    moved_artifact: Path, tmp_path: Path
) -> None:
    blocked = (*EXPORTER_PACKAGES, "torch", "onnxruntime", "onnx", "tritonclient", "google")
    arguments = ("npu-runtime", "pack", moved_artifact, "--for", "triton", "--output", tmp_path / "models", "--json")
    refused = run_blocked(blocked, *arguments)
    assert refused.returncode == 4
    assert "pip install 'npu-export[torch]'" in json.loads(refused.stdout)["error"]["next"]
    assert list(tmp_path.iterdir()) == []
    run = run_blocked(blocked, *arguments, "--backend", "onnxruntime")
    assert run.returncode == 0, run.stderr
    assert {model["backend"] for model in json.loads(run.stdout)["models"]} == {"onnxruntime"}


def test_without_the_exporters_packages_bench_lists_eager_as_not_run(moved_artifact: Path) -> None:
    arguments = ("npu-runtime", "bench", moved_artifact, "--iterations", "1", "--warmup", "1")
    tiny_is_known = "import tiny; tiny.register()"
    for blocked, before, reason in (
        (("npu_export",), "", "the backend eager is registered but does not import"),
        (EXPORTER_PACKAGES, tiny_is_known, "timm does not import here"),
    ):
        run = run_blocked(blocked, *arguments, "--json", before=before)
        assert run.returncode == 0, run.stderr
        record = json.loads(run.stdout)
        assert {row["backend"] for row in record["rows"]} == {"torchscript", "onnxruntime"}
        assert reason in record["not_run"]["eager"]
    named = run_blocked(EXPORTER_PACKAGES, *arguments, "--backend", "eager", "--json", before=tiny_is_known)
    assert named.returncode == 4


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_its_packages_a_report_exits_with_4_and_says_how_to_install_them(tmp_path: Path, missing: str) -> None:
    record = TESTS / "data" / "records" / "bench-1.0.json"
    run = run_blocked((missing,), "npu-runtime", "report", record, "--output", tmp_path / "r.html", "--json")
    assert run.returncode == 4, run.stderr
    error = json.loads(run.stdout)["error"]
    assert error["what"] == f"a report needs the package {missing}, which is not installed"
    assert error["next"] == "pip install 'npu-export[report]'"
    assert list(tmp_path.iterdir()) == []


def test_the_help_of_report_loads_neither_matplotlib_nor_jinja2() -> None:
    loaded = loaded_by("from npu_runtime.cli import main; sys.argv = ['npu-runtime', 'report', '--help']; main()")
    assert loaded <= {"click", "rich"}


def test_without_timm_an_export_exits_with_4_and_says_how_to_install_it(tmp_path: Path) -> None:
    arguments = ("--model", "vit-base", "--weights", "random:0", "--output", tmp_path / "a", "--json")
    run = run_blocked(("timm",), "npu-export", *arguments)
    assert run.returncode == 4
    assert "npu-export[export]" in json.loads(run.stdout)["error"]["next"]
    assert list(tmp_path.iterdir()) == []
