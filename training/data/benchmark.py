"""How fast training data come, measured on this machine.

    python -m training.data.benchmark

makes a synthetic set in a temporary folder and measures, through the loaders a run uses: mixed
examples a second from wav, FLAC and mapped arrays; the same from `musdb`'s own access; how long a
training step of 0.2 s waits; the memory of a worker; the time to index 150 tracks of 4 minutes and
to open 10,000. The files are in the page cache, as they are in training after the first epoch where
they fit the memory. Every example reads all its stems: silence, which saves one read in ten in the
paper's recipe, is switched off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.managers import ListProxy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from models.errors import InputError, log_level, run_command
from models.files import try_writing, write_text
from models.provenance import processor_name, provenance
from training.config import Config, parse_config
from training.data.activity import build_activity_index
from training.data.activity_cache import Activity, save_activity
from training.data.cache import HeaderCache, cache_folders
from training.data.mixing import Example
from training.data.parallel import processors
from training.data.prepare import prepare
from training.data.sources import STEMS, Track, open_dataset
from training.data.track import MIXTURE, Expected
from training.loaders import Loaders, prepare_indices
from training.run_folder import RunFolder

BATCH = 5  # of configs/bsmamba2.yaml
SEGMENT_SECONDS = 8
SAMPLE_RATE = 44_100
STEP_SECONDS = 0.2  # of a training step of 5 segments on a modern GPU
WARM_UP = 4  # batches until the workers are under way
MIB = 2**20


@dataclass(frozen=True)
class Result:
    """A measured value, and the one to reach."""

    name: str
    value: float
    unit: str
    goal: str = ""


class MusdbMixes(Dataset[Example]):
    """The same mixes by musdb's own access: `chunk_start`, `chunk_duration`, `source.audio`."""

    def __init__(self, root: Path) -> None:
        import musdb

        self.tracks = musdb.DB(root=str(root), subsets="train", is_wav=True).tracks

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> Example:
        rng = np.random.default_rng(i)
        stems = []
        for stem in STEMS:
            track = self.tracks[rng.integers(len(self.tracks))]
            track.chunk_duration = SEGMENT_SECONDS
            track.chunk_start = rng.uniform(0, track.duration - SEGMENT_SECONDS)
            stems.append(np.float32(rng.uniform(0.5, 1.5)) * track.sources[stem].audio.T)
        scaled = torch.from_numpy(np.stack(stems)).float()
        return {"mixture": scaled.sum(0), "target": scaled[:1]}


