"""A training step by component: data, STFT, network, loss, backward, optimizer."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import PEER, Setting, has_peer, runnable_backends
from benchmarks.peer import peer_network
from benchmarks.timing import (
    OUT_OF_MEMORY,
    free_memory,
    peak_gib,
    reset_peak,
    synchronize,
    told,
)
from models import BSMamba2
from models.dispatch import kernel_errors
from training.config import Config, load_config
from training.loaders import Loaders
from training.loss import SeparationLoss
from training.run_folder import RunFolder
from training.validation import round_trip

COMPONENTS = ("data", "stft", "network", "loss", "backward", "optimizer")
COLUMNS = ("backend", "seconds", "batch", *(f"{c} ms" for c in COMPONENTS), "step ms", "peak GiB",
           "examples/s", "speed-up", "note")  # fmt: skip
WARMUP, REPEATS = 2, 7
BUDGET_S = 5.0  # a slow backend gets fewer repeats
SHORT_SECONDS = 1.0  # the sequential loop keeps a state a step: 8 s do not fit any GPU
CONFIG = Path(__file__).parents[1] / "configs" / "bsmamba2.yaml"


def rows(
    setting: Setting,
    seconds: Sequence[float] | None,
    note: Callable[[list[dict[str, Any]]], None] = lambda table: None,
) -> list[dict[str, Any]]:
    """One row a backend; `sequential` on a short segment, with gradient checkpointing.

    note: called with what is measured so far.
    """
    long = (seconds or [8.0 if setting.device.type == "cuda" else SHORT_SECONDS])[0]
    backends = runnable_backends(setting, whole_block=True)
    backends = [name for name in reversed(backends) if name != "sequential"]
    jobs = [("sequential", SHORT_SECONDS, 1), ("chunked", SHORT_SECONDS, 1)]
    # In PyTorch alone a GPU's long batch is slow and says nothing that the short one does not.
    jobs += [(n, long, setting.batch) for n in backends if n != "chunked" or len(backends) == 1]
    if has_peer(setting):
        jobs.append((PEER, long, setting.batch))
    table: list[dict[str, Any]] = []
    for job in jobs:
        if not setting.wants(job[0]):
            continue
        table.append(row := _row(setting, *job))
        # Examples of different lengths compare by the seconds of music a second.
        slow = table[0].get("music") if table[0]["backend"] == "sequential" else None
        if slow and row.get("music"):
            row["speed-up"] = row["music"] / slow
        note(table)
    return table


def verdict(table: Sequence[dict[str, Any]]) -> str:
    """One line: the fastest step, against the sequential loop and the authors' wiring."""
    timed = [row for row in table if row.get("music") and row["backend"] != PEER]
    if not timed:
        return "Verdict: no backend of this network trained a step."
    best = max(timed, key=lambda row: row["music"])
    text = (
        f"Verdict: {best['backend']} trains {best['music']:.3g} s of music a second, "
        f"{best.get('speed-up') or 1:.1f} times the sequential loop"
    )
    for row in table:
        if row["backend"] == PEER and row.get("music"):
            text += f" and {best['music'] / row['music']:.1f} times the authors' wiring"
    return text + "."


