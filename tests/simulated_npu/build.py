"""Build the simulated NPU: a library, and a folder for PYTHONPATH that looks like an installed torch-npu."""

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
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
LIBRARY = "libsimulated_npu.so"


class NoCompilerError(Exception):
    """There is no C++ compiler; the text says so to whoever reads why tests were skipped."""


def build_simulated_npu(cache: Path, version: str = "2.9.0.post1") -> Path:
    """A folder with `torch_npu` of this version, its metadata and its library, to be put first on PYTHONPATH.

    Compiled once for these sources and this torch, about half a minute of two cores; it calls the compiler
    itself and needs neither ninja nor Python's headers. Processes that build at once wait for one of them.
    Raises NoCompilerError where there is no C++ compiler, and RuntimeError with its messages where it fails.
    """
    key = _digest(_sources("csrc", "*.*") + _sources("torch_npu", "**/*.py") + [HERE / "build.py"])
    folder = cache / f"torch-{torch.__version__}-{key}" / version
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"), tempfile.TemporaryDirectory(dir=cache) as temporary:
            library = cache / f"torch-{torch.__version__}-{_digest(_sources('csrc', '*.*'))}.so"
            if not library.exists():
                _compile(Path(temporary)).rename(library)
            if not folder.exists():
                folder.parent.mkdir(exist_ok=True)
                _lay_out(Path(temporary) / "site", library, version).rename(folder)
    return folder


def _sources(folder: str, pattern: str) -> list[Path]:
    return sorted((HERE / folder).glob(pattern))


def _digest(files: list[Path]) -> str:
    """Of the files and of what else decides the library: torch, the interpreter and the processor."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {platform.machine()}".encode())
    for file in files:
        digest.update(f"{file.relative_to(HERE)}\0".encode() + file.read_bytes())
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
    raise NoCompilerError("there is no C++ compiler to build the simulated NPU with; install g++ or set CXX")


def _compile(folder: Path) -> Path:
    compiler = _find_compiler()
    root = Path(torch.__file__).parent
    includes = (root / "include", root / "include/torch/csrc/api/include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", abi, *(f"-isystem{include}" for include in includes)]
    running = []
    for source in sorted((HERE / "csrc").glob("*.cpp")):
        command = [*compiler, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    messages = [process.communicate()[1] for _, process in running]
    for (command, process), message in zip(running, messages):
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{message}")
    library = folder / LIBRARY
    objects = sorted(map(str, folder.glob("*.o")))
    link = [*compiler, "-shared", *objects, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)]
    linked = subprocess.run(link, capture_output=True, text=True)
    if linked.returncode != 0:
        raise RuntimeError(f"{' '.join(link)}\n{linked.stderr}")
    return library


def _lay_out(site: Path, library: Path, version: str) -> Path:
    package = site / "torch_npu"
    shutil.copytree(HERE / "torch_npu", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "version.py").write_text(f'__version__ = "{version}"\n')
    shutil.copy(library, package / LIBRARY)
    metadata = site / f"torch_npu-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return site