def examples_per_second(batches: Iterator[Example], seconds: float) -> float:
    """Rate at which a consumer that does nothing else gets examples."""
    for _ in range(WARM_UP):
        next(batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += len(next(batches)["mixture"])
    return count / (time.perf_counter() - began)


def measure_loading(folder: Path, workers: int, seconds: float) -> Iterator[Result]:
    """Examples a second by format, and by musdb."""
    root = folder / "set"
    in_a_process(write_songs, root, 8, 60)
    rates = {}
    for form, goal in (("wav", "60"), ("flac", "25"), ("npy", "")):
        cache = folder / f"cache_{form}"
        if form != "wav":
            expected = Expected(SAMPLE_RATE)
            prepare(root, expected, 1 << 19, form=form, copy_all=True, cache_dir=cache)
        loaders = make_loaders(root, folder / "run", workers, cache)
        rates[form] = examples_per_second(loaders.training(0), seconds)
        yield Result(f"{form}, {workers} workers", rates[form], "examples/s", goal)
    peer = DataLoader(MusdbMixes(root), BATCH, num_workers=workers)
    rate = examples_per_second(iter(peer), seconds)
    yield Result(f"musdb's access to the same wav, {workers} workers", rate, "examples/s")
    yield Result("ours / musdb's", rates["wav"] / rate, "times")
    loaders = make_loaders(root, folder / "run", workers, folder / "cache_wav")
    yield Result(
        f"waiting, {workers} workers, steps of {STEP_SECONDS:g} s",
        100 * waiting_share(loaders, steps=round(2 * seconds / STEP_SECONDS)),
        "% of the time",
        "2",
    )


def waiting_share(loaders: Loaders, steps: int) -> float:
    """Share of the time that a consumer waits, once under way, which is busy for each step."""
    batches = taken_ahead(loaders.training(0))
    for _ in range(WARM_UP):
        next(batches)
        time.sleep(STEP_SECONDS)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        time.sleep(STEP_SECONDS)
        del batch  # within the step: giving back its memory takes as long as receiving it
    return waited / (time.perf_counter() - began)


def taken_ahead(batches: Iterator[Example]) -> Iterator[Example]:
    """Batches received by a thread, as the loader's pinning thread does on a GPU machine.

    Receiving one from a worker takes 6 ms, most of it for handing over the shared memory.
    """
    ready: queue.Queue[Example] = queue.Queue(maxsize=2)

    def receive() -> None:
        for batch in batches:
            ready.put(batch)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        yield ready.get()


def measure_index(folder: Path, tracks: int) -> Iterator[Result]:
    """Time to find the activity of `tracks` tracks of 4 minutes, the same few by hard links."""
    root = four_minute_tracks(folder, tracks)
    opened = open_dataset(root, "train")
    began = time.perf_counter()
    index = build_activity_index(opened, STEMS, SEGMENT_SECONDS * SAMPLE_RATE)
    name = f"activity index of {tracks} tracks of 4 minutes, {processors()} threads"
    yield Result(name, time.perf_counter() - began, "s", "180")
    windows = sum(len(rows) for rows in index.windows.values())
    yield Result("active windows found", windows, "")
    shutil.rmtree(root)


def measure_opening(folder: Path, tracks: int, workers: int) -> Iterator[Result]:
    """Time to open a data set with a finished index, and the memory of its workers."""
    root = four_minute_tracks(folder, tracks)
    config = make_config(root, folder / "run", workers)
    headers: dict[Path, HeaderCache] = {}
    began = time.perf_counter()
    opened = open_dataset(root, "train", headers=headers)
    opened += open_dataset(root, "valid", headers=headers)
    yield Result(f"reading the headers of {tracks} tracks", time.perf_counter() - began, "s")
    headers[root].save()
    write_index(root, opened)
    del opened, headers  # a run has none of them
    began = time.perf_counter()
    prepare_indices(config, RunFolder(config.run.dir))
    yield Result(f"opening {tracks} indexed tracks", time.perf_counter() - began, "s", "2")
    loaders = Loaders(config, RunFolder(config.run.dir))
    batches = loaders.training(0)
    for _ in itertools.islice(batches, 20 * workers):
        pass
    resident, own = (max(sizes) for sizes in zip(*worker_memory(), strict=True))
    yield Result("resident memory of a worker", resident / MIB, "MiB", "400")
    yield Result("of which not shared", own / MIB, "MiB")


def write_index(root: Path, tracks: list[Track]) -> None:
    """An index of a large set as if its files had been searched: every window is active."""
    headers = HeaderCache(root, cache_folders(root))
    segment = SEGMENT_SECONDS * SAMPLE_RATE
    starts = np.arange(0, tracks[0].frames - segment + 1, segment // 2)
    known = {}
    for track in tracks:
        for stem in track.stems:
            file = track.file(stem)
            assert file is not None
            key = f"{Path(file.path).relative_to(root)}#{stem}"
            known[key] = Activity((file.size, file.modified), starts)
    save_activity(headers.folders[0] / f"activity_{segment}.npz", segment, known)


def worker_memory() -> list[tuple[int, int]]:
    """Resident and private bytes of every worker that runs (Linux)."""
    sizes = []
    for child in multiprocessing.active_children():
        lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()[1:]
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        sizes.append((fields["Rss"], fields["Private_Clean"] + fields["Private_Dirty"]))
    return sizes


def four_minute_tracks(folder: Path, tracks: int) -> Path:
    """A data root of `tracks` tracks that are hard links to three songs."""
    songs = folder / "songs"
    if not songs.exists():
        in_a_process(write_songs, songs, 4, 240)
    sources = sorted((songs / "train").iterdir())
    root = folder / f"linked_{tracks}"
    for number in range(tracks):
        target = root / "train" / f"track {number:05d}"
        target.mkdir(parents=True)
        for stem in (*STEMS, MIXTURE):
            source = sources[number % len(sources)] / f"{stem}.wav"
            (target / f"{stem}.wav").hardlink_to(source)
    return root


def write_songs(root: Path, tracks: int, seconds: float) -> None:
    """A synthetic data set whose songs have this length."""
    from training.data.synthetic import write_synthetic

    write_synthetic(root, tracks=tracks, seconds=seconds)


def in_a_process(work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own: what it imports counts in no worker's memory."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise InputError("the benchmark stopped early: see above")


def measure(part: Callable[[], Iterator[Result]], results: ListProxy[Result]) -> None:
    """Print the results of a part as they come, and append them to a shared list."""
    for result in part():
        results.append(result)
        print(format_result(result), flush=True)


def make_config(root: Path, run: Path, workers: int, cache: Path | None = None) -> Config:
    """The paper's recipe without silence."""
    data = {"root": str(root), "num_workers": workers, "silent_prob": 0.0}
    if cache is not None:
        data["cache_dir"] = str(cache)
    return parse_config({"data": data, "run": {"dir": str(run)}})


def make_loaders(root: Path, run: Path, workers: int, cache: Path | None = None) -> Loaders:
    """The loaders of a run of the paper's recipe on a data root."""
    config = make_config(root, run, workers, cache)
    return Loaders(config, RunFolder(config.run.dir))


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    return {"processor": processor_name(), "processors": str(processors()), **provenance()}


def format_result(result: Result) -> str:
    """One line of the table."""
    goal = f"   (goal: {result.goal})" if result.goal else ""
    return f"{result.name:<58} {result.value:>10.4g} {result.unit}{goal}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.benchmark", description="Measure how fast training data come."
    )
    parts = ("loading", "index", "opening")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="(all)")
    parser.add_argument("--workers", type=int, default=2, help="of the loader (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each measurement (%(default)s)"
    )
    parser.add_argument(
        "--index-tracks", type=int, default=150, metavar="N", help="to index (%(default)s)"
    )
    parser.add_argument(
        "--open-tracks", type=int, default=10_000, metavar="N", help="to open (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="to work in; needs 2 GB (a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    args = parser.parse_args(argv)
    if min(args.workers, args.index_tracks, args.seconds) <= 0 or args.open_tracks < 2:
        parser.error("--workers, --seconds and the numbers of tracks must be above 0 (2 to open)")
    return args


@log_level(logging.WARNING, "training")
def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    about = machine()
    if args.json:
        try_writing(args.json.absolute().parent)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    with (
        tempfile.TemporaryDirectory(dir=args.folder, prefix="data_benchmark_") as temporary,
        multiprocessing.Manager() as manager,
    ):
        folder = Path(temporary)
        parts: dict[str, Callable[[], Iterator[Result]]] = {
            "loading": partial(measure_loading, folder, args.workers, args.seconds),
            "index": partial(measure_index, folder, args.index_tracks),
            "opening": partial(measure_opening, folder, args.open_tracks, args.workers),
        }
        shared = manager.list()
        for part in args.parts:
            in_a_process(measure, parts[part], shared)
        results = list(shared)
    if args.json:
        report = {"machine": about, "results": [asdict(result) for result in results]}
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
