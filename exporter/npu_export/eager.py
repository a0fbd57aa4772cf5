"""The eager network as a backend, rebuilt from the checkpoint that the manifest records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from npu_export.encoders import find_encoder
from npu_export.encoders.spec import EncoderSpec
from npu_export.errors import CheckpointError
from npu_export.network import load_network, plan_weights, state_sha256
from npu_export.precision import in_precision
from npu_export.weights import find_weights
from npu_runtime.artifact.store import Artifact
from npu_runtime.backends.base import Array, Options, missing_package
from npu_runtime.devices import Device
from npu_runtime.errors import UnavailableError
from npu_runtime.torch_interop import array_from_tensor, set_threads, tensor_from_array

if TYPE_CHECKING:
    from torch import nn


class EagerBackend:
    format = None

    def open(self, artifact: Artifact, device: Device, options: Options) -> EagerSession:
        """The unmodified network on the CPU, in the artifact's precision, with the very weights that were exported.

        Raises CheckpointError when the checkpoint moved or its tensors are others than those exported.
        """
        if device.kind != "cpu":
            raise UnavailableError(f"the backend eager does not run on {device}", expected="device cpu")
        try:
            set_threads(options.threads)
        except ImportError as error:
            raise missing_package("torch", "export", "eager") from error
        recorded = artifact.manifest.provenance.weights
        manifest = artifact.manifest
        encoder = find_encoder(manifest.encoder)
        image_size = manifest.preprocessing.size[0]
        if image_size != encoder.image_size:
            encoder = encoder.at_size(image_size)
        source = options.weights or recorded.source
        try:
            checkpoint = find_weights(encoder, source, recorded.layout)
            plan = plan_weights(encoder, checkpoint, recorded.layout, prefix=recorded.prefix, resample=True)
            network = load_network(plan)
        except CheckpointError as error:
            if options.weights is not None:
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
            raise CheckpointError(
                "these are not the weights that the artifact was exported from",
                where=source,
                expected=f"state dict sha256 {recorded.state_sha256}",
                got=digest,
                hint="pass the original checkpoint with --weights, or export again",
            )
        return EagerSession(encoder, in_precision(encoder.with_outputs(network), manifest.precision))


class EagerSession:
    """The eager network; any batch size runs."""

    def __init__(self, encoder: EncoderSpec, module: nn.Module) -> None:
        self._module: nn.Module | None = module
        self._names = [output.name for output in encoder.outputs]

    def run(self, pixel_values: Array, outputs: Sequence[str]) -> list[Array]:
        results = run_eager(self._module, pixel_values)
        return [results[self._names.index(name)] for name in outputs]

    def close(self) -> None:
        self._module = None


def run_eager(module: nn.Module | None, pixel_values: Array) -> list[Array]:
    """All outputs of a module on the CPU, in its order."""
    import torch

    if module is None:
        raise ValueError("the session is closed")
    with torch.inference_mode():
        return [array_from_tensor(tensor) for tensor in module(tensor_from_array(pixel_values))]
