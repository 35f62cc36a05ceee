"""A song on its way: exact lengths, seams that cannot be heard, memory that does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models import BSMamba2, BSMamba2Config
from models.errors import InputError
from separation import Separator
from separation.overlap_add import Chunk
from separation.reader import AudioStream
from separation.streaming import SongSeparation, choose_stems

from .conftest import TINY

CPU = torch.device("cpu")
RATE = 44100


class Identity(BSMamba2):
    """Says that everything is vocals; its STFT and inverse are the network's."""

    def forward_spectrogram(self, spec: Tensor) -> Tensor:
        return spec[:, None]


def identity(**options) -> Separator:
    return Separator(Identity(BSMamba2Config(**TINY)).eval(), CPU, **options)


def noise(frames: int, channels: int = 2) -> np.ndarray:
    generator = np.random.default_rng(frames)
    return (0.1 * generator.standard_normal((channels, frames))).astype(np.float32)


def stream_of(audio: np.ndarray, block: int = 10_000) -> AudioStream:
    frames = audio.shape[1]
    blocks = (audio[:, start : start + block] for start in range(0, frames, block))
    return AudioStream("song", RATE, len(audio), frames, blocks)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("frames", [1, 2, 700, 4409, 4410, 4411, 13230, 50001])
@pytest.mark.parametrize("channels", [1, 2])
def test_an_identity_network_gives_the_song_back(
    channels: int, frames: int, overlap: float
) -> None:
    audio = noise(frames, channels)
    separator = identity(chunk_seconds=0.1, overlap=overlap, batch_size=3)
    stems = separator.separate_audio(audio, RATE)
    assert stems["vocals"].shape == audio.shape
    assert np.abs(stems["vocals"] - audio).max() < 1e-6
    np.testing.assert_allclose(stems["vocals"] + stems["instrumental"], audio, atol=1e-7)


def tonal_song(seconds: float) -> np.ndarray:
    """Notes and noise bursts, which a network answers to differently along the song."""
    generator = np.random.default_rng(0)
    time = np.arange(round(seconds * RATE)) / RATE
    notes = 220 * 2 ** (generator.integers(0, 24, round(4 * seconds) + 1) / 12)
    pitch = notes[(4 * time).astype(int)]
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * (0.3 + 0.2 * np.sin(5 * time))
    hits = generator.standard_normal(time.size) * np.exp(-20 * (time % 0.5)) * 0.3
    return np.stack([tone + hits, tone - 0.5 * hits]).astype(np.float32)


@pytest.mark.slow
def test_chunks_of_a_song_sound_as_the_whole_song() -> None:
    """-50 dB away from the ends, and no step where chunks join."""
    torch.manual_seed(1)
    model = BSMamba2(BSMamba2Config(**TINY | {"depth": 2})).eval()
    audio = tonal_song(14)
    separator = Separator(model, CPU, chunk_seconds=4.0)
    with torch.inference_mode():
        whole = model(torch.from_numpy(audio)[None])[0, 0].numpy()  # c t
    chunked = separator.separate_audio(audio, RATE)["vocals"]
    middle = slice(RATE, -RATE)
    error = (chunked - whole)[:, middle]
    level = 10 * np.log10((error**2).mean() / (whole[:, middle] ** 2).mean())
    assert level < -50
    steps = np.abs(np.diff(chunked - whole, axis=1)).max(axis=0)
    hop, shared = 3 * RATE, RATE
    borders = [steps[start : start + shared].max() for start in (hop, 2 * hop, 3 * hop)]
    assert max(borders) < 0.01 * np.abs(np.diff(whole, axis=1)).max()
    for start in (hop, 2 * hop, 3 * hop):
        fade = slice(start, start + shared)
        steepest = [np.abs(np.diff(signal[:, fade])).max() for signal in (chunked, whole)]
        assert steepest[0] < 1.01 * steepest[1]


def test_an_overlap_without_context_would_be_heard() -> None:
    """The measure of the test above can fail: chunks that do not overlap differ by far more."""
    torch.manual_seed(1)
    model = BSMamba2(BSMamba2Config(**TINY)).eval()
    audio = tonal_song(3)
    with torch.inference_mode():
        whole = model(torch.from_numpy(audio)[None])[0, 0].numpy()
    joined = Separator(model, CPU, chunk_seconds=0.5, overlap=0.0).separate_audio(audio, RATE)
    error = joined["vocals"] - whole
    assert 10 * np.log10((error**2).mean() / (whole**2).mean()) > -50


def test_blocks_of_any_size_give_the_same_stems() -> None:
    audio = noise(30_001)
    separator = identity(chunk_seconds=0.2)
    results = []
    for block in (1000, 30_001):
        song = SongSeparation(separator, stream_of(audio, block), ["instrumental", "vocals"])
        blocks = list(song.outputs(song.network(song.inputs())))
        results.append(np.concatenate(blocks, axis=-1))
    np.testing.assert_array_equal(*results)
    assert results[0].shape == (2, 2, 30_001)


def test_the_first_output_takes_one_chunk_of_work() -> None:
    taken = 0
    calls: list[int] = []

    def blocks() -> Iterator[np.ndarray]:
        nonlocal taken
        for block in np.split(noise(RATE * 10), 100, axis=1):
            taken += block.shape[1]
            yield block

    separator = identity(chunk_seconds=1.0, batch_size=4)
    song = SongSeparation(separator, AudioStream("song", RATE, 2, None, blocks()), ["vocals"])

    def counted() -> Iterator[tuple[Chunk, Tensor]]:
        for chunk, output in song.network(song.inputs()):
            calls.append(output.shape[-1])
            yield chunk, output

    first = next(song.outputs(counted()))
    assert first.shape[-1] == round(0.75 * RATE)
    assert len(calls) == 1
    assert taken <= RATE + 2 * 4410


