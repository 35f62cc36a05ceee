"""Score the tracks of a data set: in parallel, in bounded memory, and again from where it ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

from evaluation.estimates import Source
from evaluation.memory import available_bytes, museval_bytes
from evaluation.records import IDENTITY, TrackStore, claim_folder
from evaluation.scoring import Signals, TrackScores, score_track
from evaluation.signals import file_reader, track_reader
from models.errors import InputError
from models.files import whole_file
from training.data.parallel import processors
from training.data.sources import MIXTURE, SUBSETS, Track

logger = logging.getLogger(__name__)

# Below this much audio, starting processes takes longer than they save.
_SECONDS_WORTH_A_POOL = 240.0


@dataclass(frozen=True)
class Job:
    """One track to score, with everything a process needs for it.

    excerpts: folder that receives the loudest seconds of each estimate as FLAC.
    """

    track: Track
    estimates: dict[str, Path]
    label: str
    scorer: str
    excerpts: Path | None


@dataclass(frozen=True)
class Runner:
    """How to score.

    Attributes:
        scorer: a name in `scoring.SCORERS`.
        store: keeps scored tracks; None keeps nothing.
        jobs: processes that score; 0 chooses, 1 scores in this process.
        estimates: folder that keeps the estimates as `<track>/<stem>.wav`; None removes them.
        excerpts: folder for excerpts of the estimates, None for none.
    """

    scorer: str = "closed-form"
    store: TrackStore | None = None
    jobs: int = 0
    estimates: Path | None = None
    excerpts: Path | None = None

    def run(self, tracks: Sequence[Track], source: Source) -> list[TrackScores]:
        """Scores in the order of `tracks`.

        Raises InputError before any work if something is missing, or `estimates` is the data set
        or holds the estimates of another source; and if some track could not be scored, after all
        others were: they are in the store, and the same call goes on from there.
        """
        source.check(tracks)
        self._spare_references(tracks)
        self._claim_estimates(tracks, source)
        # Before any is scored: a file that changes meanwhile shall not pass for the one that was.
        keys = self._keys(tracks, source)
        done = self._load(tracks, source, keys)
        todo = [track for track in tracks if track.name not in done]
        failures: list[InputError] = []
        bar = tqdm(
            total=len(tracks),
            initial=len(done),
            desc=f"evaluate {source.label}",
            unit="track",
            disable=None,
        )
        with bar, tempfile.TemporaryDirectory(prefix="evaluation-") as work:
            for track, result in self._score(todo, source, self.estimates or Path(work)):
                bar.update()
                if isinstance(result, InputError):
                    failures.append(result)
                    continue
                done[track.name] = result
                if self.store:
                    self.store.save(result, keys[track.name])
        if failures:
            raise InputError(self._report(failures, len(done)))
        return [done[track.name] for track in tracks]

    def _keys(self, tracks: Sequence[Track], source: Source) -> dict[str, str]:
        if self.store is None:
            return {}
        return {track.name: self.store.key(_files(track, source)) for track in tracks}

    def _load(
        self, tracks: Sequence[Track], source: Source, keys: dict[str, str]
    ) -> dict[str, TrackScores]:
        if self.store is None:
            return {}
        found = {
            track.name: self.store.load(track.name, keys[track.name])
            for track in tracks
            if self._has_estimates(track, source)
        }
        done = {
            name: scores
            for name, scores in found.items()
            if scores is not None and self._has_excerpts(scores)
        }
        if done:
            logger.warning("%d of %d tracks are scored already", len(done), len(tracks))
        return done

    def _spare_references(self, tracks: Sequence[Track]) -> None:
        """Estimates have the names of the true stems: in the data set they would replace them."""
        if self.estimates is None:
            return
        roots = {track.root.resolve() for track in tracks}
        stems = {path.resolve().parent for track in tracks for path in track.files} - roots
        kept = stems | {(root / subset).resolve() for root in roots for subset in SUBSETS}
        made = [self.estimates, *(self.estimates / track.name for track in tracks)]
        for folder in (path.resolve() for path in made):
            if folder in roots or not kept.isdisjoint([folder, *folder.parents]):
                raise InputError(
                    f"--save-estimates {self.estimates}: holds the data set itself, whose stems"
                    " would be overwritten; name another folder"
                )

    def _claim_estimates(self, tracks: Sequence[Track], source: Source) -> None:
        """Estimates of two sources have the same names: a folder keeps those of one."""
        if self.estimates is None or any(source.inputs(track) for track in tracks):
            return
        files = (self.estimates / t.name / f"{stem}.wav" for t in tracks for stem in source.stems)
        is_marked = (self.estimates / IDENTITY).is_file()
        if not is_marked and any(path.is_file() for path in files):
            raise InputError(
                f"{self.estimates}: holds stems of an unknown origin;"
                " name another --save-estimates, or delete the folder"
            )
        claim_folder(self.estimates, source.identity, "--save-estimates")

    def _has_estimates(self, track: Track, source: Source) -> bool:
        """Whether the estimates that are to be kept are there."""
        if self.estimates is None or source.inputs(track):
            return True
        folder = self.estimates / track.name
        return all((folder / f"{stem}.wav").is_file() for stem in source.stems)

    def _has_excerpts(self, scores: TrackScores) -> bool:
        if self.excerpts is None:
            return True
        return all(
            _excerpt_path(self.excerpts, scores.track, stem).is_file() for stem in scores.excerpts
        )

    def _score(
        self, tracks: Sequence[Track], source: Source, folder: Path
    ) -> Iterator[tuple[Track, TrackScores | InputError]]:
        """Each track with its scores or what is wrong with it, as they come."""
        is_complete = all(set(source.stems) == set(track.stems) for track in tracks)
        sources = len(source.stems) + (not is_complete) if self.scorer == "museval" else 0
        jobs = self.jobs or choose_jobs(tracks, sources)
        pending: dict[Future[TrackScores], Track] = {}
        try:
            with _executor(jobs) as submit:
                for track in tracks:
                    try:
                        files = source.files(track, folder / track.name)
                    except InputError as error:
                        yield track, error
                        continue
                    job = Job(track, files, source.label, self.scorer, self.excerpts)
                    pending[submit(job)] = track
                    # No more estimates wait on the disk than there are processes to score them.
                    while len(pending) > jobs:
                        yield from self._collect(pending, folder)
                while pending:
                    yield from self._collect(pending, folder)
        except BrokenProcessPool as error:
            raise InputError(
                "a scoring process was killed, most likely for want of memory: use --jobs 1"
                " (scored tracks are kept)"
            ) from error

    def _collect(
        self, pending: dict[Future[TrackScores], Track], folder: Path
    ) -> Iterator[tuple[Track, TrackScores | InputError]]:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            track = pending.pop(future)
            if self.estimates is None:
                shutil.rmtree(folder / track.name, ignore_errors=True)
            try:
                yield track, future.result()
            except InputError as error:
                yield track, error

    def _report(self, failures: list[InputError], scored: int) -> str:
        kept = f"; the other {scored} tracks are kept, mend it and run the same command again"
        tail = kept if self.store and scored else ""
        if len(failures) == 1:
            return f"{failures[0]}{tail}"
        return f"{len(failures)} tracks could not be scored: {'; '.join(map(str, failures))}{tail}"


def score_job(job: Job) -> TrackScores:
    """Score one track from its files, in whichever process."""
    track = job.track
    signals = Signals(
        track=track.name,
        frames=track.frames,
        sample_rate=track.sample_rate,
        mixture=track_reader(track, MIXTURE),
        references={stem: track_reader(track, stem) for stem in job.estimates},
        estimates={stem: file_reader(path) for stem, path in job.estimates.items()},
        is_complete=set(job.estimates) == set(track.stems),
    )
    scores = score_track(signals, label=job.label, scorer=job.scorer)
    if job.excerpts:
        for stem, (start, frames) in scores.excerpts.items():
            path = _excerpt_path(job.excerpts, track.name, stem)
            with whole_file(path) as part:
                audio = signals.estimates[stem](start, frames).T.clip(-1, 1)
                soundfile.write(part, audio, track.sample_rate, subtype="PCM_16")
    return scores


def choose_jobs(tracks: Sequence[Track], museval_sources: int = 0) -> int:
    """One process per core, but one in all where there is little to score.

    museval_sources: sources that museval gets; it holds a whole track in memory, several times
    over, so there are only as many processes as fit into what is available now.
    """
    seconds = sum(track.frames / track.sample_rate for track in tracks)
    if seconds < _SECONDS_WORTH_A_POOL:
        return 1
    jobs = min(processors(), len(tracks))
    if museval_sources and (available := available_bytes()) is not None:
        need = max(museval_bytes(track.frames, museval_sources) for track in tracks)
        jobs = min(jobs, available // need)
    return max(1, jobs)


class _executor:
    """Context that gives `submit(job) -> Future`; one job at a time stays in this process."""

    def __init__(self, jobs: int) -> None:
        self._pool = _make_pool(jobs) if jobs > 1 else None

    def __enter__(self) -> Callable[[Job], Future[TrackScores]]:
        if self._pool is None:
            return _run_here
        pool = self._pool
        return lambda job: pool.submit(score_job, job)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # nobody waits for what still runs
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _run_here(job: Job) -> Future[TrackScores]:
    future: Future[TrackScores] = Future()
    try:
        future.set_result(score_job(job))
    except InputError as error:
        future.set_exception(error)
    return future


def _make_pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that are not forks of this one, which may hold a GPU and threads."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        # Imported once, in pages that all processes share.
        context.set_forkserver_preload(["evaluation.runner"])
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_process)


def _start_process() -> None:
    """Ctrl-C reaches every process, but the first one ends them; one thread each is enough."""
    import scipy.linalg  # noqa: F401  its BLAS must be loaded to be limited
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    threadpool_limits(1)


def _end_with_parent() -> None:
    """A first process that was killed cannot end the others: they watch it themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _excerpt_path(folder: Path, track: str, stem: str) -> Path:
    return folder / track / f"{stem}.flac"


def _files(track: Track, source: Source) -> list[Path]:
    """What the scores of a track depend on, on the disk."""
    return [*track.files, *source.inputs(track)]
