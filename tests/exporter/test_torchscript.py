from __future__ import annotations

import inspect
import re
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import npu_export
from npu_export.network import load_network, plan_weights
from npu_export.precision import in_precision
from npu_export.torchscript import empty_constants, entry_point, nodes_of, trace_frozen
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import Precision
from npu_runtime.errors import Error
from npu_runtime.torch_interop import without_jit_deprecation, write_torchscript

BATCHES = (2, 1, 4)
WEIGHTS_NBYTES = 4 * tiny.TINY.published.parameters


@pytest.fixture(scope="module")
def module() -> nn.Module:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0")))
    return tiny.TINY.with_outputs(network)


@pytest.fixture(scope="module")
def program(module: nn.Module) -> torch.jit.ScriptModule:
    return trace_frozen(module, tiny.TINY.inputs[0], BATCHES)


@pytest.fixture(scope="module")
def file(program: torch.jit.ScriptModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torchscript") / "model.ts"
    write_torchscript(program, path, WEIGHTS_NBYTES)
    return path


def load(path: Path) -> torch.jit.ScriptModule:
    with without_jit_deprecation():
        return torch.jit.load(str(path))


def operators(program: torch.jit.ScriptModule, name: str) -> list[str]:
    return [node.kind() for node in nodes_of(getattr(program, name).graph)]


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiny.TINY.inputs[0].of_batch(batch), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("seed", range(3))
def test_each_entry_point_gives_what_eager_gives_bit_for_bit(
    file: Path, module: nn.Module, batch: int, seed: int
) -> None:
    pixel_values = images(batch, seed)
    with torch.inference_mode():
        expected = module(pixel_values)
        got = getattr(load(file), entry_point(batch))(pixel_values)
    assert isinstance(got, tuple)
    assert [tuple(tensor.shape) for tensor in got] == [spec.of_batch(batch) for spec in tiny.TINY.outputs]
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_program_of_half_precision_is_half_as_large_and_gives_what_eager_gives_in_float32(
    precision: Precision, tmp_path: Path
) -> None:
    network = load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, "random:0")))
    half = in_precision(tiny.TINY.with_outputs(network), precision)
    write_torchscript(trace_frozen(half, tiny.TINY.inputs[0], (2,)), tmp_path / "model.ts", WEIGHTS_NBYTES // 2)
    with torch.inference_mode():
        expected, got = half(images(2)), load(tmp_path / "model.ts").b2(images(2))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, expected))
    assert WEIGHTS_NBYTES // 2 <= stored_constants(tmp_path / "model.ts") < WEIGHTS_NBYTES * 0.51


def test_forward_is_the_first_batch_size(file: Path) -> None:
    loaded, pixel_values = load(file), images(BATCHES[0])
    with torch.inference_mode():
        first = getattr(loaded, entry_point(BATCHES[0]))(pixel_values)
        assert all(torch.equal(a, b) for a, b in zip(loaded(pixel_values), first))
    assert operators(loaded, "forward") == operators(loaded, entry_point(BATCHES[0]))


def test_a_program_has_an_entry_point_for_each_batch_size_and_no_other(file: Path) -> None:
    loaded = load(file)
    methods = set(loaded._c._method_names())
    assert methods == {"forward", *(entry_point(batch) for batch in BATCHES)}


def stored_constants(file: Path) -> int:
    """Bytes of the tensors in a file."""
    with zipfile.ZipFile(file) as archive:
        return sum(info.file_size for info in archive.infolist() if "/constants/" in info.filename)


def test_the_weights_are_in_the_file_once(file: Path) -> None:
    assert WEIGHTS_NBYTES <= stored_constants(file) < WEIGHTS_NBYTES * 1.01


def test_a_program_has_no_parameters_left_to_move_or_train(program: torch.jit.ScriptModule) -> None:
    assert list(program.parameters()) == []
    assert list(program.buffers()) == []


def test_no_file_of_a_program_names_a_place_on_this_machine(file: Path) -> None:
    assert npu_export.__file__ is not None
    places = [sys.prefix, str(Path(npu_export.__file__).parent), inspect.getfile(type(tiny.TINY)), "site-packages"]
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            content = archive.read(info)
            assert not [place for place in places if place.encode() in content], info.filename


def test_emptied_constants_hold_no_weights(module: nn.Module) -> None:
    program = trace_frozen(module, tiny.TINY.inputs[0], (1, 2))
    before = [_constants_nbytes(program, name) for name in ("forward", "b1", "b2")]
    empty_constants(program, ["b1", "b2"])
    assert min(before) > WEIGHTS_NBYTES // 2
    assert [_constants_nbytes(program, name) for name in ("forward", "b1", "b2")] == [0, 0, 0]


def _constants_nbytes(program: torch.jit.ScriptModule, name: str) -> int:
    values = (node.output().toIValue() for node in nodes_of(getattr(program, name).graph) if _is_constant(node))
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _is_constant(node: torch._C.Node) -> bool:
    return bool(node.kind() == "prim::Constant")


def test_a_file_that_torch_cannot_write_is_an_error_of_ours(
    program: torch.jit.ScriptModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nframe #0")

    monkeypatch.setattr(torch.jit, "save", failing)
    with pytest.raises(Error, match="could not be written") as raised:
        write_torchscript(program, tmp_path / "model.ts", WEIGHTS_NBYTES)
    assert raised.value.got == "PytorchStreamWriter failed writing file data/0: file write failed"


def test_another_fault_of_torch_is_not_hidden(
    program: torch.jit.ScriptModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("a fault of torch")

    monkeypatch.setattr(torch.jit, "save", failing)
    with pytest.raises(RuntimeError, match=re.escape("a fault of torch")):
        write_torchscript(program, tmp_path / "model.ts", WEIGHTS_NBYTES)


def test_a_disk_that_refuses_room_stops_before_torch_writes(
    program: torch.jit.ScriptModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", failing)
    monkeypatch.setattr(torch.jit, "save", lambda *_: pytest.fail("torch wrote"))
    with pytest.raises(OSError, match="No space left"):
        write_torchscript(program, tmp_path / "model.ts", WEIGHTS_NBYTES)
