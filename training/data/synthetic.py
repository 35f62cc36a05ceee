"""Write a small synthetic multitrack set in MUSDB18-HQ layout, for demos and tests.

    python -m training.data.synthetic OUT --tracks 12 --seconds 20 --seed 1

Each track has drums, bass, chords ("other") and voices that sing vowels in phrases separated by
true silence. Key, tempo and levels differ from track to track, sounds change within a track, and
all of it follows from the seed. It is no substitute for real recordings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy import signal
from tqdm import tqdm

from models.errors import InputError, run_command
from models.files import whole_folder, write_text
from training.data import instruments
from training.data.instruments import SAMPLE_RATE, Note, add_at, samples
from training.data.track import MIXTURE, STEMS

# A folder with this file was written here, and only such a folder is ever replaced.
MANIFEST = "synthetic.json"
_PEAK = 0.9
_MODES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))  # major, natural minor
_PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 4, 3), (0, 2, 3, 4), (0, 6, 5, 4))


@dataclass(frozen=True)
class Style:
    """What the players of a track agree on."""

    seconds: float
    beat: float
    root: int
    scale: tuple[int, ...]
    progression: tuple[int, ...]

    @property
    def bar(self) -> float:
        return 4 * self.beat

    @property
    def bars(self) -> int:
        return int(np.ceil(self.seconds / self.bar))

    def sections(self) -> list[range]:
        """The bars in pairs; sounds change from one to the next, so little audio holds many."""
        return [range(bar, min(bar + 2, self.bars)) for bar in range(0, self.bars, 2)]

    def pitch(self, degree: int) -> int:
        """MIDI number of a scale degree above the root, 0 = root, 7 = octave."""
        octave, step = divmod(degree, len(self.scale))
        return self.root + 12 * octave + self.scale[step]

    def chord_degree(self, bar: int) -> int:
        return self.progression[bar % len(self.progression)]


def draw_style(seconds: float, rng: np.random.Generator) -> Style:
    """Tempo 84 to 138 beats a minute, any key, major or minor."""
    mode = _MODES[rng.integers(len(_MODES))]
    progression = _PROGRESSIONS[rng.integers(len(_PROGRESSIONS))]
    return Style(seconds, 60 / rng.uniform(84, 138), int(rng.integers(36, 48)), mode, progression)


def play_drums(style: Style, rng: np.random.Generator) -> np.ndarray:
    """Kick, snare and hats on a grid of sixteenths, a kit and a pattern a section; [c, t]."""
    drums = np.zeros((2, samples(style.seconds)))
    for section in style.sections():
        snare_pan, hat_pan = rng.uniform(-0.1, 0.1), rng.uniform(-0.5, 0.5)
        kit = {
            "kick": place(instruments.kick(rng), 0.0),
            "snare": 0.8 * place(instruments.snare(rng), snare_pan),
            "hat": 0.35 * place(instruments.hat(rng, rng.uniform(0.02, 0.05)), hat_pan),
            "open": 0.3 * place(instruments.hat(rng, rng.uniform(0.1, 0.2)), hat_pan),
        }
        chance = _draw_groove(rng)
        for bar, step in itertools.product(section, range(16)):
            for name, sound in kit.items():
                if rng.random() < chance[name][step]:
                    accent = rng.uniform(0.7, 1.0) * (1.0 if step % 4 == 0 else 0.75)
                    start = samples(bar * style.bar + step * style.beat / 4)
                    add_at(drums, accent * sound, start)
    return drums


def _draw_groove(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """How probable a hit is on each sixteenth of a bar, [16] for each part of the kit."""
    chance = {name: np.zeros(16) for name in ("kick", "snare", "hat", "open")}
    chance["kick"][rng.choice([2, 3, 6, 7, 10, 11, 14], 3, replace=False)] = (0.9, 0.5, 0.2)
    chance["kick"][[0, 8]] = (1, rng.choice([0.2, 1]))
    chance["snare"][[4, 12, 7, 15]] = (1, 1, 0.15, 0.25)
    chance["hat"][:: rng.choice([1, 2])] = 0.9
    chance["open"][rng.choice([2, 6, 10, 14])] = 0.4
    return chance


def play_bass(style: Style, rng: np.random.Generator) -> np.ndarray:
    """Roots, fifths and octaves in a rhythm of eighths, both new in every section; [c, t]."""
    line = np.zeros(samples(style.seconds))
    for section in style.sections():
        brightness, pluck = rng.uniform(80, 250), rng.uniform(0.4, 2.0)
        rhythm = rng.random(8) < rng.uniform(0.45, 0.95)
        rhythm[0] = True
        onsets = [*np.flatnonzero(rhythm), 8]
        for bar, (onset, following) in itertools.product(section, itertools.pairwise(onsets)):
            degree = style.chord_degree(bar)
            step = degree if onset == 0 else degree + int(rng.choice([0, 0, 4, 7]))
            start = bar * style.bar + onset * style.beat / 2
            held = (following - onset) * style.beat / 2 * 0.92
            note = Note(style.pitch(step), start, held, rng.uniform(0.8, 1.0))
            add_at(line, instruments.bass_note(note, brightness, pluck), samples(start))
    return place(line, 0.0)


def play_other(style: Style, rng: np.random.Generator) -> np.ndarray:
    """Pads, an arpeggio of plucked strings, or both, wide in the stereo field; [c, t]."""
    other = np.zeros((2, samples(style.seconds)))
    for section in style.sections():
        layers = rng.choice(["pad", "arpeggio", "both"], p=[0.3, 0.3, 0.4])
        if layers in ("pad", "both"):
            _add_pads(other, style, section, rng)
        if layers in ("arpeggio", "both"):
            _add_arpeggio(other, style, section, rng)
    return other


def _add_pads(other: np.ndarray, style: Style, section: range, rng: np.random.Generator) -> None:
    detune, brightness = rng.uniform(6, 18), rng.uniform(250, 700)
    for voice in (0, 2, 4, 7):
        pan = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
        for bar in section:
            pitch = style.pitch(style.chord_degree(bar) + voice) + 12
            note = Note(pitch, bar * style.bar, style.bar * 1.02)
            sound = instruments.pad_note(note, detune, brightness, rng)
            add_at(other, place(sound, pan), samples(note.start))


def _add_arpeggio(
    other: np.ndarray, style: Style, section: range, rng: np.random.Generator
) -> None:
    brightness, ring = rng.uniform(600, 1500), rng.uniform(0.2, 0.5)
    level, width = rng.uniform(0.8, 1.6), rng.uniform(0.3, 0.9)
    order = rng.permutation([0, 2, 4, 7, 4, 2, 9, 7])
    sounds: dict[int, np.ndarray] = {}
    for bar, step in itertools.product(section, range(8)):
        if rng.random() < 0.85:
            pitch = style.pitch(style.chord_degree(bar) + int(order[step])) + 24
            if pitch not in sounds:
                note = Note(pitch, 0, style.beat, level)
                sounds[pitch] = instruments.plucked_note(note, brightness, ring)
            sound = rng.uniform(0.6, 1.0) * sounds[pitch]
            start = samples(bar * style.bar + step * style.beat / 2)
            add_at(other, place(sound, width if step % 2 else -width), start)


def sing_phrases(style: Style, rng: np.random.Generator) -> np.ndarray:
    """Phrases of a few notes with rests between them, about two fifths of the time; [c, t]."""
    length = samples(style.seconds)
    line = np.zeros(length)
    grid = style.beat / 2
    step = int(rng.uniform(0, min(1.5, style.seconds / 4)) / grid)
    degree = int(rng.integers(0, 7))
    while (step + 2) * grid < style.seconds:
        low = int(rng.integers(50, 61))
        notes, step, degree = _draw_phrase(style, low, step, degree, rng)
        singer = _draw_singer(low, rng)
        add_at(line, instruments.sing(notes, singer, rng), samples(notes[0].start))
        step += max(2, round(rng.uniform(1.4, 2.6) / grid))
    return place(line, rng.uniform(-0.05, 0.05))


def _draw_singer(low: int, rng: np.random.Generator) -> instruments.Singer:
    """A voice for a range that begins at `low`; every phrase has a singer of its own."""
    return instruments.Singer(
        formant_scale=0.92 + 0.02 * (low - 50) + rng.uniform(-0.05, 0.05),
        vibrato_hz=rng.uniform(4.8, 6.6),
        vibrato_cents=rng.uniform(35, 75),
        breath=rng.uniform(0.01, 0.03),
        tilt=rng.uniform(0.7, 1.1),
    )


def _draw_phrase(
    style: Style, low: int, step: int, degree: int, rng: np.random.Generator
) -> tuple[list[Note], int, int]:
    """The notes of a phrase of 1.6 to 3.2 s, and the grid step and degree where it ends."""
    grid = style.beat / 2
    end = step + max(2, round(rng.uniform(1.6, 3.2) / grid))
    notes = []
    while step < end:
        steps = min(int(rng.choice([1, 2, 3, 4], p=[0.35, 0.35, 0.15, 0.15])), end - step)
        degree = int(np.clip(degree + rng.choice([-2, -1, -1, 0, 1, 1, 2, 3]), 0, 7))
        pitch = style.pitch(degree) + 12 * int(np.ceil((low - style.root) / 12))
        notes.append(Note(pitch, step * grid, steps * grid, rng.uniform(0.75, 1.0)))
        step += steps
    return notes, step, degree


def place(line: np.ndarray, pan: float) -> np.ndarray:
    """Mono [t] to stereo [2, t], constant power; pan -1 is left."""
    angle = np.pi / 4 * (1 + pan)
    return np.stack([np.cos(angle) * line, np.sin(angle) * line])


def add_room(dry: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add a short diffuse reverberation, different in both channels; [2, t]."""
    length = samples(0.35)
    envelope = instruments.decay(length, rng.uniform(0.04, 0.09))
    response = rng.standard_normal((2, length)) * envelope
    response *= rng.uniform(0.15, 0.35) / np.linalg.norm(response, axis=-1, keepdims=True)
    return dry + signal.oaconvolve(dry, response, axes=-1)[:, : dry.shape[-1]]


