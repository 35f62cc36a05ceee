"""The data of a run: training examples that never end and validation segments that never change."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Subset

from models.errors import InputError, is_of_dead_worker
from training.config import Config
from training.data.activity import ActivityIndex, build_activity_index
from training.data.augment import Augmentation
from training.data.cache import HeaderCache
from training.data.mixing import (
    AlignedSegments,
    Example,
    ExampleCounter,
    RandomMixes,
    ShortFirst,
    collate_pieces,
    collate_readable,
)
from training.data.sources import Split, Track, open_dataset
from training.run_folder import RunFolder
from training.signals import ignore_interrupts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Indexed:
    """The tracks of a subset and where in them each stem is active."""

    tracks: Sequence[Track]
    index: ActivityIndex


def open_subset(config: Config, subset: str, headers: dict[Path, HeaderCache]) -> list[Track]:
    """The tracks of "train", "valid" or "test" as the configuration asks; see `open_dataset`."""
    data = config.data
    return open_dataset(
        data.roots,
        subset,
        sample_rate=config.model.sample_rate,
        stems=data.stems,
        missing_stems=data.missing_stems,
        split=Split(data.valid_tracks, data.valid_fraction),
        cache_dir=data.cache_dir,
        skip_broken=data.skip_broken,
        headers=headers,
    )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: it walks a large data set again and again while that is opened."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_collection()
def prepare_indices(config: Config, folder: RunFolder) -> dict[str, Indexed]:
    """Open the data roots, and find the active windows where the cache lacks them.

    Every rank may call it at any time: the activity index of a data root is built under a file lock
    by whoever comes first, and the others wait and then read it, which takes minutes for a large
    data set.

    Returns:
        "train" and "valid", with tracks and windows in the same order on every rank.

    Raises:
        InputError: a data set is missing or broken; all its broken tracks in one message.
    """
    headers: dict[Path, HeaderCache] = {}
    tracks = {subset: open_subset(config, subset, headers) for subset in ("train", "valid")}
    _warn_of_shared_names(tracks)
    # Nothing is written before the data set is known to be sound.
    folder.create()
    for known in headers.values():
        known.save()
    train, valid = tracks["train"], tracks["valid"]
    data = config.data
    where = ", ".join(map(str, data.roots))
    logger.info("%d tracks to train on and %d to validate on in %s", len(train), len(valid), where)
    both = [*train, *valid]
    index = build_activity_index(both, data.stems, config.segment_frames, data.cache_dir)
    return {
        "train": Indexed(train, index.part(0, len(train))),
        "valid": Indexed(valid, index.part(len(train), len(both))),
    }


def make_mixes(config: Config, tracks: Sequence[Track], index: ActivityIndex) -> RandomMixes:
    """The training examples of a run by number, as the configuration mixes them."""
    data = config.data
    return RandomMixes(
        tracks,
        index,
        config.model.stem_names,
        seed=config.training.seed,
        silent_prob=data.silent_prob,
        gain=(data.gain_min, data.gain_max),
        augmentation=Augmentation(
            **{field.name: getattr(data, field.name) for field in fields(Augmentation)}
        ),
        max_failed_share=data.max_failed_share,
    )


class Loaders:
    """Batches of `mixture [b, c, t]` and `target [b, n, c, t]` as the configuration asks.

    b is `training.batch_size`, for the first examples `data.short_pieces` times that.

    Args:
        config: the whole configuration.
        folder: the run's, made once the data set is known to be sound.
        rank: number of this process; each gives other examples.
        world_size: number of processes.

    Attributes:
        mixes: the training examples of full length by number.
        segments: the validation segments of all ranks.

    Raises:
        InputError: the data set is missing, broken, or has nothing to train or validate on.
    """

    def __init__(
        self, config: Config, folder: RunFolder, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config = config
        self.rank, self.world_size = rank, world_size
        data, stem_names = config.data, config.model.stem_names
        prepared = prepare_indices(config, folder)
        train, valid = prepared["train"], prepared["valid"]
        self.mixes = make_mixes(config, train.tracks, train.index)
        self._examples = ShortFirst(self.mixes, data.short_until, data.short_pieces)
        self.segments = AlignedSegments(valid.tracks, valid.index, stem_names, data.valid_segments)
        self._unindexed = len(train.index.broken)  # of both
        self._validation: DataLoader | None = None

    def active_windows(self) -> int:
        """How many segments of the training set hold an active target stem."""
        windows = self.mixes.windows
        return sum(len(windows[stem]) for stem in self.config.model.stem_names)

    def step(self, start: int, count: int) -> Iterator[Example]:
        """This rank's batches of the `count` examples from number `start` on, drawn again."""
        numbers = ExampleCounter(start, start + count, self.rank, self.world_size)
        for members in BatchSampler(numbers, self.config.training.batch_size, drop_last=False):
            yield collate_pieces([self._examples[number] for number in members])

    def training(self, start: int) -> Iterator[Example]:
        """Training batches of this rank from the example number `start` on, without end.

        Args:
            start: examples that all ranks together have consumed before.
        """
        sampler = ExampleCounter(start, rank=self.rank, world_size=self.world_size)
        return plain_errors(
            self._loader(self._examples, sampler=sampler, collate_fn=collate_pieces)
        )

    def validation(self) -> Iterable[Example]:
        """The validation segments of this rank (rank, rank + world_size, ...), in order.

        A rank may have none. A segment that can no longer be read is left out with a warning.
        """
        if self._validation is None:
            mine = range(self.rank, len(self.segments), self.world_size)
            workers = min(self.config.data.num_workers, len(mine))
            self._validation = self._loader(
                Subset(self.segments, mine),
                num_workers=workers,
                collate_fn=collate_readable,
                persistent_workers=workers > 0,
            )
        for batch in plain_errors(self._validation):
            if batch is not None:
                yield batch

    def read_failures(self) -> dict[str, float]:
        """What could not be read so far, for the log of a training step.

        Returns:
            data/broken_files: stems left out when the activity index was built, or failed since.
            data/failed_reads: failed reads of training data in this process and its workers.
            data/failed_share: their share of all reads.
            data/lost_valid_segments: validation segments left out the last time.
        """
        failures = self.mixes.failures
        return {
            "data/broken_files": float(self._unindexed + int(self.mixes.broken.sum())),
            "data/failed_reads": float(failures.failed),
            "data/failed_share": failures.failed_share,
            "data/lost_valid_segments": float(self.segments.unreadable.sum()),
        }

    def _loader(self, dataset: Any, **options: Any) -> DataLoader:
        workers = options.setdefault("num_workers", self.config.data.num_workers)
        return DataLoader(
            dataset,
            batch_size=self.config.training.batch_size,
            prefetch_factor=self.config.data.prefetch if workers else None,
            worker_init_fn=ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            # A loader draws a seed for its workers, which must not move the global generator.
            generator=torch.Generator(),
            **options,
        )


