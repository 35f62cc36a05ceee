"""Many songs, one after the other: what fails is told and counted, and the others go on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

from models.errors import InputError
from separation.overlap_add import Chunk
from separation.plan import Job, Problem
from separation.reader import AudioStream, open_audio, probe_seconds
from separation.separator import Separator
from separation.sharding import Shard
from separation.streaming import SongSeparation
from separation.threads import ahead, drain
from separation.writer import Format, Write, open_standard_output, open_writers

BATCHES_AHEAD = 1  # decoded and cut while the network works
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"


Outputs = Iterator[tuple[Chunk, Tensor]]


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
    _audio_seconds: float = field(default=0.0, init=False)

    def run(self, jobs: Sequence[Job], problems: Sequence[Problem], skip_existing: bool) -> int:
        """Separate every job; returns the exit code, 2 if any song or problem failed.

        problems: songs that could not become jobs, the same in all processes.
        """
        # Sound on standard output leaves no room for words there.
        self._text = sys.stdout if all(job.paths for job in jobs) else sys.stderr
        todo = [job for job in jobs if not (skip_existing and job.is_done)]
        failed: list[str] = []
        start = time.perf_counter()
        with self._open_bar(todo) as self._bar:
            for problem in problems if self.shard.is_first else []:
                self._say_error(problem.text)
                failed += problem.sources
            for job in todo:
                try:
                    self._say(self._separate(job))
                except InputError as error:
                    self._say_error(str(error))
                    failed.append(job.song.source)
        spent = time.perf_counter() - start
        failed = self.shard.gather(failed)
        if self.shard.is_first:
            skipped = len(jobs) - len(todo)
            tried = len(todo) + sum(len(problem.sources) for problem in problems)
            self._summarise(skipped, tried, failed, spent)
        return 2 if failed else 0

    def _separate(self, job: Job) -> str:
        """Separate one song; returns what was done, for people."""
        start = time.perf_counter()
        self._bar.set_description(Path(job.song.source).name, refresh=False)
        with open_audio(job.song.source) as stream:
            song = SongSeparation(self.separator, stream, self.stems, self.downmix)
            inputs = ahead(song.inputs(), BATCHES_AHEAD)
            # A batch is cross-faded and encoded while the network works on the next.
            behind = self.separator.batch_size + 1
            try:
                drain(song.network(inputs), self._writing(song, job), behind)
            finally:
                inputs.close()  # type: ignore[attr-defined]
            seconds = song.frames / stream.rate
        spent = time.perf_counter() - start
        share = song.network_seconds / spent
        head = (
            f"{song.stream.name}: {seconds:.1f} s in {spent:.1f} s "
            f"(real-time factor {spent / seconds:.3g}, {share:.0%} of it the network)"
        )
        return "\n".join([head, *(f"  {path}" for path in job.paths)])

    def _writing(self, song: SongSeparation, job: Job) -> Callable[[Outputs], None]:
        def consume(chunks: Outputs) -> None:
            blocks = song.outputs(chunks, self._progress)  # n c t
            first = next(blocks)  # a song that cannot be read leaves no folder behind
            with self._open_output(song, job) as write:
                write(first)
                for block in blocks:
                    write(block)

        return consume

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
                f"(real-time factor {factor:.3g})"
            )
