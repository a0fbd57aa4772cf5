"""The processor cores that this process may use: its affinity, and the quotas of the cgroups that it is in."""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def cpu_count(root: Path = ROOT) -> int:
    """Cores that this process may use: the least of its affinity and its cgroups' quotas, at least 1.

    From Python 3.13 on PYTHON_CPU_COUNT and `-X cpu_count` stand in place of the affinity, as they do in
    `os.process_cpu_count`, which does not look at quotas. `root` is where /proc and /sys are read.
    """
    count = _affinity()
    quota = quota_cores(root)
    return count if quota is None else max(1, min(count, quota))


def quota_cores(root: Path = ROOT) -> int | None:
    """Cores for which the cgroups of this process give time, the least of them and of those around them.

    None without a limit. A part of a core counts as one: a thread fewer would leave time unused that the process
    has, a thread more is halted for a part of each period. What cannot be read sets no limit. Source: the kernel's
    documentation of cgroup-v2 (cpu.max) and of the scheduler's bandwidth control (cpu.cfs_quota_us).
    """
    return min((limit for limit in map(_read_limit, _groups(root)) if limit is not None), default=None)


def threads_within_cores() -> int | None:
    """Threads for a library that counts the machine's cores whatever this process may use of them.

    None where it may use all, so that the library's own choice can stand.
    """
    count = cpu_count()
    return count if count < _machine_cores() else None


def _affinity() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine_cores() -> int:
    """Cores that are online, which PYTHON_CPU_COUNT does not change."""
    if "SC_NPROCESSORS_ONLN" in getattr(os, "sysconf_names", {}):
        return max(1, os.sysconf("SC_NPROCESSORS_ONLN"))
    return os.cpu_count() or 1


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the cgroups that limit this process's time on processors, from its own up to the root."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            tops = [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mounts / controllers, mounts / "cpu"]
        else:
            continue
        # In a container the path may be the host's, of which only the end, or nothing, is mounted.
        group = posixpath.normpath("/" + path.lstrip("/"))
        while True:
            yield from (top / group.lstrip("/") for top in tops)
            if group == "/":
                break
            group = posixpath.dirname(group)


def _read_limit(group: Path) -> int | None:
    """Cores of one cgroup, rounded up, from either version's files; None without a limit that makes sense."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((group / name).read_text("utf-8") for name in names).split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # `max 100000` is no limit, and not two numbers
            continue
        if quota > 0 and period > 0:  # -1 is no limit
            return -(-quota // period)
    return None
