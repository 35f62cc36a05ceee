"""Files and folders that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.files import remove_left_parts, whole_file, whole_folder


def test_a_folder_takes_its_place_past_what_a_killed_process_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "set") as folder:
        left = folder
        raise RuntimeError
    left.mkdir()  # a process of the same number, killed before its end
    (left / "old").touch()
    with whole_folder(tmp_path / "set") as folder:
        (folder / "new").write_text("x")
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "new"]


def test_left_parts_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = 2**22 + 1  # beyond the largest process number
    (tmp_path / f".a.{dead}.partial.pt").touch()
    (tmp_path / f".b.{dead}.partial").mkdir()
    (tmp_path / f".b.{dead}.partial" / "file").touch()
    (tmp_path / ".c.1.partial.pt").touch()
    with whole_file(tmp_path / "d.pt") as part:
        part.touch()
    remove_left_parts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.1.partial.pt", "d.pt"]
