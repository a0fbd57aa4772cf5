"""How exact a device's arithmetic is to be: a stated choice, held while encoders are open.

An NPU multiplies float32 as HF32 (11 bits) in convolutions and runs GELU by tanh, and a GPU convolves in TF32, unless
they are told not to. Sources: torch_npu/npu/npu_config.py and its document of use_compatible_impl; PyTorch's note on
numerical accuracy and torch/backends.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from npu_runtime.artifact.schema import Numerics
from npu_runtime.devices.device import CPU, Device
from npu_runtime.errors import Error, ProgramError, UsageError

NUMERICS: tuple[Numerics, ...] = ("strict", "fast")


@dataclass(frozen=True, slots=True)
class Setting:
    """One switch of a library that changes results, and its value for each choice."""

    name: str
    strict: object
    fast: object
    write: Callable[[Any], object]
    read: Callable[[], object] | None
    """None where the library does not tell the value; it is then left as set, as where this gives None."""

    def value(self, numerics: Numerics) -> object:
        return self.strict if numerics == "strict" else self.fast


def settings_of(device: Device) -> list[Setting]:
    """The switches that torch has for a kind of device, in its installed version."""
    return list({"cpu": _of_cpu, "cuda": _of_cuda, "npu": _of_npu}[device.kind]())


def _of_cpu() -> Iterator[Setting]:
    import torch

    for part in ("matmul", "conv"):
        holder = getattr(torch.backends.mkldnn, part, None)
        if hasattr(holder, "fp32_precision"):
            yield _attribute(f"torch.backends.mkldnn.{part}", holder, "fp32_precision", "ieee", "ieee")


def _of_cuda() -> Iterator[Setting]:
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later
        # The older switches first, which write the newer ones as well: reading one raises where they disagree.
        name = "torch.get_float32_matmul_precision()"
        yield _older(name, "highest", "high", _write_matmul_precision, torch.get_float32_matmul_precision)
        yield _attribute("torch.backends.cuda.matmul", matmul, "fp32_precision", "ieee", "tf32")
        name = "torch.backends.cudnn.allow_tf32"
        yield _older(name, False, True, lambda on: setattr(cudnn, "allow_tf32", on), lambda: cudnn.allow_tf32)
        for part in ("conv", "rnn"):
            yield _attribute(f"torch.backends.cudnn.{part}", getattr(cudnn, part), "fp32_precision", "ieee", "tf32")
    else:
        yield _attribute("torch.backends.cuda.matmul", matmul, "allow_tf32", False, True)
        yield _attribute("torch.backends.cudnn", cudnn, "allow_tf32", False, True)
    for dtype in ("fp16", "bf16"):
        name = f"allow_{dtype}_reduced_precision_reduction"
        yield _attribute("torch.backends.cuda.matmul", matmul, name, False, True)


def _of_npu() -> Iterator[Setting]:
    import torch

    npu: Any = torch.npu  # type: ignore[attr-defined]
    for part in ("conv", "matmul"):
        yield _attribute(f"torch.npu.{part}", getattr(npu, part), "allow_hf32", False, True)
    yield Setting(
        "torch.npu.config.allow_internal_format",
        False,
        False,
        write=lambda value: setattr(npu.config, "allow_internal_format", value),
        read=None,
    )
    yield Setting(
        "torch.npu.set_compile_mode(jit_compile)",
        False,
        False,
        write=lambda value: npu.set_compile_mode(jit_compile=value),
        read=None,
    )
    if hasattr(npu, "use_compatible_impl"):  # read by torch_npu once, at the process's first GELU
        yield Setting(
            "torch.npu.use_compatible_impl",
            True,
            False,
            write=npu.use_compatible_impl,
            read=getattr(npu, "are_compatible_impl_enabled", None),
        )


def _write_matmul_precision(value: str) -> None:
    """Set it for CUDA and leave the CPU's, which torch.set_float32_matmul_precision sets as well."""
    import torch

    if value != "medium":
        torch.backends.cuda.matmul.allow_tf32 = value == "high"
        return
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cpu.fp32_precision
    torch.set_float32_matmul_precision(value)
    cpu.fp32_precision = before


