from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from training.data import activity, parallel
from training.data.activity import active_windows, build_activity_index
from training.data.activity_cache import Activity, load_activity
from training.data.cache import FOLDER
from training.data.sources import STEMS, open_dataset

RATE = 44_100


def literal_windows(audio: np.ndarray, window: int, hop: int) -> list[int]:
    """The paper's recipe word for word, one chunk and channel after the other."""
    starts = []
    start = 0
    while start + window <= audio.shape[1]:
        loud = []
        for channel in audio:
            chunk = window // 10
            rms = []
            for number in range(10):
                part = channel[start + number * chunk : start + (number + 1) * chunk]
                value = float(np.sqrt(np.mean(part.astype(np.float64) ** 2)))
                rms.append(1e-5 if value == 0 else value)
            threshold = max(float(np.quantile(rms, 0.15)), 1e-3)
            loud.append(sum(value > threshold for value in rms))
        if min(loud) >= 6:
            starts.append(start)
        start += hop
    return starts


@pytest.mark.parametrize(
    ("window", "hop"), [(4000, 2000), (66150 // 8, 66150 // 16), (1003, 501), (500, 170)]
)
def test_windows_agree_with_the_literal_recipe(window: int, hop: int) -> None:
    rng = np.random.default_rng(3)
    # Blocks at levels around the -60 dBFS floor, some silent, channels apart.
    levels = 10 ** rng.uniform(-4, -1.5, (2, 480)) * (rng.random((2, 480)) < 0.85)
    levels = np.repeat(levels, window // 10 + 3, axis=1)[:, :48_000]
    audio = (levels * rng.standard_normal(levels.shape)).astype(np.float32)
    expected = literal_windows(audio, window, hop)
    assert 0.1 < len(expected) / ((levels.shape[1] - window) // hop + 1) < 0.9
    assert active_windows(audio, window, hop) == expected


def with_loud_chunks(left: int, right: int) -> np.ndarray:
    audio = np.zeros((2, 1000), dtype=np.float32)
    audio[0, : 100 * left] = 0.1
    audio[1, : 100 * right] = 0.1
    return audio


def test_six_of_ten_chunks_in_both_channels() -> None:
    assert active_windows(with_loud_chunks(6, 6), 1000, 500) == [0]
    assert active_windows(with_loud_chunks(5, 10), 1000, 500) == []
    assert active_windows(with_loud_chunks(8, 5), 1000, 500) == []


def test_floor_is_minus_sixty_db() -> None:
    shape = np.where(np.arange(1000) // 100 % 10 < 8, 1.0, 0.1)  # not a tie at the quantile
    audio = np.stack([shape, shape])
    assert active_windows(1.001e-3 * audio, 1000, 500) == [0]
    assert active_windows(0.999e-3 * audio, 1000, 500) == []


def test_tail_shorter_than_a_window_is_dropped() -> None:
    rng = np.random.default_rng(0)
    audio = rng.standard_normal((2, 2499))
    assert active_windows(audio, 1000, 500) == [0, 500, 1000]
    assert active_windows(audio[:, :999], 1000, 500) == []
    with pytest.raises(ValueError, match="chunks"):
        active_windows(audio, 9, 4)


@pytest.fixture
def tracks(tmp_path: Path, make_folder_track) -> list:
    gap = np.random.default_rng(5).integers(-4000, 4000, (2 * RATE, 2))
    gap[RATE // 2 :] = 0
    make_folder_track(tmp_path / "test" / "a", seconds=2)
    make_folder_track(tmp_path / "test" / "b", seconds=2, vocals=gap)
    return open_dataset(tmp_path, "test")


def test_index_rows_are_track_and_start(tracks: list) -> None:
    index = build_activity_index(tracks, STEMS, RATE)
    half = RATE // 2
    assert index.windows["drums"].tolist() == [[t, s] for t in (0, 1) for s in (0, half, RATE)]
    assert index.windows["vocals"].tolist() == [[0, 0], [0, half], [0, RATE]]
    assert index.segment_frames == RATE
    assert index.windows["vocals"].dtype == np.int64


def read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects `track/stem` of every file that is searched from here on."""
    searched: list[str] = []
    search = activity._search

    def noted(job: activity.Job, segment_frames: int) -> Activity:
        searched.append(f"{job[0].name}/{job[1]}")
        return search(job, segment_frames)

    monkeypatch.setattr(activity, "_search", noted)
    return searched


def test_only_new_and_changed_files_are_read(
    tracks: list, tmp_path: Path, monkeypatch, make_folder_track
) -> None:
    first = build_activity_index(tracks, STEMS, RATE)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [
        ".lock",
        f"activity_{RATE}.npz",
    ]
    searched = read_files(monkeypatch)
    again = build_activity_index(tracks, STEMS, RATE)
    assert searched == []
    for stem in STEMS:
        np.testing.assert_array_equal(again.windows[stem], first.windows[stem])
    build_activity_index(tracks, STEMS, RATE // 2)
    assert len(searched) == 8  # another segment length has a cache of its own
    searched.clear()
    os.utime(tracks[1].files[0], ns=(1, 1))  # as a rewritten file of the same size
    make_folder_track(tmp_path / "test" / "aa", seconds=2)
    index = build_activity_index(open_dataset(tmp_path, "test"), STEMS, RATE)
    assert sorted(searched) == ["aa/bass", "aa/drums", "aa/other", "aa/vocals", "b/vocals"]
    assert index.windows["vocals"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_data_set_may_move_and_shrink(tracks: list, tmp_path: Path, monkeypatch) -> None:
    build_activity_index(tracks, STEMS, RATE)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "test").rename(moved / "test")
    (tmp_path / FOLDER).rename(moved / FOLDER)
    searched = read_files(monkeypatch)
    index = build_activity_index(open_dataset(moved, "test"), STEMS, RATE)
    assert searched == [] and len(index.windows["drums"]) == 6
    shutil.rmtree(moved / "test" / "a")
    os.utime(moved / "test" / "b" / "bass.wav", ns=(1, 1))
    (track,) = open_dataset(moved, "test")
    build_activity_index([track], STEMS, RATE)
    kept = load_activity(moved / FOLDER / f"activity_{RATE}.npz", RATE)
    assert {key.split("/")[1] for key in kept} == {"b"}


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "no zip"])
def test_damaged_cache_is_rebuilt(tracks: list, tmp_path: Path, damage: str, caplog) -> None:
    first = build_activity_index(tracks, STEMS, RATE)
    cache = tmp_path / FOLDER / f"activity_{RATE}.npz"
    good = cache.read_bytes()
    flipped = bytearray(good)
    flipped[good.rindex(np.int64(RATE // 2).tobytes())] ^= 1  # one of the windows
    cuts = {"empty": b"", "cut": good[:-40], "flipped": bytes(flipped), "no zip": b"{}" * 99}
    cache.write_bytes(cuts[damage])
    index = build_activity_index(tracks, STEMS, RATE)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(index.windows["vocals"], first.windows["vocals"])
    assert load_activity(cache, RATE).keys() == {
        f"test/{t}/{s}.wav#{s}" for t in "ab" for s in STEMS
    }


def test_interrupted_search_goes_on_where_it_was(tracks: list, tmp_path: Path, monkeypatch) -> None:
    search = activity._search

    def interrupted(job: activity.Job, segment_frames: int) -> Activity:
        if job[0].name == "b" and job[1] == "other":
            raise KeyboardInterrupt
        return search(job, segment_frames)

    monkeypatch.setattr(activity, "_search", interrupted)
    monkeypatch.setattr(parallel, "processors", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        build_activity_index(tracks, STEMS, RATE)
    monkeypatch.setattr(activity, "_search", search)
    searched = read_files(monkeypatch)
    build_activity_index(tracks, STEMS, RATE)
    assert searched == ["b/other"]


def test_long_files_are_searched_piece_by_piece(tracks: list, monkeypatch) -> None:
    whole = build_activity_index(tracks, STEMS, RATE)
    monkeypatch.setattr(activity, "_PIECE_FRAMES", 7000)
    for track in tracks:
        os.utime(track.files[0], ns=(5, 5))
    pieces = build_activity_index(open_dataset(tracks[0].root, "test"), STEMS, RATE)
    np.testing.assert_array_equal(pieces.windows["vocals"], whole.windows["vocals"])


def test_cache_goes_elsewhere_where_asked_or_needed(
    tracks: list, tmp_path: Path, monkeypatch
) -> None:
    asked = tmp_path / "elsewhere"
    build_activity_index(tracks, STEMS, RATE, asked)
    assert len(list(asked.glob(f"{tmp_path.name}-*/activity_{RATE}.npz"))) == 1
    (tmp_path / FOLDER).write_text("no folder can be made here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    build_activity_index(tracks, STEMS, RATE)
    assert len(list(tmp_path.glob(f"home/bsmamba2/*/activity_{RATE}.npz"))) == 1
    searched = read_files(monkeypatch)
    build_activity_index(tracks, STEMS, RATE)
    assert searched == []


def build_counting(root: Path, counts: Path) -> None:
    original = activity._search

    def noted(job: activity.Job, segment_frames: int) -> Activity:
        with counts.open("a") as file:
            file.write("x")
        return original(job, segment_frames)

    activity._search = noted
    build_activity_index(open_dataset(root, "test"), STEMS, RATE)


def test_of_several_processes_one_builds(tracks: list, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=build_counting, args=(tmp_path, counts)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert counts.read_text() == "x" * 8


def test_broken_file_is_reported_by_name_and_tried_again(
    tracks: list, tmp_path: Path, caplog
) -> None:
    path = tracks[0].folder / "drums.wav"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    for _ in range(2):
        caplog.clear()
        index = build_activity_index(tracks, STEMS, RATE)
        assert set(index.windows["drums"][:, 0]) == {1}
        assert set(index.windows["bass"][:, 0]) == {0, 1}
        assert list(index.broken) == [str(path)]
        (record,) = caplog.records
        assert f"{path} is cut" in record.getMessage()
    path.write_bytes(whole)
    assert build_activity_index(tracks, STEMS, RATE).broken == {}
