"""CANN, the driver, npu-smi and the chips."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from npu_runtime.devices.cann import CONTAINER, FOLDERS, source_environment
from npu_runtime.devices.device import Device
from npu_runtime.devices.doctor.check import Check, Verdict
from npu_runtime.devices.doctor.machine import Machine, read_fields

HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""What set_env.sh sets to CANN's folder."""


def check_cann(machine: Machine) -> Iterator[Check]:
    home = next((machine.environ[name] for name in HOMES if machine.environ.get(name)), None)
    folder, known = _find_cann(machine, home)
    told = _version_of_torch_npu(machine, home) or known
    if folder is not None and folder != Path(home or ""):
        advice = source_environment((machine.ascend,))
        amiss = "set_env.sh was not sourced" if home is None else f"the environment names {home}"
        yield Check("CANN", "warn", f"{told} in {folder}, but {amiss}", advice)
    elif told is not None:
        yield Check("CANN", "ok", told if home is None else f"{told} in {home}")
    else:
        found = "set_env.sh was not sourced" if home is None else f"no version of it in {home}"
        yield Check("CANN", _lacking(machine), found, source_environment((machine.ascend,)))


def check_driver(machine: Machine) -> Iterator[Check]:
    file = machine.ascend / "driver" / "version.info"
    fields = read_fields(file)
    known = fields.get("package_version") or fields.get("version")
    if known is not None:
        yield Check("driver", "ok", known)
    else:
        found = f"{file} tells no version" if file.exists() else f"there is no {file}"
        yield Check("driver", _lacking(machine), found, f"install the driver; {CONTAINER}")


def check_npu_smi(machine: Machine) -> Iterator[Check]:
    smi = machine.npu_smi
    if smi is None:
        yield Check("npu-smi", _lacking(machine, "warn"), "not on the path", "it comes with the driver")
    elif smi.error is not None:
        advice = f"it asks the driver, and some drivers answer root alone; {CONTAINER}"
        yield Check("npu-smi", "warn" if machine.count("npu") else "fail", f"{smi.path}: {smi.error}", advice)
    else:
        cards = ", ".join(f"{card.index} {card.name} {card.health}" for card in smi.cards)
        ill = [str(card.index) for card in smi.cards if card.health.upper() != "OK"]
        advised = f"npu-smi info -t health -i {ill[0]} says what is wrong with it" if ill else None
        yield Check("npu-smi", "warn" if ill else "ok", f"{smi.version or 'no version'}: {cards}", advised)


def check_soc(machine: Machine) -> Iterator[Check]:
    names = [machine.probe(Device("npu", index)).name for index in range(machine.count("npu"))]
    seen = list(dict.fromkeys(name for name in names if name))
    smi = machine.npu_smi
    if seen:
        yield Check("SoC", "ok", ", ".join(seen))
    elif smi is not None and smi.cards:
        yield Check("SoC", "ok", f"{', '.join(dict.fromkeys(card.name for card in smi.cards))}, as npu-smi names it")
    else:
        yield Check("SoC", "absent", "no NPU is seen")


def _lacking(machine: Machine, otherwise: Verdict = "fail") -> Verdict:
    """The verdict on something missing that an NPU needs."""
    if not machine.torch_npu.installed:
        return "absent"
    return "warn" if machine.count("npu") else otherwise


def _find_cann(machine: Machine, home: str | None) -> tuple[Path | None, str | None]:
    """CANN's folder and the version that its files tell."""
    for folder in [*([Path(home)] if home else []), *(machine.ascend / below for below in FOLDERS)]:
        for pattern in (
            "*/ascend_toolkit_install.info",
            "ascend_toolkit_install.info",
            "version.cfg",
            "*/version.info",
        ):
            with contextlib.suppress(OSError):
                for file in sorted(folder.glob(pattern)):
                    known = _version_in(read_fields(file))
                    if known is not None:
                        return folder, known
    return None, None


def _version_in(fields: dict[str, str]) -> str | None:
    """`8.5.1` of `version=8.5.1` or of `runtime_running_version=[7.6.0.1.220:8.5.1]`."""
    if fields.get("version"):
        return fields["version"]
    running = fields.get("toolkit_running_version") or fields.get("runtime_running_version") or ""
    match = re.fullmatch(r".*\[(?:[^:\]]*:)?([^\]]+)\]", running)
    return match[1] if match else None


def _version_of_torch_npu(machine: Machine, home: str | None) -> str | None:
    """What torch_npu says of the CANN that it runs with: one function in 2.13, another in 2.9."""
    if not machine.torch_npu.imports:
        return None
    # The one of 2.9 walks through the working folder where ASCEND_HOME_PATH is not set.
    modules = ["torch_npu.npu.utils"]
    if machine.environ.get("ASCEND_HOME_PATH") and home:
        modules.append("torch_npu.utils.collect_env")
    for module in modules:
        # They raise what reading CANN's files raises, RuntimeError and UnicodeDecodeError among it.
        with contextlib.suppress(Exception):
            told = importlib.import_module(module).get_cann_version()
            if isinstance(told, str) and any(letter.isdigit() for letter in told):
                return told
    return None