def _older(
    name: str, strict: object, fast: object, write: Callable[[Any], object], read: Callable[[], object]
) -> Setting:
    """A switch that torch 2.9 warns of, and that does not tell its value where newer ones disagree with it."""

    def told() -> object:
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return read()
        return None

    def written(value: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            write(value)

    return Setting(name, strict, fast, written, told)


def _attribute(path: str, holder: object, name: str, strict: object, fast: object) -> Setting:
    return Setting(
        f"{path}.{name}",
        strict,
        fast,
        write=lambda value: setattr(holder, name, value),
        read=lambda: getattr(holder, name),
    )


class HeldNumerics:
    """The settings of a kind of device, as one encoder holds them; `release` puts back what was there before.

    They are settings of the whole process, so encoders that are open together must agree on them.
    """

    def __init__(self, device: Device, numerics: Numerics) -> None:
        self.numerics = numerics
        self._kind = device.kind
        self._settings = settings_of(device)
        self._held = True
        # torch's precision of products is CUDA's and the CPU's at once: it does not tell it where they disagree.
        self._cpu = HeldNumerics(CPU, numerics) if device.kind == "cuda" else None
        try:
            self._hold(numerics)
        except BaseException:
            if self._cpu is not None:
                self._cpu.release()
            raise

    def _hold(self, numerics: Numerics) -> None:
        values = {setting.name: setting.value(numerics) for setting in self._settings}
        with _PROCESS.lock:
            current = _PROCESS.held.get(self._kind)
            if current is None:
                _PROCESS.held[self._kind] = _Held(values, _apply(self._settings, numerics))
                return
            current.holders += 1  # before anything else: the collector may end another holder at any allocation
        try:
            if current.values != values:
                raise UsageError(
                    f"an encoder with other numerics is open on {self._kind}",
                    expected=", ".join(f"{name}={value}" for name, value in current.values.items()),
                    got=f"numerics {numerics}, which sets {', '.join(f'{n}={v}' for n, v in values.items())}",
                    hint="these are settings of the whole process: close the other encoder, or load both alike",
                )
            self.check()
        except Error:
            self.release()
            raise

    def __enter__(self) -> HeldNumerics:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def describe(self) -> dict[str, object]:
        """The choice and every setting by its name in the library, as it is now where the library tells."""
        now = {s.name: s.value(self.numerics) if s.read is None else s.read() for s in self._settings}
        return {"numerics": self.numerics, **now}

    def check(self) -> None:
        """Raise ProgramError when something else in the process changed a setting since it was set."""
        changed = [
            f"{setting.name}={setting.read()}, expected {setting.value(self.numerics)}"
            for setting in self._settings
            if setting.read is not None and setting.read() != setting.value(self.numerics)
        ]
        if changed:
            raise ProgramError(
                f"the {self.numerics} numerics were changed while the encoder was open",
                got="\n".join(changed),
                hint="set nothing of torch's precision beside an open encoder; it puts back what it found when closed",
            )

    def release(self) -> None:
        """Put back what the first of the open encoders found, when this is the last; a second call does nothing."""
        with _PROCESS.lock:
            if not self._held:
                return
            self._held = False
            current = _PROCESS.held[self._kind]
            current.holders -= 1
            if not current.holders:
                del _PROCESS.held[self._kind]
                for restore in current.restore:
                    restore()
        if self._cpu is not None:
            self._cpu.release()


@dataclass(slots=True)
class _Held:
    values: dict[str, object]
    restore: list[Callable[[], object]]
    holders: int = 1


class _Process:
    """What open encoders hold, by kind of device. The settings are the process's, and so is this."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # the collector may release one in the thread that takes another
        self.held: dict[str, _Held] = {}


_PROCESS = _Process()


def _apply(settings: list[Setting], numerics: Numerics) -> list[Callable[[], object]]:
    """Write the settings; returns what undoes them, and undoes them at once when one cannot be written."""
    found = [(setting.write, None if setting.read is None else setting.read()) for setting in settings]
    # In the same order as they are written here: some write others that come later.
    restore: list[Callable[[], object]] = [
        functools.partial(write, value) for write, value in found if value is not None
    ]
    try:
        for setting in settings:
            setting.write(setting.value(numerics))
    except BaseException:
        for undo in restore:
            undo()
        raise
    return restore
