"""A stand-in for torch-npu that computes on the CPU and refuses what an Ascend 910B4 refuses.

torch imports it by itself, as it does the real one, where `simulated_npu.build` put it on the path. Variables
choose what it is like. They are read once, most of them at the import; that of captures at each, as is
TASK_QUEUE_ENABLE, with which at 2 no capture begins:

SIMULATED_NPU_COUNT                devices, 2 by default; with 0 none is available
SIMULATED_NPU_MISSING              operators without a kernel, as in `aten::gelu,aten::add.Tensor`; a name without an
                                   overload stands for all of them, in place and `out` included
SIMULATED_NPU_COMPATIBLE_IMPL=0    there is no `use_compatible_impl`
SIMULATED_NPU_CAPTURE=fail         graphs are refused after a few operators
SIMULATED_NPU_IMPORT=no-cann       importing raises ImportError as without CANN
SIMULATED_NPU_IMPORT=no-cann-exit  importing prints a traceback and exits
SIMULATED_NPU_IMPORT=cuda          importing raises as beside a CUDA build of torch
SIMULATED_NPU_LOG=FILE             events, a line each in their order, are added to this file: `init`,
                                   `use_compatible_impl True`, `conv.allow_hf32 False`, `matmul.allow_hf32 False`,
                                   `allow_internal_format False`, `jit_compile False`, `gelu exact` or `gelu tanh`
                                   (at the first), `conv hf32`, `fp32`, `fp16` or `bf16` (at each), `capture`,
                                   `replay`, `fallback aten::lgamma.out` (at each), `empty_cache`
SIMULATED_NPU_LIBRARY=FILE         the library to load instead of the one beside this file

`torch.ops.simulated_npu.nbytes_copied_in()` counts the bytes that came from the host.

Memory that nothing was written to holds NaN, and a tensor of float64 becomes one of float32 with a warning.
"""

import os

# torch would import this package while this package imports torch.
_autoload_before = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch  # noqa: E402

if _autoload_before is None:
    del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
else:
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoload_before

from torch_npu import _import_failures  # noqa: E402

_import_failures.raise_chosen()
torch.ops.load_library(os.environ.get("SIMULATED_NPU_LIBRARY") or f"{os.path.dirname(__file__)}/libsimulated_npu.so")

for _name in filter(None, os.environ.get("SIMULATED_NPU_MISSING", "").split(",")):
    if not torch._C._jit_get_schemas_for_operator(_name.split(".")[0]):
        raise ValueError(f"SIMULATED_NPU_MISSING: torch has no operator {_name!r}")

from torch_npu import npu  # noqa: E402
from torch_npu.version import __version__  # noqa: E402

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()

__all__ = ["__version__", "npu"]


def _autoload() -> None:
    """What torch calls once it has imported the package."""
