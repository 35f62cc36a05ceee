from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import soundfile

from models.errors import InputError
from training.data import cache, stem_files
from training.data.activity import build_activity_index
from training.data.audio_files import AudioFile
from training.data.cache import FOLDER
from training.data.excerpt import write_excerpt
from training.data.musdb_sample import fetch_musdb_sample
from training.data.sources import (
    MUSDB_VALIDATION_TRACKS,
    STEMS,
    CorruptAudioError,
    Split,
    open_dataset,
)

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
RATE = 44_100


@pytest.fixture
def root(tmp_path: Path, make_folder_track) -> Path:
    for number in range(4):
        make_folder_track(tmp_path / "train" / f"song {number}", seed=number)
    make_folder_track(tmp_path / "test" / "held out", seed=9)
    return tmp_path


def names(root: Path, subset: str) -> list[str]:
    return [track.name for track in open_dataset(root, subset)]


def test_partial_read_is_the_slice_of_the_file(root: Path) -> None:
    track = open_dataset(root, "train")[1]
    whole, _ = soundfile.read(root / "train" / "song 1" / "bass.wav", dtype="float32")
    part = track.read("bass", 1234, 500)
    assert (track.name, track.frames, track.sample_rate) == ("song 1", RATE, RATE)
    assert track.stems == STEMS
    assert part.dtype == np.float32
    assert part.flags.c_contiguous
    np.testing.assert_array_equal(part, whole[1234:1734].T)
    np.testing.assert_array_equal(track.read("bass", 1234), whole[1234:].T)


def test_mixture_is_the_file_or_else_the_sum(root: Path) -> None:
    track = open_dataset(root, "train")[0]
    from_file = track.read("mixture", 10, 100)
    (root / "train" / "song 0" / "mixture.wav").unlink()
    track = open_dataset(root, "train")[0]
    np.testing.assert_array_equal(track.read("mixture", 10, 100), from_file)
    assert [path.stem for path in track.files] == list(STEMS)


def test_reading_beyond_the_end_is_refused(root: Path) -> None:
    track = open_dataset(root, "train")[0]
    with pytest.raises(ValueError, match="44000..44101 of 44100"):
        track.read("bass", 44_000, 101)


def test_split_without_musdb_names_holds_out_the_last_track(root: Path) -> None:
    assert names(root, "train") == ["song 0", "song 1", "song 2"]
    assert names(root, "valid") == ["song 3"]
    assert names(root, "test") == ["held out"]


def test_split_with_a_valid_folder_uses_it(root: Path, make_folder_track) -> None:
    make_folder_track(root / "valid" / "chosen")
    assert names(root, "valid") == ["chosen"]
    assert len(names(root, "train")) == 4


def test_split_of_musdb_is_the_packages_own(tmp_path: Path, make_folder_track) -> None:
    for name in MUSDB_VALIDATION_TRACKS:
        make_folder_track(tmp_path / "train" / name, seconds=0.01)
    make_folder_track(tmp_path / "train" / "Zeno - Last By Name", seconds=0.01)
    assert names(tmp_path, "valid") == sorted(MUSDB_VALIDATION_TRACKS)
    assert names(tmp_path, "train") == ["Zeno - Last By Name"]
    musdb = pytest.importorskip("musdb")
    setup = musdb.DB(root=str(tmp_path), is_wav=True, subsets="test").setup
    assert sorted(MUSDB_VALIDATION_TRACKS) == sorted(setup["validation_tracks"])


def silence(channels: int, frames: int = RATE) -> np.ndarray:
    return np.zeros((frames, channels), dtype=np.int16)


def break_missing(stem: Path) -> None:
    stem.unlink()


def break_shorter(stem: Path) -> None:
    soundfile.write(stem, silence(2, 44_000), RATE, "PCM_16")


def break_rate(stem: Path) -> None:
    soundfile.write(stem, silence(2), 48_000, "PCM_16")


def break_channels(stem: Path) -> None:
    soundfile.write(stem, silence(3), RATE, "PCM_16")


