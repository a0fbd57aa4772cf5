"""How devices are spelled, and what differs between their kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from npu_runtime.errors import UsageError

_SPELLING = re.compile(r"(cpu)|(cuda|npu)(?::(\d+))?")


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between kinds of device; torch.npu mirrors torch.cuda in everything else."""

    name: str
    dispatch_key: str
    """torch's name for the kernels of this kind; torch-npu's are those of its PrivateUse1."""
    graph_class: str | None
    """The class of torch's module for it that captures and replays; None where there is none."""
    visible_variable: str | None
    """The environment variable that selects devices."""
    provider: str
    """ONNX Runtime's execution provider."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("cpu", "CPU", None, None, "CPUExecutionProvider"),
        Kind("cuda", "CUDA", "CUDAGraph", "CUDA_VISIBLE_DEVICES", "CUDAExecutionProvider"),
        Kind("npu", "PrivateUse1", "NPUGraph", "ASCEND_RT_VISIBLE_DEVICES", "CANNExecutionProvider"),
    )
}


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device and which one of it."""

    kind: str
    index: int | None
    """None for the CPU, which is one."""

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"

    @property
    def traits(self) -> Kind:
        return KINDS[self.kind]


CPU = Device("cpu", None)


def parse_device(text: str) -> Device:
    """`cpu`, `cuda`, `cuda:N`, `npu` or `npu:N`; raises UsageError for anything else."""
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise UsageError("unknown device", expected="cpu, cuda:N or npu:N", got=repr(text))
    cpu, kind, index = match.groups()
    return CPU if cpu else Device(kind, int(index or 0))
