"""Small synthesisers for the synthetic data set: mono float64 sounds at 44.1 kHz.

Every function takes the random generator it draws from, so a track follows from its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import signal

SAMPLE_RATE = 44_100
_TABLE = 2048
_FFT, _FFT_HOP = 1024, 256
# Formant frequencies in Hz and levels in dB of five sung vowels, typical of a tenor.
_VOWELS = {
    "a": ((700, 1150, 2500, 3300), (0, -5, -12, -16)),
    "e": ((450, 1850, 2550, 3400), (0, -9, -12, -16)),
    "i": ((300, 2200, 2900, 3500), (0, -12, -14, -18)),
    "o": ((450, 800, 2500, 3300), (0, -6, -18, -20)),
    "u": ((330, 700, 2400, 3200), (0, -10, -24, -26)),
}
_BANDWIDTHS = np.array([80.0, 100.0, 140.0, 200.0])


@dataclass(frozen=True)
class Note:
    """A pitch (MIDI number, fractional is fine) from `start` for `seconds`."""

    pitch: float
    start: float
    seconds: float
    level: float = 1.0


def samples(seconds: float) -> int:
    """Seconds to a number of samples."""
    return round(seconds * SAMPLE_RATE)


def frequency(pitch: float | np.ndarray) -> np.ndarray:
    """MIDI number to Hz, A4 = 69 = 440 Hz."""
    return np.asarray(440.0 * 2.0 ** ((pitch - 69) / 12))


def add_at(track: np.ndarray, sound: np.ndarray, start: int) -> None:
    """Add `sound` into `track`, both [..., t], from the sample `start` on, cut at the end."""
    end = min(track.shape[-1], start + sound.shape[-1])
    if 0 <= start < end:
        track[..., start:end] += sound[..., : end - start]


def decay(length: int, seconds: float) -> np.ndarray:
    """An exponential that falls to 1/e in `seconds`, [length]."""
    return np.exp(-np.arange(length) / (seconds * SAMPLE_RATE))


def fade_edges(sound: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Raised-cosine fades of the given seconds at both ends."""
    envelope = np.ones(len(sound))
    for edge, seconds in ((envelope, attack), (envelope[::-1], release)):
        length = min(samples(seconds), len(sound))
        edge[:length] *= 0.5 - 0.5 * np.cos(np.pi * np.arange(length) / max(1, length))
    return sound * envelope


