"""A server that speaks what the clients of Hugging Face and ModelScope ask for a file of a repository."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import save

from npu_export.checkpoint import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "tests/tiny-vit"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUGGING_FACE = re.compile(rf"/{REPOSITORY}/resolve/([^/]+)/(.+)")
MODELSCOPE = f"/api/v1/models/{REPOSITORY}/repo"


@dataclass
class Hub:
    """A repository with the revisions `main`, `master`, `v1` and COMMIT, all of one content."""

    files: dict[str, bytes]
    status: dict[str, int] = field(default_factory=dict)
    """What the server answers for a file in place of 200."""
    cut: set[str] = field(default_factory=set)
    """Files amid which the connection ends, whether asked for whole or from the middle."""
    requests: list[str] = field(default_factory=list)
    """Method, revision and file of each, and the range that was asked for; a dash and the path of others."""
    endpoint: str = ""
    stop: Callable[[], None] = lambda: None


@contextlib.contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A hub with these files, until it is stopped or the block ends."""
    hub = Hub(dict(files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()
        hub.stop = lambda: None

    hub.endpoint, hub.stop = f"http://127.0.0.1:{server.server_port}", stop
    try:
        yield hub
    finally:
        hub.stop()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            revision, name = _asked(self.path)
            hub.requests.append(" ".join((self.command, revision, name, self.headers.get("Range", ""))).strip())
            if revision == "-":
                return self._refuse(404, "RepoNotFound")
            if revision not in ("main", "master", "v1", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            if name in hub.status:
                return self._refuse(hub.status[name], None)
            if name not in hub.files:
                return self._refuse(404, "EntryNotFound")
            content = hub.files[name]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if body:
                self.wfile.write(content[start : len(content) // 2 if name in hub.cut else None])

        def _refuse(self, status: int, code: str | None) -> None:
            content = json.dumps({"Code": status, "Message": code, "Success": False}).encode()
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _asked(path: str) -> tuple[str, str]:
    """Revision and file that a path asks for; a dash and the path itself where it is none of the repository's."""
    if match := HUGGING_FACE.fullmatch(path):
        return match[1], match[2]
    parts = urlsplit(path)
    query = parse_qs(parts.query)
    return (query["Revision"][0], query["FilePath"][0]) if parts.path == MODELSCOPE else ("-", path)


def sharded(state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The files of a checkpoint in three shards and their index."""
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    parts = [dict(list(state.items())[number::3]) for number in range(3)]
    weight_map = {key: name for name, part in zip(names, parts) for key in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {INDEX: index, **{name: save(part) for name, part in zip(names, parts)}}


def assert_holds(checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]) -> None:
    """The checkpoint's tensors are these, bit for bit, and no others."""
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    with checkpoint.tensors() as read:
        for name, tensor in state.items():
            assert torch.equal(read(name), tensor), name
