"""Small ONNX graphs in ONNX's text syntax, what ONNX Runtime computes for them, and the same rewritten."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from npu_export.onnx_rewrites import rewrite_for_onnxruntime

INDICES = {"zero": [0], "one": [1], "two": [2], "three": [3], "last": [-1], "end": [2**63 - 1]}


@dataclass(frozen=True)
class Graph:
    """The nodes, what they read and make, and the constants; those that callers may replace are inputs too."""

    nodes: str
    inputs: str
    outputs: str
    constants: Mapping[str, object] = field(default_factory=dict)
    opset: int = 18
    unknown: Sequence[str] = ()
    """Values whose shapes the graph does not tell."""
    feeds: Mapping[str, np.ndarray] = field(default_factory=dict)
    """In place of random numbers."""

    def model(self) -> onnx.ModelProto:
        """With the shapes that ONNX infers, accepted by onnx.checker."""
        domains = ', "other" : 1' if "other." in self.nodes else ""
        text = f'<ir_version: 8, opset_import: ["" : {self.opset}{domains}]> g ({self.inputs}) => ({self.outputs})'
        model = onnx.parser.parse_model(f"{text} {{ {self.nodes} }}")
        for name, content in {**INDICES, **self.constants}.items():
            if content is not None and re.search(rf"\b{name}\b", self.nodes):
                array = np.array(content, np.int64) if isinstance(content, list) else np.asarray(content)
                model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        for value in [value for value in model.graph.value_info if value.name in self.unknown]:
            model.graph.value_info.remove(value)
        onnx.checker.check_model(model, full_check=True)
        return model

    def rewritten(self) -> tuple[onnx.ModelProto, dict[str, int]]:
        """The model after every rewrite, accepted by onnx.checker, and what was applied."""
        model = ir.from_proto(self.model())
        applied = rewrite_for_onnxruntime(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        return proto, applied

    def unchanged(self) -> onnx.ModelProto:
        """The model read and written without a rewrite."""
        return ir.to_proto(ir.from_proto(self.model()))

    def run(self, model: onnx.ModelProto) -> list[np.ndarray]:
        """What ONNX Runtime computes on the CPU, node by node."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        generator, feeds = np.random.default_rng(5), dict(self.feeds)
        constants = {tensor.name for tensor in model.graph.initializer}
        for value in self.model().graph.input:
            if value.name not in {*feeds, *constants}:
                tensor = value.type.tensor_type
                sizes = [dim.dim_value or 3 for dim in tensor.shape.dim]
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
                feeds[value.name] = np.asarray(generator.standard_normal(sizes) * 2).astype(dtype)
        return [np.asarray(output) for output in session.run(None, feeds)]


def random(*sizes: int, dtype: type[np.generic] = np.float32) -> np.ndarray:
    """Weights, the same for the same sizes."""
    return np.random.default_rng(sum(sizes)).standard_normal(sizes).astype(dtype)
