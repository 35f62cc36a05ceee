"""Many songs in one stream: what fails is told and counted, and the others go on.

    read       batches of chunks, one song after the other, in a thread of its own
    network    the chunks, separated, in the main thread
    write      stems, cross-faded and encoded, in a thread of its own

While the end of a song is written, the network works on the next, whose first batches were read
before. What waits between the stages is bounded in batches and chunks, whichever songs they are
of: many songs take the memory of one. Under the protocol `paper`, whose batch is a whole song, they
take the memory of three: one read, one separated, one being written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

from models.errors import InputError
from separation.overlap_add import Chunk, Stack
from separation.plan import Job, Problem
from separation.reader import AudioStream, Decoder, open_audio, probe_seconds
from separation.separator import Separator
from separation.sharding import Shard
from separation.streaming import SongSeparation
from separation.threads import ahead, drain
from separation.writer import Format, Write, open_standard_output, open_writers

BATCHES_AHEAD = 2  # decoded and cut while the network works
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"

Output = tuple[Chunk, Tensor]


@dataclass
class Passage:
    """A song on its way through the stages.

    Attributes:
        job: what is read and written.
        song: its stages, once it is open.
        has_failed: in the network or later; the stages before need not work on it any more.
    """

    job: Job
    song: SongSeparation = field(init=False, repr=False)
    has_failed: bool = False


# An error stands in place of the rest of its song.
Batches = Generator[tuple[Passage, Stack | InputError], None, None]
Outputs = Iterator[tuple[Passage, Output | InputError]]


@dataclass
class Batch:
    """Separates songs with one separator and tells people how it goes.

    Attributes:
        separator: model, device, chunks.
        stems: names of the stems to write.
        form: how they are stored.
        downmix: mix songs of more than two channels down.
        shard: which of several processes this is.
    """

    separator: Separator
    stems: Sequence[str]
    form: Format
    downmix: bool = False
    shard: Shard = field(default_factory=Shard)
    _text: TextIO = field(init=False, repr=False)
    _bar: tqdm = field(init=False, repr=False)
    _failed: list[str] = field(init=False, repr=False)  # sources
    _audio_seconds: float = field(init=False, repr=False)
    _network_seconds: float = field(init=False, repr=False)

    def run(self, jobs: Sequence[Job], problems: Sequence[Problem], skip_existing: bool) -> int:
        """Separate every job; returns the exit code, 2 if any song or problem failed.

        problems: songs that could not become jobs, the same in all processes.
        """
        # Sound on standard output leaves no room for words there.
        self._text = sys.stdout if all(job.paths for job in jobs) else sys.stderr
        self._failed = []
        self._audio_seconds = self._network_seconds = 0.0
        todo = [job for job in jobs if not (skip_existing and job.is_done)]
        start = time.perf_counter()
        with self._open_bar(todo) as self._bar:
            for problem in problems if self.shard.is_first else []:
                self._say_error(problem.text)
                self._failed += problem.sources
            self._separate(todo)
        spent = time.perf_counter() - start
        failed = self.shard.gather(self._failed)
        if self.shard.is_first:
            skipped = len(jobs) - len(todo)
            tried = len(todo) + sum(len(problem.sources) for problem in problems)
            self._summarise(skipped, tried, failed, spent)
        return 2 if failed else 0

    def _separate(self, jobs: Sequence[Job]) -> None:
        decoders: set[Decoder] = set()

        def kill_decoders() -> None:
            for decoder in tuple(decoders):
                decoder.kill()

        if self.separator.protocol == "paper":
            in_front = behind = 1
        else:
            in_front = BATCHES_AHEAD
            # A batch is cross-faded and encoded while the network works on the next.
            behind = self.separator.batch_size + 1
        with closing(ahead(self._read(jobs, decoders), in_front, kill_decoders)) as batches:
            drain(self._network(batches), self._write, behind)

    def _read(self, jobs: Iterable[Job], decoders: set[Decoder]) -> Batches:
        """The batches of every song. decoders: see `open_audio`."""
        for job in jobs:
            passage = Passage(job)
            try:
                with open_audio(job.song.source, decoders) as stream:
                    passage.song = SongSeparation(self.separator, stream, self.stems, self.downmix)
                    for batch in passage.song.inputs():
                        yield passage, batch
                        if passage.has_failed:
                            break
            except InputError as error:
                yield passage, error

    def _network(self, batches: Batches) -> Outputs:
        for passage, batch in batches:
            if passage.has_failed:
                continue
            if isinstance(batch, InputError):
                yield passage, batch
                continue
            try:
                for output in passage.song.network([batch]):
                    yield passage, output
            except InputError as error:
                passage.has_failed = True
                yield passage, error

    def _write(self, outputs: Outputs) -> None:
        """Write every song, and say how it went as soon as its files have their names."""
        told: Passage | None = None  # the last that failed
        start = time.perf_counter()
        for passage, first in outputs:
            if passage is told:  # this was under way when it failed
                continue
            try:
                if isinstance(first, InputError):
                    raise first
                self._save(passage, _outputs_of_song(first, outputs))
                self._say(self._report(passage, time.perf_counter() - start))
            except InputError as error:
                passage.has_failed = True
                told = passage
                self._say_error(str(error))
                self._failed.append(passage.job.song.source)
            start = time.perf_counter()

    def _save(self, passage: Passage, outputs: Iterator[Output]) -> None:
        self._bar.set_description(Path(passage.job.song.source).name, refresh=False)
        blocks = passage.song.outputs(outputs, self._progress)  # n c t
        first = next(blocks)  # a song that cannot be read leaves no folder behind
        with self._open_output(passage.song, passage.job) as write:
            write(first)
            for block in blocks:
                write(block)

    def _report(self, passage: Passage, spent: float) -> str:
        """What was done, for people. spent: seconds since the song before was finished."""
        song = passage.song
        self._network_seconds += song.network_seconds
        seconds = song.frames / song.stream.rate
        head = (
            f"{song.stream.name}: {seconds:.1f} s in {spent:.2f} s "
            f"(real-time factor {spent / seconds:.3g}, network {song.network_seconds:.2f} s)"
        )
        return "\n".join([head, *(f"  {path}" for path in passage.job.paths)])

    def _open_output(self, song: SongSeparation, job: Job) -> AbstractContextManager[Write]:
        stream: AudioStream = song.stream
        if not job.paths:
            frames = stream.frames if stream.is_exact else None
            return open_standard_output(self.form, stream.rate, song.channels, frames)
        paths = list(job.paths)
        return open_writers(paths, self.form, stream.rate, song.channels, stream.frames)

    def _open_bar(self, jobs: Sequence[Job]) -> tqdm:
        shown = self.shard.is_first and sys.stderr.isatty()
        total: float | None = None
        if shown:
            lengths = [
                None if job.song.is_standard_input else probe_seconds(Path(job.song.source))
                for job in jobs
            ]
            total = sum(length or 0.0 for length in lengths) if all(lengths) else None
        layout = BAR if total else None
        return tqdm(total=total, unit=" s", unit_scale=True, bar_format=layout, disable=not shown)

    def _progress(self, frames: int) -> None:
        seconds = frames / self.separator.model.config.sample_rate
        self._audio_seconds += seconds
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed:
            factor = elapsed / self._audio_seconds
            self._bar.set_postfix_str(f"real-time factor {factor:.2g}", refresh=False)
        self._bar.update(seconds)

    def _say(self, text: str) -> None:
        tqdm.write(text, file=self._text)

    def _say_error(self, text: str) -> None:
        tqdm.write(f"error: {' '.join(text.split())}", file=sys.stderr)

    def _summarise(self, skipped: int, tried: int, failed: list[str], spent: float) -> None:
        if skipped:
            self._say(f"{skipped} skipped: their stems exist")
        if failed and self.shard.world_size > 1:
            self._say(f"failed: {', '.join(failed)}")
        elif failed and tried > 1:
            done = tried - len(failed)
            self._say(f"{done} of {tried} songs separated; failed: {', '.join(failed)}")
        elif tried > 1:
            factor = spent / max(self._audio_seconds, 1e-9)
            self._say(
                f"{tried} songs, {self._audio_seconds:.1f} s in {spent:.1f} s "
                f"(real-time factor {factor:.3g}, "
                f"{self._network_seconds / spent:.0%} of it the network)"
            )


def _outputs_of_song(first: Output, others: Outputs) -> Iterator[Output]:
    """Outputs up to the last of a song. Raises the InputError that stands in place of one."""
    output: Output | InputError = first
    while not isinstance(output, InputError):
        yield output
        if output[0].is_last:
            return
        _, output = next(others)
    raise output
