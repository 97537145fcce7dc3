"""The memory that a process may still take, under control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import psutil

from shared.memory import available_memory, cgroup_limits


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def membership(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_every_limit_above_the_process_counts(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "a", memory_max="1000", memory_current="900", memory_stat="anon 300\ninactive_file 500")
    group(root / "a" / "b", memory_max="800", memory_current="100", memory_stat="anon 100\ninactive_file 0")
    group(root / "a" / "c", memory_max="max", memory_current="100", memory_stat="anon 100\ninactive_file 0")
    assert sorted(left for _, left in cgroup_limits(membership(tmp_path, "0::/a/b"), root)) == [600, 700]
    assert [left for _, left in cgroup_limits(membership(tmp_path, "0::/a/c"), root)] == [600]


def test_what_is_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path / "fs", memory_max="100", memory_current="130", memory_stat="inactive_file 10")
    assert [left for _, left in cgroup_limits(membership(tmp_path, "0::/"), tmp_path / "fs")] == [0]


def test_version_1_has_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "fs" / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("1000\n")
    (folder / "memory.usage_in_bytes").write_text("400\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 50\n")
    file = membership(tmp_path, "3:cpu,cpuacct:/x", "4:memory:/job", "0::/")
    assert [left for _, left in cgroup_limits(file, tmp_path / "fs")] == [650]


def test_a_group_that_this_namespace_does_not_show_is_left_out(tmp_path: Path) -> None:
    assert cgroup_limits(membership(tmp_path, "0::/elsewhere"), tmp_path / "fs") == []
    assert cgroup_limits(tmp_path / "missing", tmp_path / "fs") == []


def test_this_machine_has_some_and_no_more_than_it_has() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total
