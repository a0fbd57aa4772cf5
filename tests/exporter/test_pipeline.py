from __future__ import annotations

import collections
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from mutations import MUTATIONS, changed_before_the_freezing, on_network, swap_blocks
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from torch import nn
from watching import Watching

import npu_export.pipeline as pipeline
import npu_export.plan
import npu_runtime
from npu_export.eager import run_eager
from npu_export.encoders.outputs import ClsAndTokens
from npu_export.errors import CheckpointError
from npu_export.network import load_network, plan_weights, state_sha256
from npu_export.pipeline import export
from npu_export.plan import FORMATS
from npu_export.weights import find_weights
from npu_runtime.artifact.schema import SCHEMA_MAJOR, SCHEMA_MINOR
from npu_runtime.artifact.store import open_artifact
from npu_runtime.backends.table import backend_name
from npu_runtime.errors import Error, ParityError, UnavailableError, UsageError
from npu_runtime.parity.inputs import seeded_images
from npu_runtime.parity.verify import measure_parity

FILES = {
    "manifest.json",
    "model.b1.onnx",
    "model.b4.onnx",
    "model.ts",
    "reference.safetensors",
    "weights.onnx.data",
}


def loaded(weights: str) -> nn.Module:
    return load_network(plan_weights(tiny.TINY, find_weights(tiny.TINY, weights)))


