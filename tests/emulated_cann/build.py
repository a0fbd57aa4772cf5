"""Build the emulated CANN: a folder that the vendor's torch_npu takes for an installed CANN."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME = ("faults", "devices", "memory", "streams", "aclop", "not_emulated")
"""Sources of libascendcl.so, which needs torch_npu's headers of AscendCL and nothing else."""
OPERATORS = ("aclnn", "operators", "missing_kernels")
"""Sources of libopapi.so, which computes with torch's kernels of the CPU."""
SHIMS = ("hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
"""Libraries that torch_npu links; what it takes from them is in libascendcl.so."""
FOLDERS = ("runtime", "compiler", "opp")
"""Those below ASCEND_HOME_PATH that torch_npu looks for when it is imported."""


class NoCompilerError(Exception):
    """There is no C++ compiler; the text says so to whoever reads why tests were skipped."""


def build_emulated_cann(cache: Path) -> Path:
    """CANN's folder, for the installed torch and torch_npu; compiled once for them and these sources.

    Neither package is imported. Processes that build at once wait for one of them. Raises NoCompilerError where there
    is no C++ compiler, and RuntimeError with its messages where it fails.
    """
    folder = cache.absolute() / _digest()
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"), tempfile.TemporaryDirectory(dir=cache) as temporary:
            if not folder.exists():
                _build(Path(temporary)).rename(folder)
    return folder


def cann_environment(folder: Path) -> dict[str, str]:
    """What CANN's set_env.sh sets, as far as torch_npu reads it."""
    libraries = os.pathsep.join([f"{folder}/lib64", *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return {"LD_LIBRARY_PATH": libraries, "ASCEND_HOME_PATH": str(folder), "ASCEND_OPP_PATH": f"{folder}/opp"}


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return Path(spec.origin).parent


def _digest() -> str:
    """Of the sources and of what else decides the libraries: torch, torch_npu, the interpreter and the processor."""
    digest = hashlib.sha256(f"{sys.version} {platform.machine()}".encode())
    versions = [_package(name) / "version.py" for name in ("torch", "torch_npu")]
    for file in [*sorted((HERE / "csrc").iterdir()), HERE / "build.py", *versions]:
        digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_compiler() -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NoCompilerError("there is no C++ compiler to build the emulated CANN with; install g++ or set CXX")


def _build(folder: Path) -> Path:
    compiler = _find_compiler()
    torch = _package("torch")
    headers = _package("torch_npu") / "include/third_party/acl/inc"
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-fvisibility=hidden", "-fno-access-control", f"-I{headers}"]
    flags += [f"-isystem{torch / below}" for below in ("include", "include/torch/csrc/api/include")]
    home = folder / "cann"
    libraries = home / "lib64"
    for below in ("lib64", *FOLDERS):
        (home / below).mkdir(parents=True)
    _run_all(
        [*compiler, *flags, "-c", str(HERE / "csrc" / f"{name}.cpp"), "-o", str(folder / f"{name}.o")]
        for name in (*OPERATORS, *RUNTIME)
    )

    def link(name: str, objects: Sequence[str], *needs: str) -> list[str]:
        library = f"lib{name}.so"
        files = [str(folder / f"{part}.o") for part in objects]
        return [
            *compiler,
            "-shared",
            "-o",
            str(libraries / library),
            "-Wl,-z,defs",
            f"-Wl,-soname,{library}",
            *files,
            *needs,
        ]

    runtime = ["-Wl,--no-as-needed", f"-L{libraries}", "-lascendcl"]
    _run_all([link("ascendcl", RUNTIME, "-pthread")])
    _run_all([link("opapi", OPERATORS, *runtime, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl")])
    _run_all(link(name, (), *runtime) for name in SHIMS)
    return home


def _run_all(commands: Iterator[list[str]] | list[list[str]]) -> None:
    running = [(command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)) for command in commands]
    messages = [process.communicate()[1] for _, process in running]
    for (command, process), message in zip(running, messages):
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{message}")
