"""What the looks share: which packages import, what npu-smi prints, which devices run."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from npu_runtime.devices.cann import ROOT
from npu_runtime.devices.device import Device
from npu_runtime.devices.probe import Probe, probe_device
from npu_runtime.devices.torch_import import import_torch, import_torch_npu
from npu_runtime.errors import UnavailableError, first_line

NPU_SMI_TIMEOUT_S = 10.0

_SMI_VERSION = re.compile(r"Version:\s*([\w.\-]+)|npu-smi\s+v?(\d[\w.\-]*)")
_SMI_CARD = re.compile(r"^\|\s*(\d+)\s+([A-Za-z0-9][\w.\- ]*?)\s*\|\s*([A-Za-z]\w*)\s*\|", re.MULTILINE)
"""A card's first row, `| 5     910B4     | OK     | 89.9 …`; in its second one the middle cell is a bus id."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package and whether it imports."""

    version: str | None
    """None where it is not installed, or has no metadata."""
    installed: bool
    error: UnavailableError | None
    """Why it does not import; None where it does, and where it is not installed."""

    @property
    def imports(self) -> bool:
        return self.installed and self.error is None

    def told(self) -> str:
        return self.version or ("a version without metadata" if self.installed else "not installed")


@dataclass(frozen=True, slots=True)
class Card:
    """One NPU as npu-smi tells it."""

    index: int
    name: str
    health: str


@dataclass(frozen=True, slots=True)
class NpuSmi:
    """What `npu-smi info` printed."""

    path: str
    version: str | None
    cards: tuple[Card, ...]
    error: str | None
    """Why there is no answer; None where there is one."""


class Machine:
    """This machine, looked at once.

    torch and torch_npu import no second time in a process after a failure (the error is then another one, or the
    process dies), so every look asks here.
    """

    def __init__(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        ascend: Path = ROOT,
        timeout_s: float = NPU_SMI_TIMEOUT_S,
    ) -> None:
        # torch_npu changes some of the variables while it is imported.
        self.environ = dict(os.environ if environ is None else environ)
        self.ascend = ascend
        self._timeout_s = timeout_s
        self._probes: dict[Device, Probe] = {}

    @cached_property
    def torch(self) -> Package:
        return look("torch", "torch", import_torch)

    @cached_property
    def torch_npu(self) -> Package:
        broken = self.torch.error

        def start() -> None:
            if broken is not None:
                raise broken
            import_torch_npu()

        return look("torch_npu", "torch-npu", start)

    @cached_property
    def onnxruntime(self) -> Package:
        return look("onnxruntime", "onnxruntime", lambda: importlib.import_module("onnxruntime"))

    @cached_property
    def torch_cuda(self) -> str | None:
        """The version of CUDA that torch is built for, told as well where torch does not import."""
        if self.torch.imports:
            import torch

            built: str | None = torch.version.cuda if hasattr(torch, "version") else None
            return built
        spec = find_spec("torch") if self.torch.installed else None
        if spec is None or spec.origin is None:
            return None
        text = _read(Path(spec.origin).with_name("version.py"))
        match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        return match[1] if match else None

    @cached_property
    def npu_smi(self) -> NpuSmi | None:
        """None where there is no npu-smi on the path."""
        path = shutil.which("npu-smi", path=self.environ.get("PATH"))
        if path is None:
            return None
        code, output = _run(path, self.environ, self._timeout_s)
        versions = _SMI_VERSION.search(output)
        known = None if versions is None else versions[1] or versions[2]
        cards = tuple(Card(int(index), name, health) for index, name, health in _SMI_CARD.findall(output))
        if code is None:
            error: str | None = output or f"no answer within {self._timeout_s:g} s"
        elif code:
            error = f"it exits with {code}: {first_line(output) or 'without a word'}"
        else:
            error = None if cards else f"it lists no device: {first_line(output) or 'without a word'}"
        return NpuSmi(path, known, cards, error)

    def probe(self, device: Device) -> Probe:
        """Whether the device can run programs; what its package raises is told as well."""
        if device not in self._probes:
            self._probes[device] = self._probe(device)
        return self._probes[device]

    def count(self, kind: str) -> int:
        """Devices of a kind that torch sees and can start."""
        if not self.probe(Device(kind, 0)).available:
            return 0
        import torch

        return int(getattr(torch, kind).device_count())

    def _probe(self, device: Device) -> Probe:
        error = {"cpu": None, "cuda": self.torch.error, "npu": self.torch.error or self.torch_npu.error}[device.kind]
        if error is not None:
            return Probe(str(device), None, error)
        found: list[Probe] = []
        failed = _failure(lambda: found.append(probe_device(device)), f"{device} does not start", "npu-smi info")
        return Probe(str(device), None, failed) if failed else found[0]


def installed_version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def read_fields(file: Path) -> dict[str, str]:
    """`NAME=VALUE` lines of a version file by lower-case name; none where it cannot be read."""
    pairs = (line.partition("=") for line in _read(file).splitlines())
    return {name.strip().lower(): value.strip() for name, sign, value in pairs if sign}


def look(module: str, distribution: str, start: Callable[[], object]) -> Package:
    """The package, after `start` imported it where it is installed."""
    known = installed_version(distribution)
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        return Package(None, False, None)
    return Package(known, True, _failure(start, f"{module} is installed and does not import", f"reinstall {module}"))


def _failure(start: Callable[[], object], what: str, hint: str) -> UnavailableError | None:
    """What `start` raises, whatever it is: one broken package is no reason not to look at the others."""
    try:
        start()
    except UnavailableError as error:
        return error
    except (Exception, SystemExit) as error:
        return UnavailableError(what, got=f"{type(error).__name__}: {error}", hint=hint)
    return None


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _run(path: str, environ: Mapping[str, str], timeout_s: float) -> tuple[int | None, str]:
    """Exit code and output of `npu-smi info`; None for the code where it does not end, or start, with the reason."""
    try:
        process = subprocess.Popen(
            [path, "info"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
    except OSError as error:
        return None, f"it does not start: {error.strerror}"
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output.decode("utf-8", errors="replace")
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if process.returncode is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it and what it started. One that hangs in the driver does not even die then, and is not waited for."""
    with contextlib.suppress(OSError):  # a program of root's is not ours to kill
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
