"""Graphs: a capture computes nothing, a replay computes all of it again into the same memory."""

from __future__ import annotations

import gc
import weakref
from types import TracebackType

import torch

from torch_npu.npu.streams import Stream, stream

_simulated = torch.ops.simulated_npu

_Pool = tuple[int, int]


class NPUGraph:
    """One capture and its replays. `reset` gives its memory back, as does letting go of it."""

    def __init__(self) -> None:
        self._id = _simulated.graph_create()
        weakref.finalize(self, _simulated.graph_destroy, self._id).atexit = False

    def capture_begin(self, pool: _Pool | None = None, capture_error_mode: str = "global") -> None:
        _simulated.graph_begin(self._id, 0 if pool is None else pool[1], capture_error_mode)

    def capture_end(self) -> None:
        _simulated.graph_end(self._id)

    def replay(self) -> None:
        _simulated.graph_replay(self._id)

    def reset(self) -> None:
        _simulated.graph_reset(self._id)

    def pool(self) -> _Pool:
        return (0, _simulated.graph_pool(self._id))


def graph_pool_handle() -> _Pool:
    """A pool that graphs may share. A replay spoils the outputs of the others in it."""
    return (0, _simulated.new_pool())


def is_current_stream_capturing() -> bool:
    return _simulated.is_capturing()


class GraphContext:
    """Captures what is issued meanwhile on a stream of its own, or the one given."""

    def __init__(
        self,
        npu_graph: NPUGraph,
        pool: _Pool | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> None:
        self._graph = npu_graph
        self._pool = pool
        self._stream = stream
        self._mode = capture_error_mode

    def __enter__(self) -> None:
        torch.npu.synchronize()
        gc.collect()
        torch.npu.empty_cache()
        self._on_stream = stream(self._stream or Stream())
        self._on_stream.__enter__()
        try:
            self._graph.capture_begin(self._pool, self._mode)
        except BaseException:
            self._on_stream.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._graph.capture_end()
        finally:
            self._on_stream.__exit__(None, None, None)


graph = GraphContext
