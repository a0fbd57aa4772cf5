"""What a caller may have set in torch around a call, and contexts in which it does not count.

Autocast and the default device are a thread's, the default dtype is the process's; each changes in silence what
operators compute in, or where tensors are made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    """No autocast in this thread, for the CPU and a type of device; the caller's is on again afterwards.

    TorchScript optimises a program apart for each state of autocast, so what runs here is never the one that casts.
    """
    import torch

    types = [name for name in dict.fromkeys(("cpu", device_type)) if torch.is_autocast_enabled(name)]
    for name in types:
        torch.set_autocast_enabled(name, False)
    try:
        yield
    finally:
        for name in types:
            torch.set_autocast_enabled(name, True)


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Tensors are made on the CPU, in float32, and nothing is cast: as in a process that set nothing."""
    import torch

    dtype = torch.get_default_dtype()
    # Only where it is another: every call to torch passes through this context in Python.
    device = contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    torch.set_default_dtype(torch.float32)
    try:
        with without_autocast("cpu"), device:
            yield
    finally:
        torch.set_default_dtype(dtype)
