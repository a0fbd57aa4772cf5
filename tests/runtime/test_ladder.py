"""The ladder names the step in which a fault was planted, for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import frozen_faults
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import npu_export.eager as eager
from npu_export.pipeline import export
from npu_runtime import Encoder
from npu_runtime.artifact.store import Artifact, open_artifact
from npu_runtime.backends.table import backend_name
from npu_runtime.parity.inputs import Inputs, seeded_inputs
from npu_runtime.parity.ladder import Ladder, plan_ladder
from npu_runtime.parity.records import ParityRecord, make_record

Record = Callable[[Path], Artifact]


def climb(artifact: Artifact, **how: Any) -> ParityRecord:
    """The record of the whole ladder on the CPU, on two seeds."""
    inputs = Inputs(seeded_inputs((42, 123), artifact.manifest.inputs[0]))
    ladder = Ladder(artifact, inputs, threads=1, **how)
    ladder.climb(plan_ladder(artifact.manifest, "cpu"))
    return make_record("parity", artifact, "cpu", ladder.steps, inputs=inputs.records, seconds=0)


def verdicts(record: ParityRecord) -> list[tuple[str, str]]:
    return [(step.backend, step.status) for step in record.steps]


CLEAN = [("eager", "passed"), ("torchscript", "passed"), ("onnxruntime", "passed")]


def test_without_a_fault_every_step_passes(probed_artifact: Path) -> None:
    record = climb(open_artifact(probed_artifact))
    assert (verdicts(record), record.passed, record.cause) == (CLEAN, True, None)
    for step in record.steps[1:]:
        assert (step.baseline, step.inputs) == ("eager fp32 on cpu", ("seed 42", "seed 123"))
    assert all(o.metrics.max_abs_error == 0 for o in record.steps[1].outputs), "TorchScript equals eager bit for bit"


def perturb(folder: Path, format: str, block: str) -> None:
    frozen_faults.change_weight(folder, format, block, frozen_faults.scale)


def plant_nan(folder: Path, format: str, block: str) -> None:
    frozen_faults.change_weight(folder, format, block, frozen_faults.nan)


@pytest.mark.parametrize("fault", [perturb, plant_nan, frozen_faults.tanh_gelu])
@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_a_fault_in_a_program_is_the_exports(
    probed_copy: Path, record_again: Record, format: str, fault: Callable[[Path, str, str], None]
) -> None:
    if "aimv2" in open_artifact(probed_copy).manifest.encoder and fault is frozen_faults.tanh_gelu:
        pytest.skip("AIMv2 has no GELU")
    fault(probed_copy, format, frozen_faults.blocks_of(probed_copy)[-2])
    record = climb(record_again(probed_copy))
    backend = backend_name(format)
    assert verdicts(record) == [(name, "failed" if name == backend else "passed") for name, _ in CLEAN]
    assert (record.passed, record.first_failure, record.cause) == (False, f"{backend} fp32 on cpu", "export")
    failed = next(step for step in record.steps if step.backend == backend)
    assert failed.reason is not None
    if fault is plant_nan:
        assert "NaN" in failed.reason
        assert all(output.metrics.nan > 0 for output in failed.whole_outputs)


class RoundedInputs(nn.Module):
    """Rounds its inputs to 11 bits, as HF32 does, by Veltkamp's splitting."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    @torch.jit.export
    def b1(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b1(8193.0 * x - (8193.0 * x - x))  # type: ignore[no-any-return]

    @torch.jit.export
    def b4(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.program.b4(8193.0 * x - (8193.0 * x - x))  # type: ignore[no-any-return]


def test_inputs_rounded_as_hf32_inside_of_a_program_are_the_exports(
    artifact_copy: Path, wrap_torchscript: Callable[..., None], record_again: Record
) -> None:
    wrap_torchscript(artifact_copy / "model.ts", RoundedInputs)
    record = climb(record_again(artifact_copy))
    assert (record.first_failure, record.cause) == ("torchscript fp32 on cpu", "export")


@pytest.fixture
def mutate_eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Have the eager backend run a network that was changed after its weights were checked."""

    def mutate(change: Callable[[Any], None]) -> None:
        rebuild = eager._rebuild

        def changed(*arguments: Any) -> nn.Module:
            module = rebuild(*arguments)
            with torch.no_grad():
                change(module)
            return module

        monkeypatch.setattr(eager, "_rebuild", changed)

    return mutate


def test_a_network_that_computes_something_else_is_the_checkpoints_step(
    probed_artifact: Path, mutate_eager: Callable[..., None]
) -> None:
    def perturb_largest(module: Any) -> None:
        max(module.parameters(), key=torch.Tensor.numel).view(-1)[12] += 0.05

    mutate_eager(perturb_largest)
    record = climb(open_artifact(probed_artifact))
    assert (record.first_failure, record.cause) == ("eager fp32 on cpu", "checkpoint")
    assert record.steps[0].baseline == "stored reference"
    assert verdicts(record)[0] == ("eager", "failed")


def test_a_checkpoint_with_a_changed_weight_is_the_checkpoints_step(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("attention.query.weight"))
    tensors[name][0, 0] += 0.01
    save_file(tensors, tmp_path / "model.safetensors")
    record = climb(open_artifact(tiny_artifact), weights=str(tmp_path))
    assert (record.first_failure, record.cause) == ("eager fp32 on cpu", "checkpoint")
    assert "not the weights that the artifact was exported from" in str(record.steps[0].reason)
    assert [step.baseline for step in record.steps[1:]] == ["stored reference"] * 2
    assert [step.status for step in record.steps[1:]] == ["passed"] * 2


def test_a_wrong_remapping_is_the_checkpoints_step(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_network = eager.load_network

    def swapped(plan: Any) -> Any:
        network: Any = load_network(plan)
        with torch.no_grad():
            weight = network.blocks[1].attn.qkv.weight
            query, key, value = weight.chunk(3)
            weight.copy_(torch.cat([key, query, value]))
        return network

    monkeypatch.setattr(eager, "load_network", swapped)
    record = climb(open_artifact(tiny_artifact))
    assert (record.first_failure, record.cause) == ("eager fp32 on cpu", "checkpoint")


def test_without_the_checkpoint_the_programs_answer_to_the_stored_reference(
    artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(artifact_copy, lambda d: d["provenance"]["weights"].update(source=str(artifact_copy / "gone")))
    record = climb(open_artifact(artifact_copy))
    assert verdicts(record) == [("eager", "not run"), ("torchscript", "passed"), ("onnxruntime", "passed")]
    assert (record.passed, record.cause) == (True, None)
    assert "gone" in str(record.steps[0].reason) or "cannot be used" in str(record.steps[0].reason)
    assert [step.baseline for step in record.steps[1:]] == ["stored reference"] * 2
    assert record.steps[1].inputs == tuple(f"reference {seed}" for seed in range(4))


def test_an_encoder_that_this_exporter_does_not_know_leaves_eager_not_run(
    artifact_copy: Path, edit_manifest: Callable[..., None]
) -> None:
    edit_manifest(artifact_copy, lambda document: document.update(encoder="vit-of-somebody-else"))
    record = climb(open_artifact(artifact_copy))
    assert verdicts(record) == [("eager", "not run"), ("torchscript", "passed"), ("onnxruntime", "passed")]
    assert "unknown encoder" in str(record.steps[0].reason)


def test_half_precision_has_a_step_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path, mutate_eager: Callable[..., None]
) -> None:
    path = export(
        "tiny-vit", weights=str(tiny_checkpoint), formats=("torchscript",), precision="fp16", output=tmp_path / "half"
    )
    artifact = open_artifact(path)
    record = climb(artifact)
    assert [(step.title, step.cause, step.status) for step in record.steps] == [
        ("eager fp32 on cpu", "checkpoint", "passed"),
        ("eager fp16 on cpu", "precision", "passed"),
        ("torchscript fp16 on cpu", "export", "passed"),
    ]
    assert record.steps[1].baseline == "eager fp32 on cpu"

    def coarse(module: Any) -> None:
        for parameter in module.parameters():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.bfloat16().half()

    mutate_eager(coarse)
    record = climb(artifact)
    assert (record.first_failure, record.cause) == ("eager fp16 on cpu", "precision")


def test_a_device_that_is_not_here_leaves_the_steps_on_it_not_run(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    inputs = Inputs(seeded_inputs((1,), artifact.manifest.inputs[0]))
    ladder = Ladder(artifact, inputs, device="cuda:7", threads=1)
    ladder.climb(plan_ladder(artifact.manifest, "cuda:7"))
    assert [(step.device, step.status) for step in ladder.steps] == [
        *[("cpu", "passed")] * 3,
        *[("cuda:7", "not run")] * 3,
    ]
    assert all(step.reason for step in ladder.steps[3:])
    record = make_record("parity", artifact, "cuda:7", ladder.steps, inputs=inputs.records, seconds=0)
    assert (record.passed, record.first_failure) == (False, None)


def test_an_interruption_keeps_what_was_measured(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = open_artifact(tiny_artifact)
    inputs = Inputs(seeded_inputs(range(10), artifact.manifest.inputs[0]))
    run = Encoder.run
    calls: Iterator[int] = iter(range(100))

    def interrupt(self: Encoder, *arguments: Any, **options: Any) -> Any:
        if self.backend == "torchscript" and next(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(Encoder, "run", interrupt)
    ladder = Ladder(artifact, inputs, threads=1)
    with pytest.raises(KeyboardInterrupt):
        ladder.climb(plan_ladder(artifact.manifest, "cpu"))
    assert [step.status for step in ladder.steps] == ["passed", "interrupted"]
    assert ladder.steps[1].outputs[0].metrics.images == 2
    record = make_record("parity", artifact, "cpu", ladder.steps, inputs=inputs.records, seconds=0, partial=True)
    assert (record.partial, record.passed, record.first_failure) == (True, False, None)


def test_the_worst_input_of_the_first_failing_step_is_kept(artifact_copy: Path, record_again: Record) -> None:
    frozen_faults.perturb_torchscript(artifact_copy)
    artifact = record_again(artifact_copy)
    inputs = Inputs(seeded_inputs((1, 2, 3), artifact.manifest.inputs[0]))
    ladder = Ladder(artifact, inputs, threads=1)
    ladder.climb(plan_ladder(artifact.manifest, "cpu"))
    assert ladder.worst is not None
    failed = ladder.steps[1]
    assert ladder.worst.name == failed.worst
    row = failed.inputs.index(ladder.worst.name)
    assert np.array_equal(ladder.worst.pixel_values, inputs.rows(row, row + 1))
    errors = [max(o.images[i].relative_l2_error for o in failed.whole_outputs) for i in range(3)]
    assert row == int(np.argmax(errors))
    difference = np.linalg.norm(ladder.worst.actual["tokens"] - ladder.worst.expected["tokens"])
    assert difference > 0


def test_outputs_larger_than_what_is_kept_are_computed_again(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import npu_runtime.parity.baselines as module

    whole = climb(open_artifact(tiny_artifact))
    monkeypatch.setattr(module, "KEPT_NBYTES", 0)
    again = climb(open_artifact(tiny_artifact))
    assert [step.outputs for step in again.steps] == [step.outputs for step in whole.steps]
