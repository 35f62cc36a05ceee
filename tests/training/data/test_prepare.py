from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from models.errors import InputError
from training.data import prepared
from training.data.cache import FOLDER
from training.data.prepare import main, prepare
from training.data.sources import STEMS, open_dataset
from training.data.track import Expected

RATE = 44_100
SECOND = ("--segment-seconds", "0.5")


@pytest.fixture
def root(tmp_path: Path, make_folder_track) -> Path:
    for number in range(3):
        make_folder_track(tmp_path / "set" / "train" / f"song {number}", seed=number)
    make_folder_track(tmp_path / "set" / "train" / "48.khz song", seed=7, rate=48_000)
    make_folder_track(tmp_path / "set" / "test" / "held out", seed=9)
    return tmp_path / "set"


def copies(root: Path) -> dict[str, int]:
    """Name of every file of a copy, and when it was written."""
    folder = root / FOLDER / "prepared"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_command_leaves_the_log_as_it_was(root: Path, capsys) -> None:
    names = ("training", "training.data.activity")
    before = [logging.getLogger(name).level for name in names]
    main([str(root), *SECOND])
    assert [logging.getLogger(name).level for name in names] == before


def test_other_rates_are_resampled_once(root: Path, capsys) -> None:
    with pytest.raises(InputError, match=r"48000 Hz, expected 44100: .*training.data.prepare ROOT"):
        open_dataset(root, "train")
    assert main([str(root), *SECOND]) == 0
    assert "5 tracks ready, 1 of them copied now, 0 broken" in capsys.readouterr().out
    written = copies(root)
    assert {Path(name).parent.name for name in written} == {"48.khz song"}
    assert main([str(root), *SECOND]) == 0
    assert "5 tracks ready, 0 of them copied now" in capsys.readouterr().out
    assert copies(root) == written
    track = open_dataset(root, "train")[0]
    assert (track.sample_rate, track.frames) == (RATE, RATE)
    original, _ = soundfile.read(root / "train" / "48.khz song" / "bass.wav", always_2d=True)
    assert track.read("bass").std() == pytest.approx(original.std(), rel=0.1)


def test_resampled_tone_stays_in_place(tmp_path: Path, make_folder_track) -> None:
    tone = 20_000 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    for name in "ab":
        make_folder_track(tmp_path / name, rate=48_000, bass=np.stack([tone, -tone], 1))
    main([str(tmp_path), *SECOND])
    audio = open_dataset(tmp_path, "train")[0].read("bass")
    expected = 20_000 / 2**15 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    inner = slice(1000, -1000)
    np.testing.assert_allclose(audio[:, inner], [expected[inner], -expected[inner]], atol=1e-4)


@pytest.mark.parametrize("form", ["wav", "flac", "npy"])
def test_copies_of_everything_read_alike(root: Path, form: str) -> None:
    before = open_dataset(root, "test")[0]
    assert main([str(root), *SECOND, "--all", "--format", form]) == 0
    (after,) = open_dataset(root, "test")
    assert {path.suffix for path in after.files} == {f".{form}"}
    for stem in (*STEMS, "mixture"):
        np.testing.assert_array_equal(after.read(stem, 999, 7000), before.read(stem, 999, 7000))
    assert len(open_dataset(root, "train")) == 3
    if form == "npy":  # a cut array is never read as silence
        path = after.files[0]
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match="vocals.npy cannot be read"):
            after.read("vocals", 0, 100)
        with pytest.raises(InputError, match="vocals.npy is damaged .* delete its folder"):
            open_dataset(root, "test")


def test_a_copy_of_fewer_stems_stands_for_none_of_the_others(root: Path) -> None:
    few = ("--stems", "vocals", "drums", "--all")
    assert main([str(root), *SECOND, *few]) == 0
    before = copies(root)
    track = open_dataset(root, "test", stems=STEMS, missing_stems="silence")[0]
    assert track.read("bass").any()
    assert main([str(root), *SECOND, "--all"]) == 0
    assert main([str(root), *SECOND, *few]) == 0  # those of all stems serve
    after = copies(root)
    assert len(after) > len(before) and all(after[name] != before[name] for name in before)


def test_a_changed_track_gets_a_new_copy(root: Path, caplog) -> None:
    main([str(root), *SECOND])
    path = root / "train" / "48.khz song" / "bass.wav"
    soundfile.write(path, np.full((48_000, 2), 0.25), 48_000, "PCM_16")
    with pytest.raises(InputError, match="48000 Hz"):
        open_dataset(root, "train")
    assert "48.khz song has changed since it was copied" in caplog.text
    main([str(root), *SECOND])
    track = open_dataset(root, "train")[0]
    assert track.read("bass", 20_000, 100) == pytest.approx(0.25, abs=1e-3)