def make_track(seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One track: int16 [t, c] of every stem and of the mixture, which is their exact sum."""
    style = draw_style(seconds, rng)
    stems = {
        "vocals": add_room(sing_phrases(style, rng), rng),
        "drums": play_drums(style, rng),
        "bass": play_bass(style, rng),
        "other": add_room(play_other(style, rng), rng),
    }
    shares = {"drums": rng.uniform(0.3, 0.5), "bass": rng.uniform(0.3, 0.5)}
    shares["other"] = rng.uniform(0.06, 0.12)
    # The voice lies 1 to 2 dB below the accompaniment: to the fore, as in a ballad.
    shares["vocals"] = sum(shares.values()) * 10 ** (-rng.uniform(1.0, 2.0) / 10)
    for name, stem in stems.items():
        stem *= np.sqrt(shares[name] / np.mean(stem**2))
    loudest = max(float(np.abs(x).max()) for x in (*stems.values(), sum(stems.values())))
    scale = _PEAK * 32_767 / loudest
    track = {name: np.round(scale * stems[name]).astype(np.int16).T for name in STEMS}
    track[MIXTURE] = np.sum([track[name] for name in STEMS], axis=0, dtype=np.int16)
    return track


def write_synthetic(
    out: Path, tracks: int = 12, seconds: float = 20.0, seed: int = 1, overwrite: bool = False
) -> None:
    """Write `out/train` (three quarters) and `out/test` (the rest), 44.1 kHz stereo 16-bit wav.

    The same arguments give the same bytes. An interrupted run leaves nothing behind.

    Raises:
        InputError: fewer than 3 tracks, not 2 to 600 seconds, a seed below 0, or `out` not empty.
    """
    if tracks < 3 or not 2 <= seconds <= 600 or seed < 0:
        raise InputError(
            f"tracks {tracks}, seconds {seconds:g}, seed {seed}: at least 3 tracks of 2 to 600 s"
            " and a seed of 0 or more are needed"
        )
    _make_room(out, overwrite)
    tests = max(1, tracks // 4)
    with whole_folder(out) as folder:
        for number in tqdm(range(tracks), desc="synthesis", unit="track", disable=None):
            rng = np.random.default_rng(np.random.SeedSequence((seed, number)))
            subset = "train" if number < tracks - tests else "test"
            target = folder / subset / f"synthetic-{number + 1:02d}"
            target.mkdir(parents=True)
            for name, audio in make_track(seconds, rng).items():
                soundfile.write(str(target / f"{name}.wav"), audio, SAMPLE_RATE, "PCM_16")
        manifest = {"tracks": tracks, "seconds": seconds, "seed": seed}
        write_text(folder / MANIFEST, json.dumps(manifest) + "\n")


def _make_room(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{out} is not empty: name another folder, or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out} holds other files than a synthetic set: name another folder")
    shutil.rmtree(out)


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.synthetic",
        description="Write a small synthetic multitrack set in MUSDB18-HQ layout.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write train/ and test/ in")
    parser.add_argument("--tracks", type=int, default=12, help="number of tracks (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each track (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier synthetic set")
    args = parser.parse_args(argv)
    write_synthetic(args.out, args.tracks, args.seconds, args.seed, args.overwrite)
    print(f"{args.tracks} synthetic tracks of {args.seconds:g} s in {args.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
