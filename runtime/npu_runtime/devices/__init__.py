"""Devices that a program runs on. Everything else asks here.

`device` spells them and holds what differs between their kinds, `cores` counts those of the CPU that the process may
use, `probe` says whether a device can run programs and why not, `accelerator` drives one through torch, `numerics`
states how exact its arithmetic is, `ambient` keeps a caller's settings of torch out of it, `operators` finds what
would run on the CPU instead. Importing this package imports no torch.
"""

from npu_runtime.devices.cores import cpu_count
from npu_runtime.devices.device import CPU, Device, parse_device
from npu_runtime.devices.probe import require_device

__all__ = ["CPU", "Device", "cpu_count", "parse_device", "require_device"]
