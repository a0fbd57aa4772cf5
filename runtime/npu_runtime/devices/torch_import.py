"""Importing torch and torch_npu, and what to do where that fails."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

from npu_runtime.errors import UnavailableError

SET_ENVIRONMENT = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
"""Puts CANN's libraries on the path; the folder is where CANN's installer leaves it."""
WITHOUT_AUTOLOAD = "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run on the CPU without torch_npu"


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
        if error.name not in ("torch", "torch_npu"):
            raise _failed("torch_npu", error) from error
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
    except ModuleNotFoundError:
        raise
    except (ImportError, RuntimeError, OSError, SystemExit) as error:
        # SystemExit: some builds of torch_npu print a traceback and exit where CANN's libraries are missing.
        _failures[name] = _failed(name, error)
        raise _failures[name] from error


def _failed(name: str, error: BaseException) -> UnavailableError:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    text = "\n".join(str(cause) for cause in causes)
    by_autoload = name == "torch" and "torch_npu" in text
    what = f"torch does not import, since torch_npu does not: {causes[-1]}" if by_autoload else None
    if "Two accelerators" in text and "npu and npu" not in text:
        hint = "install the CPU build of torch beside torch-npu: pip install torch==VERSION+cpu"
    elif "undefined symbol" in text:
        hint = f"torch_npu was built for another torch: {_versions()}; install the pair of one release"
    elif any(library in text for library in ("libhccl", "libascendcl", "libascend", "libacl")) or isinstance(
        error, SystemExit
    ):
        hint = f"{SET_ENVIRONMENT}, for CANN's libraries are not found; or {WITHOUT_AUTOLOAD}"
    else:
        hint = WITHOUT_AUTOLOAD if by_autoload else f"reinstall {name}"
    return UnavailableError(what or f"{name} is installed and does not import", got=str(causes[-1]), hint=hint)


def _check_versions() -> None:
    """torch_npu X.Y is built for torch X.Y and for no other."""
    torch, torch_npu = (_release(package) for package in ("torch", "torch-npu"))
    if None not in (torch, torch_npu) and torch != torch_npu:
        raise UnavailableError(
            "torch_npu belongs to another torch",
            expected="the same release X.Y of both",
            got=_versions(),
            hint="install the torch-npu of the installed torch, or the torch of the installed torch-npu",
        )


def _release(package: str) -> tuple[str, ...] | None:
    """`2.9` of `2.9.0.post1+git…`, None where the package has no metadata."""
    try:
        return tuple(version(package).partition("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return None


def _versions() -> str:
    known = {package: _release(package) and version(package) for package in ("torch", "torch-npu")}
    return ", ".join(f"{package} {installed or 'not installed'}" for package, installed in known.items())