def test_an_artifact_holds_the_listed_files_and_nothing_else(tiny_artifact: Path) -> None:
    manifest = open_artifact(tiny_artifact).manifest
    assert {path.name for path in tiny_artifact.iterdir()} == FILES
    assert {record.file for record in manifest.files} == FILES - {"manifest.json"}
    for record in manifest.files:
        content = (tiny_artifact / record.file).read_bytes()
        assert (record.nbytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_nothing_is_left_beside_an_artifact(tiny_artifact: Path) -> None:
    assert [path.name for path in tiny_artifact.parent.iterdir()] == [tiny_artifact.name]


def test_a_manifest_says_what_was_frozen(tiny_artifact: Path) -> None:
    manifest = open_artifact(tiny_artifact).manifest
    assert (manifest.encoder, manifest.precision) == ("tiny-vit", "fp32")
    assert (manifest.inputs, manifest.outputs) == (tiny.TINY.inputs, tiny.TINY.outputs)
    assert {t.name for t in manifest.tolerances_on("cpu")} == {t.name for t in manifest.tolerances}
    assert [t.limit for t in manifest.tolerances_on("npu")] == [10 * t.limit for t in manifest.tolerances_on("cpu")]
    assert manifest.preprocessing == tiny.TINY.preprocessing[0]
    assert [(p.format, p.file, p.batch, p.entry_point, p.opset, p.needs) for p in manifest.programs] == [
        ("torchscript", "model.ts", 1, "b1", None, ()),
        ("torchscript", "model.ts", 4, "b4", None, ()),
        ("onnx", "model.b1.onnx", 1, None, 18, ("weights.onnx.data",)),
        ("onnx", "model.b4.onnx", 4, None, 18, ("weights.onnx.data",)),
    ]


def test_a_manifest_says_whose_weights_these_are(tiny_artifact: Path, tiny_checkpoint: Path) -> None:
    weights = open_artifact(tiny_artifact).manifest.provenance.weights
    file = tiny_checkpoint / "model.safetensors"
    assert weights.source == str(tiny_checkpoint)
    assert [(f.path, f.nbytes, f.sha256) for f in weights.files] == [
        (str(file), file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    ]
    assert (weights.layout, weights.prefix) == ("hf", "vit.")
    assert weights.random_seed is None
    assert weights.state_sha256 == state_sha256(loaded(str(tiny_checkpoint)))
    coverage = weights.coverage
    assert (coverage.matched, coverage.transformed, coverage.dropped) == (26, 12, 0)
    assert coverage.parameters == tiny.TINY.published.parameters


def test_random_weights_are_recorded_as_such(tmp_path: Path) -> None:
    output = export("tiny-vit", weights="random:3", formats=("onnx",), output=tmp_path / "out")
    manifest = open_artifact(output).manifest
    assert (manifest.provenance.weights.source, manifest.provenance.weights.random_seed) == ("random:3", 3)
    assert manifest.provenance.weights.files == ()
    assert "RANDOM" in manifest.weights_summary()


def test_versions_of_the_tools_are_recorded(tiny_artifact: Path) -> None:
    versions = open_artifact(tiny_artifact).manifest.provenance.versions
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert versions["numpy"] == np.__version__
    assert {"npu-export", "python", "timm", "onnx", "onnxruntime"} <= set(versions)


def test_the_reference_is_the_eager_networks_output_of_seeded_images(
    tiny_artifact: Path, tiny_checkpoint: Path
) -> None:
    artifact = open_artifact(tiny_artifact)
    recorded = load_arrays(tiny_artifact / "reference.safetensors")
    images = [np.random.default_rng(s).standard_normal((3, 32, 32), np.float32) for s in (0, 1, 2, 3)]
    assert artifact.manifest.reference.seeds == (0, 1, 2, 3)
    assert np.array_equal(recorded["pixel_values"], np.stack(images))
    module = tiny.TINY.with_outputs(loaded(str(tiny_checkpoint)))
    for row, image in enumerate(images):
        for name, array in zip(("embedding", "tokens"), run_eager(module, image[None])):
            assert np.array_equal(recorded[name][row], array[0])
    assert np.array_equal(recorded["embedding"], recorded["tokens"][:, 0])


def test_no_two_reference_images_are_alike() -> None:
    images = seeded_images((0, 1, 2, 3), (3, 4, 4))
    assert len({image.tobytes() for image in images}) == 4
    assert np.array_equal(images[2:3], seeded_images((2,), (3, 4, 4)))


def test_two_exports_of_the_same_weights_are_the_same_bytes(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        command = ("npu-export", "--model", "tiny-vit", "--weights", tiny_checkpoint, "--batch", "1,4")
        run = run_command(*command, "--output", tmp_path / name / "artifact", cwd=tmp_path / name)
        assert run.returncode == 0, run.stderr
    for file in FILES:
        first, second = ((tmp_path / name / "artifact" / file).read_bytes() for name in ("first", "second"))
        assert first == second, file


def test_a_second_export_in_one_process_differs_in_the_name_of_torchs_class_alone(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    again = export("tiny-vit", weights=str(tiny_checkpoint), batch=(1, 4), output=tmp_path / "again")
    for file in FILES - {"model.ts", "manifest.json"}:
        assert (again / file).read_bytes() == (tiny_artifact / file).read_bytes(), file
    first, second = (open_artifact(folder).manifest for folder in (tiny_artifact, again))
    assert first.provenance.weights == second.provenance.weights


def test_formats_may_be_frozen_alone(tmp_path: Path) -> None:
    script = export("tiny-vit", weights="random:0", formats=("torchscript",), output=tmp_path / "script")
    assert {path.name for path in script.iterdir()} == {"manifest.json", "model.ts", "reference.safetensors"}
    graph = export("tiny-vit", weights="random:0", formats=("onnx",), batch=(2,), output=tmp_path / "graph")
    assert {path.name for path in graph.iterdir()} == {
        "manifest.json",
        "model.b2.onnx",
        "weights.onnx.data",
        "reference.safetensors",
    }


def test_the_first_batch_size_given_is_the_forward(tmp_path: Path) -> None:
    output = export("tiny-vit", weights="random:0", formats=("torchscript",), batch=(4, 1), output=tmp_path / "out")
    assert [p.batch for p in open_artifact(output).manifest.programs] == [4, 1]


HALF_PRECISIONS = [
    pytest.param("fp16", ("torchscript", "onnx"), 1e-2, id="fp16"),
    pytest.param("bf16", ("torchscript",), 1e-1, id="bf16"),
]


@pytest.mark.parametrize(("precision", "formats", "near"), HALF_PRECISIONS)
def test_an_export_in_half_precision_halves_the_weights_and_agrees_with_eager(
    precision: str,
    formats: tuple[str, ...],
    near: float,
    tiny_artifact: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    output = export(
        "tiny-vit",
        weights=str(tiny_checkpoint),
        batch=(1, 4),
        precision=precision,
        formats=formats,
        output=tmp_path / "out",
    )
    artifact, full = open_artifact(output), open_artifact(tiny_artifact)
    assert artifact.manifest.precision == precision
    assert artifact.manifest.formats() == formats
    limits, full_limits = (
        {t.name: t.limit for t in m.tolerances_on("cpu")} for m in (artifact.manifest, full.manifest)
    )
    assert all(limits[name] > 100 * full_limits[name] for name in full_limits)
    assert artifact.manifest.outputs == full.manifest.outputs
    assert artifact.manifest.provenance.weights == full.manifest.provenance.weights
    weights = 2 * tiny.TINY.published.parameters
    for name in {"model.ts", "weights.onnx.data"} & {path.name for path in output.iterdir()}:
        nbytes = (output / name).stat().st_size
        assert 0.95 * weights < nbytes < 0.55 * (tiny_artifact / name).stat().st_size
    artifact.check_files()
    images = seeded_images((7, 8, 9, 10), (3, 32, 32))
    with npu_runtime.load(output, backend="eager") as eager, npu_runtime.load(tiny_artifact, backend="eager") as fp32:
        expected, unrounded = eager.run(images), fp32.run(images)
    for format in formats:
        backend = backend_name(format)
        rows = list(measure_parity(artifact, backend=backend))
        assert {(row.batches[0], output.output, output.passed) for row in rows for output in row.whole_outputs} == {
            (batch, name, True) for batch in (1, 4) for name in ("embedding", "tokens")
        }
        with npu_runtime.load(output, backend=backend) as encoder:
            got = encoder.run(images)
        for name, array in got.items():
            assert array.dtype == expected[name].dtype == np.float32
            assert np.abs(array - expected[name]).max() <= (0 if format == "torchscript" else near)
            assert 1e-4 < np.abs(array - unrounded[name]).max() < near


@pytest.mark.parametrize(("precision", "formats", "near"), HALF_PRECISIONS)
def test_a_program_of_half_precision_that_differs_fails_parity_and_leaves_nothing(
    precision: str, formats: tuple[str, ...], near: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with changed_before_the_freezing(on_network(swap_blocks), monkeypatch), pytest.raises(ParityError):
        export("tiny-vit", weights="random:0", precision=precision, formats=formats, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class MeanOfPatches(ClsAndTokens):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, tokens = super().forward(pixel_values)
        return tokens[:, 1:].mean(dim=1), tokens


def _mean_for_cls(module: nn.Module) -> None:
    module.__class__ = MeanOfPatches


class RowsMixed(ClsAndTokens):
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding, tokens = super().forward(pixel_values)
        return embedding.flip(0), tokens.flip(0)


def _mix_rows(module: nn.Module) -> None:
    module.__class__ = RowsMixed


@pytest.mark.parametrize(
    "change",
    [*(on_network(mutation) for mutation in MUTATIONS["vit"]), _mean_for_cls, _mix_rows],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_program_that_differs_from_the_reference_fails_parity_and_leaves_nothing(
    change: Callable[[Any], None], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        changed_before_the_freezing(change, monkeypatch),
        pytest.raises(ParityError, match="differs from the eager reference") as raised,
    ):
        export("tiny-vit", weights=str(tiny_checkpoint), batch=(2,), output=tmp_path / "out")
    assert raised.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    failures = str(raised.value.got)
    for backend in ("torchscript", "onnx"):
        assert f"{backend} batch 2 embedding max_abs_error" in failures.replace("onnxruntime", "onnx")


def test_a_change_that_changes_nothing_passes_parity(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with changed_before_the_freezing(lambda module: None, monkeypatch):
        assert export("tiny-vit", weights=str(tiny_checkpoint), output=tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "holds NaN or infinite weights"),
        (float("inf"), "holds NaN or infinite weights"),
        (3e38, "own output (embedding|tokens) holds NaN or infinity"),
    ],
)
def test_weights_that_give_no_numbers_are_refused_and_leave_nothing(
    value: float, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    state = load_file(tiny_checkpoint / "model.safetensors")
    state["vit.encoder.layer.1.output.dense.weight"][3, 5] = value
    save_file(state, tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=message):
        export("tiny-vit", weights=str(tmp_path / "damaged"), output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("arguments", "message", "said"),
    [
        ({"model": "tiny-vitt"}, "unknown encoder 'tiny-vitt'", "did you mean tiny-vit?"),
        ({"model": "resnet"}, "unknown encoder", "--list"),
        ({"model": ""}, "unknown encoder", "--list"),
        ({"formats": ("om",)}, "unknown format", "torchscript, onnx"),
        ({"formats": ()}, "no format was given", "torchscript, onnx"),
        ({"precision": "fp64"}, "unknown precision", "fp32"),
        ({"layout": "meta"}, "unknown layout", "auto, hf, timm, jax"),
        ({"batch": ()}, "wrong batch sizes", "none"),
        ({"batch": (0,)}, "wrong batch sizes", "got:      0"),
        ({"batch": (-1,)}, "wrong batch sizes", "got:      -1"),
        ({"batch": (1, 4, 1)}, "wrong batch sizes", "1,4,1"),
        ({"batch": (1025,)}, "wrong batch sizes", "from 1 to 1024"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_the_choices(
    arguments: dict[str, Any], message: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        export(**{"model": "tiny-vit", "weights": "random:0", "output": tmp_path / "out", **arguments})
    assert said in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tiny-vit", "tests/tiny-vit", "tiny-vit-for-tests"])
def test_an_encoder_is_known_by_its_name_hub_id_and_aliases(name: str) -> None:
    assert npu_export.plan.make_request(name).encoder == tiny.TINY


@pytest.mark.parametrize("batch", [(1,), (1024,), (8, 4, 1)])
def test_batch_sizes_that_fit_are_kept_in_order(batch: tuple[int, ...]) -> None:
    assert npu_export.plan.make_request("tiny-vit", batch=batch).batches == batch


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "tiny-vit-fp32"),
        ({"precision": "bf16"}, "tiny-vit-bf16"),
        ({"image_size": 32}, "tiny-vit-fp32"),
        ({"image_size": 48, "precision": "fp16"}, "tiny-vit-48-fp16"),
    ],
)
def test_without_output_the_artifact_is_named_for_encoder_size_and_precision(
    arguments: dict[str, Any], name: str
) -> None:
    assert npu_export.plan.make_request("tiny-vit", **arguments).output == Path(name)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(-8, 8), (0, 8), (1, 8), (7, 8), (30, 32), (33, 32), (4095, 4096), (4097, 4096), (4104, 4096), (10**9, 4096)],
)
def test_an_image_size_that_the_network_does_not_take_is_refused_with_the_nearest(size: int, nearest: int) -> None:
    with pytest.raises(UsageError, match="takes no images of this size") as raised:
        npu_export.plan.make_request("tiny-vit", image_size=size)
    assert raised.value.expected == "a multiple of 8 pixels up to 4096"
    assert raised.value.hint == f"the nearest is {nearest}"
    assert npu_export.plan.make_request("tiny-vit", image_size=nearest).encoder.image_size == nearest


def test_an_opset_that_torch_does_not_honour_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Error, match="another opset"):
        export("tiny-vit", weights="random:0", formats=("onnx",), opset=16, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that looks for weights."""
    monkeypatch.setattr(npu_export.plan, "find_weights", lambda *_: pytest.fail("looked for weights"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("formats", [("onnx",), ("torchscript", "onnx")])
def test_an_onnx_export_in_bf16_is_refused_with_advice_before_anything_heavy(
    formats: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match="an ONNX export in bf16 could not be checked here") as raised:
        export("tiny-vit", precision="bf16", formats=formats, output=tmp_path / "out")
    assert raised.value.exit_code == 4
    assert "MatMul" in str(raised.value.got)
    assert "--format torchscript" in str(raised.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
def test_an_output_that_exists_is_refused_before_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="the output exists"):
        export("tiny-vit", output=tmp_path / "out")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_is_no_artifact_is_never_replaced(force: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UsageError, match="the output exists"):
        export("tiny-vit", output=tmp_path / "out", force=force)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "irreplaceable"


def test_force_replaces_an_artifact(artifact_copy: Path) -> None:
    export("tiny-vit", weights="random:1", formats=("onnx",), output=artifact_copy, force=True)
    assert open_artifact(artifact_copy).manifest.provenance.weights.random_seed == 1
    assert "model.ts" not in {path.name for path in artifact_copy.iterdir()}


def test_a_failed_export_keeps_the_artifact_that_it_would_have_replaced(
    artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in artifact_copy.iterdir()}
    with changed_before_the_freezing(on_network(swap_blocks), monkeypatch), pytest.raises(ParityError):
        export("tiny-vit", weights="random:1", output=artifact_copy, force=True)
    assert {path.name: path.read_bytes() for path in artifact_copy.iterdir()} == before
    assert list(artifact_copy.parent.iterdir()) == [artifact_copy]


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    needed = 2 * 4 * tiny.TINY.published.parameters + pipeline.DISK_MARGIN_NBYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    with pytest.raises(Error, match="too little room") as raised:
        export("tiny-vit", weights="random:0", output=tmp_path / "a" / "out")
    assert raised.value.where == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed + (1 << 20)))
    assert export("tiny-vit", weights="random:0", output=tmp_path / "a" / "out").is_dir()


def test_planned_weights_in_half_precision_take_half_the_bytes(tmp_path: Path) -> None:
    sizes = {
        precision: npu_export.plan.plan_export(
            npu_export.plan.make_request("tiny-vit", precision=precision, formats=formats, output=tmp_path / "out"),
            "random:0",
        ).sizes()
        for precision, formats in (("fp32", FORMATS), ("fp16", FORMATS), ("bf16", ("torchscript",)))
    }
    weights = 4 * tiny.TINY.published.parameters
    assert (sizes["fp32"]["model.ts"], sizes["fp32"]["weights.onnx.data"]) == (weights, weights)
    assert (sizes["fp16"]["model.ts"], sizes["fp16"]["weights.onnx.data"]) == (weights // 2, weights // 2)
    assert sizes["bf16"]["model.ts"] == weights // 2
    assert len({nbytes["reference.safetensors"] for nbytes in sizes.values()}) == 1


def test_the_planned_sizes_are_about_those_of_the_files(tiny_artifact: Path, tmp_path: Path) -> None:
    request = npu_export.plan.make_request("tiny-vit", output=tmp_path / "out")
    sizes = npu_export.plan.plan_export(request, "random:0").sizes()
    assert set(sizes) == {"model.ts", "weights.onnx.data", "reference.safetensors"}
    for name, nbytes in sizes.items():
        assert nbytes <= (tiny_artifact / name).stat().st_size + 4096
        assert (tiny_artifact / name).stat().st_size < nbytes + (256 << 10)


def test_a_file_that_torch_cannot_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch.jit, "save", failing)
    with pytest.raises(Error, match="could not be written"):
        export("tiny-vit", weights="random:0", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_whoever_watches_is_told_of_each_step(tmp_path: Path) -> None:
    watch = Watching()
    export("tiny-vit", weights="random:0", output=tmp_path / "out", steps=watch)
    rewrites = "rewrites: separate_heads 2, order_gelu 2"
    assert f"opset 18, fixed shapes, fp32, no float64; {rewrites}" in watch.details
    assert watch.steps[0] == "find the weights and plan the keys"
    assert {"load the weights", "record the reference"} < set(watch.steps)
    assert "random:0: 38 of 38 keys are those of layout hf (the hub's file, with or without `vit.`)" in watch.details


def test_the_manifest_is_json_that_names_its_schema(tiny_artifact: Path) -> None:
    document = json.loads((tiny_artifact / "manifest.json").read_text("utf-8"))
    assert document["schema"] == f"{SCHEMA_MAJOR}.{SCHEMA_MINOR}"


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no switch for the CPU")
def test_the_reference_is_computed_in_float32_whatever_the_process_asked_torch_for(tmp_path: Path) -> None:
    """In a process of its own, in which no encoder is open."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
import tiny, torch, npu_export
tiny.register()
switch = torch.backends.mkldnn.matmul
switch.fp32_precision = "bf16"
npu_export.export("tiny-vit", weights="random:1", formats=("torchscript",), output=sys.argv[1])
assert switch.fp32_precision == "bf16"
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numerics = open_artifact(tmp_path / "a").manifest.reference.numerics
    assert numerics["numerics"] == "strict"
    assert numerics["torch.backends.mkldnn.matmul.fp32_precision"] == "ieee"
