"""The separation command and function on a tiny network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import separation.separate  # noqa: F401  (must not hide the function of that name)
from models import BSMamba2, BSMamba2Config, load_checkpoint
from models.checkpoint import save_checkpoint
from models.errors import InputError
from separation import Separator, separate
from separation.separate import main

from .conftest import ROOT


def read(path: Path) -> tuple[np.ndarray, int]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return samples.T, rate


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_one_line(result, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_command_writes_vocals_and_instrumental(
    checkpoint, song, run_separate, tmp_path: Path
) -> None:
    path = song(seconds=1.3)
    out = tmp_path / "out"
    result = run_separate(path, "--checkpoint", checkpoint, "-o", out, "--chunk-seconds", 0.5)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "real-time factor" in result.stdout
    assert names(out) == ["song/instrumental.wav", "song/vocals.wav"]
    assert str(out / "song" / "vocals.wav") in result.stdout
    mixture, _ = read(path)
    vocals, rate = read(out / "song" / "vocals.wav")
    instrumental, _ = read(out / "song" / "instrumental.wav")
    assert rate == 44100
    np.testing.assert_allclose(vocals + instrumental, mixture, atol=1e-6)
    assert np.abs(vocals).max() > 0


def test_short_song_is_what_the_network_says(checkpoint, song) -> None:
    path = song(seconds=0.2)
    mixture, _ = read(path)
    with torch.inference_mode():
        expected = load_checkpoint(checkpoint)(torch.from_numpy(mixture)[None])[0, 0].numpy()
    np.testing.assert_allclose(separate(path, checkpoint)["vocals"], expected, atol=1e-6)
    waveform = separate(mixture, checkpoint, sample_rate=44100)
    np.testing.assert_array_equal(waveform["vocals"], separate(path, checkpoint)["vocals"])


@pytest.mark.parametrize(
    ("rate", "channels", "frames"),
    [(48000, 2, 24000), (22050, 1, 11025), (44100, 1, 1), (96000, 2, 1), (8000, 1, 1999)],
)
def test_rate_length_and_channels_are_the_songs_own(
    checkpoint, song, tmp_path: Path, rate: int, channels: int, frames: int
) -> None:
    samples = 0.1 * np.random.default_rng(0).standard_normal((channels, frames))
    path = song("a.wav", samples=samples, rate=rate)
    assert main([str(path), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]) == 0
    for stem in ("vocals", "instrumental"):
        audio, written_rate = read(tmp_path / "out" / "a" / f"{stem}.wav")
        assert (audio.shape, written_rate) == ((channels, frames), rate)
        assert np.isfinite(audio).all()


def test_silence_gives_silence(checkpoint, song) -> None:
    stems = separate(song(samples=np.zeros((2, 20000))), checkpoint)
    assert all(not stem.any() for stem in stems.values())


def test_every_stem_of_the_model_is_written(two_stem_checkpoint, song, tmp_path: Path) -> None:
    path = song()
    main([str(path), "--checkpoint", str(two_stem_checkpoint), "-o", str(tmp_path / "out")])
    folder = tmp_path / "out" / "song"
    assert names(folder) == ["drums.wav", "instrumental.wav", "vocals.wav"]
    total = read(folder / "vocals.wav")[0] + read(folder / "instrumental.wav")[0]
    np.testing.assert_allclose(total, read(path)[0], atol=1e-6)


def test_function_is_not_hidden_by_the_command_module(checkpoint, song) -> None:
    import separation

    assert set(separation.separate(song(), checkpoint)) == {"vocals", "instrumental"}


def test_separator_is_reused_and_options_reach_it(checkpoint, song) -> None:
    separator = Separator.from_checkpoint(checkpoint, "cpu", chunk_seconds=0.1, overlap=0.5)
    counts: list[int] = []
    separate(song(seconds=0.5), separator, progress=counts.append)
    # 4410-sample chunks every 2205 samples: eight hops and the last chunk.
    assert counts == [2205] * 8 + [4410]
    paper = Separator.from_checkpoint(checkpoint, "cpu", chunk_seconds=0.1, protocol="paper")
    counts.clear()
    separate(song(seconds=0.45), paper, progress=counts.append)
    assert sum(counts) == 4 * 4410 + 2205


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": 1.5}, "overlap 1.5"),
        ({"chunk_seconds": 0}, "chunk of 0"),
        ({"chunk_seconds": float("inf")}, "chunk of inf"),
        ({"chunk_seconds": 1e9}, "at most 3600"),
        ({"batch_size": 0}, "batch size 0"),
        ({"protocol": "mine"}, "protocol 'mine'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "toaster"}, "device 'toaster'"),
    ],
)
def test_impossible_options(checkpoint, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Separator.from_checkpoint(checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu(checkpoint) -> None:
    with pytest.raises(InputError, match="device 'cuda': not on this machine, which has 0 CUDA"):
        Separator.from_checkpoint(checkpoint, "cuda")


def bad_songs() -> list[tuple[str, np.ndarray, str]]:
    nan = np.zeros((2, 100))
    nan[0, 3] = np.nan
    return [
        ("empty.wav", np.zeros((2, 0)), "0 samples"),
        ("nan.wav", nan, "NaN"),
        ("surround.wav", np.zeros((6, 100)), "6 channels"),
    ]


@pytest.mark.parametrize(("name", "samples", "message"), bad_songs())
def test_bad_songs_through_the_function(
    checkpoint, song, name: str, samples: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=rf"{name}: .*{message}"):
        separate(song(name, samples=samples), checkpoint)


def test_bad_song_is_one_line_and_writes_nothing(checkpoint, run_separate, tmp_path: Path) -> None:
    path = tmp_path / "noise.wav"
    path.write_bytes(b"RIFF\x00\x00\x00\x00WAVEjunk" + bytes(range(256)))
    out = tmp_path / "out"
    result = run_separate(path, "--checkpoint", checkpoint, "-o", out)
    assert_one_line(result, "noise.wav", "not an audio file")
    assert names(out) == []


def test_other_songs_go_on_after_a_bad_one(
    checkpoint, song, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = [song(name, seconds=0.1) for name in ("a.wav", "c.wav")]
    bad = song("b.wav", samples=np.zeros((2, 0)))
    arguments = [songs[0], bad, songs[1], "--checkpoint", checkpoint, "-o", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"error: {bad}: has 0 samples; nothing to separate"]
    assert f"2 of 3 songs separated; failed: {bad}" in captured.out
    assert {Path(name).parts[0] for name in names(tmp_path / "out")} == {"a", "c"}


def test_bad_checkpoints(song, run_separate, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(b"not weights")
    result = run_separate(song(), "--checkpoint", path, "-o", tmp_path / "out")
    assert_one_line(result, "other.pt")
    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}}, path)
    with pytest.raises(InputError, match=r"other\.pt.*another architecture"):
        separate(song(), path)


def test_two_songs_of_one_name_are_refused_and_others_go_on(
    checkpoint, song, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = [song(name, seconds=0.1) for name in ("x/song.wav", "y/song.wav", "other.wav")]
    out = tmp_path / "o"
    assert main([*map(str, songs), "--checkpoint", str(checkpoint), "-o", str(out)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "both would write" in captured.err
    assert "1 of 3 songs separated" in captured.out
    assert {Path(name).parts[0] for name in names(out)} == {"other"}


def test_output_that_cannot_be_written(checkpoint, song, tmp_path: Path) -> None:
    taken = tmp_path / "out"
    taken.write_text("a file, not a folder")
    with pytest.raises(InputError, match="out: cannot be written"):
        main([str(song()), "--checkpoint", str(checkpoint), "-o", str(taken)])


def test_stem_name_that_leaves_the_folder(song, tmp_path: Path) -> None:
    config = BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16, stem_names=("../../vocals",))
    path = tmp_path / "odd.pt"
    save_checkpoint(path, config, BSMamba2(config).state_dict())
    with pytest.raises(InputError, match=r"stem '\.\./\.\./vocals'"):
        main([str(song()), "--checkpoint", str(path), "-o", str(tmp_path / "out" / "deep")])
    assert not (tmp_path / "vocals.wav").exists()


def test_waveforms_that_would_be_mistaken(checkpoint) -> None:
    with pytest.raises(InputError, match="int16 samples; give floats"):
        separate(np.ones((2, 100), np.int16), checkpoint, sample_rate=44100)
    with pytest.raises(InputError, match="sample_rate 0: must be above 0"):
        separate(np.ones((2, 100), np.float32), checkpoint, sample_rate=0)
    stems = separate(torch.rand(2, 4410, requires_grad=True), checkpoint, sample_rate=44100)
    assert stems["vocals"].shape == (2, 4410)


def test_waveform_needs_its_rate(checkpoint) -> None:
    with pytest.raises(InputError, match="sample_rate"):
        separate(np.zeros((2, 10)), checkpoint)


def test_folders_formats_and_existing_stems(checkpoint, song, tmp_path: Path, capsys) -> None:
    for name in ("music/a.wav", "music/live/b.wav"):
        song(name, seconds=0.1)
    out = tmp_path / "out"
    command = [str(tmp_path / "music"), "--checkpoint", str(checkpoint), "-o", str(out)]
    command += ["--stems", "instrumental", "--format", "flac", "--name", "{stem}/{track}.{ext}"]
    expected = ["instrumental/a.flac", "live/instrumental/b.flac"]

    assert main([*command, "--dry-run"]) == 0
    assert not out.exists()
    planned = capsys.readouterr().out
    assert all(str(out / name) in planned for name in expected)

    assert main(command) == 0
    assert names(out) == expected
    assert "2 songs" in capsys.readouterr().out

    (out / expected[0]).unlink()
    kept = (out / expected[1]).stat().st_mtime_ns
    assert main([*command, "--skip-existing"]) == 0
    assert "1 skipped" in capsys.readouterr().out
    assert names(out) == expected
    assert (out / expected[1]).stat().st_mtime_ns == kept


def test_standard_input_to_standard_output(checkpoint, song, tmp_path: Path) -> None:
    path = song(seconds=0.7)
    command = [sys.executable, "-m", "separation.separate", "-", "-c", str(checkpoint), "-o", "-"]
    command += ["--stems", "vocals", "--chunk-seconds", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with path.open("rb") as source:
        result = subprocess.run(
            command, stdin=source, capture_output=True, cwd=ROOT, env=environment
        )
    assert result.returncode == 0, result.stderr
    assert b"standard input: 0.7 s" in result.stderr
    (tmp_path / "out.wav").write_bytes(result.stdout)
    piped, rate = read(tmp_path / "out.wav")
    expected = separate(path, checkpoint, chunk_seconds=0.2)["vocals"]
    assert rate == 44100
    np.testing.assert_allclose(piped, expected, atol=1e-6)


def test_standard_output_takes_one_song_and_one_stem(checkpoint, song) -> None:
    path = str(song())
    with pytest.raises(InputError, match="one stem: --stems vocals"):
        main([path, "-c", str(checkpoint), "-o", "-"])
    with pytest.raises(InputError, match="one song"):
        main([path, "-", "-c", str(checkpoint), "-o", "-", "--stems", "vocals"])


def test_downmix_takes_surround(checkpoint, song, tmp_path: Path) -> None:
    path = song("six.wav", channels=6, seconds=0.2)
    out = tmp_path / "out"
    assert main([str(path), "-c", str(checkpoint), "-o", str(out)]) == 2
    assert main([str(path), "-c", str(checkpoint), "-o", str(out), "--downmix"]) == 0
    assert read(out / "six" / "vocals.wav")[0].shape == (2, 8820)


def test_shards_share_the_songs(checkpoint, song, tmp_path: Path, monkeypatch) -> None:
    for name in ("a", "b", "c"):
        song(f"music/{name}.wav", seconds=0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        out = tmp_path / f"out{rank}"
        assert main([str(tmp_path / "music"), "-c", str(checkpoint), "-o", str(out)]) == 0
        done.append({Path(name).parts[0] for name in names(out)})
    assert done == [{"a", "c"}, {"b"}]


def test_a_song_that_fails_on_the_way_leaves_nothing(
    checkpoint, song, tmp_path: Path, capsys
) -> None:
    samples = 0.1 * np.random.default_rng(0).standard_normal((2, 200_000))
    samples[0, 190_000] = np.inf
    path = song("late.wav", samples=samples)
    out = tmp_path / "out"
    arguments = [str(path), "-c", str(checkpoint), "-o", str(out), "--chunk-seconds", "0.5"]
    assert main(arguments) == 2
    error = f"error: {path}: has NaN or infinite samples (first at 4.308 s); export it again"
    assert capsys.readouterr().err.splitlines() == [error]
    assert names(out) == []


def test_interruption_leaves_nothing_half_written(checkpoint, song, tmp_path: Path) -> None:
    path = song(seconds=60.0)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "separation.separate", str(path), "-c", str(checkpoint)]
    command += ["-o", str(out), "--chunk-seconds", "0.5"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(out.glob("song/.*partial*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert names(out) == []


def test_a_warning_is_one_line_and_the_song_is_separated(
    checkpoint, song, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = song(seconds=0.5)
    path.write_bytes(path.read_bytes()[:-50_000])
    out = tmp_path / "out"
    assert main([str(path), "-c", str(checkpoint), "-o", str(out)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path}: is damaged or cut short; only its first 0.4 s can be read"
    ]
    assert len(names(out)) == 2
