from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from training.data.activity import active_windows, build_activity_index
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


def test_cache_is_used_until_the_data_change(tracks: list, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "index.json"
    first = build_activity_index(tracks, STEMS, RATE, cache)
    content = json.loads(cache.read_text())
    content["windows"]["vocals"] = [[0, 0]]
    cache.write_text(json.dumps(content))
    assert len(build_activity_index(tracks, STEMS, RATE, cache).windows["vocals"]) == 1
    # Another segment length, or a file touched, is another data set.
    assert build_activity_index(tracks, STEMS, RATE // 2, cache).segment_frames == RATE // 2
    cache.write_text(json.dumps(content))
    os.utime(tracks[1].files[0], ns=(1, 1))
    again = build_activity_index(tracks, STEMS, RATE, cache)
    assert again.windows["vocals"].tolist() == first.windows["vocals"].tolist()
    assert [path.name for path in cache.parent.iterdir()] == ["index.json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"windows": {}}'])
def test_damaged_cache_is_rebuilt(tracks: list, tmp_path: Path, damage: str, caplog) -> None:
    cache = tmp_path / "index.json"
    build_activity_index(tracks, STEMS, RATE, cache)
    good = cache.read_text()
    cache.write_text(damage)
    build_activity_index(tracks, STEMS, RATE, cache)
    assert cache.read_text() == good
    assert "is damaged" in caplog.text


def test_broken_file_is_reported_once_and_has_no_windows(
    tracks: list, tmp_path: Path, caplog
) -> None:
    path = tracks[0].folder / "drums.wav"
    path.write_bytes(path.read_bytes()[:5000])
    cache = tmp_path / "index.json"
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        index = build_activity_index(tracks, STEMS, RATE, cache)
        assert set(index.windows["drums"][:, 0]) == {1}
        assert set(index.windows["bass"][:, 0]) == {0, 1}
        (record,) = caplog.records
        assert str(path) in record.getMessage()
