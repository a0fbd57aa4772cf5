"""What a caller has set in torch around a call changes no number and breaks nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch

from npu_export.eager import run_eager
from npu_export.pipeline import export
from npu_runtime import load
from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.base import Options
from npu_runtime.backends.probed import open_probed
from npu_runtime.devices import CPU
from npu_runtime.devices.ambient import torch_defaults, without_autocast
from npu_runtime.devices.arithmetic import measure_arithmetic
from npu_runtime.devices.operators import watch_operators

Around = Callable[[], AbstractContextManager[object]]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


AROUND: dict[str, Around] = {
    "autocast": autocast,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "torch.device('meta')": lambda: torch.device("meta"),
    "the default device meta": lambda: default_device("meta"),
}
around = pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
torch_backends = pytest.mark.parametrize("backend", ["torchscript", "eager"])


@around
@torch_backends
@pytest.mark.parametrize("loaded", ["before", "inside"])
def test_an_encoder_gives_the_same_bits_whatever_is_set_around_it(
    tiny_artifact: Path, images: npt.NDArray[np.float32], backend: str, around: Around, loaded: str
) -> None:
    with load(tiny_artifact, backend=backend) as encoder:
        expected = encoder.run(images)
    with contextlib.ExitStack() as stack:
        if loaded == "before":
            encoder = stack.enter_context(load(tiny_artifact, backend=backend))
            stack.enter_context(around())
        else:
            stack.enter_context(around())
            encoder = stack.enter_context(load(tiny_artifact, backend=backend))
        for _ in range(3):  # TorchScript optimises a program in its first runs
            for name, array in encoder.run(images).items():
                assert np.array_equal(array, expected[name])
    with around():
        encoder = load(tiny_artifact, backend=backend)
        encoder(images)
    with encoder:
        assert np.array_equal(encoder(images), expected["embedding"])


@torch_backends
def test_a_thread_that_casts_for_itself_gets_what_the_others_get(
    tiny_artifact: Path, images: npt.NDArray[np.float32], backend: str
) -> None:
    got: list[npt.NDArray[np.float32]] = []

    def run() -> None:
        with autocast():
            got.append(encoder(images))
            assert torch.is_autocast_enabled("cpu")

    with load(tiny_artifact, backend=backend) as encoder:
        expected = encoder(images)
        thread = Thread(target=run)
        thread.start()
        thread.join()
    assert np.array_equal(got[0], expected)


@around
def test_values_from_inside_of_a_program_are_the_same_bits(probed_vit: Path, around: Around) -> None:
    artifact = open_artifact(probed_vit)
    inputs, _ = artifact.read_reference()

    def values() -> list[npt.NDArray[np.generic]]:
        with open_probed(artifact, CPU, Options((4,)), backend="torchscript") as program:
            places = [place.name for place in program.places()]
            with program.open(places) as call:
                outputs, inner = call(np.resize(inputs, (4, *inputs.shape[1:])))
        return [*outputs.values(), *inner]

    expected = values()
    with around():
        got = values()
    assert len(got) == len(expected) > 10
    assert all(map(np.array_equal, got, expected))


@around
def test_the_same_errors_are_measured_of_a_devices_arithmetic(around: Around) -> None:
    def run() -> list[torch.Tensor]:
        tokens = torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), torch.ones(16, 3, 4, 4), stride=4).flatten(2)
        return [torch.nn.functional.gelu(torch.nn.functional.layer_norm(tokens @ torch.ones(4, 8), (8,)))]

    operators, _ = watch_operators(CPU, run)
    assert set(operators.calls) == {"conv", "matmul", "layer_norm", "gelu"}
    expected = measure_arithmetic(torch.device("cpu"), operators.calls)
    with around():
        got = measure_arithmetic(torch.device("cpu"), operators.calls)
    assert got == expected


def test_a_module_that_the_exporter_runs_computes_in_float32(images: npt.NDArray[np.float32]) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8)).eval()
    (expected,) = run_eager(lambda x: (module(x),), images)  # type: ignore[arg-type]
    with autocast():
        (got,) = run_eager(lambda x: (module(x),), images)  # type: ignore[arg-type]
    assert np.array_equal(got, expected)


OPTIONS: dict[str, Any] = {"weights": "random:3", "probes": True}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with nothing set around it, of a network that computes its rotary positions as it is built."""
    return export(tiny.TINY_PE_LANG, output=tmp_path_factory.mktemp("plain") / "artifact", **OPTIONS)


@around
def test_an_export_is_the_same_whatever_is_set_around_it(around: Around, plain: Path, tmp_path: Path) -> None:
    with around():
        got = export(tiny.TINY_PE_LANG, output=tmp_path / "got", **OPTIONS)
    for file in ("reference.safetensors", "probes.safetensors", "model.b1.onnx", "weights.onnx.data"):
        assert (got / file).read_bytes() == (plain / file).read_bytes(), file
    inputs, _ = open_artifact(plain).read_reference()
    for backend in ("torchscript", "eager"):
        with load(plain, backend=backend) as one:
            expected = one(inputs)
        with around(), load(got, backend=backend) as other:
            assert np.array_equal(other(inputs), expected), backend


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_caller_set_is_there_again_afterwards_also_on_an_error(device: str) -> None:
    torch.set_autocast_enabled(device, True)
    try:
        with contextlib.suppress(ValueError), without_autocast(device):
            assert not torch.is_autocast_enabled(device)
            raise ValueError
        assert torch.is_autocast_enabled(device)
        with default_dtype(torch.float64), default_device("meta"):
            with torch_defaults():
                assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float32, "cpu")
                assert torch.is_autocast_enabled("cpu") is False
            assert (torch.zeros(1).dtype, torch.zeros(1).device.type) == (torch.float64, "meta")
    finally:
        torch.set_autocast_enabled(device, False)
