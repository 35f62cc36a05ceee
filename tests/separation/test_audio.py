"""Audio files: what is read and written, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from models.errors import InputError
from separation.audio import load_audio
from separation.writer import write_wav


def sine(rate: int, seconds: float = 1.0, frequency: float = 1000.0) -> np.ndarray:
    time = np.arange(round(rate * seconds)) / rate
    return np.stack([np.sin(2 * np.pi * frequency * time), np.cos(2 * np.pi * frequency * time)])


def test_float_wav_round_trip_is_exact_beyond_full_scale(tmp_path: Path) -> None:
    audio = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32) * 2
    write_wav(tmp_path / "new folder" / "a.wav", audio, 32000)
    loaded, rate = load_audio(tmp_path / "new folder" / "a.wav")
    assert rate == 32000
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, audio)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["a.wav"]


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_formats_of_libsndfile(tmp_path: Path, suffix: str) -> None:
    audio = 0.5 * sine(44100)
    soundfile.write(tmp_path / f"a.{suffix}", audio.T, 44100)
    loaded, rate = load_audio(tmp_path / f"a.{suffix}")
    assert rate == 44100
    middle = slice(4000, 40000)
    assert np.abs(loaded[:, middle] - audio[:, middle]).max() < 0.05


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_m4a_goes_through_ffmpeg(tmp_path: Path) -> None:
    audio = 0.5 * sine(48000)
    soundfile.write(tmp_path / "a.wav", audio.T, 48000)
    target = tmp_path / "-odd: name.m4a"
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.wav"), f"file:{target}"]
    subprocess.run(command, check=True)
    loaded, rate = load_audio(target)
    assert rate == 48000
    assert loaded.shape[0] == 2
    middle = slice(8000, 40000)
    assert np.abs(loaded[:, middle] - audio[:, middle]).max() < 0.05


def test_a_file_that_is_no_audio_says_so_with_and_without_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notes.wav"
    path.write_text("these are words, not samples\n" * 100)
    if shutil.which("ffmpeg"):
        with pytest.raises(InputError, match=r"notes\.wav: not an audio file"):
            load_audio(path)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(InputError, match=r"notes\.wav: .*ffmpeg is missing"):
        load_audio(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_audio(tmp_path / "absent.wav")
    with pytest.raises(InputError, match="is a folder"):
        load_audio(tmp_path)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(InputError, match=r"a\.wav: is an empty file"):
        load_audio(tmp_path / "a.wav")


def test_decoders_do_not_chatter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(InputError, match=r"a\.mp3"):
        load_audio(tmp_path / "a.mp3")
    assert capfd.readouterr().err == ""


def test_nan_is_reported_with_its_time(tmp_path: Path) -> None:
    audio = np.zeros((2, 1000), np.float32)
    audio[1, 500] = np.nan
    write_wav(tmp_path / "a.wav", audio, 1000)
    with pytest.raises(InputError, match=r"a\.wav: has NaN or infinite samples .*0\.500 s"):
        load_audio(tmp_path / "a.wav")
