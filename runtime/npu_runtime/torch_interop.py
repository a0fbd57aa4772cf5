"""What the backends that run on torch share: arrays and tensors, threads, warnings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npu_runtime.artifact.staging import require_room
from npu_runtime.errors import Error, first_line

if TYPE_CHECKING:
    import torch

OVERHEAD_NBYTES = 8 << 20
"""More than code, debug records and padding of a TorchScript file take beside the weights."""

Array = npt.NDArray[np.float32]


def tensor_from_array(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor over the array's memory; over a copy where the array is read-only, which torch cannot share."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else array.copy())


def array_from_tensor(tensor: torch.Tensor) -> Array:
    """A C-contiguous array that holds on to no more memory than it shows.

    An output may be a view of a larger one (the CLS row of all tokens); that one is copied.
    """
    array: Array = tensor.numpy()
    return array if array.flags.c_contiguous and tensor.untyped_storage().nbytes() == array.nbytes else array.copy()


def set_threads(threads: int | None, cores: int) -> None:
    """Set torch's threads for one operator, which is a setting of the whole process.

    None leaves them as torch or the user set them, unless they are more than the `cores` that it may use: torch
    heeds OMP_NUM_THREADS and the affinity, and no cgroup's quota.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    elif torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def write_torchscript(program: torch.jit.ScriptModule, path: Path, weights_nbytes: int) -> None:
    """Save the program so that plain `torch.jit.load` opens it.

    Raises OSError where the disk has no room for it, and Error where torch could not write it.
    """
    import torch

    # torch's own writer does not raise on a full disk: its destructor throws, which ends the process
    # (PyTorchStreamWriter in caffe2/serialize/inline_container.cc). Needless when it raises.
    require_room(path, weights_nbytes + OVERHEAD_NBYTES)
    try:
        with without_jit_deprecation():
            torch.jit.save(program, str(path))
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise Error("the TorchScript file could not be written", where=path, got=first_line(error)) from error


@contextlib.contextmanager
def without_jit_deprecation() -> Iterator[None]:
    """torch deprecates torch.jit in favour of torch.export, whose programs torch-npu does not load."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", category)
        yield