def plain_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, with an InputError of a worker in its own words.

    The DataLoader puts the worker's traceback in front of them.
    """
    try:
        yield from batches
    except InputError as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(re.sub(r"^[\w.]*Error: ", "", last)) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if "Bus error" in str(error) or "No space left" in str(error):
            raise InputError(
                f"a data worker cannot hand over its batches ({_lines(error)[-1]}): enlarge"
                " /dev/shm (docker run --shm-size=8g) or set data.num_workers=0"
            ) from error
        if isinstance(error, RuntimeError) and not is_of_dead_worker(error):
            raise  # a fault of ours, with the worker's traceback
        # Reading what a dead worker was handing over fails as a broken or ended connection.
        raise worker_death(error) from error


def worker_death(error: Exception) -> InputError:
    """What to tell of a data worker that died, as `error` shows."""
    return InputError(
        f"a data worker died ({_lines(error)[0]}): if memory ran out, lower data.num_workers or"
        " data.prefetch; go on with --resume auto"
    )


def _lines(error: Exception) -> list[str]:
    return [line for line in str(error).splitlines() if line.strip()] or [repr(error)]


def _warn_of_shared_names(tracks: dict[str, list[Track]]) -> None:
    """Two data sets may hold the same song, and one of them validates on it."""
    names = {subset: {track.name for track in members} for subset, members in tracks.items()}
    shared = sorted(names["train"] & names["valid"])
    if shared:
        logger.warning(
            "%d name(s) both in train and in valid (%s): if they are the same songs, the"
            " validation scores are too good; name them in data.valid_tracks",
            len(shared),
            ", ".join(shared[:5]),
        )
