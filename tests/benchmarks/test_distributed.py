"""The scaling benchmark's arguments and its report of a run that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

import benchmark_distributed
from benchmarks.runs import Launch
from models.errors import InputError


def counts(*words: str) -> list[int]:
    return benchmark_distributed.counts_of(benchmark_distributed.parse(list(words)), "cpu")


def test_counts_start_at_one_and_divide_the_largest() -> None:
    assert counts() == [1, 2]
    assert counts("--processes", "4", "1", "2") == [1, 2, 4]
    for wrong in (["2"], ["1", "2", "3"]):
        with pytest.raises(InputError, match="--processes"):
            counts("--processes", *wrong)


def test_a_failed_run_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    launch = Launch(tmp_path / "absent.yaml", tmp_path)
    with pytest.raises(InputError, match=r"^alone failed \(1\): .*absent.yaml"):
        launch.finish("alone", 1)
