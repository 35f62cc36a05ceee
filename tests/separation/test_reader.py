"""Files as streams: every block in order, and what is left of a damaged file, with a warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tqdm import tqdm

from models.errors import InputError
from separation.audio import load_audio
from separation.reader import BLOCK_FRAMES, Decoder, _silent_decoders, open_audio, probe_seconds

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
SECONDS = 6


def tones() -> np.ndarray:
    time = np.arange(SECONDS * 44100) / 44100
    return 0.4 * np.stack([np.sin(440 * 6.28 * time), np.sin(660 * 6.28 * time)])


def cut(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    shorter = path.with_name(f"cut_{path.name}")
    shorter.write_bytes(content[: int(len(content) * share)])
    return shorter


def test_blocks_are_the_file(tmp_path: Path) -> None:
    audio = tones().astype(np.float32)
    soundfile.write(tmp_path / "a.wav", audio.T, 44100, subtype="FLOAT")
    with open_audio(tmp_path / "a.wav") as stream:
        assert (stream.rate, stream.channels, stream.frames) == (44100, 2, audio.shape[1])
        blocks = list(stream.blocks)
    assert [block.shape[1] for block in blocks[:-1]] == [BLOCK_FRAMES] * (len(blocks) - 1)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), audio)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "mp3", "ogg"])
def test_a_file_cut_short_is_read_as_far_as_it_goes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tones().T, 44100)
    whole, _ = load_audio(path)
    with pytest.warns(
        UserWarning, match=rf"cut_a\.{suffix}: is damaged or cut short; only"
    ) as seen:
        part, rate = load_audio(cut(path))
    assert len(seen) == 1
    assert rate == 44100
    assert 0.3 * whole.shape[1] < part.shape[1] < 0.8 * whole.shape[1]
    np.testing.assert_allclose(part[:, :50000], whole[:, :50000], atol=1e-6)


def test_damage_inside_a_flac_ends_it_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, tones().T, 44100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        audio, _ = load_audio(path)
    assert 0 < audio.shape[1] < SECONDS * 44100


@needs_ffmpeg
@pytest.mark.parametrize("flags", [["-movflags", "faststart"], []])
def test_an_m4a_cut_short(tmp_path: Path, flags: list[str]) -> None:
    """Its table of contents at the start lets the rest be read; at the end it is lost."""
    soundfile.write(tmp_path / "a.wav", tones().T, 44100)
    path = tmp_path / "a.m4a"
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.wav"), *flags, str(path)]
    subprocess.run(command, check=True)
    assert probe_seconds(path) == pytest.approx(SECONDS, abs=0.1)
    if flags:
        with pytest.warns(UserWarning, match=r"cut_a\.m4a: is damaged or cut short"):
            audio, _ = load_audio(cut(path))
        assert 2 * 44100 < audio.shape[1] < SECONDS * 44100
    else:
        with pytest.raises(InputError, match=r"cut_a\.m4a: not an audio file"):
            load_audio(cut(path))


@needs_ffmpeg
def test_a_wav_written_to_a_pipe_is_whole(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    soundfile.write(tmp_path / "a.wav", tones().T, 44100)
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.wav"), "-f", "wav", "pipe:1"]
    piped = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    assert b"\xff\xff\xff\xff" in piped[:100]  # sizes that ffmpeg could not know
    (tmp_path / "piped.wav").write_bytes(piped)
    audio, _ = load_audio(tmp_path / "piped.wav")
    assert audio.shape[1] == SECONDS * 44100
    assert not recwarn.list


@needs_ffmpeg
def test_leaving_early_ends_the_decoder(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.tile(tones(), 5).T, 44100)
    path = tmp_path / "a.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.wav"), str(path)], check=True)
    with open_audio(path) as stream:
        assert next(stream.blocks).shape == (2, BLOCK_FRAMES)
    with pytest.raises(ValueError, match="closed file"):
        next(stream.blocks)


@needs_ffmpeg
def test_a_killed_decoder_is_no_damage(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    soundfile.write(tmp_path / "a.wav", np.tile(tones(), 5).T, 44100)
    path = tmp_path / "a.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(tmp_path / "a.wav"), str(path)], check=True)
    decoders: set[Decoder] = set()
    with open_audio(path, decoders) as stream:
        (decoder,) = decoders
        decoder.kill()
        with pytest.raises(InputError, match=r"a\.m4a: ffmpeg was ended by signal 9"):
            list(stream.blocks)
    assert not decoders
    assert not recwarn.list


def test_threads_that_decode_mp3_leave_standard_error_as_it_was(tmp_path: Path) -> None:
    """Two silent spans that overlap, whichever ends first."""
    before = os.fstat(2)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with _silent_decoders(only_if=True):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with _silent_decoders(only_if=True):
        thread.start()
        inside.wait(0.2)
    leave.set()
    thread.join()
    after = os.fstat(2)
    assert (after.st_dev, after.st_ino) == (before.st_dev, before.st_ino)


def test_messages_wait_until_an_mp3_block_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    kept = os.dup(2)
    with path.open("wb") as sink, os.fdopen(2, "w", closefd=False) as stderr:
        os.dup2(sink.fileno(), 2)
        try:
            say = partial(tqdm.write, "read to the end", file=stderr)
            thread = threading.Thread(target=say)
            with _silent_decoders(only_if=True):
                thread.start()
                thread.join(0.2)
                stderr.flush()
            thread.join()
            stderr.flush()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    assert path.read_text() == "read to the end\n"


@pytest.mark.parametrize("name", ["a.mp3", "a.wav", "a.flac"])
def test_damaged_audio_makes_no_noise(tmp_path: Path, name: str) -> None:
    """libmpg123 writes to the process's standard error; only an mp3 costs a redirection."""
    soundfile.write(tmp_path / "a.mp3", tones().T, 44100)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    content[20000:21000] = np.random.default_rng(0).bytes(1000)
    (tmp_path / name).write_bytes(content)
    code = "import sys, warnings; warnings.simplefilter('ignore')\n"
    code += "from separation.audio import load_audio; load_audio(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stderr == ""


