"""CANN: where it lies, how its environment is set, and what its errors say through torch_npu.

The texts are those of torch_npu 2.13.0 (torch_npu/csrc/core/npu/NPUException.h, NPUErrorCodes.h).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/usr/local/Ascend")
"""Where the installers of CANN and of the driver put them for root; for others it is ~/Ascend."""
FOLDERS = ("ascend-toolkit/latest", "cann")
"""Where CANN lies below the root; the second since 8.5."""
LIBRARY = "libascendcl.so"
CONTAINER = (
    "in a container pass /dev/davinci*, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc, and mount "
    "/usr/local/Ascend/driver and npu-smi"
)

_CALL = re.compile(r"NPU function error: (?P<call>.+), error code is (?P<code>\d+)")
_TRAILER = re.compile(r"\[ERROR\] \S+ \(PID:\d+, Device:-?\d+, RankID:-?\d+\) ERR\d+ ")
"""The line with date and process that torch_npu puts below each of its messages."""


@dataclass(frozen=True, slots=True)
class CannError:
    """A call of CANN that failed."""

    code: int
    text: str
    """The call, its code, torch_npu's words for that and CANN's own."""


def source_environment(roots: Sequence[Path] | None = None) -> str:
    """How CANN's environment is set on this machine."""
    for root in (ROOT, Path.home() / "Ascend") if roots is None else roots:
        for folder in (root / below for below in FOLDERS):
            for script in (folder / "set_env.sh", folder.parent / "set_env.sh"):
                if script.is_file():
                    return f"source {script}"
    return f"install CANN and source its set_env.sh ({ROOT} and ~/Ascend hold none)"


def library_folder(value: str | None) -> str | None:
    """The first folder of a search path that holds CANN's library."""
    return next((part for part in (value or "").split(":") if part and (Path(part) / LIBRARY).exists()), None)


def message_lines(said: object) -> list[str]:
    """The lines of a message of torch_npu that say something, each without the blanks around it."""
    return [line.strip() for line in str(said).splitlines() if line.strip() and not _TRAILER.match(line)]


def read_cann_error(said: object) -> CannError | None:
    """The call of CANN that an error of torch_npu tells of; None where it tells of none."""
    lines = [line for line in str(said).splitlines() if line.strip()]
    call = _CALL.search(lines[0]) if lines else None
    if call is None:
        return None
    meaning = next((line.partition(":")[2].strip() for line in lines if line.startswith("[Error]:")), "")
    # torch_npu's advice is indented; CANN's own words, of which the first line says what happened, are not.
    own = [line for line in lines[1:] if not line.startswith((" ", "[Error]:")) and not _TRAILER.match(line)]
    text = ": ".join(filter(None, (f"{call['call']} gives error {call['code']}", meaning.rstrip("."), *own[:1])))
    return CannError(int(call["code"]), text)


def advise_start(code: int | None, visible: bool) -> str:
    """What to do where a device that CANN lists does not start; `visible`: ASCEND_RT_VISIBLE_DEVICES is set."""
    if code == 100039:
        return "take CANN's folder devlib, which holds stubs for compiling, off LD_LIBRARY_PATH"
    if code == 107001 and visible:
        return "npu-smi info lists the devices that are there: name those in ASCEND_RT_VISIBLE_DEVICES, or unset it"
    look = f"npu-smi info lists the devices, their health and who uses them; CANN's log is in {log_folder()}"
    return f"{look}; {CONTAINER}"


def log_folder() -> str:
    """Where CANN writes its log."""
    return os.environ.get("ASCEND_PROCESS_LOG_PATH") or "~/ascend/log"
