"""Stems on disk: whole files or none, in every format."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from models.errors import InputError
from separation import writer
from separation.writer import FORMATS, open_writers, write_wav


def noise(frames: int = 30000, stems: int = 2) -> np.ndarray:
    return 0.2 * np.random.default_rng(0).standard_normal((stems, 2, frames)).astype(np.float32)


def paths(folder: Path, form: str, stems: int = 2) -> list[Path]:
    return [folder / f"{index}.{FORMATS[form].extension}" for index in range(stems)]


def test_float_wav_is_exact_beyond_full_scale(tmp_path: Path) -> None:
    audio = noise()[0] * 20
    write_wav(tmp_path / "new folder" / "a.wav", audio, 32000)
    loaded, rate = soundfile.read(tmp_path / "new folder" / "a.wav", dtype="float32")
    assert rate == 32000
    np.testing.assert_array_equal(loaded.T, audio)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["a.wav"]


@pytest.mark.parametrize(
    ("form", "subtype", "error"),
    [
        ("float", "FLOAT", 0),
        ("wav16", "PCM_16", 2**-15),
        ("wav24", "PCM_24", 2**-23),
        ("flac", "PCM_24", 2**-23),
        ("mp3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_formats(tmp_path: Path, form: str, subtype: str, error: float) -> None:
    stems = noise()
    stems = np.cumsum(stems, axis=-1) * 0.01  # mp3 cuts the highest frequencies
    files = paths(tmp_path, form)
    with open_writers(files, FORMATS[form], 44100, 2, 30000) as write:
        for start in range(0, 30000, 7000):
            write(stems[..., start : start + 7000])
        assert not any(path.exists() for path in files)
    for path, stem in zip(files, stems, strict=True):
        assert soundfile.info(path).subtype == subtype
        loaded = soundfile.read(path, dtype="float32")[0].T
        assert loaded.shape == stem.shape
        assert np.abs(loaded - stem).max() <= error


def test_formats_that_clip_say_so(tmp_path: Path) -> None:
    loud = np.full((1, 2, 100), 1.5, np.float32)
    with (
        pytest.warns(UserWarning, match=r"clipped, the peak is 1\.50"),
        open_writers(paths(tmp_path, "wav16", 1), FORMATS["wav16"], 44100, 2, 100) as write,
    ):
        write(-loud)
    loaded = soundfile.read(tmp_path / "0.wav")[0]
    assert loaded.min() == -1.0
    assert loaded.max() == -1.0  # not wrapped around


def test_an_error_leaves_old_files_and_nothing_else(tmp_path: Path) -> None:
    files = paths(tmp_path, "float")
    files[0].write_text("old")
    with (
        pytest.raises(InputError, match="song"),
        open_writers(files, FORMATS["float"], 44100, 2, None) as write,
    ):
        write(noise())
        raise InputError("song: is damaged")
    assert files[0].read_text() == "old"
    assert list(tmp_path.iterdir()) == [files[0]]


@pytest.mark.parametrize("form", ["float", "flac"])
def test_a_disk_that_fills(tmp_path: Path, form: str) -> None:
    """A limit on the size of files stands in for the end of the disk."""
    files = paths(tmp_path, form)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, limits[1]))
    try:
        with (
            pytest.raises(InputError, match=r"0\.\w+: cannot be written"),
            open_writers(files, FORMATS[form], 44100, 2, None) as write,
        ):
            for _ in range(20):
                write(noise())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="cannot be written"):
        write_wav(tmp_path / "taken" / "a.wav", noise()[0], 44100)


def test_long_files_are_rf64_and_unknown_lengths_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WAV_LIMIT_BYTES", 100_000)
    write_wav(tmp_path / "long.wav", noise()[0], 44100)
    assert soundfile.info(tmp_path / "long.wav").format == "RF64"
    write_wav(tmp_path / "short.wav", noise(1000)[0], 44100)
    assert soundfile.info(tmp_path / "short.wav").format == "WAV"
    with (
        pytest.raises(InputError, match="4 GiB do not fit into wav; use --format flac"),
        open_writers([tmp_path / "a.wav"], FORMATS["float"], 44100, 2, None) as write,
    ):
        write(noise(stems=1))


def test_mp3_of_a_rate_it_has_not(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="mp3 cannot hold 96000 Hz"),
        open_writers([tmp_path / "a.mp3"], FORMATS["mp3"], 96000, 2, None),
    ):
        pass


@pytest.mark.parametrize("form", ["float", "wav16", "wav24"])
@pytest.mark.parametrize("frames", [3000, None])
def test_standard_output_is_the_same_wav(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, frames: int | None
) -> None:
    stem = noise(3000, 1)
    stem[0, 0, 0] = 1.5 if form == "float" else 1.0
    with (tmp_path / "out.wav").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with writer.open_standard_output(FORMATS[form], 44100, 2, frames) as write:
            write(stem[..., :1000])
            write(stem[..., 1000:])
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.frames, info.channels, info.subtype) == (3000, 2, FORMATS[form].subtype)
    loaded = soundfile.read(tmp_path / "out.wav", dtype="float32")[0].T
    tolerance = {"float": 0, "wav24": 2**-23, "wav16": 2**-15}[form]
    assert np.abs(loaded - stem[0]).max() <= tolerance


def test_standard_output_whose_reader_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, sink = os.pipe()
    os.close(reader)
    with os.fdopen(sink, "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with (
            pytest.raises(InputError, match="closed by its reader"),
            writer.open_standard_output(FORMATS["float"], 44100, 2, None) as write,
        ):
            write(noise(100000, 1))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("frames", [10, 100_000])
def test_standard_output_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    """Whether a block or the last flush finds it full."""
    with Path("/dev/full").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with (
            pytest.raises(InputError, match="standard output cannot be written .No space left"),
            writer.open_standard_output(FORMATS["float"], 44100, 2, None) as write,
        ):
            write(noise(frames, 1))


def test_standard_output_takes_wav_alone() -> None:
    with (
        pytest.raises(InputError, match="takes --format float, wav16 or wav24"),
        writer.open_standard_output(FORMATS["mp3"], 44100, 2, None),
    ):
        pass
