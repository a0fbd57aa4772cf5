"""Importing torch and torch_npu, and what to do where that fails."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from npu_runtime.devices.cann import LIBRARY, library_folder, message_lines, source_environment
from npu_runtime.errors import UnavailableError

WITHOUT_AUTOLOAD = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run without torch_npu"

_CANN_LIBRARY = re.compile(r"(lib(?:hccl|ascend|acl|ge_|graph)\w*\.so\S*): cannot open shared object file")
"""Those that torch_npu links."""


def import_torch() -> None:
    """Import torch, which loads torch_npu where that is installed.

    Raises ImportError when torch is not installed, UnavailableError, with what to do, when a package that
    it loads by itself fails.
    """
    _import("torch")


def import_torch_npu() -> None:
    """Import torch_npu, which gives torch the device `npu`. Raises UnavailableError, with what to do."""
    try:
        _import("torch")
        _import("torch_npu")
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"the device npu needs the package {error.name}, which is not installed",
            expected="torch and torch-npu of one release, on a host with CANN",
            got=_versions(),
            hint="pip install 'npu-export[npu]', with the torch-npu that belongs to the installed torch and CANN",
        ) from error
    _check_versions()


_failures: dict[str, UnavailableError] = {}
"""Packages whose import failed in this process: a second try meets what the first left, and fails otherwise."""


def _import(name: str) -> None:
    if name in _failures:
        raise _failures[name]
    try:
        importlib.import_module(name)
    except Exception as error:  # torch_npu raises Exception itself where CANN's folders are missing
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise
        _failures[name] = _failed(name, error)
        raise _failures[name] from error


def _failed(name: str, error: BaseException) -> UnavailableError:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = "\n".join(str(cause) for cause in causes)
    by_autoload = name == "torch" and "torch_npu" in text
    said = next(iter(message_lines(causes[-1])), type(causes[-1]).__name__)
    expected, remedy = _explain("torch_npu" if by_autoload else name, said)
    return UnavailableError(
        f"torch does not import, since torch_npu does not: {said}"
        if by_autoload
        else f"{name} is installed and does not import",
        expected=expected,
        got=said,
        hint=f"{remedy}; or {WITHOUT_AUTOLOAD}" if by_autoload else remedy,
    )


def _explain(name: str, said: str) -> tuple[str | None, str]:
    """What was expected, where that helps, and what to do; the texts are those of torch_npu 2.7 to 2.14."""
    if match := re.search(r"Two accelerators .* npu and (?!npu)\w+", said):
        public = (_version("torch") or "VERSION").partition("+")[0]
        index = "https://download.pytorch.org/whl/cpu"
        return "the CPU build of torch", f"pip install torch=={public}+cpu --index-url {index}"
    if match := re.search(r"undefined symbol: (\S+)", said):
        # Those of torch are C++, those of CANN are C.
        if match[1].startswith("_Z"):
            return "torch and torch-npu of one release", f"torch_npu was built for another torch: {_advise_pair()}"
        return (
            "a CANN of torch_npu's release",
            f"this CANN is too old for torch-npu {_version('torch-npu')}: install the one that its release notes name, "
            "and source its set_env.sh",
        )
    if match := _CANN_LIBRARY.search(said):
        folder = library_folder(os.environ.get("LD_LIBRARY_PATH"))
        if folder is not None and not match[1].startswith(LIBRARY):
            return None, f"the CANN in {folder} is not whole: install its toolkit, and source its set_env.sh"
        return None, f"{source_environment()}, for CANN's libraries are not found"
    if re.search(r"ASCEND_(HOME|OPP|RUNTIME|COMPILER)_PATH", said):
        return None, f"{source_environment()}, for the environment names no whole CANN"
    if "No module named 'torch_npu._C'" in said:
        return _explain_extension()
    return None, f"reinstall {name}"


def _explain_extension() -> tuple[str, str]:
    """For a torch_npu without an extension that this Python loads."""
    spec = find_spec("torch_npu")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    there = sorted(file.name for folder in folders for file in folder.glob("_C.*"))
    wanted = f"torch_npu/_C{EXTENSION_SUFFIXES[0]}, that of Python {platform.python_version()} on {platform.machine()}"
    found = ", ".join(there) or "no _C"
    return wanted, f"torch_npu holds {found}: install torch-npu with the pip of this Python, {sys.executable} -m pip"


def _check_versions() -> None:
    """torch_npu X.Y is built for torch X.Y and for no other."""
    torch, torch_npu = (_release(package) for package in ("torch", "torch-npu"))
    if None not in (torch, torch_npu) and torch != torch_npu:
        raise UnavailableError(
            "torch_npu belongs to another torch",
            expected="the same release X.Y of both",
            got=_versions(),
            hint=_advise_pair(),
        )


def _advise_pair() -> str:
    wanted = ".".join(_release("torch") or ("X", "Y"))
    return f"install the torch-npu {wanted} of the installed torch, or the torch of the installed torch-npu"


def _release(package: str) -> tuple[str, ...] | None:
    """`2.9` of `2.9.0.post1+git…`, None where the package has no metadata."""
    known = _version(package)
    return None if known is None else tuple(known.partition("+")[0].split(".")[:2])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> str:
    return ", ".join(f"{package} {_version(package) or 'not installed'}" for package in ("torch", "torch-npu"))
