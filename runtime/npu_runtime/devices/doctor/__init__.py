"""What this machine can run, and what to do about the rest.

`check` is what one look gives, `machine` what the looks share; `packages`, `ascend`, `variables` and `visible` look.
Nothing is written and no setting is changed; a package that does not import is a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from npu_runtime.devices.device import Device
from npu_runtime.devices.doctor import ascend, packages, variables, visible
from npu_runtime.devices.doctor.check import Check
from npu_runtime.devices.doctor.machine import Machine
from npu_runtime.devices.probe import Probe

__all__ = ["Check", "Findings", "Machine", "examine"]

GROUPS: dict[str, tuple[Callable[[Machine], Iterable[Check]], ...]] = {
    "packages": (
        packages.check_python,
        packages.check_torch,
        packages.check_torch_build,
        packages.check_torch_npu,
        ascend.check_cann,
        packages.check_onnxruntime,
        packages.check_numpy,
        packages.check_torchvision,
        packages.check_exporter,
    ),
    "devices": (ascend.check_driver, ascend.check_npu_smi, ascend.check_soc, visible.check_visible),
    "environment": (variables.check_variables,),
}
"""Group -> what is looked at in it, in the order in which it is told."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found on a machine."""

    checks: dict[str, tuple[Check, ...]]
    """By group."""
    probes: dict[str, Probe]
    """By device: the CPU, every other device that is seen, the first of a kind of which none is, and the one that
    was asked for."""


def examine(machine: Machine, asked: Device | None = None) -> Findings:
    """Look at everything. What is absent or broken is told and never raised."""
    checks = {group: [check for look in looks for check in look(machine)] for group, looks in GROUPS.items()}
    probes = visible.probe_devices(machine, asked)
    checks["devices"] += visible.check_devices(machine, probes, asked)
    return Findings({group: tuple(found) for group, found in checks.items()}, probes)