def _row(setting: Setting, backend: str, seconds: float, batch: int) -> dict[str, Any]:
    """Times of one backend, with half the batch again and again until memory suffices."""
    print(f"  {backend}, {batch} x {seconds:g} s", file=sys.stderr, flush=True)
    row: dict[str, Any] = {"backend": backend, "seconds": seconds, "batch": batch}
    if (seconds, batch) == (SHORT_SECONDS, 1):
        row["note"] = "short segment"
    free_memory(setting.device)
    failure = None
    try:
        measured = _measure(setting, backend, seconds, batch)
    except kernel_errors() as error:
        failure = told(error)
    if failure is not None:  # by now the error, and with it the network, is gone
        free_memory(setting.device)
        if batch == 1 or failure != OUT_OF_MEMORY:
            return row | {"step ms": failure}
        smaller = _row(setting, backend, seconds, batch // 2)
        return {"note": f"out of memory with {batch}"} | smaller
    times, step, peak = measured
    row |= {f"{name} ms": value for name, value in times.items()}
    rate = 1e3 * batch / step
    return row | {"step ms": step, "peak GiB": peak, "examples/s": rate, "music": rate * seconds}


def _measure(
    setting: Setting, backend: str, seconds: float, batch: int
) -> tuple[dict[str, float], float, float | None]:
    """Median milliseconds of every component, those of a whole step, and the peak memory.

    Waiting after each component hides no launch behind the device's work: the sum of them is more
    than the time of a step that runs as in training.
    """
    reset_peak(setting.device)
    model = _network(setting, backend)
    with tempfile.TemporaryDirectory() as folder:
        batches = _batches(Path(folder), seconds, batch)
        step = _Step(setting, model, batches)
        laps = list(_laps(step))
        start = time.perf_counter()
        for _ in laps:
            step.run(waits=False)
        synchronize(setting.device)
        whole = 1e3 * (time.perf_counter() - start) / len(laps)
    parts = {name: statistics.median(lap[name] for lap in laps) for name in COMPONENTS}
    return parts, whole, peak_gib(setting.device)


def _laps(step: _Step) -> Iterator[dict[str, float]]:
    """Components of the steps after warm-up, as many as the budget allows."""
    for _ in range(WARMUP):
        last = step.run()
    spent, done = sum(last.values()) / 1e3, 0
    while done < REPEATS and (done < 1 or spent < BUDGET_S):
        yield (lap := step.run())
        spent, done = spent + sum(lap.values()) / 1e3, done + 1


def _network(setting: Setting, backend: str) -> BSMamba2:
    if backend == PEER:
        model = peer_network(setting.config, BSMamba2(setting.config))
    else:
        recompute = backend == "sequential"
        config = replace(setting.config, scan_backend=backend, gradient_checkpointing=recompute)
        model = BSMamba2(config)
    return model.to(setting.device).train()


def _batches(folder: Path, seconds: float, batch: int) -> Iterator[dict[str, Tensor]]:
    """Random mixes of a small synthetic set, as training reads them."""
    from training.data import synthetic

    synthetic.main([str(folder / "set"), "--tracks", "3", "--seconds", "20"])
    overrides = [
        f"data.root={folder / 'set'}",
        f"run.dir={folder / 'run'}",
        f"data.segment_seconds={seconds}",
        f"training.batch_size={batch}",
        "data.num_workers=2",
    ]
    config: Config = load_config(CONFIG, overrides)
    return Loaders(config, RunFolder(config.run.dir, 1)).training(0)


class _Step:
    """One optimizer step without accumulation, cut into its components."""

    def __init__(
        self, setting: Setting, model: BSMamba2, batches: Iterator[dict[str, Tensor]]
    ) -> None:
        self.setting, self.model, self.batches = setting, model, batches
        self.loss = SeparationLoss().to(setting.device)
        fused = setting.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=fused)

    def run(self, waits: bool = True) -> dict[str, float]:
        """Milliseconds of every component; they mean something if the step waits after each."""
        laps: dict[str, float] = {}

        def lap(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            if waits:
                synchronize(self.setting.device)
            laps[name] = laps.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
            return result

        model = self.model
        batch = lap("data", self._batch)
        spec = lap("stft", lambda: model.stft(batch["mixture"]))
        target = lap("stft", lambda: round_trip(model, batch["target"]))
        stems = lap("network", lambda: self._network(spec))
        length = batch["mixture"].shape[-1]
        estimate = lap("stft", lambda: model.istft(stems, length))
        loss = lap("loss", lambda: self.loss(estimate, target)[0])
        lap("backward", loss.backward)
        lap("optimizer", self._update)
        return laps

    def _batch(self) -> dict[str, Tensor]:
        device = self.setting.device
        return {k: v.to(device, non_blocking=True) for k, v in next(self.batches).items()}

    def _network(self, spec: Tensor) -> Tensor:
        setting = self.setting
        enabled = setting.dtype != torch.float32
        with torch.autocast(setting.device.type, setting.dtype, enabled=enabled):
            return self.model.forward_spectrogram(spec)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