def test_length_of_what_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("words")
    assert probe_seconds(tmp_path / "a.wav") is None


def encode(source: Path, name: str, *options: str) -> Path:
    path = source.with_name(name)
    command = ["ffmpeg", "-v", "error", "-i", source, *options]
    if path.suffix == ".flac":  # through a pipe, to which no length can be written afterwards
        path.write_bytes(subprocess.run([*command, "-"], capture_output=True, check=True).stdout)
    else:
        subprocess.run([*command, path], check=True)
    return path


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("no_tag.mp3", ("-q:a", "2", "-write_xing", "0")),
        ("constant.mp3", ("-b:a", "128k", "-write_xing", "0")),
        ("piped.flac", ("-f", "flac")),
    ],
)
def test_files_that_do_not_tell_their_length_are_whole(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, name: str, options: tuple[str, ...]
) -> None:
    quiet_then_loud = np.concatenate([1e-3 * tones(), np.random.default_rng(0).normal(
        scale=0.2, size=(2, 10 * 44100))], axis=1)  # fmt: skip
    soundfile.write(tmp_path / "a.wav", quiet_then_loud.T, 44100)
    audio, rate = load_audio(encode(tmp_path / "a.wav", name, *options))
    assert rate == 44100
    assert 0 <= audio.shape[1] - quiet_then_loud.shape[1] < 4000  # an encoder fills its last frame
    assert not recwarn.list


def test_a_damaged_flac_is_read_to_its_last_good_frame(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tones().T, 44100)
    with pytest.warns(UserWarning, match="only its first"):
        part, _ = load_audio(cut(tmp_path / "a.flac"))
    assert part.shape[1] % BLOCK_FRAMES


@needs_ffmpeg
def test_surround_in_vorbis_has_its_channels_in_the_order_of_wav(tmp_path: Path) -> None:
    hertz = (300, 500, 700, 90, 1100, 1300)  # L R C LFE Ls Rs
    time = np.arange(2 * 44100) / 44100
    waves = 0.1 * np.sin(2 * np.pi * np.array(hertz)[:, None] * time)
    soundfile.write(tmp_path / "a.wav", waves.T, 44100)
    options = ("-channel_layout", "5.1", "-c:a", "libvorbis")
    audio, _ = load_audio(encode(tmp_path / "a.wav", "a.ogg", *options))
    spectra = np.abs(np.fft.rfft(audio[:, 22050:66150]))  # 1 Hz a bin
    assert spectra.argmax(axis=1).tolist() == list(hertz)
