"""Songs overlap in the pipeline; what happens to one does not happen to its neighbour."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from models import BSMamba2, BSMamba2Config
from models.errors import InputError
from separation import Separator, batch
from separation.batch import Batch
from separation.plan import Job, Song
from separation.writer import FORMATS, Write, open_writers

from .conftest import TINY

CHUNK_SECONDS = 0.25
PATIENCE = 20.0  # seconds until a test fails that waits for another thread


def happens(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "the pipeline did not get there"


def comes_true(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the pipeline did not get there"
        time.sleep(0.01)


@dataclass(frozen=True)
class Scripted(Separator):
    """A network that gives its input back and does what a test says on the way.

    calls: sizes of the batches so far.
    before: called with the number of the call, from 1.
    """

    calls: list[int] = field(default_factory=list)
    before: Callable[[int], object] = lambda number: None

    def network(self, batch: Tensor) -> Tensor:
        self.calls.append(len(batch))
        self.before(len(self.calls))
        return batch[:, None]


def scripted(before: Callable[[int], object] = lambda number: None, **options: Any) -> Scripted:
    model = BSMamba2(BSMamba2Config(**TINY)).eval()
    return Scripted(model, torch.device("cpu"), CHUNK_SECONDS, before=before, **options)


@pytest.fixture
def jobs(song, tmp_path: Path) -> Callable[..., list[Job]]:
    """Jobs for songs of so many chunks: a, b, c..."""

    def make(*chunks: int) -> list[Job]:
        # Every chunk after the first adds three quarters of one.
        lengths = [round(CHUNK_SECONDS * (1 + 0.75 * (n - 1)) * 44100) if n else 0 for n in chunks]
        sources = [
            song(f"{name}.wav", samples=np.full((2, length), 0.1))
            for name, length in zip("abcdefghi", lengths, strict=False)
        ]
        return [
            Job(Song(str(source)), (tmp_path / "out" / source.stem / "vocals.wav",))
            for source in sources
        ]

    return make


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What people are told, in order, on standard output and error alike."""
    lines: list[str] = []
    monkeypatch.setattr(tqdm, "write", lambda text, file: lines.append(text))
    return lines


def make_batch(separator: Separator) -> Batch:
    return Batch(separator, ("vocals",), FORMATS["float"])


def run(separator: Separator, jobs: list[Job]) -> int:
    return make_batch(separator).run(jobs, [], skip_existing=False)


