"""Freeze a module to ONNX: one graph for each batch size over one shared weights file."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import torch
from torch import nn

from npu_export.onnx_rewrites import rewrite_for_onnxruntime
from npu_runtime.artifact.schema import TensorSpec
from npu_runtime.errors import Error

WEIGHTS_FILE = "weights.onnx.data"
ALIGNMENT = 4096
"""Offsets are multiples of a page, so that a tensor can be mapped by itself."""
INLINE_NBYTES = 1024
"""Smaller constants stay in the graph, where shape inference and compilers read them."""


def graph_file(batch: int) -> str:
    """Name of the graph for this batch size."""
    return f"model.b{batch}.onnx"


class WeightsFile:
    """The shared weights: each tensor's bytes are written once, whichever graphs name it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets: dict[bytes, int] = {}

    def add(self, data: bytes) -> int:
        """Offset of these bytes in the file, written if no equal bytes were."""
        key = hashlib.blake2b(data, digest_size=32).digest()
        if key not in self._offsets:
            self._file.seek(-self._file.tell() % ALIGNMENT, 1)
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._offsets[key]


def export_graph(
    module: nn.Module, pixel_values: TensorSpec, outputs: Sequence[TensorSpec], batch: int, opset: int
) -> tuple[ir.Model, dict[str, int]]:
    """The module as an ONNX graph of fixed shapes with named inputs and outputs, and how often each rewrite applied.

    Raises Error when torch's exporter gives another opset than the one asked for, which it does
    without an error for some.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            (torch.zeros(pixel_values.of_batch(batch), dtype=getattr(torch, pixel_values.dtype)),),
            dynamo=True,
            opset_version=opset,
            input_names=[pixel_values.name],
            output_names=[output.name for output in outputs],
            verbose=False,
            optimize=False,
        )
        if program is None:
            raise Error("torch.onnx.export gave no program", where=f"batch {batch}")
        weights = list(program.model.graph.initializers.values())
        program.optimize()
    model = program.model
    # onnxscript's rewrite rules hold on to the last graph they saw: let go of the weights that it lost.
    kept = {id(value) for value in model.graph.initializers.values()}
    for value in weights:
        if id(value) not in kept:
            value.const_value = None
    # torch names opsets of domains that no node uses; ATC refuses a second opset_import (E16005).
    used = {node.domain for node in model.graph.all_nodes()}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]
    if model.opset_imports != {"": opset}:
        raise Error(
            "the ONNX graph came out with another opset",
            where=f"batch {batch}",
            expected=f"ai.onnx {opset}",
            got=", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items()),
            hint="pass --opset 18, which torch's exporter writes for every encoder",
        )
    applied = rewrite_for_onnxruntime(model)
    _strip_metadata(model)
    return model, applied


def write_graph(model: ir.Model, weights: WeightsFile, path: Path) -> None:
    """Write the graph, its large tensors into `weights`, and have onnx.checker read it back with its types.

    The model's own tensors are replaced by references to the file beside `path`.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > INLINE_NBYTES:
            data = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                weights.add(data),
                len(data),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=path.parent,
            )
    ir.save(model, path)


def check_graph(path: Path) -> None:
    """Raise Error unless onnx.checker, with full shape inference, accepts the file and its weights."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Error("onnx.checker refuses the graph that was written", where=path, got=error) from error


def _strip_metadata(model: ir.Model) -> None:
    """Drop the stack traces that torch records, which name paths of this machine; keep module names."""
    for node in model.graph.all_nodes():
        namespace = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        node.doc_string = None
        if namespace is not None:
            node.metadata_props["namespace"] = namespace
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own deprecations and its notes on opset conversion: the opset is read back here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated", FutureWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
