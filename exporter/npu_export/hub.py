"""Find a published checkpoint in the cache of a hub or on the hub itself, through the hub's own package."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from npu_export.checkpoint import (
    CONFIG_FILE,
    INDEX_SUFFIX,
    PREPROCESSOR_FILE,
    USUAL_FILES,
    Checkpoint,
    open_checkpoint,
    shard_names,
)
from npu_export.errors import CheckpointError
from npu_runtime.errors import UnavailableError, first_line
from npu_runtime.steps import BYTES, Silent, Steps


class NoAnswerError(Exception):
    """The hub did not say whether it has a file; asking for another would only wait as long again."""


def no_answer(reason: BaseException) -> NoAnswerError:
    """What a client raised, in one line."""
    return NoAnswerError(f"{type(reason).__name__}: {first_line(reason)}")


Get = Callable[[str, str, str | None, bool, Steps], Path | None]


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and how a file of it is had."""

    scheme: str
    package: str
    get: Get
    """(repository, name, revision, offline, watch) -> the file in the cache, fetched first unless offline; None
    where there is none. Raises NoAnswerError, with the reason, where nobody could say."""
    place: Callable[[bool], str]
    """Where it looks, offline or not, for messages."""
    revision_of: Callable[[Path, str | None], str | None]
    """The revision that a repository's folder in the cache holds, given the one that was asked for; None where
    the folder does not say."""


def fetch_checkpoint(
    hub: Hub,
    repository: str,
    revision: str | None = None,
    names: tuple[str, ...] = (),
    file: str = "",
    watch: Steps | None = None,
) -> Checkpoint:
    """The weights of a hub repository, from the cache where they lie there, else from the hub.

    The first of the usual names, their indexes and `names` is taken; an index with all of its shards; or
    `file` alone. The hub's own environment variables (HF_ENDPOINT, HF_HUB_OFFLINE, MODELSCOPE_CACHE, …)
    work as its package defines them. Raises CheckpointError that says what was tried and how to pass a
    file, UnavailableError without the package.
    """
    try:
        importlib.import_module(hub.package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside another torch
        raise UnavailableError(
            f"looking for weights on the hub needs the package {hub.package}",
            got=error,
            hint=f"pip install {hub.package}, or pass a file with --weights",
        ) from error
    wanted = (file,) if file else (*USUAL_FILES, *names)
    folder = file[: file.rfind("/") + 1]
    tried: list[str] = []
    for offline in (True, False):

        def get(name: str, offline: bool = offline) -> Path | None:
            try:
                return hub.get(repository, name, revision, offline, watch or Silent())
            except NoAnswerError as error:
                tried.append(f"{hub.place(offline)}: {name}: {error}")
                raise

        def weights(name: str, offline: bool = offline) -> Path | None:
            path = get(name, offline)
            if path is None:
                tried.append(f"{hub.place(offline)}: {name}: not there")
            return path

        with contextlib.suppress(NoAnswerError):
            # The settings first: where they cannot be had, no weights are left in the cache that seem to have none.
            for name in (CONFIG_FILE, PREPROCESSOR_FILE):
                get(folder + name)
            found = next((path for name in wanted if (path := weights(name)) is not None), None)
            if found is None:
                continue
            shards = shard_names(found) if found.name.endswith(INDEX_SUFFIX) else []
            if any(weights(folder + name) is None for name in shards):
                continue
            known = hub.revision_of(found.parents[folder.count("/")], revision)
            source = f"{hub.scheme}:{repository}{f'/{file}' if file else ''}{f'@{known}' if known else ''}"
            return open_checkpoint(found, source, wanted)
    raise CheckpointError(
        f"no weights of {repository} could be had",
        where=f"revision {revision or 'the default'}",
        expected=" or ".join(wanted),
        got="\n".join(tried),
        hint="download the file where there is a connection and pass it with --weights FILE or DIR",
    )


def _hugging_face(repository: str, name: str, revision: str | None, offline: bool, watch: Steps) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    download: Callable[..., str] = hf_hub_download
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # below 1.1 nobody is told how far it is
        download = functools.partial(hf_hub_download, tqdm_class=_bar_that_tells(watch))
    try:
        with _without_bars():
            return Path(download(repository, name, revision=revision, local_files_only=offline))
    except EntryNotFoundError as error:
        if offline or not isinstance(error, LocalEntryNotFoundError):
            return None
        # Why the hub was not reached: huggingface_hub chains it behind 'not found locally'.
        reason: BaseException = error.__cause__ or error
    except Exception as error:  # beside its own, those of the HTTP library: requests, httpx or httpx2 by release
        reason = error
    raise no_answer(reason) from reason


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without the client's own progress bars, which would be drawn over those of the step."""
    from huggingface_hub import utils

    enabled = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where HF_HUB_DISABLE_PROGRESS_BARS is set, it has the last word
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if enabled:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _bar_that_tells(watch: Steps) -> type:
    """A class in place of the client's tqdm, each of whose bars is a count of bytes of the step."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            super().__init__(total=total, initial=initial, disable=True)
            self._advance = watch.count(total or 0, BYTES)
            self._advance(initial)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            self._advance(int(n or 0))

    return Bar


def _hugging_face_place(offline: bool) -> str:
    from huggingface_hub import constants

    return f"cache {constants.HF_HUB_CACHE}" if offline else f"hub {constants.ENDPOINT}"


HUGGING_FACE = Hub(
    scheme="hf",
    package="huggingface_hub",
    get=_hugging_face,
    place=_hugging_face_place,
    # The cache keeps a snapshot under the commit that the revision named: that is what was read.
    revision_of=lambda folder, _: folder.name,
)
