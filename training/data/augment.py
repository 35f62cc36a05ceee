"""Changes to a stem on its way into a random mix, all off unless asked for.

The field's usual ones, as Open-Unmix, Demucs and others have them: swapped channels, inverted
polarity, several stems of one kind at once, a shifted start, another speed, another pitch, another
tempo; and examples whose stems belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import soxr

from models.errors import InputError


@dataclass(frozen=True)
class Change:
    """What was drawn for one window of a stem."""

    swaps_channels: bool = False
    inverts: bool = False
    shift: int = 0  # samples
    speed: float = 1.0
    semitones: float = 0.0
    tempo: float = 1.0

    def place(self, start: int, segment_frames: int, track_frames: int) -> tuple[int, int]:
        """First sample and number of samples to read, within the track."""
        frames = min(round(segment_frames * self.speed * self.tempo), track_frames)
        return min(max(0, start + self.shift), track_frames - frames), frames

    def apply(self, audio: np.ndarray, segment_frames: int, sample_rate: int) -> np.ndarray:
        """The window `place` asked for, [c, t], as it goes into the mix: `segment_frames` long."""
        if self.speed != 1:
            audio = resample(audio, round(segment_frames * self.tempo))
        if self.semitones or audio.shape[-1] != segment_frames:
            audio = stretch(audio, segment_frames, self.semitones, sample_rate)
        if self.swaps_channels:
            audio = audio[::-1]
        return -audio if self.inverts else audio


@dataclass(frozen=True)
class Augmentation:
    """Probabilities, each for one stem of one example if nothing else is said, and ranges.

    Attributes:
        aligned_prob: of a whole example: all its stems lie as in one song, where a target stem is
            active, and are changed alike; gain and silence stay each stem's own.
        channel_swap_prob: left and right exchanged.
        polarity_prob: the sign inverted.
        same_stem_prob: one more window of the same stem, of any track and with a gain of its own,
            on top; and with the same probability another one on top of that.
        time_shift_prob: the start moved by up to
        time_shift_seconds: either way, within the track.
        speed_prob: pitch and tempo together multiplied by a factor between
        speed_min: and
        speed_max: by resampling.
        pitch_prob: the pitch moved by up to
        pitch_semitones: either way.
        tempo_prob: the tempo multiplied by a factor between
        tempo_min: and
        tempo_max: the pitch staying as it is.
        augment_after: the first so many examples of a run stay as they are, and of as many again
            more and more do not.

    Raises:
        InputError: pitch or tempo is asked for and python-stretch is not installed.
    """

    aligned_prob: float = 0.0
    channel_swap_prob: float = 0.0
    polarity_prob: float = 0.0
    same_stem_prob: float = 0.0
    time_shift_prob: float = 0.0
    time_shift_seconds: float = 2.0
    speed_prob: float = 0.0
    speed_min: float = 0.9
    speed_max: float = 1.1
    pitch_prob: float = 0.0
    pitch_semitones: float = 2.0
    tempo_prob: float = 0.0
    tempo_min: float = 0.9
    tempo_max: float = 1.1
    augment_after: int = 0

    def __post_init__(self) -> None:
        if self.pitch_prob or self.tempo_prob:
            _import_stretch()  # now, not in a worker after the first batch

    def applies(self, i: int, draw: float) -> bool:
        """Whether example `i` is one that may be changed; draw: uniform in [0, 1)."""
        return draw * self.augment_after <= i - self.augment_after

    def draw(self, rng: np.random.Generator, sample_rate: int) -> Change:
        """Draw a change; always the same number of draws, so that settings do not move others."""
        swap, invert, shift, pitch, tempo = rng.random(5)
        by_shift, by_pitch, by_tempo = rng.random(3)
        speed, by_speed = rng.random(2)
        reach = self.time_shift_seconds * sample_rate
        return Change(
            swaps_channels=bool(swap < self.channel_swap_prob),
            inverts=bool(invert < self.polarity_prob),
            shift=round((2 * by_shift - 1) * reach) if shift < self.time_shift_prob else 0,
            speed=_factor(speed < self.speed_prob, self.speed_min, self.speed_max, by_speed),
            semitones=(2 * by_pitch - 1) * self.pitch_semitones if pitch < self.pitch_prob else 0.0,
            tempo=_factor(tempo < self.tempo_prob, self.tempo_min, self.tempo_max, by_tempo),
        )


def resample(audio: np.ndarray, frames: int) -> np.ndarray:
    """Bring audio [c, t] to `frames` samples, and its pitch with it."""
    samples = np.ascontiguousarray(audio.T)  # t c
    return _fit(soxr.resample(samples, len(samples), frames).T, frames)


def stretch(audio: np.ndarray, frames: int, semitones: float, sample_rate: int) -> np.ndarray:
    """Bring audio [c, t] to `frames` samples without a change of pitch, then move the pitch.

    By Signalsmith Stretch, which is deterministic and keeps the alignment to a millisecond.
    """
    stretcher = _import_stretch().Signalsmith.Stretch()
    stretcher.preset(len(audio), sample_rate)
    stretcher.setTransposeSemitones(semitones)
    stretcher.timeFactor = audio.shape[-1] / frames
    # Its length is rounded down.
    return _fit(stretcher.process(np.ascontiguousarray(audio)), frames)


def _factor(is_drawn: bool, low: float, high: float, share: float) -> float:
    return low + (high - low) * share if is_drawn else 1.0


def _fit(audio: np.ndarray, frames: int) -> np.ndarray:
    """The first samples of audio [c, t], with zeros where it is some too short."""
    return np.pad(audio[:, :frames], ((0, 0), (0, max(0, frames - audio.shape[-1]))))


def _import_stretch() -> ModuleType:
    try:
        import python_stretch
    except ImportError as error:
        raise InputError(
            "data.pitch_prob and data.tempo_prob need python-stretch: pip install python-stretch,"
            " or set both to 0 and take data.speed_prob"
        ) from error
    return python_stretch