def oscillator(hz: np.ndarray, amplitudes: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """A periodic sound with harmonic `amplitudes` [k], free of aliasing.

    Args:
        hz: instantaneous fundamental of every sample, [t].
        amplitudes: of harmonics 1..k; those above 18 kHz are left out.
        phase: of the fundamental at the start, in turns.
    """
    top = int(18_000 / max(float(np.max(hz)), 1.0))
    kept = np.asarray(amplitudes)[:top]
    spectrum = np.zeros(_TABLE // 2 + 1, dtype=complex)
    # Alternating quadratic phases keep the crest factor low.
    spectrum[1 : len(kept) + 1] = kept * np.exp(1j * np.pi * np.arange(len(kept)) ** 2 / 7)
    table = np.fft.irfft(spectrum) * _TABLE / 2
    position = (phase + np.cumsum(hz) / SAMPLE_RATE) % 1.0 * _TABLE
    return np.interp(position, np.arange(_TABLE + 1), np.append(table, table[0]))


def kick(rng: np.random.Generator) -> np.ndarray:
    """A falling sine with a click."""
    length = samples(0.35)
    low, high = rng.uniform(42, 60), rng.uniform(140, 320)
    hz = low + high * decay(length, rng.uniform(0.012, 0.03))
    body = np.sin(2 * np.pi * np.cumsum(hz) / SAMPLE_RATE) * decay(length, rng.uniform(0.07, 0.14))
    click = rng.standard_normal(length) * decay(length, 0.002) * rng.uniform(0.1, 0.4)
    return fade_edges(body + click, 0.0005, 0.05)


def snare(rng: np.random.Generator) -> np.ndarray:
    """Two drum modes and a band of noise."""
    length = samples(0.3)
    hz = rng.uniform(160, 240)
    time = np.arange(length) / SAMPLE_RATE
    shell = np.sin(2 * np.pi * hz * time) + 0.6 * np.sin(2 * np.pi * 1.6 * hz * time)
    band = signal.butter(2, [rng.uniform(600, 1500), 9000], "band", fs=SAMPLE_RATE, output="sos")
    wires = signal.sosfilt(band, rng.standard_normal(length))
    wires *= decay(length, rng.uniform(0.05, 0.1))
    return fade_edges(0.4 * shell * decay(length, 0.04) + wires, 0.0005, 0.05)


def hat(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """High-passed noise that dies away in `seconds`."""
    length = samples(4 * seconds)
    high = signal.butter(4, rng.uniform(6000, 8500), "high", fs=SAMPLE_RATE, output="sos")
    noise = signal.sosfilt(high, rng.standard_normal(length))
    return fade_edges(noise * decay(length, seconds), 0.0005, seconds)


def bass_note(note: Note, brightness: float, pluck: float) -> np.ndarray:
    """A low note: harmonics above `brightness` Hz fall off, the level decays in `pluck` seconds."""
    length = samples(note.seconds)
    hz = float(frequency(note.pitch))
    k = np.arange(1, 40)
    dark = 1 / k / (1 + (k * hz / brightness) ** 2)
    bright = 1 / k / (1 + (k * hz / (4 * brightness)) ** 2)
    steady = np.full(length, hz)
    sound = oscillator(steady, dark) + decay(length, 0.06) * oscillator(steady, bright - dark)
    return note.level * fade_edges(sound * decay(length, pluck), 0.004, 0.03)


def pad_note(note: Note, detune: float, brightness: float, rng: np.random.Generator) -> np.ndarray:
    """A sustained note of two saws, `detune` in cents apart, with soft edges."""
    length = samples(note.seconds)
    k = np.arange(1, 60)
    sound = np.zeros(length)
    for cents in (-detune / 2, detune / 2):
        hz = float(frequency(note.pitch + cents / 100))
        harmonics = 1 / k / (1 + (k * hz / brightness) ** 2)
        sound += oscillator(np.full(length, hz), harmonics, rng.random())
    return note.level * fade_edges(sound, 0.06, 0.15)


def plucked_note(note: Note, brightness: float, ring: float) -> np.ndarray:
    """A string: each harmonic dies the faster the higher it lies; `ring` seconds for the first."""
    length = samples(min(note.seconds * 1.5, 4 * ring))
    hz = float(frequency(note.pitch))
    time = np.arange(length) / SAMPLE_RATE
    sound = np.zeros(length)
    for k in range(1, min(16, int(12_000 / hz)) + 1):
        level = 1 / k / (1 + (k * hz / brightness) ** 2)
        stretched = k * hz * np.sqrt(1 + 0.0002 * k * k)
        ringing = np.exp(-time * (0.5 + 0.5 * k) / ring)
        sound += level * ringing * np.sin(2 * np.pi * stretched * time)
    return note.level * fade_edges(sound, 0.002, 0.03)


@dataclass(frozen=True)
class Singer:
    """What makes a voice recognisable.

    Attributes:
        formant_scale: factor on every formant frequency; above 1 for a shorter throat.
        vibrato_hz: vibrato cycles a second.
        vibrato_cents: largest deviation of the pitch.
        breath: level of the noise beside the glottal source.
        tilt: harmonic k of the source has the amplitude k**-tilt.
    """

    formant_scale: float
    vibrato_hz: float
    vibrato_cents: float
    breath: float
    tilt: float


def sing(notes: Sequence[Note], singer: Singer, rng: np.random.Generator) -> np.ndarray:
    """One phrase, from the start of the first note to the end of the last; [t].

    A glottal pulse train with vibrato and portamento and a little breath goes through formants that
    move from vowel to vowel; some syllables begin with a consonant-like burst of noise.
    """
    begin = notes[0].start
    length = samples(notes[-1].start + notes[-1].seconds - begin)
    hz = _melody_line(notes, length, singer, rng)
    k = np.arange(1, 120)
    source = oscillator(hz, k**-singer.tilt)
    noise = rng.standard_normal(length)
    loudness, bursts = _syllables(notes, length, rng)
    excitation = loudness * (source + singer.breath * noise)
    vowels = _formant_filter(excitation, notes, singer, rng)
    return fade_edges(vowels / (np.std(vowels) + 1e-9) + bursts, 0.03, 0.08)


def _melody_line(
    notes: Sequence[Note], length: int, singer: Singer, rng: np.random.Generator
) -> np.ndarray:
    """The fundamental of every sample in Hz: glides, vibrato that sets in late, drift; [t]."""
    pitch = np.zeros(length)
    depth = np.zeros(length)
    for note in notes:
        first = samples(note.start - notes[0].start)
        last = min(length, first + samples(note.seconds))
        pitch[first:] = note.pitch
        since = np.arange(last - first) / SAMPLE_RATE
        depth[first:last] = np.clip((since - 0.12) / 0.25, 0, 1)
    glide = np.hanning(samples(rng.uniform(0.05, 0.12)))
    pitch = signal.oaconvolve(np.pad(pitch, len(glide), mode="edge"), glide / glide.sum(), "same")
    pitch = pitch[len(glide) : len(glide) + length]
    time = np.arange(length) / SAMPLE_RATE
    vibrato = np.sin(2 * np.pi * (singer.vibrato_hz * time + rng.random()))
    knots = np.linspace(0, length, 2 + int(4 * length / SAMPLE_RATE))
    drift = np.interp(np.arange(length), knots, rng.normal(0, 8, len(knots)))
    return frequency(pitch + (depth * singer.vibrato_cents * vibrato + drift) / 100)


def _syllables(
    notes: Sequence[Note], length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Loudness of the voice, with dips between notes, and the bursts of consonants; both [t]."""
    loudness = np.zeros(length)
    bursts = np.zeros(length)
    for note in notes:
        first = samples(note.start - notes[0].start)
        last = min(length, first + samples(note.seconds))
        shape = fade_edges(np.ones(last - first), 0.04, 0.05)
        loudness[first:last] = note.level * (0.25 + 0.75 * shape)
        if rng.random() < 0.45:
            burst = rng.standard_normal(samples(rng.uniform(0.04, 0.09)))
            edges = [rng.uniform(2500, 4500), rng.uniform(7000, 11_000)]
            band = signal.butter(2, edges, "band", fs=SAMPLE_RATE, output="sos")
            add_at(bursts, 0.5 * fade_edges(signal.sosfilt(band, burst), 0.015, 0.02), first)
    return loudness, bursts


def _formant_filter(
    excitation: np.ndarray,
    notes: Sequence[Note],
    singer: Singer,
    rng: np.random.Generator,
) -> np.ndarray:
    """Shape the excitation [t] by the formants of a vowel a note, gliding between them."""
    overlap = _FFT - _FFT_HOP
    bins, times, spectrum = signal.stft(excitation, SAMPLE_RATE, nperseg=_FFT, noverlap=overlap)
    onsets = [note.start - notes[0].start for note in notes]
    knots: list[float] = []
    targets: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for onset, note in zip(onsets, notes, strict=True):
        vowel = _VOWELS[str(rng.choice(list(_VOWELS)))]
        knots += [onset + 0.05, onset + max(0.06, note.seconds - 0.03)]
        targets += [vowel, vowel]
    envelope = np.full((len(bins), len(times)), 10 ** (-45 / 20))
    for number, bandwidth in enumerate(_BANDWIDTHS):
        centre = np.interp(times, knots, [vowel[0][number] for vowel in targets])
        level = 10 ** (np.interp(times, knots, [vowel[1][number] for vowel in targets]) / 20)
        detune = (bins[:, None] - singer.formant_scale * centre) / bandwidth
        envelope += level / np.sqrt(1 + detune**2)
    _, shaped = signal.istft(spectrum * envelope, SAMPLE_RATE, nperseg=_FFT, noverlap=overlap)
    return shaped[: len(excitation)]
