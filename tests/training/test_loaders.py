"""Batches as a run sees them: sharded over ranks, resumable, honest about what cannot be read."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import InputError
from training.config import load_config
from training.loaders import Loaders, prepare_indices
from training.run_folder import RunFolder


@pytest.fixture
def make(tiny_config: Path, tmp_path: Path, noise_root: Path) -> Callable[..., Loaders]:
    """Loaders of a copy of the noise set; `rank` and `world_size` as given."""
    root = tmp_path / "data"
    shutil.copytree(noise_root, root, ignore=shutil.ignore_patterns(".*"))

    def build(*overrides: str, rank: int = 0, world_size: int = 1) -> Loaders:
        config = load_config(tiny_config, [f"data.root={root}", *overrides])
        return Loaders(config, RunFolder(config.run.dir), rank, world_size)

    return build


def take(loaders: Loaders, count: int, start: int = 0) -> Tensor:
    batches = itertools.islice(loaders.training(start), count)
    return torch.cat([batch["mixture"] for batch in batches])


def test_training_stream_is_one_for_any_ranks_and_workers(make) -> None:
    expected = take(make(), 12)
    for rank in (0, 1):
        loaders = make("training.batch_size=2", "data.num_workers=2", rank=rank, world_size=2)
        assert torch.equal(take(loaders, 2, start=4), expected[4 + rank :: 2])


def test_short_mixes_come_first_whatever_the_batches(make) -> None:
    options = ("data.short_until=4", "data.short_pieces=3")
    plain, loaders = take(make(), 12), make(*options, "training.batch_size=2")
    whole, frames = plain.shape[-1], plain.shape[-1] // 3
    batches = list(itertools.islice(loaders.training(0), 3))
    assert [batch["mixture"].shape for batch in batches] == [
        (6, 2, frames),
        (6, 2, frames),
        (2, 2, whole),
    ]
    assert torch.equal(batches[2]["mixture"], plain[4:6])
    short = torch.cat([batch["mixture"] for batch in batches[:2]])
    cut = next(make(*options, "training.batch_size=2").training(3))["mixture"]
    assert torch.equal(cut[:3], short[9:])
    assert torch.equal(torch.cat([*cut[3:]], dim=-1), plain[4][:, : 3 * frames])
    for rank in (0, 1):  # resumed after two examples, and drawn again
        sharded = make(*options, "data.num_workers=1", rank=rank, world_size=2)
        mine = short.unflatten(0, (-1, 3))[2 + rank]
        assert torch.equal(next(sharded.training(2))["mixture"], mine)
        assert torch.equal(next(sharded.step(2, 2))["mixture"], mine)


def test_a_dead_worker_is_one_line(tiny_config: Path) -> None:
    """In a process of its own, since PyTorch's signal handler may raise at any later line."""
    code = """
import multiprocessing, sys
from training.config import load_config
from training.loaders import Loaders, worker_death
from training.run_folder import RunFolder

config = load_config(sys.argv[1], ["data.num_workers=1"])
batches = Loaders(config, RunFolder(config.run.dir)).training(0)
next(batches)
try:
    for child in multiprocessing.active_children():
        child.kill()
    for _ in range(10):
        next(batches)
except RuntimeError as error:  # it came before the next batch was asked for
    print(worker_death(error))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""
    command = [sys.executable, "-c", code, str(tiny_config)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert re.match(r"(InputError: )?a data worker died \(.*data.num_workers", done.stdout)


def test_validation_is_sharded_and_the_same_every_time(make) -> None:
    whole = torch.cat([batch["mixture"] for batch in make().validation()])
    assert len(whole) == 3
    for rank in (0, 1):
        loaders = make("training.batch_size=2", "data.num_workers=1", rank=rank, world_size=2)
        for _ in range(2):  # the second time from workers that stayed
            seen = torch.cat([batch["mixture"] for batch in loaders.validation()])
            assert torch.equal(seen, whole[rank::2])
    assert list(make(rank=4, world_size=5).validation()) == []


def test_augmentation_follows_the_configuration(make) -> None:
    plain, inverted = take(make(), 3), take(make("data.polarity_prob=1"), 3)
    assert torch.equal(inverted, -plain)


def test_failures_and_lost_segments_are_counted(make, tmp_path: Path) -> None:
    loaders = make("data.num_workers=1", "data.max_failed_share=0.9")
    assert set(loaders.read_failures().values()) == {0.0}
    (tmp_path / "data" / "train" / "a" / "bass.wav").unlink()
    take(loaders, 30)
    report = loaders.read_failures()
    assert report["data/broken_files"] == 1
    assert report["data/failed_reads"] > 3
    assert 0 < report["data/failed_share"] < 0.3
    assert report["data/lost_valid_segments"] == 0
    (tmp_path / "data" / "train" / "c" / "bass.wav").write_bytes(b"")
    assert list(loaders.validation()) == []
    assert loaders.read_failures()["data/lost_valid_segments"] == 3


def test_stopping_reason_comes_out_of_a_worker_as_one_line(make, tmp_path: Path) -> None:
    loaders = make("data.num_workers=1", "data.silent_prob=0")
    for track in "ab":
        (tmp_path / "data" / "train" / track / "bass.wav").unlink()
    with pytest.raises(InputError, match="^50 reads of 'bass' failed in a row"):
        take(loaders, 3)


def test_several_roots_and_shared_names(make, tmp_path: Path, noise_root: Path, caplog) -> None:
    more = tmp_path / "more"
    shutil.copytree(noise_root / "train", more)
    loaders = make(f"data.extra_roots=[{more}]", "data.valid_tracks=[b, c]")
    assert [track.name for track in loaders.mixes.tracks] == ["a", "a"]
    assert {track.name for track in loaders.segments.tracks} == {"b", "c"}
    assert "both in train and in valid" not in caplog.text
    (more / "c").rename(more / "0")
    make(f"data.extra_roots=[{more}]", "data.valid_fraction=0.5")
    assert "1 name(s) both in train and in valid (a)" in caplog.text


def test_nothing_is_written_for_a_broken_data_set(make, tmp_path: Path) -> None:
    for track in "abc":
        (tmp_path / "data" / "train" / track / "bass.wav").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 broken tracks: .*a/bass.wav.*b/bass.wav"):
        make()
    assert not (tmp_path / "run").exists()


def test_indices_are_built_once(make, tiny_config: Path, tmp_path: Path) -> None:
    config = load_config(tiny_config, [f"data.root={tmp_path / 'data'}"])
    first = prepare_indices(config, RunFolder(config.run.dir))
    (cache,) = (tmp_path / "data" / ".bsmamba2").glob("*.npz")
    written = cache.stat().st_mtime_ns
    again = prepare_indices(config, RunFolder(config.run.dir))
    assert cache.stat().st_mtime_ns == written
    for subset in ("train", "valid"):
        assert again[subset].tracks == first[subset].tracks
        for stem, rows in first[subset].index.windows.items():
            assert (again[subset].index.windows[stem] == rows).all()
