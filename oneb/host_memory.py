"""How much memory the host can still give, limits of a container included."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
# memory.max, memory.current and memory.stat's reclaimable part; cgroup v1 has other names for the same.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Bytes that a process can take without anything being swapped or killed; None where nothing says (macOS).

    The smaller of the kernel's MemAvailable and what the control group leaves, its page cache counted as free.
    """
    found = [left for names in _LIMITS if (left := _left_in_group(cgroup, *names)) is not None]
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    return min(found, default=None)


def _left_in_group(cgroup: Path, limit: str, used: str, stat: str, cache: str) -> int | None:
    try:
        most = (cgroup / limit).read_text().strip()
        if most == "max":
            return None
        fields = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
        return int(most) - int((cgroup / used).read_text()) + int(fields.get(cache, 0))
    except (OSError, ValueError):
        return None
