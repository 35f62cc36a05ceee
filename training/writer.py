"""Files written beside the training, so that no step waits for the disk."""

from __future__ import annotations

import queue
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from models.errors import InputError

_ALIGNMENT = 16  # elements: a copied tensor starts where vector loads can


@torch.no_grad()
def snapshot(state: Any) -> Any:
    """A copy of nested containers whose tensors no later step changes, each on its device.

    Nothing waits for the device: the copies are queued behind the steps before. On a GPU the
    tensors of a type lie in one buffer, for `on_host`.
    """
    leaves, structure = tree_flatten(state)
    groups = defaultdict(list)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            groups[leaf.device, leaf.dtype].append(index)
    for (device, _), indices in groups.items():
        sources = [leaves[index].detach() for index in indices]
        on_cpu = device.type == "cpu"
        copies = [source.clone() for source in sources] if on_cpu else packed(sources)
        for index, copy in zip(indices, copies, strict=True):
            leaves[index] = copy
    return tree_unflatten(leaves, structure)


def packed(sources: list[Tensor]) -> list[Tensor]:
    """Copies of tensors of one device and type, one behind the other in one buffer."""
    sizes = [-(-source.numel() // _ALIGNMENT) * _ALIGNMENT for source in sources]
    parts = sources[0].new_empty(sum(sizes)).split(sizes)
    copies = [p[: s.numel()].view(s.shape) for p, s in zip(parts, sources, strict=True)]
    torch._foreach_copy_(copies, sources)  # thousands of small tensors, in a few launches
    return copies


def on_host(state: Any) -> Any:
    """A `snapshot` on the CPU, each tensor with memory of its own.

    A buffer crosses as one: to fetch thousands of small tensors keeps Python and the driver busy.
    """
    buffers: dict[tuple[torch.dtype, int], Tensor] = {}

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
            return leaf
        storage = leaf.untyped_storage()
        key = leaf.dtype, storage.data_ptr()
        if key not in buffers:
            buffers[key] = _fetch(leaf.new_empty(0).set_(storage))
        # A view would take the whole buffer into every file and model that it is put in.
        whole = buffers[key]
        return whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset()).clone()

    return tree_map(move, state)


# Elements that are on their way from the GPU at once.
_PIECE = 1 << 20


def _fetch(buffer: Tensor) -> Tensor:
    """A flat GPU tensor on the CPU, by way of a little pinned memory.

    Copied to pageable memory at once, 770 MB held the training up for half a second (H100).
    """
    whole = torch.empty(buffer.shape, dtype=buffer.dtype)
    pinned = torch.empty(min(_PIECE, len(buffer)), dtype=buffer.dtype, pin_memory=True)
    for source, target in zip(buffer.split(_PIECE), whole.split(_PIECE), strict=True):
        piece = pinned[: len(source)].copy_(source, non_blocking=True)
        torch.cuda.current_stream(buffer.device).synchronize()
        target.copy_(piece)
    return whole


def unwritable(error: OSError, what: object) -> InputError:
    """What to tell of a file of the run that cannot be written; `what` names it if it must."""
    return InputError(
        f"{error.filename or what}: cannot be written: {error.strerror or error};"
        " free space or mend the disk, then go on with --resume auto from the last"
        " checkpoint, which is whole"
    )


# How long a job may keep Python to itself once the training wants it. With Python's own 5 ms a
# checkpoint of 770 MB took half a second from a busy thread beside it, so it takes 40 ms.
_HANDOVER_S = 1e-4


class BackgroundWriter:
    """Runs jobs one after the other in a thread; an error stops the run at its next call.

    At most two jobs wait, since each holds a copy of the weights: a third makes `submit` wait.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=2)
        self._error: BaseException | None = None
        # A daemon: a second Ctrl-C leaves at once, and a part of a file never has its name.
        self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
        self._thread.start()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not KeyboardInterrupt:  # a second Ctrl-C waits for nothing
            self.close()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; raises what an earlier one raised."""
        self.check()
        self._jobs.put(_on_side_stream(job))

    def check(self) -> None:
        """Raise what a job raised.

        Raises:
            InputError: a file could not be written.
        """
        if self._error is None:
            return
        error, self._error = self._error, None
        if isinstance(error, OSError):
            raise unwritable(error, "checkpoint") from error
        raise error

    def close(self) -> None:
        """Wait for all jobs and end the thread; raises what one of them raised."""
        self._jobs.put(None)
        self._thread.join()
        self.check()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:  # else files that are whole would be replaced
                    with _quick_handover():
                        job()
            except BaseException as error:  # handed to the training thread
                self._error = error
            del job  # and its copy of the weights, before the next one comes


@contextmanager
def _quick_handover() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_HANDOVER_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _on_side_stream(job: Callable[[], None]) -> Callable[[], None]:
    """The job with its copies from the GPU beside the training's kernels, after those so far."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return job
    stream = torch.cuda.Stream()  # of the training's device: a new thread's own is the first
    stream.wait_stream(torch.cuda.current_stream())

    def run() -> None:
        with torch.cuda.stream(stream):
            job()

    return run