def break_corrupt(stem: Path) -> None:
    stem.write_bytes(b"not a wav file" * 100)


def break_zero_bytes(stem: Path) -> None:
    stem.write_bytes(b"")


def break_zero_samples(stem: Path) -> None:
    soundfile.write(stem, silence(2, 0), RATE, "PCM_16")


def break_cut(stem: Path) -> None:
    stem.write_bytes(stem.read_bytes()[:50_000])


BREAKAGES = {
    "missing": (break_missing, "is missing: add it"),
    "shorter": (break_shorter, "has 44000 samples but vocals.wav has 44100: cut or pad"),
    "rate": (break_rate, "has 48000 Hz, expected 44100: resample"),
    "three channels": (break_channels, "has 3 channels, expected stereo or mono: convert"),
    "corrupt": (break_corrupt, r"is not readable audio \(.*\): restore it"),
    "zero bytes": (break_zero_bytes, r"is empty \(0 bytes\): restore it"),
    "zero samples": (break_zero_samples, "holds no samples: restore it"),
    "cut": (break_cut, r"has \d+ samples but vocals.wav has 44100: cut or pad"),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_broken_stem_is_named_with_its_remedy(root: Path, kind: str) -> None:
    breaks, message = BREAKAGES[kind]
    stem = root / "train" / "song 1" / "bass.wav"
    breaks(stem)
    with pytest.raises(InputError, match=f"^{stem} {message}") as caught:
        open_dataset(root, "train")
    assert "\n" not in str(caught.value)


def test_all_broken_tracks_are_reported_at_once(root: Path, caplog) -> None:
    break_missing(root / "train" / "song 0" / "bass.wav")
    break_channels(root / "train" / "song 2" / "other.wav")
    with pytest.raises(InputError, match=r"2 broken tracks: .*song 0/bass.wav .*song 2/other.wav"):
        open_dataset(root, "train")
    kept = open_dataset(root, "train", skip_broken=True)
    assert [track.name for track in kept] == ["song 1"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_track_of_another_rate_is_refused_as_a_whole(tmp_path: Path, make_folder_track) -> None:
    make_folder_track(tmp_path / "test" / "a", rate=48_000)
    with pytest.raises(InputError, match="vocals.wav has 48000 Hz"):
        open_dataset(tmp_path, "test")


def test_test_track_needs_its_mixture(root: Path) -> None:
    (root / "test" / "held out" / "mixture.wav").unlink()
    with pytest.raises(InputError, match=r"held out/mixture.wav is missing"):
        open_dataset(root, "test")


def test_roots_without_tracks(tmp_path: Path, make_folder_track) -> None:
    with pytest.raises(InputError, match="data root .*/nowhere does not exist: name the folder"):
        open_dataset(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        open_dataset(tmp_path / "file", "train")
    with pytest.raises(InputError, match="has no folder 'train'"):
        open_dataset(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="train holds no tracks: expected train/<track>/vocals"):
        open_dataset(tmp_path, "train")
    make_folder_track(tmp_path / "train" / "only one")
    with pytest.raises(InputError, match="no track left for .train.: add tracks"):
        open_dataset(tmp_path, "train")
    with pytest.raises(InputError, match="unknown subset 'dev'"):
        open_dataset(tmp_path, "dev")


def test_damage_after_opening_is_a_corrupt_audio_error(root: Path) -> None:
    track = open_dataset(root, "train")[0]
    paths = {stem: root / "train" / "song 0" / f"{stem}.wav" for stem in STEMS}
    break_cut(paths["vocals"])
    break_corrupt(paths["drums"])
    break_missing(paths["bass"])
    soundfile.write(paths["other"], np.full((RATE, 2), np.nan), RATE, "FLOAT")
    messages = {"vocals": "is cut", "drums": "cannot", "bass": "has disappeared", "other": "is now"}
    for stem, message in messages.items():
        with pytest.raises(CorruptAudioError, match=f"{stem}.wav {message}") as caught:
            track.read(stem, 20_000, 1000)
        assert caught.value.path == paths[stem]


def rewrite(path: Path, subtype: str, channels: int = 2, suffix: str = ".wav") -> np.ndarray:
    """Replaces a stem by noise in another sample format; returns what should be read, [c, t]."""
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, (RATE, channels))
    path.unlink()
    path = path.with_suffix(suffix)
    soundfile.write(path, noise, RATE, subtype)
    audio, _ = soundfile.read(path, dtype="float32", always_2d=True)
    return np.broadcast_to(audio.T, (2, RATE))


@pytest.mark.parametrize(
    ("subtype", "channels", "suffix"),
    [
        ("PCM_16", 1, ".wav"),
        ("PCM_24", 2, ".wav"),
        ("PCM_32", 2, ".wav"),
        ("FLOAT", 2, ".wav"),
        ("DOUBLE", 1, ".wav"),
        ("PCM_U8", 2, ".wav"),
        ("PCM_16", 2, ".flac"),
        ("PCM_24", 1, ".flac"),
    ],
)
def test_any_sample_format_reads_as_libsndfile_converts_it(
    root: Path, subtype: str, channels: int, suffix: str
) -> None:
    expected = rewrite(root / "train" / "song 1" / "bass.wav", subtype, channels, suffix)
    track = open_dataset(root, "train")[1]
    np.testing.assert_array_equal(track.read("bass", 777, 5000), expected[:, 777:5777])
    np.testing.assert_array_equal(track.read("bass"), expected)


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        'it\'s "quoted"',
        "Björk – Jóga 世界",
        "a..b",
        "..And Dots",
        "[x] #1 100%",
        "-rf",
    ],
)
def test_any_name_of_a_song(tmp_path: Path, make_folder_track, name: str) -> None:
    make_folder_track(tmp_path / "up" / "train" / name)
    make_folder_track(tmp_path / "up" / "train" / "zzz")
    (tmp_path / "up" / "train" / ".DS_Store").write_bytes(b"")
    (tmp_path / "up" / "train" / name / "._bass.wav").write_bytes(b"a Mac's")
    root = tmp_path / "up" / ".." / "up"
    (track,) = open_dataset(root, "train")
    index = build_activity_index([track], STEMS, RATE // 2)
    assert track.name == name
    assert track.read("drums").any()
    assert len(index.windows["drums"]) == 3
    again = build_activity_index(open_dataset(root, "train"), STEMS, RATE // 2)
    np.testing.assert_array_equal(again.windows["drums"], index.windows["drums"])


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_flac_is_an_error_not_silence(root: Path, damage: str) -> None:
    path = root / "train" / "song 0" / "drums.flac"
    rewrite(path.with_suffix(".wav"), "PCM_16", suffix=".flac")
    track = open_dataset(root, "train")[0]
    expected = track.read("drums", 0, 5000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content if damage == "overwritten" else content[:middle])
    with pytest.raises(CorruptAudioError, match="drums.flac (is cut|cannot be read)"):
        track.read("drums", RATE // 2 - 2500, 5000)
    np.testing.assert_array_equal(track.read("drums", 0, 5000), expected)


@needs_ffmpeg
def test_a_flac_that_does_not_tell_its_length_is_named(root: Path) -> None:
    path = root / "train" / "song 0" / "vocals.wav"
    command = ["ffmpeg", "-v", "error", "-i", path, "-f", "flac", "-"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    path.with_suffix(".flac").write_bytes(piped)
    path.unlink()
    with pytest.raises(InputError, match="vocals.flac does not say how long it is"):
        open_dataset(root, "train")


def test_the_first_sample_that_is_not_finite_is_named(root: Path) -> None:
    samples = np.zeros((RATE, 2), np.float32)
    samples[777:, 1] = np.nan
    soundfile.write(root / "train" / "song 0" / "vocals.wav", samples, RATE, "FLOAT")
    track = open_dataset(root, "train")[0]
    with pytest.raises(CorruptAudioError, match="vocals.wav has NaN or infinite samples from 777"):
        track.read("vocals", 500, 1000)


def test_missing_stems_are_silence_where_asked(root: Path) -> None:
    (root / "train" / "song 0" / "bass.wav").unlink()
    (root / "train" / "song 0" / "mixture.wav").unlink()
    with pytest.raises(InputError, match="bass.wav is missing: add it.*missing_stems=silence"):
        open_dataset(root, "train")
    track = open_dataset(root, "train", missing_stems="silence")[0]
    assert not track.read("bass", 5, 100).any()
    assert track.file("bass") is None
    total = sum(track.read(stem) for stem in ("vocals", "drums", "other"))
    np.testing.assert_array_equal(track.read("mixture"), total)
    index = build_activity_index([track], STEMS, RATE // 2)
    assert (len(index.windows["bass"]), len(index.windows["drums"])) == (0, 3)


@pytest.mark.parametrize("where", ("train", "song 1"))
def test_folder_that_cannot_be_read_is_named(root: Path, refuse_folder, where: str) -> None:
    refuse_folder(where)
    with pytest.raises(InputError, match=rf"{where} cannot be read \(Permission denied\)"):
        open_dataset(root, "train")


def test_folder_without_any_stem_tells_what_it_has(root: Path) -> None:
    folder = root / "train" / "song 0"
    for stem in STEMS:
        (folder / f"{stem}.wav").rename(folder / f"lead {stem}.wav")
    with pytest.raises(InputError, match="none of the stems vocals.*it has lead bass.wav") as error:
        open_dataset(root, "train", missing_stems="silence")
    assert "rename its files" in str(error.value)


def test_tracks_in_the_root_itself(tmp_path: Path, make_folder_track) -> None:
    for number in range(10):
        make_folder_track(tmp_path / f"song {number}", seconds=0.01, mixture=False)
    (tmp_path / "artwork").mkdir()
    assert names(tmp_path, "train") == [f"song {number}" for number in range(9)]
    assert names(tmp_path, "valid") == ["song 9"]
    with pytest.raises(InputError, match="has no folder 'test'"):
        open_dataset(tmp_path, "test")

    def chosen(**split: Any) -> list[str]:
        return [track.name for track in open_dataset(tmp_path, "valid", split=Split(**split))]

    assert chosen(valid_fraction=0.3) == ["song 7", "song 8", "song 9"]
    assert chosen(valid_tracks=("song 2", "song 5")) == ["song 2", "song 5"]
    with pytest.raises(InputError, match="data.valid_tracks: no track 'song x' in"):
        chosen(valid_tracks=("song 2", "song x"))
    with pytest.raises(InputError, match="no track left for .valid.: add tracks"):
        chosen(valid_fraction=0.0)


def test_several_roots_join(root: Path, tmp_path: Path, make_folder_track) -> None:
    more = tmp_path / "more"
    for number in range(3):
        make_folder_track(more / f"extra {number}", seconds=0.6, seed=20 + number)
    roots = [root, more]
    assert [t.name for t in open_dataset(roots, "valid")] == ["song 3", "extra 2"]
    tracks = open_dataset(roots, "train")
    assert [t.name for t in tracks] == ["song 0", "song 1", "song 2", "extra 0", "extra 1"]
    assert [t.root for t in tracks] == [root] * 3 + [more] * 2
    index = build_activity_index(tracks, STEMS, RATE // 2)
    assert index.windows["bass"][:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 4]
    break_missing(root / "train" / "song 0" / "bass.wav")
    break_missing(more / "extra 1" / "bass.wav")
    with pytest.raises(InputError, match=r"2 broken tracks: .*song 0.*extra 1") as error:
        open_dataset(roots, "train")
    assert f"{root} and {more}" in str(error.value)


def test_headers_are_read_once_until_a_file_changes(root: Path, monkeypatch) -> None:
    read: list[str] = []
    original = cache.read_header

    def noted(path: str, size: int, modified: int) -> AudioFile:
        read.append(Path(path).name)
        return original(path, size, modified)

    monkeypatch.setattr(cache, "read_header", noted)
    headers: dict[Path, cache.HeaderCache] = {}
    first = open_dataset(root, "train", headers=headers)
    headers[root].save()
    assert len(read) == 15
    assert open_dataset(root, "train") == first
    assert len(read) == 15
    rewrite(root / "train" / "song 1" / "bass.wav", "PCM_24")
    assert open_dataset(root, "train")[1].audio["bass"].subtype == "PCM_24"
    assert read[15:] == ["bass.wav"]
    open_dataset(root, "valid", headers=headers)
    assert len(read) == 21
    for damage in ("", "{", '{"format": 1, "files": {"train/song 1/bass.wav": [1]}}', "[]"):
        (root / FOLDER / "headers.json").write_text(damage)
        assert open_dataset(root, "train")[0] == first[0]


@needs_ffmpeg
def test_stem_file_reads_like_its_decoded_whole(tmp_path: Path) -> None:
    stempeg = pytest.importorskip("stempeg")
    source = Path(stempeg.example_stem_path())
    (tmp_path / "test").mkdir()
    shutil.copy(source, tmp_path / "test")
    (track,) = open_dataset(tmp_path, "test")
    reference, rate = stempeg.read_stems(str(source), stem_id=4, ffmpeg_format="s16le")
    assert (track.name, track.sample_rate) == ("The Easton Ellises - Falcon 69", rate)
    assert track.frames == len(reference) == 268_288
    np.testing.assert_array_equal(
        track.read("vocals", 100_001, 33_333), reference[100_001:133_334].T
    )


@needs_ffmpeg
def test_stem_file_has_musdbs_stems_and_silence_for_others(tmp_path: Path) -> None:
    stempeg = pytest.importorskip("stempeg")
    (tmp_path / "test").mkdir()
    shutil.copy(stempeg.example_stem_path(), tmp_path / "test")
    stems = ("vocals", "piano")
    with pytest.raises(InputError, match=r"mp4 has no stem 'piano', only vocals.*missing_stems"):
        open_dataset(tmp_path, "test", stems=stems)
    with pytest.raises(InputError, match="no stem 'piano'"):
        open_dataset(tmp_path, "test", stems=("piano",), missing_stems="silence")
    (track,) = open_dataset(tmp_path, "test", stems=stems, missing_stems="silence")
    assert track.file("piano") is None and not track.read("piano", 5, 100).any()
    assert track.stems == stems and track.read("vocals", 50_000, 9000).any()


@needs_ffmpeg
def test_excerpt_unpacks_to_a_data_root(tmp_path: Path) -> None:
    folder = write_excerpt(tmp_path / "real")
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_excerpt(tmp_path / "real") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    (track,) = open_dataset(tmp_path / "real", "test")
    assert track.frames == 268_288
    mixture = track.read("mixture")
    total = sum(track.read(stem) for stem in STEMS)
    error = np.sum((mixture - total) ** 2) / np.sum(mixture**2)
    assert 10 * np.log10(error) < -10  # AAC and mastering keep the two apart
    assert list(folder.parent.iterdir()) == [folder]


@needs_ffmpeg
def test_broken_stem_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.stem.mp4").write_bytes(b"not an mp4")
    with pytest.raises(InputError, match=r"a\.stem\.mp4 is not readable by ffmpeg"):
        open_dataset(tmp_path, "test")


def test_missing_ffmpeg_says_how_to_get_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.stem.mp4").write_bytes(b"")
    monkeypatch.setattr(stem_files.shutil, "which", lambda program: None)
    with pytest.raises(InputError, match="ffmpeg is not on the PATH.*apt install ffmpeg"):
        open_dataset(tmp_path, "test")


@needs_ffmpeg
def test_sample_without_internet_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch
) -> None:
    musdb = pytest.importorskip("musdb")

    def unreachable(request: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(musdb, "urlopen", unreachable)
    with pytest.raises(InputError, match="could not be downloaded .*no route to host.*synthetic"):
        fetch_musdb_sample(tmp_path / "sample")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other").write_text("")
    with pytest.raises(InputError, match="is not an empty folder"):
        fetch_musdb_sample(tmp_path)
