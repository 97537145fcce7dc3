"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes: what the machine has left, or the control groups that this process is in, whichever is less."""
    return memory()[1]


def memory() -> tuple[int, int]:
    """(bytes that there are, bytes that are left), of the machine or of the control group that has least left."""
    machine = psutil.virtual_memory()
    return min([(machine.total, machine.available), *cgroup_limits(MEMBERSHIP, CGROUPS)], key=lambda pair: pair[1])


def cgroup_limits(membership: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, bytes left under it) of each control group above a process; groups without a limit are left out.

    What is used counts without the file pages that the kernel would drop first. Source: cgroups(7); the kernel's
    admin-guide/cgroup-v2 ("memory.max", "memory.current") and cgroup-v1/memory ("memory.limit_in_bytes").

    Args:
        membership: /proc/PID/cgroup: lines of hierarchy:controllers:path.
        root: where the groups are mounted.

    """
    left: list[tuple[int, int]] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, used, dropped = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used, dropped = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                left += _left(folder, limit, used, dropped)
    return left


def _left(group: Path, limit: str, used: str, dropped: str) -> list[tuple[int, int]]:
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return []
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        left = int(most) - int((group / used).read_text()) + int(stat.get(dropped, 0))
        return [(int(most), max(0, left))]
    except (OSError, ValueError):  # no such group in this namespace, or not ours to read
        return []
