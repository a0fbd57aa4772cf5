"""ModelScope's hub, through the package modelscope.

Its variables are MODELSCOPE_CACHE for the cache, MODELSCOPE_ENDPOINT for the hub and
MODELSCOPE_DOWNLOAD_MAX_RETRIES for how often it asks a hub that does not answer (5: half a minute).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from npu_export.hub import Hub, NoAnswerError, no_answer
from npu_runtime.steps import Steps

DEFAULT_REVISION = "master"
"""What is asked for without a revision. The client would ask the hub for the newest tag, even where it is told
to stay offline, and take one or another by its own release."""


def _modelscope(repository: str, name: str, revision: str | None, offline: bool, _: Steps) -> Path | None:
    asked = revision or DEFAULT_REVISION
    try:
        from modelscope.hub.file_download import model_file_download

        with _quiet():
            file = Path(model_file_download(repository, name, asked, local_files_only=offline))
    except Exception as error:  # its own, those of requests and ValueError, by release
        status = getattr(getattr(error, "response", None), "status_code", None)
        absent = {"ValueError", "CacheNotFound"} if offline else {"NotExistError"}
        if status == 404 or type(error).__name__ in absent:
            return None
        raise no_answer(error) from error
    if revision is not None and _revision_of(file.parents[name.count("/")], revision) is None:
        raise NoAnswerError(f"{file} lies in a cache of modelscope before 1.38, which does not say its revision")
    return file


def _revision_of(folder: Path, revision: str | None) -> str | None:
    """Since modelscope 1.38 a snapshot lies under the branch, tag or commit that was asked for."""
    asked = revision or DEFAULT_REVISION
    return asked if folder.as_posix().endswith(f"/snapshots/{asked}") else None


def _place(offline: bool) -> str:
    if offline:
        return f"cache {os.environ.get('MODELSCOPE_CACHE') or Path.home() / '.cache' / 'modelscope'}"
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
    return f"hub {named or 'https://www.modelscope.cn'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's logs and warnings, and its progress bars, which would be drawn over the step's own line."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in (logging.getLogger("modelscope"), logging.getLogger("modelscope_hub")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


MODELSCOPE = Hub(scheme="ms", package="modelscope", get=_modelscope, place=_place, revision_of=_revision_of)
