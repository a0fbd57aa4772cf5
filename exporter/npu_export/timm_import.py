"""Import timm where PyPI's torchvision does not fit the torch beside it.

timm imports torchvision. On x86, PyPI's torchvision is a CUDA build, and beside a CPU torch its import
dies with `RuntimeError: operator torchvision::nms does not exist`, because the compiled operators that
its registrations name did not load. Encoders use none of them: declaring the two schemas that are named
lets the import succeed. This can go when torchvision imports without its operators.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

from npu_runtime.errors import UnavailableError

_SYMPTOM = "operator torchvision::nms does not exist"


@functools.cache
def import_timm() -> ModuleType:
    """The package timm. Raises UnavailableError, with the reason, when it does not import."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise _unavailable(error) from error
    except RuntimeError as error:
        if _SYMPTOM not in str(error):
            raise _unavailable(error) from error
    _forget("timm", "torchvision")
    declare_torchvision_operators()
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise _unavailable(error) from error


@functools.cache
def declare_torchvision_operators() -> object:
    """Declare the schemas of torchvision's missing operators; they last as long as what is returned."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _forget(*packages: str) -> None:
    """Drop what a failed import left half-initialised."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


def _unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(
        "timm does not import here",
        got=error,
        hint="pip install 'npu-export[export]'; torchvision must be the release made for this torch",
    )
