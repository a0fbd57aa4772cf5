from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import npu_runtime
from npu_runtime import ProgramError, UsageError
from npu_runtime.devices import Device, numerics
from npu_runtime.devices.numerics import HeldNumerics, Setting

DEVICE = Device("npu", 0)


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A library with a switch that can be read and one that cannot, for the device's kind."""
    library = types.SimpleNamespace(hf32=True, format=None)
    settings = [
        Setting("lib.hf32", False, True, lambda value: setattr(library, "hf32", value), lambda: library.hf32),
        Setting("lib.format", False, False, lambda value: setattr(library, "format", value), None),
    ]
    monkeypatch.setattr(numerics, "settings_of", lambda device: settings)
    yield library
    assert "npu" not in numerics._PROCESS.held


def test_strict_sets_every_switch_and_release_puts_back_what_it_found(switches: types.SimpleNamespace) -> None:
    held = HeldNumerics(DEVICE, "strict")
    assert (switches.hf32, switches.format) == (False, False)
    assert held.describe() == {"numerics": "strict", "lib.hf32": False, "lib.format": False}
    held.release()
    held.release()
    assert switches.hf32 is True


def test_what_was_there_before_the_first_is_put_back_after_the_last(switches: types.SimpleNamespace) -> None:
    first, second = HeldNumerics(DEVICE, "strict"), HeldNumerics(DEVICE, "strict")
    first.release()
    assert switches.hf32 is False
    second.release()
    assert switches.hf32 is True


def test_other_numerics_beside_an_open_encoder_are_refused_until_it_is_closed(switches: types.SimpleNamespace) -> None:
    held = HeldNumerics(DEVICE, "strict")
    with pytest.raises(UsageError, match="other numerics is open on npu") as caught:
        HeldNumerics(DEVICE, "fast")
    assert "lib.hf32=False" in str(caught.value.expected)
    assert switches.hf32 is False
    held.release()
    with HeldNumerics(DEVICE, "fast") as fast:
        assert fast.describe()["lib.hf32"] is True


def test_a_switch_that_is_changed_beside_an_open_encoder_is_found(switches: types.SimpleNamespace) -> None:
    with HeldNumerics(DEVICE, "strict") as held:
        held.check()
        switches.hf32 = True
        with pytest.raises(ProgramError, match="strict numerics were changed") as caught:
            held.check()
        assert caught.value.got == "lib.hf32=True, expected False"


def test_a_switch_that_cannot_be_set_leaves_the_others_as_they_were(
    switches: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(value: object) -> None:
        raise RuntimeError("no such option")

    settings = [*numerics.settings_of(DEVICE)[:1], Setting("lib.bad", False, False, refuse, None)]
    monkeypatch.setattr(numerics, "settings_of", lambda device: settings)
    with pytest.raises(RuntimeError, match="no such option"):
        HeldNumerics(DEVICE, "strict")
    assert switches.hf32 is True


def test_unknown_numerics_are_wrong_usage(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="unknown numerics"):
        npu_runtime.load(tiny_artifact, numerics="exact")  # type: ignore[arg-type]


def test_what_was_changed_beside_an_open_encoder_is_found_when_another_is_loaded(
    switches: types.SimpleNamespace,
) -> None:
    with HeldNumerics(DEVICE, "strict"):
        switches.hf32 = True
        with pytest.raises(ProgramError, match="strict numerics were changed"):
            HeldNumerics(DEVICE, "strict")
    assert switches.hf32 is True
    assert HeldNumerics(DEVICE, "strict").release() is None


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no precision switch for the CPU"
)
def test_the_cpu_computes_in_float32_whatever_the_process_asked_torch_for(tiny_artifact: Path) -> None:
    """In a process of its own, in which no other encoder is open."""
    code = """
import sys, numpy as np, torch, npu_runtime
switch = torch.backends.mkldnn.matmul
switch.fp32_precision = "bf16"
with npu_runtime.load(sys.argv[1], backend="torchscript") as encoder:
    assert encoder.report().numerics["torch.backends.mkldnn.matmul.fp32_precision"] == "ieee"
    encoder(np.zeros((1, 3, 32, 32), np.float32))
    switch.fp32_precision = "bf16"
    try:
        encoder.report()
    except npu_runtime.ProgramError as error:
        assert "numerics were changed" in error.what
    else:
        raise SystemExit("not found")
assert switch.fp32_precision == "bf16"
npu_runtime.load(sys.argv[1], backend="torchscript")  # nobody closes it
assert switch.fp32_precision == "bf16"
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny_artifact)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has the older switches alone"
)
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_torch_tells_its_precision_while_settings_are_held_and_afterwards(kind: str, before: str) -> None:
    """In a process of its own: torch raises where one of its older switches is read and newer ones disagree with it."""
    code = """
import sys, torch
from npu_runtime.devices import Device
from npu_runtime.devices.numerics import HeldNumerics

def tells():
    backends = torch.backends
    cpu = backends.mkldnn
    newer = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, cpu.matmul, cpu.conv]
    return (
        backends.cuda.matmul.allow_tf32,
        backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        getattr(backends.mkldnn, "allow_tf32", None),
        *(holder.fp32_precision for holder in newer),
    )

kind, precision = sys.argv[1:]
torch.set_float32_matmul_precision(precision)
before = tells()
for numerics, tf32 in (("strict", False), ("fast", True)):
    with HeldNumerics(Device(kind, 0), numerics) as held:
        held.check()
        if kind == "cuda":
            assert tells()[:2] == (tf32, tf32)
            assert tells()[4:7] == ("tf32" if tf32 else "ieee",) * 3
        assert tells()[7:] == ("ieee", "ieee"), "the CPU's"
    assert tells() == before
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, kind, before], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_switches_that_disagree_already_are_held_and_left_as_they_were() -> None:
    code = """
import torch
from npu_runtime.devices import Device
from npu_runtime.devices.numerics import HeldNumerics

torch.backends.cudnn.rnn.fp32_precision = "ieee"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
with HeldNumerics(Device("cuda", 0), "strict") as held:
    held.check()
    assert torch.backends.cudnn.allow_tf32 is False
assert torch.backends.cudnn.conv.fp32_precision == "tf32"
assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
"""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
