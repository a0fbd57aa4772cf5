"""A frozen program of half precision run without its rounding, so that the network in it is told from a wrong one.

Rounding to half precision hides faults smaller than itself: with massive channels two swapped projections of one layer
move the outputs of a right ViT-base in bf16 by half of what its rounding does. A copy of the program in float32, its
weights as the program has them, must give what the eager network gives with those weights in float32, within the limits
of float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npu_runtime.artifact.schema import Program, Tolerance
from npu_runtime.artifact.store import Array, Artifact, Images
from npu_runtime.errors import ParityError
from npu_runtime.parity.ladder import judge_outputs
from npu_runtime.parity.measure import Measurement, Outputs
from npu_runtime.steps import Steps

if TYPE_CHECKING:
    import torch

ROOTS = tuple(
    n**power for n, powers in ((2, (0.5, -0.5)), *((8 * k, (-0.25, -0.5)) for k in range(1, 65))) for power in powers
)
"""Constants that torch's exporter spells in the precision of the graph: GELU's root of 2, and the scales of attention
by the width of a head, on queries and keys or on their product. Rounded they are a tenth of a GELU by tanh off."""
Run = Callable[[Images], list[Array]]


def check_unrounded(artifact: Artifact, expected: Outputs, limits: tuple[Tolerance, ...], steps: Steps) -> None:
    """Run each format's program of the smallest batch size in float32 and compare it with the eager network.

    `expected` are the outputs of the first images of the reference, `limits` those of float32. Raises ParityError.
    """
    manifest = artifact.manifest
    inputs, reference = artifact.read_reference()
    count = len(next(iter(expected.values())))
    for format in manifest.formats():
        program = min(manifest.programs_for(format), key=lambda program: program.batch)
        with steps.step(f"check {format} without its rounding"):
            measurement = Measurement(manifest.outputs, reference)
            with tempfile.TemporaryDirectory(prefix="unrounded-", dir=artifact.path) as scratch:
                run = _WIDEN[format](artifact.path, program, Path(scratch))
                for index in range(count):
                    outputs = run(np.repeat(inputs[index : index + 1], program.batch, axis=0))
                    actual = {spec.name: array[:1] for spec, array in zip(manifest.outputs, outputs)}
                    measurement.add(actual, {name: array[index : index + 1] for name, array in expected.items()})
                del run
            results = measurement.results(limits)
            status, reason = judge_outputs(results)
            worst = max(result.metrics.max_scaled_rmse or 0.0 for result in results)
            steps.detail(f"{worst:.1e} of each channel from the eager network")
        if status != "passed":
            raise ParityError(
                "a frozen program is another network than the eager one, even without its rounding",
                where=f"{manifest.encoder}, {format} batch {program.batch}",
                expected="every metric within the limit of float32",
                got=reason,
                hint="nothing was kept; this is a fault of the export or of a library, please report it",
            )


def _widen_torchscript(folder: Path, program: Program, scratch: Path) -> Run:
    """The program's graph with constants of half precision, and casts to it, made float32."""
    import torch

    from npu_export.lint import argument_names
    from npu_export.torchscript import nodes_of
    from npu_runtime.backends.torchscript import find_entry_point, open_file
    from npu_runtime.devices import CPU
    from npu_runtime.devices.ambient import without_autocast
    from npu_runtime.torch_interop import array_from_tensor, tensor_from_array

    path = folder / program.file
    graph: Any = find_entry_point(open_file(path, CPU), program, path).graph
    halves = (torch.float16, torch.bfloat16)
    numbers = {_number_of(dtype) for dtype in halves}
    for node in list(nodes_of(graph)):
        if node.kind() == "prim::Constant":
            value = node.output().toIValue()
            if isinstance(value, torch.Tensor) and value.dtype in halves:
                node.t_("value", value.float())
            continue
        schema = node.schema()
        names = () if schema == "(no schema)" else argument_names(schema)
        for place, (name, given) in enumerate(zip(names, list(node.inputs()))):
            constant: Any = given.toIValue() if given.node().kind() == "prim::Constant" else None
            if name == "dtype" and constant in numbers:
                wide = graph.insertConstant(_number_of(torch.float32))
                wide.node().moveBefore(node)
                node.replaceInput(place, wide)
    for value in [*graph.inputs(), *(output for node in nodes_of(graph) for output in node.outputs())]:
        if value.type().kind() == "TensorType":
            value.setType(torch._C.TensorType.get())  # types recorded by tracing name the old dtype

    graph = graph.copy()
    graph.eraseInput(0)  # the module, of which a frozen program reads nothing
    function = torch._C._create_function_from_graph("unrounded", graph)

    def run(pixel_values: Images) -> list[Array]:
        plain = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        with torch.inference_mode(), plain, without_autocast("cpu"):
            return [array_from_tensor(tensor) for tensor in function(tensor_from_array(pixel_values))]

    return run


def _number_of(dtype: torch.dtype) -> int:
    """How a TorchScript program spells a dtype (c10/core/ScalarType.h)."""
    import torch

    return {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}[dtype]


def _widen_onnx(folder: Path, program: Program, scratch: Path) -> Run:
    """The program's graph with initializers, constants and casts of half precision made float32."""
    import onnx_ir as ir
    import onnxruntime

    model = ir.load(folder / program.file)
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for value in model.graph.initializers.values():
        value.const_value = _as_float32(value.const_value)
        if value.dtype in halves:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if node.op_type == "Cast" and name == "to" and attribute.as_int() in halves:
                node.attributes[name] = ir.AttrInt64("to", ir.DataType.FLOAT)
            elif attribute.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.AttrTensor(name, _as_float32(attribute.as_tensor()))
        for value in node.outputs:
            if value.dtype in halves:
                value.dtype = ir.DataType.FLOAT
    wide = scratch / "unrounded.onnx"
    ir.save(model, wide, external_data="unrounded.onnx.data")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(wide, options, providers=["CPUExecutionProvider"])

    def run(pixel_values: Images) -> list[Array]:
        given = {session.get_inputs()[0].name: pixel_values}
        outputs: list[Array] = session.run(None, given)
        return outputs

    return run


def _as_float32(tensor: Any) -> Any:
    """A tensor of half precision as float32, converted when it is read; any other as it is."""
    import onnx_ir as ir

    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return tensor
    if tensor.size == 1:
        value = tensor.numpy()
        exact = next((root for root in ROOTS if value.dtype.type(root) == value), float(value.item()))
        return ir.tensor(np.full(value.shape, exact, np.float32), name=tensor.name)
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)), ir.DataType.FLOAT, tensor.shape, name=tensor.name
    )


_WIDEN: Mapping[str, Callable[[Path, Program, Path], Run]] = {"torchscript": _widen_torchscript, "onnx": _widen_onnx}
