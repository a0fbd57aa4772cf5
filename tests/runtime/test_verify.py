from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from npu_runtime import ArtifactError, UsageError
from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.parity.records import Step
from npu_runtime.parity.verify import measure_parity

BACKENDS = ("onnxruntime", "torchscript", "eager")
Record = Callable[[Path], Artifact]


class Mixed(nn.Module):
    """Batch 4 gives each image the outputs of another."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @torch.jit.export
    def b1(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b1(x)  # type: ignore[no-any-return]

    @torch.jit.export
    def b4(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.tensor([0, 2, 1, 3])
        embedding, tokens = self.program.b4(x)
        return embedding[order], tokens[order]


class Constant(nn.Module):
    """Gives every batch the outputs of the first one that it is asked for."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program
        first = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
        self.register_buffer("first", torch.from_numpy(first))

    @torch.jit.export
    def b1(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b1(self.first)  # type: ignore[no-any-return]

    @torch.jit.export
    def b4(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b4(x)  # type: ignore[no-any-return]


def verdicts(rows: list[Step]) -> dict[tuple[int, str], bool]:
    return {(row.batches[0], output.output): output.passed for row in rows for output in row.whole_outputs}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_program_of_a_fresh_artifact_passes(tiny_artifact: Path, backend: str) -> None:
    rows = list(measure_parity(open_artifact(tiny_artifact), backend=backend))
    assert verdicts(rows) == {(batch, output): True for batch in (1, 4) for output in ("embedding", "tokens")}
    for row in rows:
        assert (row.backend, row.device) == (backend, "cpu")
        assert (row.status, row.reason, row.baseline) == ("passed", None, "stored reference")
        for output in row.outputs:
            whole = ["max_abs_error", "max_relative_l2_error"] if output.group is None else []
            assert [check.metric for check in output.checks] == [*whole, "max_scaled_error", "max_scaled_rmse"]
            assert all(check.value <= check.limit for check in output.checks)


@pytest.mark.parametrize("tensor", [0, 1, -1])
def test_one_perturbed_onnx_weight_fails(artifact_copy: Path, record_again: Record, tensor: int) -> None:
    file = artifact_copy / "weights.onnx.data"
    data = np.fromfile(file, np.float32)
    pages = np.flatnonzero(data.reshape(-1, 1024).any(axis=1))
    data[1024 * pages[tensor]] += 0.05
    data.tofile(file)
    artifact = record_again(artifact_copy)
    rows = list(measure_parity(artifact, backend="onnxruntime"))
    assert not any(passed for (_, output), passed in verdicts(rows).items() if output == "tokens")
    assert all(row.status == "passed" for row in measure_parity(artifact, backend="torchscript"))


def test_a_program_that_mixes_the_rows_of_a_batch_fails(
    artifact_copy: Path, wrap_torchscript: Callable[..., None], record_again: Record
) -> None:
    wrap_torchscript(artifact_copy / "model.ts", Mixed)
    rows = list(measure_parity(record_again(artifact_copy), backend="torchscript"))
    assert verdicts(rows) == {
        (1, "embedding"): True,
        (1, "tokens"): True,
        (4, "embedding"): False,
        (4, "tokens"): False,
    }


def test_a_program_that_gives_one_answer_to_all_images_fails(
    artifact_copy: Path, wrap_torchscript: Callable[..., None], record_again: Record
) -> None:
    wrap_torchscript(artifact_copy / "model.ts", Constant)
    rows = list(measure_parity(record_again(artifact_copy), backend="torchscript"))
    assert verdicts(rows) == {
        (1, "embedding"): False,
        (1, "tokens"): False,
        (4, "embedding"): True,
        (4, "tokens"): True,
    }


@pytest.mark.parametrize("image", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_altered_reference_of_any_image_fails_every_program(
    artifact_copy: Path, record_again: Record, backend: str, image: int
) -> None:
    file = artifact_copy / "reference.safetensors"
    tensors = load_file(file)
    tensors["embedding"][image, 5] += 1e-3
    save_file(tensors, file)
    rows = list(measure_parity(record_again(artifact_copy), backend=backend))
    assert verdicts(rows) == {
        (1, "embedding"): False,
        (1, "tokens"): True,
        (4, "embedding"): False,
        (4, "tokens"): True,
    }


def test_a_reference_of_fewer_images_than_a_batch_is_repeated(
    artifact_copy: Path, record_again: Record, edit_manifest: Callable[..., None]
) -> None:
    file = artifact_copy / "reference.safetensors"
    save_file({name: array[:3].copy() for name, array in load_file(file).items()}, file)
    edit_manifest(artifact_copy, lambda document: document["reference"].update(seeds=[0, 1, 2]))
    rows = list(measure_parity(record_again(artifact_copy), backend="onnxruntime"))
    assert [(row.inputs[-1], row.status) for row in rows] == [("reference 2", "passed"), ("reference 1", "passed")]


def test_a_program_that_gives_nan_fails_and_the_values_are_counted(
    artifact_copy: Path, write_root_graph: Callable[..., None], record_again: Record
) -> None:
    for batch in (1, 4):
        write_root_graph(artifact_copy / f"model.b{batch}.onnx", batch)
    artifact = record_again(artifact_copy)
    negative = int((artifact.read_reference()[0].sum(axis=(1, 2, 3)) < 0).sum())
    assert negative > 0
    rows = list(measure_parity(artifact, backend="onnxruntime"))
    assert [row.status for row in rows] == ["failed"] * 2
    counts = [output.metrics.nan for row in rows for output in row.whole_outputs]
    assert counts == [64 * negative, 17 * 64 * negative] * 2


def test_an_output_without_a_tolerance_does_not_pass(artifact_copy: Path, edit_manifest: Callable[..., None]) -> None:
    def change(document: dict[str, Any]) -> None:
        document["tolerances"] = [t for t in document["tolerances"] if t["output"] == "tokens"]

    edit_manifest(artifact_copy, change)
    rows = list(measure_parity(open_artifact(artifact_copy), backend="onnxruntime"))
    assert {output: passed for (_, output), passed in verdicts(rows).items()} == {"embedding": False, "tokens": True}
    assert "embedding has no tolerance" in str(rows[0].reason)


def test_a_tighter_tolerance_fails_what_a_looser_one_passes(
    artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(artifact_copy, lambda document: document["tolerances"][0].update(limit=0.0))
    rows = list(measure_parity(open_artifact(artifact_copy), backend="onnxruntime", threads=1))
    assert [passed for (_, output), passed in verdicts(rows).items() if output == "tokens"] == [True, True]
    assert not all(passed for (_, output), passed in verdicts(rows).items() if output == "embedding")


def test_a_changed_program_is_refused_rather_than_measured(artifact_copy: Path) -> None:
    with (artifact_copy / "model.b4.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match="another size"):
        list(measure_parity(open_artifact(artifact_copy), backend="onnxruntime"))


def test_an_unknown_backend_is_refused(tiny_artifact: Path) -> None:
    with pytest.raises(UsageError, match="unknown backend"):
        list(measure_parity(open_artifact(tiny_artifact), backend="tensorrt"))
