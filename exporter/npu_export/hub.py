"""Find a published checkpoint in the Hugging Face cache or on the hub, through huggingface_hub."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from npu_export.checkpoint import CONFIG_FILE, PREPROCESSOR_FILE, WEIGHT_FILES, Checkpoint, open_checkpoint
from npu_export.errors import CheckpointError
from npu_runtime.errors import UnavailableError


def fetch_checkpoint(repository: str, revision: str | None = None) -> Checkpoint:
    """The weights of a hub repository, from the cache where they lie there, else from the hub.

    HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and the cache variables work as huggingface_hub defines them.
    Raises CheckpointError that says what was tried and how to pass a file.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            "looking for weights on the hub needs the package huggingface_hub",
            hint="pip install 'npu-export[export]', or pass a file with --weights",
        ) from error
    tried: list[str] = []
    for offline in (True, False):
        with contextlib.suppress(_NoAnswerError):
            file = _first(repository, WEIGHT_FILES, revision, offline, tried)
            if file is not None:
                for name in (CONFIG_FILE, PREPROCESSOR_FILE):
                    _first(repository, (name,), revision, offline, tried)
                # The cache keeps a snapshot under the commit that the revision named: that is what was read.
                return open_checkpoint(file, f"hf:{repository}@{file.parent.name}")
    raise CheckpointError(
        f"no weights of {repository} could be had",
        where=f"revision {revision or 'main'}",
        expected=" or ".join(WEIGHT_FILES),
        got="\n".join(tried),
        hint="download the file where there is a connection and pass it with --weights FILE or DIR",
    )


class _NoAnswerError(Exception):
    """The hub did not say whether it has a file; asking for another would only wait as long again."""


def _first(repository: str, names: Sequence[str], revision: str | None, offline: bool, tried: list[str]) -> Path | None:
    for name in names:
        file = _get(repository, name, revision, offline, tried)
        if file is not None:
            return file
    return None


def _get(repository: str, name: str, revision: str | None, offline: bool, tried: list[str]) -> Path | None:
    """The file in the cache, fetched first unless `offline`; None where there is none.

    The reason is added to `tried`. Raises _NoAnswerError where nobody could say.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place = f"cache {constants.HF_HUB_CACHE}" if offline else f"hub {constants.ENDPOINT}"
    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=offline))
    except EntryNotFoundError as error:
        if offline or not isinstance(error, LocalEntryNotFoundError):
            tried.append(f"{place}: {name}: not there")
            return None
        # Why the hub was not reached: huggingface_hub chains it behind 'not found locally'.
        reason: BaseException = error.__cause__ or error
    except Exception as error:  # beside its own, those of the HTTP library: requests, httpx or httpx2 by release
        reason = error
    tried.append(f"{place}: {name}: {type(reason).__name__}: {_first_line(reason)}")
    raise _NoAnswerError from reason


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
