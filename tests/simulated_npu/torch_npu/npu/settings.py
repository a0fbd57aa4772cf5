"""What programs set about the device, and the log of it."""

from __future__ import annotations

import torch

_simulated = torch.ops.simulated_npu


class _AllowHf32:
    """Its one attribute, `allow_hf32`, is a setting of the process; torch-npu ignores others, as this does."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> bool | None:
        return getattr(_simulated, f"{self._name}_hf32")() if name == "allow_hf32" else None

    def __setattr__(self, name: str, value: bool) -> None:
        if name == "allow_hf32":
            getattr(_simulated, f"set_{self._name}_hf32")(value)
            _simulated.log(f"{self._name}.allow_hf32 {bool(value)}")


conv = _AllowHf32("conv")
matmul = _AllowHf32("matmul")


class _Config:
    """`allow_internal_format` can be set and not be read, as in torch-npu."""

    def __setattr__(self, name: str, value: bool) -> None:
        if name == "allow_internal_format":
            _simulated.log(f"allow_internal_format {bool(value)}")


config = _Config()


def set_compile_mode(jit_compile: bool = False) -> None:
    _simulated.log(f"jit_compile {bool(jit_compile)}")


def use_compatible_impl(is_enable: bool) -> None:
    """The exact gelu for all of the process, if this comes before its first."""
    _simulated.set_compatible_impl(is_enable)
    _simulated.log(f"use_compatible_impl {bool(is_enable)}")


def are_compatible_impl_enabled() -> bool:
    return _simulated.compatible_impl()
