"""The data of a run: training examples that never end and validation segments that never change."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import BatchSampler, DataLoader, default_collate

from models.errors import InputError
from training.config import Config
from training.data.activity import build_activity_index
from training.data.mixing import AlignedSegments, Example, ExampleCounter, RandomMixes
from training.data.sources import open_dataset
from training.run_folder import RunFolder
from training.signals import ignore_interrupts

logger = logging.getLogger(__name__)


class Loaders:
    """Batches of `mixture [b, c, t]` and `target [b, n, c, t]` as the configuration asks.

    Args:
        config: the whole configuration.
        folder: receives the activity index.

    Raises:
        InputError: the data set is missing, broken, or has nothing to train or validate on.
    """

    def __init__(
        self, config: Config, folder: RunFolder, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        data, model = config.data, config.model
        tracks = {
            subset: open_dataset(data.root, subset, sample_rate=model.sample_rate, stems=data.stems)
            for subset in ("train", "valid")
        }
        # Nothing is written before the data set is known to be sound.
        folder.create()
        indices = {}
        for subset, members in tracks.items():
            logger.info("%s: %d tracks in %s", subset, len(members), data.root)
            cache = folder.root / "cache" / f"activity_{subset}.json"
            frames = config.segment_frames
            indices[subset] = build_activity_index(members, data.stems, frames, cache)
        self.mixes = RandomMixes(
            tracks["train"],
            indices["train"],
            model.stem_names,
            seed=config.training.seed,
            silent_prob=data.silent_prob,
            gain=(data.gain_min, data.gain_max),
        )
        self.segments = AlignedSegments(
            tracks["valid"], indices["valid"], model.stem_names, data.valid_segments
        )

    def active_windows(self) -> int:
        """How many segments of the training set hold an active target stem."""
        windows = self.mixes.windows
        return sum(len(windows[stem]) for stem in self.config.model.stem_names)

    def training(self, start: int) -> Iterator[Example]:
        """Training batches from the example number `start` on, without end."""
        workers = self.config.data.num_workers
        loader = DataLoader(
            self.mixes,
            batch_size=self.config.training.batch_size,
            sampler=ExampleCounter(start, None, self.rank, self.world_size),
            num_workers=workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            # A loader draws a seed for its workers, which must not move the global generator.
            generator=torch.Generator(),
        )
        return plain_errors(loader)

    def step(self, start: int, count: int) -> Iterator[Example]:
        """This rank's batches of the `count` examples from number `start` on, drawn again."""
        numbers = ExampleCounter(start, start + count, self.rank, self.world_size)
        batches = BatchSampler(numbers, self.config.training.batch_size, drop_last=False)
        for members in batches:
            yield default_collate([self.mixes[number] for number in members])

    def validation(self) -> Iterable[Example]:
        """This rank's validation segments, in order: every `world_size`-th from `rank` on."""
        loader = DataLoader(
            self.segments,
            batch_size=self.config.training.batch_size,
            sampler=range(self.rank, len(self.segments), self.world_size),
            num_workers=self.config.data.num_workers,
            worker_init_fn=ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        return plain_errors(loader)


def plain_errors(batches: Iterable[Example]) -> Iterator[Example]:
    """The batches, with an InputError of a worker in its own words.

    The DataLoader puts the worker's traceback in front of them.
    """
    try:
        yield from batches
    except InputError as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(re.sub(r"^[\w.]*Error: ", "", last)) from error
