"""Counting the reads that fail during training, across the workers of a process."""

from __future__ import annotations

import logging

import torch
from torch.utils.data import get_worker_info

from models.errors import InputError
from training.data.track import CorruptAudioError

logger = logging.getLogger(__name__)

_MAX_WORKERS = 1023
# A share is judged over this many reads of a worker: a disk that goes away after days of good
# reads shows at once, and a few bad files of a small set do not stop a run by chance.
_WINDOW = 500
_FEWEST = 200


class ReadFailures:
    """Counts reads and failed reads; warns once a file.

    The counts lie in memory that the workers share, a row each, so that none has to wait.

    Args:
        max_failed_share: stop when more than this share of a worker's latest reads failed.
    """

    def __init__(self, max_failed_share: float = 1.0) -> None:
        self.max_failed_share = max_failed_share
        self._counts = torch.zeros(1 + _MAX_WORKERS, 2, dtype=torch.int64).share_memory_()
        self._recent_share = 0.0  # of this worker, exponentially forgotten
        self._seen = 0

    @property
    def reads(self) -> int:
        """All reads so far."""
        return int(self._counts[:, 0].sum())

    @property
    def failed(self) -> int:
        """All failed reads so far."""
        return int(self._counts[:, 1].sum())

    @property
    def failed_share(self) -> float:
        """Share of all reads that failed."""
        return self.failed / max(1, self.reads)

    def succeeded(self) -> None:
        """Count a read."""
        self._count(failed=False)

    def failure(self, error: CorruptAudioError, reported: torch.Tensor) -> None:
        """Count a failed read and warn of its file.

        Args:
            error: names the file and what is wrong with it.
            reported: a shared uint8 scalar of that file, set when it has been reported.

        Raises:
            InputError: too many of the latest reads failed.
        """
        self._count(failed=True)
        # Never remembered to skip the next read: examples would depend on their order.
        if not reported:
            reported.fill_(1)
            logger.warning("file skipped: %s", error)
        if self._seen >= _FEWEST and self._recent_share > self.max_failed_share:
            raise InputError(
                f"{100 * self._recent_share:.1f}% of the latest reads of training data failed, more"
                f" than data.max_failed_share={self.max_failed_share:g} allows; the last one:"
                f" {error}: check the disk, then go on with --resume auto"
            )

    def _count(self, failed: bool) -> None:
        worker = get_worker_info()
        row = self._counts[0 if worker is None else 1 + worker.id % _MAX_WORKERS]
        row[0] += 1
        row[1] += int(failed)
        self._seen += 1
        self._recent_share += (failed - self._recent_share) / min(self._seen, _WINDOW)
