from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from npu_runtime import ArtifactError, UnavailableError, UsageError, load
from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.backends.base import Options
from npu_runtime.backends.table import BUILT_IN, FORMATS, backend_names, find_backend
from npu_runtime.devices import CPU

Array = npt.NDArray[np.float32]
Record = Callable[[Path], Artifact]


class WithoutB4(nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @torch.jit.export
    def b1(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b1(x)  # type: ignore[no-any-return]


class TokensFirst(nn.Module):
    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @torch.jit.export
    def b1(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding, tokens = self.program.b1(x)
        return tokens, embedding

    @torch.jit.export
    def b4(self, x: torch.Tensor) -> torch.Tensor:
        return self.program.b4(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("input_name", "width"), [("image", 64), ("pixel_values", 32)])
def test_an_onnx_graph_with_another_signature_is_refused(
    artifact_copy: Path,
    write_root_graph: Callable[..., None],
    record_again: Record,
    input_name: str,
    width: int,
) -> None:
    write_root_graph(artifact_copy / "model.b1.onnx", 1, input_name=input_name, width=width)
    with (
        load(record_again(artifact_copy)) as encoder,
        pytest.raises(ArtifactError, match="other inputs or outputs") as caught,
    ):
        encoder(np.ones((1, 3, 32, 32), np.float32))
    assert caught.value.where == "model.b1.onnx"


def test_an_onnx_graph_with_the_signature_of_the_manifest_is_run(
    artifact_copy: Path, write_root_graph: Callable[..., None], record_again: Record
) -> None:
    write_root_graph(artifact_copy / "model.b1.onnx", 1)
    with load(record_again(artifact_copy)) as encoder:
        embedding = encoder(np.ones((1, 3, 32, 32), np.float32))
    np.testing.assert_allclose(embedding, np.full((1, 64), np.sqrt(3072)), rtol=1e-6)


def test_an_onnx_graph_of_another_batch_size_is_refused(artifact_copy: Path, record_again: Record) -> None:
    (artifact_copy / "model.b1.onnx").write_bytes((artifact_copy / "model.b4.onnx").read_bytes())
    with load(record_again(artifact_copy)) as encoder, pytest.raises(ArtifactError, match="other inputs or outputs"):
        encoder(np.ones((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize("file", ["model.b4.onnx", "weights.onnx.data"])
def test_a_graph_that_is_opened_late_is_the_one_that_was_loaded(artifact_copy: Path, file: str) -> None:
    with load(artifact_copy, backend="onnxruntime") as encoder:
        encoder(np.ones((1, 3, 32, 32), np.float32))
        kept = (artifact_copy / file).read_bytes()
        (artifact_copy / file).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="has changed"):
            encoder(np.ones((4, 3, 32, 32), np.float32))
        (artifact_copy / file).write_bytes(kept)
        assert encoder(np.ones((4, 3, 32, 32), np.float32)).shape == (4, 64)


def test_a_torchscript_file_without_an_entry_point_is_refused(
    artifact_copy: Path, wrap_torchscript: Callable[..., None], record_again: Record
) -> None:
    wrap_torchscript(artifact_copy / "model.ts", WithoutB4)
    artifact = record_again(artifact_copy)
    with pytest.raises(ArtifactError, match="lacks an entry point") as caught:
        load(artifact, backend="torchscript")
    assert caught.value.expected == "b4"
    with load(artifact, backend="torchscript", batches=[1]) as encoder:
        assert encoder(np.ones((2, 3, 32, 32), np.float32)).shape == (2, 64)


@pytest.mark.parametrize(
    ("batch", "got"), [(1, "float32 [1, 17, 64], float32 [1, 64]"), (4, "Tensor")], ids=["order", "no-tuple"]
)
def test_a_torchscript_program_with_other_outputs_is_refused(
    artifact_copy: Path, wrap_torchscript: Callable[..., None], record_again: Record, batch: int, got: str
) -> None:
    wrap_torchscript(artifact_copy / "model.ts", TokensFirst)
    with (
        load(record_again(artifact_copy), backend="torchscript") as encoder,
        pytest.raises(ArtifactError, match="gives other outputs") as caught,
    ):
        encoder(np.ones((batch, 3, 32, 32), np.float32))
    assert caught.value.got == got


@pytest.mark.parametrize(("backend", "file"), [("onnxruntime", "model.b1.onnx"), ("torchscript", "model.ts")])
@pytest.mark.parametrize("data", [b"", b"no program", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_program_is_refused_by_name(
    artifact_copy: Path, record_again: Record, backend: str, file: str, data: bytes
) -> None:
    (artifact_copy / file).write_bytes(data)
    artifact = record_again(artifact_copy)

    def run() -> None:
        with load(artifact, backend=backend) as encoder:
            encoder(np.ones((1, 3, 32, 32), np.float32))

    with pytest.raises(ArtifactError, match="does not open this program") as caught:
        run()
    assert caught.value.where == str(artifact_copy / file)
    assert caught.value.got


@pytest.mark.parametrize(
    ("backend", "package", "extra"), [("onnxruntime", "onnxruntime", "[onnx]"), ("torchscript", "torch", "[torch]")]
)
def test_a_backend_whose_package_is_missing_is_unavailable(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, backend: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=f"needs the package {package}") as caught:
        load(tiny_artifact, backend=backend)
    assert caught.value.exit_code == 4
    assert extra in str(caught.value.hint)


@pytest.mark.parametrize("backend", ["onnxruntime", "torchscript"])
def test_a_frozen_program_refuses_a_checkpoint(tiny_artifact: Path, tiny_checkpoint: Path, backend: str) -> None:
    with pytest.raises(UsageError, match="carries its weights"):
        load(tiny_artifact, backend=backend, weights=str(tiny_checkpoint))


def test_eager_takes_the_checkpoint_from_where_it_lies_now(
    tiny_artifact: Path, tiny_checkpoint: Path, artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(artifact_copy, lambda document: document["provenance"]["weights"].update(source="moved/away"))
    pixel_values = np.ones((1, 3, 32, 32), np.float32)
    with load(artifact_copy, backend="eager", weights=str(tiny_checkpoint)) as encoder:
        moved = encoder(pixel_values)
    with load(tiny_artifact, backend="eager") as encoder:
        np.testing.assert_array_equal(moved, encoder(pixel_values))


def test_a_session_gives_the_outputs_in_the_order_asked_and_closes_twice(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    for name in BUILT_IN:
        session = find_backend(name).open(artifact, CPU, Options((1,)))
        arrays = session.run(np.ones((1, 3, 32, 32), np.float32), ["tokens", "embedding"])
        assert [array.shape for array in arrays] == [(1, 17, 64), (1, 64)]
        session.close()
        session.close()


@pytest.mark.parametrize("format", list(FORMATS))
def test_a_backend_is_found_by_its_format_too(format: str) -> None:
    backend = find_backend(format)
    assert backend.format == format
    assert type(backend) is type(find_backend(FORMATS[format]))


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that adds the backends `ones`, `broken` and, for a built-in name, a false one."""
    site = tmp_path / "site"
    metadata = site / "acme_backends-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-backends\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[npu_runtime.backends]\nones = acme_backends:Ones\nbroken = acme_missing:X\nonnxruntime = acme_backends:Ones\n"
    )
    (site / "acme_backends.py").write_text(
        """
import numpy as np

class Ones:
    format = None

    def open(self, artifact, device, options):
        return Session(artifact.manifest, options)

class Session:
    def __init__(self, manifest, options):
        self.outputs = {output.name: output for output in manifest.outputs}
        self.options = options

    def run(self, pixel_values, outputs):
        assert pixel_values.flags.c_contiguous and len(pixel_values) in self.options.batches
        shapes = [self.outputs[name].of_batch(len(pixel_values)) for name in outputs]
        return [np.full(shape, float(self.options.weights), np.float32) for shape in shapes]

    def close(self):
        pass
"""
    )
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("third_party")
def test_a_backend_that_another_package_adds_is_found_and_run(tiny_artifact: Path) -> None:
    assert {"ones", "broken"} <= set(backend_names())
    with load(tiny_artifact, backend="ones", weights="3") as encoder:
        assert (encoder.backend, encoder.batches) == ("ones", (1, 4))
        strided = np.ones((6, 3, 32, 64), np.float32)[..., ::2]
        np.testing.assert_array_equal(encoder(strided), np.full((6, 64), 3, np.float32))
        np.testing.assert_array_equal(encoder(strided[:4]), np.full((4, 64), 3, np.float32))


@pytest.mark.usefixtures("third_party")
def test_an_added_backend_that_does_not_import_is_unavailable(tiny_artifact: Path) -> None:
    with pytest.raises(UnavailableError, match="registered but does not import") as caught:
        load(tiny_artifact, backend="broken")
    assert "acme_missing" in str(caught.value.got)


@pytest.mark.usefixtures("third_party")
def test_an_added_backend_does_not_take_a_built_in_name() -> None:
    assert find_backend("onnxruntime").format == "onnx"
    assert backend_names().count("onnxruntime") == 1