def test_a_half_made_copy_is_never_used(root: Path, monkeypatch) -> None:
    write = prepared._write

    def stops_at_the_third(path: Path, *args: object) -> None:
        if path.name == "bass":
            raise KeyboardInterrupt
        write(path, *args)

    monkeypatch.setattr(prepared, "_write", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        main([str(root), *SECOND])
    assert copies(root) == {}
    # One that was killed leaves its temporary folder, one whose list was lost is no copy.
    left = root / FOLDER / "prepared" / "train" / ".48.123.partial.khz song"
    left.mkdir(parents=True)
    lost = root / FOLDER / "prepared" / "train" / "song 1"
    lost.mkdir()
    soundfile.write(lost / "bass.wav", np.zeros((10, 2)), RATE)
    monkeypatch.setattr(prepared, "_write", write)
    assert main([str(root), *SECOND]) == 0
    assert not left.exists()
    assert open_dataset(root, "train")[2].frames == RATE
    (root / FOLDER / "prepared" / "train" / "48.khz song" / "source.json").write_text("{")
    with pytest.raises(InputError, match="48000 Hz"):
        open_dataset(root, "train")


def test_all_broken_tracks_are_listed_and_the_others_made_ready(root: Path, capsys) -> None:
    (root / "train" / "song 0" / "bass.wav").unlink()
    (root / "train" / "song 1" / "drums.wav").write_bytes(b"RIFF")
    (root / "test" / "held out" / "other.wav").write_bytes(b"")
    cut = root / "train" / "48.khz song" / "vocals.wav"
    cut.write_bytes(cut.read_bytes()[:9000])
    assert main([str(root), *SECOND]) == 2
    out, error = capsys.readouterr()
    assert "1 tracks ready, 0 of them copied now, 4 broken" in out
    named = [line for line in error.splitlines() if line.startswith("broken: ")]
    files = ("song 0/bass", "song 1/drums", "48.khz song/", "held out/other")
    assert [sum(name in line for line in named) for name in files] == [1, 1, 1, 1]
    assert "Traceback" not in error


def test_full_disk_and_no_place_are_one_line(root: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "_write", full)
    with pytest.raises(InputError, match="cannot be written .*No space left on device.*free some"):
        main([str(root), *SECOND])
    assert copies(root) == {}
    (root / "file").write_text("")
    with pytest.raises(InputError, match="no place for copies .*give one with --cache-dir"):
        main([str(root), *SECOND, "--cache-dir", str(root / "file")])


def test_loud_resampled_peaks_are_clipped_with_a_warning(
    tmp_path: Path, make_folder_track, caplog
) -> None:
    square = 32_767 * np.sign(np.sin(np.arange(48_000) / 20))[:, None].repeat(2, 1)
    make_folder_track(tmp_path / "a", rate=48_000, bass=square)
    make_folder_track(tmp_path / "b", rate=48_000)
    assert prepare(tmp_path, Expected(RATE), 4410).copied == 2
    (record,) = caplog.records
    assert re.search(r"/a: \d+ samples beyond full scale were clipped", record.getMessage())
    copy = tmp_path / FOLDER / "prepared" / "a" / "bass.wav"
    audio, _ = soundfile.read(copy, dtype="int16")
    assert audio.max() == 32_767 and audio.min() == -32_768


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_stem_files_are_decoded_once(tmp_path: Path, capsys) -> None:
    stempeg = pytest.importorskip("stempeg")
    source = Path(stempeg.example_stem_path())
    for name in ("train/a.b", "test/c"):
        path = tmp_path / f"{name}.stem.mp4"
        path.parent.mkdir()
        shutil.copy(source, path)
    cut = tmp_path / "train" / "cut.stem.mp4"
    cut.write_bytes(source.read_bytes()[:400_000])
    (before,) = open_dataset(tmp_path, "test")
    assert main([str(tmp_path), "--segment-seconds", "3", "--format", "flac"]) == 2
    out, error = capsys.readouterr()
    assert "2 tracks ready, 2 of them copied now, 1 broken" in out
    assert f"broken: {cut} is cut" in error
    cut.unlink()
    (after,) = open_dataset(tmp_path, "test")
    assert after.name == before.name == "c"
    for stem in (*STEMS, "mixture"):
        np.testing.assert_array_equal(after.read(stem, 5000, 9000), before.read(stem, 5000, 9000))
    source_list = tmp_path / FOLDER / "prepared" / "test" / "c" / "source.json"
    assert list(json.loads(source_list.read_text())["files"]) == ["c.stem.mp4"]
