"""What Linux control groups allow this process, as containers and job schedulers set them: memory and CPU time.

Versions 1 and 2 are read. A limit of a parent holds for its children, so that the least of all counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
NO_LIMIT = 2**60  # bytes: version 1 says 2^63, rounded to pages, where there is none


def memory_limit() -> int | None:
    """Bytes that this process may use at most; None where no control group says so."""
    limits = [*_numbers("memory", "memory.limit_in_bytes"), *_numbers("", "memory.max")]
    return min((int(limit) for (limit,) in limits if limit < NO_LIMIT), default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that this process may use at most, such as 1.5; None where none is set."""
    quotas = [quota / period for quota, period in _numbers("", "cpu.max")]
    spent = _numbers("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    quotas += [quota / period for quota, period in spent if quota > 0]  # -1 is none
    return min(quotas, default=None)


def _numbers(controller: str, *names: str) -> Iterator[list[float]]:
    """Numbers in the files of these names, of each group from this process's own up to the root."""
    for folder in _folders(controller):
        try:
            words = [word for name in names for word in (folder / name).read_text().split()]
            if "max" not in words:  # which is no limit
                yield [float(word) for word in words]
        except (OSError, ValueError):
            continue


def _folders(controller: str) -> Iterator[Path]:
    """Folders of this process's groups, its own first; without a controller's name those of version 2."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            # a container may see its own group as the root, and be told the path that the host sees
            own = Path(path.lstrip("/"))
            yield from (ROOT / controller / part for part in (own, *own.parents))