def hold_writers(monkeypatch: pytest.MonkeyPatch, before_closing: Callable[[str], object]) -> None:
    """Call `before_closing`, with the song's name, when only the names of its files are missing."""

    @contextmanager
    def held(paths: list[Path], *options) -> Iterator[Write]:
        with open_writers(paths, *options) as write:
            yield write
            before_closing(paths[0].parent.name)

    monkeypatch.setattr(batch, "open_writers", held)


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_no_threads() -> None:
    assert not {"ahead", "drain"} & {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_network_goes_on_with_the_next_song_while_one_is_written(
    jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    next_began = threading.Event()
    hold_writers(monkeypatch, lambda name: happens(next_began) if name == "a" else None)
    separator = scripted(lambda number: next_began.set() if number > chunks else None)
    assert run(separator, jobs(chunks, chunks)) == 0
    assert sum(separator.calls) == 2 * chunks
    assert written(tmp_path / "out") == ["a/vocals.wav", "b/vocals.wav"]


def test_the_next_song_is_read_while_the_network_works_on_one(
    jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open = threading.Event()
    open_audio = batch.open_audio

    def noted(source: str, *options):
        if Path(source).name == "b.wav":
            is_open.set()
        return open_audio(source, *options)

    monkeypatch.setattr(batch, "open_audio", noted)
    assert run(scripted(lambda number: happens(is_open)), jobs(1, 1)) == 0


def test_whole_songs_are_three_at_once(jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol `paper`: one is written, one is separated, one is read."""
    opened: list[str] = []
    open_audio = batch.open_audio

    def noted(source: str, *options):
        opened.append(Path(source).stem)
        return open_audio(source, *options)

    def others_are_open(name: str) -> None:
        if name == "a":
            comes_true(lambda: len(opened) >= 3)
            time.sleep(0.3)  # for those that should not be
            assert opened == ["a", "b", "c"]

    monkeypatch.setattr(batch, "open_audio", noted)
    hold_writers(monkeypatch, others_are_open)
    assert run(scripted(protocol="paper", batch_size=4), jobs(*[1] * 9)) == 0
    assert opened == list("abcdefghi")


def test_the_networks_time_counts_with_whole_songs(jobs, told: list[str]) -> None:
    assert run(scripted(lambda number: time.sleep(0.05), protocol="paper"), jobs(1, 1)) == 0
    for line in told[:2]:
        seconds = re.search(r"network (\S+) s\)", line)
        assert seconds is not None and float(seconds[1]) >= 0.05


def test_a_second_run_counts_from_nothing(jobs, told: list[str]) -> None:
    both = jobs(2, 2)
    songs = make_batch(scripted())
    for _ in range(2):
        assert songs.run(both, [], skip_existing=False) == 0
    first, second = (line for line in told if line.startswith("2 songs, "))
    assert first.startswith("2 songs, 0.9 s in ")
    assert second.startswith("2 songs, 0.9 s in ")


def test_a_song_is_told_of_when_its_files_are_there_not_when_the_next_is_done(
    jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_told = threading.Event()
    there: list[list[str]] = []

    def tell(text: str, file: object) -> None:
        there.append(written(tmp_path / "out"))
        is_told.set()

    monkeypatch.setattr(tqdm, "write", tell)
    assert run(scripted(lambda number: happens(is_told) if number == 3 else None), jobs(2, 2)) == 0
    assert there[0] == ["a/vocals.wav"]


def test_many_songs_of_one_chunk_keep_their_order_and_content(
    jobs, told: list[str], tmp_path: Path
) -> None:
    assert run(scripted(), jobs(1, 3, 1)) == 0
    assert [Path(line.split(":")[0]).name for line in told[:3]] == ["a.wav", "b.wav", "c.wav"]
    sizes = [(tmp_path / "out" / name / "vocals.wav").stat().st_size for name in "abc"]
    assert sizes[0] == sizes[2] < sizes[1]
    assert re.fullmatch(
        r"3 songs, 1\.1 s in \d+\.\d s \(real-time factor \S+, \d+% of it the network\)", told[3]
    )


def test_a_bad_song_is_told_of_after_the_one_that_is_being_written(
    jobs, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_failed = threading.Event()

    def failing(source: str, *options):
        if Path(source).name == "b.wav":
            has_failed.set()
            raise InputError(f"{source}: is damaged")
        return open_audio(source, *options)

    open_audio = batch.open_audio
    monkeypatch.setattr(batch, "open_audio", failing)
    hold_writers(monkeypatch, lambda name: happens(has_failed) if name == "a" else None)
    assert run(scripted(), jobs(2, 2, 2)) == 2
    good, error, other, summary = told
    assert "a.wav: 0.4 s in" in good
    assert error == f"error: {tmp_path / 'b.wav'}: is damaged"
    assert "c.wav: 0.4 s in" in other
    assert summary.startswith("2 of 3 songs separated; failed: ")
    assert written(tmp_path / "out") == ["a/vocals.wav", "c/vocals.wav"]


def test_a_song_that_cannot_be_written_takes_no_more_of_the_network(
    jobs, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("a file where a folder should be")
    separator = scripted(lambda number: comes_true(lambda: told) if number == 2 else None)
    assert run(separator, jobs(40, 2)) == 2
    assert len(separator.calls) <= 2 + 2
    assert [line.startswith("error: ") for line in told] == [True, False, False]
    assert "b.wav" in told[1]


def test_a_network_that_fails_on_one_song_goes_on_with_the_next(
    jobs, told: list[str], tmp_path: Path
) -> None:
    def fail(number: int) -> None:
        if number == 2:
            raise InputError("out of memory")

    assert run(scripted(fail), jobs(3, 2)) == 2
    assert told[0] == "error: out of memory"
    assert "b.wav" in told[1]
    assert written(tmp_path / "out") == ["b/vocals.wav"]


def test_a_song_that_failed_in_the_network_takes_no_more_of_it(
    jobs, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor before the error is told, after the song that is being written."""

    def fail(number: int) -> None:
        if number == 2:
            raise InputError("out of memory")

    separator = scripted(fail)
    hold_writers(monkeypatch, lambda name: comes_true(lambda: len(separator.calls) >= 3))
    assert run(separator, jobs(1, 6, 1)) == 2
    assert len(separator.calls) == 3
    assert [line.startswith("error: ") for line in told] == [False, True, False, False]


def test_an_interruption_while_two_songs_are_under_way(
    jobs, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that only lacks its name gets it; of the next there is nothing."""
    interrupted = threading.Event()
    hold_writers(monkeypatch, lambda name: happens(interrupted))

    def interrupt(number: int) -> None:
        if number == 4:
            interrupted.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scripted(interrupt), jobs(3, 3, 3))
    assert written(tmp_path / "out") == ["a/vocals.wav"]
    assert len(told) == 1
    assert_no_threads()


def test_an_interruption_once_the_second_song_is_being_written(jobs, tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 5:
            comes_true(lambda: list(tmp_path.glob("out/b/.*partial*")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scripted(interrupt), jobs(3, 3))
    assert written(tmp_path / "out") == ["a/vocals.wav"]
    assert_no_threads()


HEADER_AND_A_BLOCK = r"""
printf '.snd\0\0\0\030\377\377\377\377\0\0\0\006\0\0\254\104\0\0\0\002'
head -c 524288 /dev/zero
"""


def silent_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> Path:
    """An ffmpeg that does `first` and then waits; the file that then tells its process id."""
    started = folder / "started"
    wait = f"echo $$ > {started}.part\nmv {started}.part {started}\nexec sleep 60\n"
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{first}\n{wait}")
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return started


@pytest.mark.parametrize("opening", [True, False])
def test_an_interruption_while_ffmpeg_is_silent_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, opening: bool
) -> None:
    """Before its header, or between two blocks: as long as its standard input says nothing."""
    started = silent_ffmpeg(tmp_path, monkeypatch, "" if opening else HEADER_AND_A_BLOCK)
    main = threading.main_thread().ident
    assert main is not None
    interrupted: list[float] = []

    def interrupt() -> None:
        comes_true(started.exists)
        time.sleep(0.2)  # until the reader waits
        interrupted.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    job = Job(Song("-"), (tmp_path / "out" / "a" / "vocals.wav",))
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(scripted(), [job])
    assert time.monotonic() - interrupted[0] < 3
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert_no_threads()
    assert not recwarn.list
