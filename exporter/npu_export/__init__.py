"""Turn published weights of a vision encoder into a frozen artifact whose parity was checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npu_runtime import __version__ as __version__

if TYPE_CHECKING:
    from npu_export.pipeline import export as export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    """`export`, imported when it is first asked for, so that `--help` does not wait for torch."""
    if name == "export":
        from npu_export.pipeline import export

        return export
    raise AttributeError(name)