def test_stems_are_chosen_by_name() -> None:
    separator = identity()
    assert choose_stems(separator, None) == ("vocals", "instrumental")
    assert choose_stems(separator, ["instrumental"]) == ("instrumental",)
    for wanted, message in ((["drums"], "stem 'drums'"), (["vocals"] * 2, "once"), ([], "once")):
        with pytest.raises(InputError, match=message):
            choose_stems(separator, wanted)


def test_a_network_that_gives_nan_is_not_written_on() -> None:
    class Broken(Identity):
        def forward_spectrogram(self, spec: Tensor) -> Tensor:
            return spec[:, None] * float("nan")

    separator = Separator(Broken(BSMamba2Config(**TINY)).eval(), CPU)
    with pytest.raises(InputError, match="the network gave NaN"):
        separator.separate_audio(noise(1000), RATE)


class Hungry(Identity):
    """Runs out of memory with more than `room` chunks at once."""

    room = 2
    error: RuntimeError = torch.cuda.OutOfMemoryError("CUDA out of memory")

    def forward_spectrogram(self, spec: Tensor) -> Tensor:
        if len(spec) > self.room:
            raise self.error
        return super().forward_spectrogram(spec)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ],
)
def test_batches_halve_when_memory_runs_out(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hungry, "error", error)
    separator = Separator(
        Hungry(BSMamba2Config(**TINY)).eval(), CPU, chunk_seconds=0.05, batch_size=8
    )
    audio = noise(RATE)
    with pytest.warns(UserWarning, match="out of memory with") as seen:
        stems = separator.separate_audio(audio, RATE)
    assert [str(w.message) for w in seen] == [
        "out of memory with 8 chunks at once; going on with 4",
        "out of memory with 4 chunks at once; going on with 2",
    ]
    assert np.abs(stems["vocals"] - audio).max() < 1e-6


def test_the_end_of_a_song_fills_a_batch_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    separator, room, sizes = identity(chunk_seconds=0.05, batch_size=4), 4, []

    def run(self: Separator, batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        if len(batch) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self._ran.add(len(batch))
        return batch[:, None]

    monkeypatch.setattr(Separator, "_run", run)
    object.__setattr__(separator, "device", torch.device("cuda"))
    short, whole = torch.randn(3, 2, 9), torch.randn(4, 2, 9)
    for batch in (short, whole, short, short[:1]):
        assert torch.equal(separator.network(batch), batch[:, None])
    assert sizes == [3, 4, 4, 1]  # before a batch of four there is nothing to fill
    room = 2
    with pytest.warns(UserWarning, match="out of memory with 4 chunks at once; going on with 2"):
        assert torch.equal(separator.network(short), short[:, None])
    assert sizes[4:] == [4, 2, 1]


def test_one_chunk_too_many_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "room", 0)
    separator = Separator(Hungry(BSMamba2Config(**TINY)).eval(), CPU, chunk_seconds=0.05)
    with pytest.raises(InputError, match="out of memory on cpu with one chunk of 0.05 s"):
        separator.separate_audio(noise(100), RATE)


def test_other_errors_of_the_network_are_not_taken_for_memory() -> None:
    class Faulty(Identity):
        def forward_spectrogram(self, spec: Tensor) -> Tensor:
            raise RuntimeError("a fault of ours")

    separator = Separator(Faulty(BSMamba2Config(**TINY)).eval(), CPU)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        separator.separate_audio(noise(100), RATE)


PEAK_MEMORY = """
import resource, sys
from pathlib import Path
import soundfile, numpy, torch
from models import BSMamba2, BSMamba2Config
from separation import Separator
from separation.batch import Batch
from separation.plan import Job, Song
from separation.writer import FORMATS

class Identity(BSMamba2):
    def forward(self, waveform):
        return waveform[:, None]

folder = Path(sys.argv[1])
separator = Separator(Identity(BSMamba2Config(dim=8, depth=1, headdim=16)), torch.device("cpu"))
object.__setattr__(separator, "_graphed", separator.model)
job = Job(Song(str(folder / "a.wav")), (folder / "v.wav", folder / "i.wav"))
batch = Batch(separator, ("vocals", "instrumental"), FORMATS["wav16"])
minute = 0.1 * numpy.random.default_rng(0).standard_normal((44100 * 60, 2)).astype("float32")
for minutes, songs in ((1, 1), (10, 1), (10, 3)):
    with soundfile.SoundFile(folder / "a.wav", "w", 44100, 2, "PCM_16") as file:
        for _ in range(minutes):
            file.write(minute)
    assert batch.run([job] * songs, [], False) == 0
    assert soundfile.info(folder / "v.wav").frames == minutes * 60 * 44100
    sys.stderr.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} ")
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_song_or_their_number(tmp_path: Path) -> None:
    """From file to file, in a process of its own: MiB at the peak of a song of 1 minute, then of
    one of 10, then of three of 10."""
    command = [sys.executable, "-c", PEAK_MEMORY, str(tmp_path)]
    root = Path(__file__).parents[2]
    # What glibc keeps of freed memory for each thread would hide what the song takes.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    short, long, many = map(int, result.stderr.split())
    assert long - short < 10  # nine minutes of the song alone are 180 MiB
    assert many - short < 10
