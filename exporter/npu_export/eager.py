"""The eager network as a backend, rebuilt from the checkpoint that the manifest records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from npu_export.encoders import find_encoder
from npu_export.errors import CheckpointError
from npu_export.network import load_network, plan_weights, state_sha256
from npu_export.precision import in_precision
from npu_export.weights import find_weights
from npu_runtime.artifact.store import Artifact, Images
from npu_runtime.backends.base import Array, Options, missing_package
from npu_runtime.backends.torch_session import Call, TorchSession, open_torch_session
from npu_runtime.devices import Device
from npu_runtime.devices.ambient import torch_defaults, without_autocast
from npu_runtime.devices.torch_import import import_torch
from npu_runtime.errors import WeightsError
from npu_runtime.torch_interop import array_from_tensor, tensor_from_array

if TYPE_CHECKING:
    from torch import nn


class EagerBackend:
    format = None
    replays_graphs = True

    def open(self, artifact: Artifact, device: Device, options: Options) -> TorchSession:
        """The unmodified network in the artifact's precision, with the very weights that were exported.

        Raises CheckpointError when the checkpoint cannot be used, WeightsError when its tensors are others than
        those exported.
        """
        try:
            import_torch()
        except ImportError as error:
            raise missing_package("torch", "export", "eager") from error

        def open_network(device: Device, batches: Sequence[int]) -> Mapping[int, Call]:
            module = _rebuild(artifact, options.weights)
            if device.kind != "cpu":
                module = module.to(str(device))
            return dict.fromkeys(batches, module)

        return open_torch_session(artifact, device, options, open_network)


@torch_defaults()
def _rebuild(artifact: Artifact, weights: str | None) -> nn.Module:
    """The network that the artifact was frozen from, its state as recorded."""
    from npu_export.normalisation import with_input

    manifest = artifact.manifest
    recorded = manifest.provenance.weights
    encoder = find_encoder(manifest.encoder)
    image_size = manifest.preprocessing.size[0]
    if image_size != encoder.image_size:
        encoder = encoder.at_size(image_size)
    source = weights or recorded.source
    try:
        checkpoint = find_weights(encoder, source, recorded.layout)
        plan = plan_weights(encoder, checkpoint, recorded.layout, prefix=recorded.prefix, resample=True)
        network = load_network(plan)
    except CheckpointError as error:
        if weights is not None:
            raise
        raise CheckpointError(
            "the checkpoint that the manifest records cannot be used",
            where=error.where,
            expected=error.expected,
            got=f"{error.what}: {error.got}" if error.got else error.what,
            hint="say where it lies now with --weights",
        ) from error
    digest = state_sha256(network)
    if digest != recorded.state_sha256:
        raise WeightsError(
            "these are not the weights that the artifact was exported from",
            where=source,
            expected=f"state dict sha256 {recorded.state_sha256}",
            got=digest,
            hint="pass the original checkpoint with --weights, or export again",
        )
    module = in_precision(encoder.with_outputs(network), manifest.precision, manifest.keep_fp32)
    return with_input(module, manifest.inputs[0].dtype, manifest.preprocessing)


def run_eager(module: nn.Module, pixel_values: Images) -> list[Array]:
    """All outputs of a module on the CPU, in its order."""
    import torch

    with torch.inference_mode(), without_autocast("cpu"):
        return [array_from_tensor(tensor) for tensor in module(tensor_from_array(pixel_values))]
