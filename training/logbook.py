"""What a run tells: metrics.jsonl, TensorBoard, a progress bar or log lines."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from models.errors import InputError
from models.files import write_text
from training.pictures import spectrogram_triptych

logger = logging.getLogger(__name__)

Row = dict[str, float]


class Logbook:
    """Writes one row per logging step to every place where a person or a script may look.

    Args:
        root: the run's folder; receives metrics.jsonl and tensorboard/.
        step: optimizer steps already done. Rows after it, left by a run that was cut off, go, so
            that a resumed run shows one curve.
        max_steps: length of the progress bar, in optimizer steps.
        tensorboard: whether to write TensorBoard events.
    """

    def __init__(self, root: Path, *, step: int, max_steps: int, tensorboard: bool = True) -> None:
        self.path = root / "metrics.jsonl"
        write_text(self.path, _rows_until(self.path, step))
        self._writer = _open_tensorboard(root, step) if tensorboard else None
        self._shown: dict[str, str] = {}
        # disable=None: no bar where standard error is not a terminal.
        self.bar = tqdm(total=max_steps, initial=step, unit="step", disable=None)

    def advance(self) -> None:
        """Note one optimizer step on the bar."""
        self.bar.update()

    def write(self, row: Row) -> None:
        """Record a row; it holds at least `step` and `loss`."""
        with self.path.open("a", encoding="utf-8") as file:
            # JSON has no NaN; a row of skipped steps alone has no loss.
            plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
            file.write(json.dumps(plain) + "\n")
        step = int(row["step"])
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, step)
        if self.bar.disable:
            logger.info(_line(row))
        else:
            seconds = f"{row['seconds_per_step']:.2f}s"
            self._shown |= {"loss": f"{row['loss']:.4f}", "step_time": seconds}
            if "valid_usdr" in row:
                self._shown["uSDR"] = f"{row['valid_usdr']:.2f}dB"
                self._shown["level"] = f"{row['valid_level']:.0f}dB"
                self.bar.write(_line(row))
            self.bar.set_postfix(self._shown)

    def write_example(
        self, waves: dict[str, Tensor], sample_rate: int, step: int, name: str
    ) -> None:
        """Record audio and the spectrogram picture of one validation segment.

        Args:
            waves: `mixture`, `estimate` and `truth`, each `[channel, time]`.
            sample_rate: in hertz.
            step: optimizer step.
            name: name of the stem.
        """
        if self._writer is None:
            return
        for kind, wave in waves.items():
            # TensorBoard plays one channel.
            mono = wave.mean(0, keepdim=True).clamp(-1, 1)
            self._writer.add_audio(f"{name}/{kind}", mono, step, sample_rate=sample_rate)
        figure = spectrogram_triptych(**waves, sample_rate=sample_rate)
        self._writer.add_figure(f"{name}/spectrograms", figure, step)

    def close(self) -> None:
        """Flush everything; the object writes no more."""
        self.bar.close()
        if self._writer is not None:
            self._writer.close()


@contextmanager
def quiet_tensorboard() -> Iterator[None]:
    """No traceback of its thread where the disk is full: its next call raises the error."""
    before = threading.excepthook

    def hook(caught: threading.ExceptHookArgs) -> None:
        is_tensorboard = type(caught.thread).__module__.startswith("tensorboard")
        if not (is_tensorboard and isinstance(caught.exc_value, OSError)):
            before(caught)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _open_tensorboard(root: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"TensorBoard cannot be used ({error}): pip install -r requirements.txt, or set"
            " run.tensorboard=false"
        ) from error
    return SummaryWriter(str(root / "tensorboard"), purge_step=step + 1)


def _rows_until(path: Path, step: int) -> str:
    """The lines of an earlier metrics file up to a step; a half-written last line is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= step:
            kept.append(line + "\n")
    return "".join(kept)


def _line(row: Row) -> str:
    left = timedelta(seconds=round(row["seconds_left"]))
    parts = [
        f"step {int(row['step'])}",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"grad norm {row['grad_norm']:.2f}",
        f"{row['seconds_per_step']:.2f} s/step",
        f"{row['real_time_factor']:.3g}x real time",
        f"{row['data_wait_share']:.1%} waiting for data",
        f"{left} left",
    ]
    if row["skipped_steps"]:
        parts.append(f"{int(row['skipped_steps'])} steps skipped")
    if "valid_usdr" in row:
        parts.append(
            f"validation loss {row['valid_loss']:.4f}, uSDR {row['valid_usdr']:.2f} dB"
            f" (silence 0), level {row['valid_level']:.1f} dB"
        )
    return ", ".join(parts)
