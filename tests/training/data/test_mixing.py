from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.errors import InputError
from training.data import failures
from training.data.activity import ActivityIndex, build_activity_index
from training.data.augment import Augmentation
from training.data.mixing import (
    AlignedSegments,
    ExampleCounter,
    RandomMixes,
    ShortFirst,
    collate_pieces,
    collate_readable,
)
from training.data.sources import STEMS, CorruptAudioError, open_dataset

SEGMENT = 4410


def mixes(tracks: list, index: ActivityIndex, targets=STEMS, **options) -> RandomMixes:
    return RandomMixes(tracks, index, targets, **{"seed": 7, **options})


def test_mixture_is_the_sum_of_the_scaled_stems_bit_for_bit(tracks, index) -> None:
    dataset = mixes(tracks, index)
    for i in range(20):
        example = dataset[i]
        total = np.zeros((2, SEGMENT), dtype=np.float32)
        for stem in example["target"].numpy():
            total = total + stem
        np.testing.assert_array_equal(example["mixture"].numpy(), total)
    assert example["target"].shape == (4, 2, SEGMENT)
    assert example["mixture"].dtype == torch.float32


def test_targets_are_listed_windows_times_one_gain(tracks, index) -> None:
    dataset = mixes(tracks, index)
    windows = {
        stem: np.stack([tracks[t].read(stem, s, SEGMENT) for t, s in index.windows[stem]])
        for stem in STEMS
    }
    gains, sources, silent = [], set(), 0
    for i in range(150):
        for stem, target in zip(STEMS, dataset[i]["target"].numpy(), strict=True):
            if not target.any():
                silent += 1
                continue
            products = np.einsum("wct,ct->w", windows[stem], target)
            fitted = products / np.einsum("wct,wct->w", windows[stem], windows[stem])
            source = int(np.argmax(fitted))
            np.testing.assert_allclose(fitted[source] * windows[stem][source], target, atol=1e-6)
            sources.add((stem, source))
            gains.append(fitted[source])
    assert len(sources) >= 0.95 * sum(len(rows) for rows in index.windows.values())
    assert 0.5 <= min(gains) < 0.53
    assert 1.47 < max(gains) <= 1.5
    assert abs(np.mean(gains) - 1) < 0.05
    assert 35 <= silent <= 85  # 600 draws at 0.1: 60 +- 7.3


def test_the_stream_of_the_plain_recipe_stays(tracks, index) -> None:
    """A run resumed by a later version goes on in the examples that it would have had."""
    dataset = mixes(tracks, index)
    for i in (0, 5, 1234):
        for number, stem in enumerate(STEMS):
            rng = np.random.Generator(np.random.Philox(key=7, counter=[0, 0, number, i]))
            gain, silent = np.float32(rng.uniform(0.5, 1.5)), rng.random() < 0.1
            t, start = index.windows[stem][rng.integers(len(index.windows[stem]))]
            expected = 0 if silent else gain * tracks[t].read(stem, int(start), SEGMENT)
            np.testing.assert_array_equal(dataset[i]["target"][number], expected + np.zeros(1))


@pytest.mark.parametrize("aligned", [0.0, 1.0])
def test_short_mixes_are_of_pieces_of_active_windows(tracks, index, aligned: float) -> None:
    augmentation = Augmentation(aligned_prob=aligned)
    whole = mixes(tracks, index, silent_prob=0.0, gain=(1.0, 1.0), augmentation=augmentation)
    short, frames = whole.in_pieces(4), SEGMENT // 4  # and two samples that are in no piece
    known = {
        (stem, tracks[t].read(stem, int(start) + piece * frames, frames).tobytes())
        for stem in STEMS
        for t, start in index.windows["vocals" if aligned else stem]
        for piece in range(4)
    }
    seen = set()
    for i in range(300):
        example = short[i]
        for stem, target in zip(STEMS, example["target"].numpy(), strict=True):
            seen.add((stem, target.tobytes()))
        torch.testing.assert_close(example["mixture"], example["target"].sum(0))
    if not aligned:
        assert seen <= known
    assert len(seen & known) >= 0.8 * len(known)


def test_short_mixes_come_first_and_share_the_rest(tracks, index) -> None:
    augmentation = Augmentation(polarity_prob=1.0, augment_after=3)
    whole = mixes(tracks, index, augmentation=augmentation)
    plain = mixes(tracks, index).in_pieces(2)
    stream = ShortFirst(whole, until=10, pieces=2)
    for i in range(10):
        both = stream[i]
        assert [mix["target"].shape for mix in both] == 2 * [(4, 2, SEGMENT // 2)]
        for k in (0, 1):
            sign = both[k]["mixture"] / plain[2 * i + k]["mixture"]
            sign = sign[sign.isfinite()].mean().round()
            assert sign == 1 if i < 3 else sign == -1 if i >= 6 else abs(sign) == 1
    assert len(stream[10]) == 1
    assert torch.equal(stream[10][0]["mixture"], whole[10]["mixture"])
    assert stream.short.failures is whole.failures
    assert stream.short.broken is whole.broken


def test_whole_windows_do_not_repeat_what_short_mixes_had(tracks, index) -> None:
    whole = mixes(tracks, index, silent_prob=0.0, gain=(1.0, 1.0))
    short = whole.in_pieces(2)
    half = SEGMENT // 2
    repeats = 0
    for i in range(40):
        piece, target = short[i]["target"], whole[i]["target"]
        parts = (target[..., :half], target[..., half:])
        repeats += sum(any(torch.equal(piece[n], part[n]) for part in parts) for n in range(4))
    assert repeats < 40  # of 160: by chance, a 24th or so of them


def test_a_batch_across_the_end_of_the_short_mixes_is_cut(tracks, index) -> None:
    stream = ShortFirst(mixes(tracks, index), until=2, pieces=4)
    batch, frames = collate_pieces([stream[i] for i in (1, 2, 3)]), SEGMENT // 4
    assert batch["mixture"].shape == (12, 2, frames)
    assert batch["target"].shape == (12, 4, 2, frames)
    for key in ("mixture", "target"):
        assert torch.equal(batch[key][:4], torch.stack([mix[key] for mix in stream[1]]))
        for first, i in ((4, 2), (8, 3)):
            joined = torch.cat([*batch[key][first : first + 4]], dim=-1)
            assert torch.equal(joined, stream[i][0][key][..., : 4 * frames])


def test_stems_are_drawn_independently(tracks, index) -> None:
    dataset = mixes(tracks, index)
    gains = torch.stack([dataset[i]["target"].std(dim=(1, 2)) for i in range(200)])
    off_diagonal = torch.corrcoef(gains.T) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.25


def test_target_stems_choose_and_order(tracks, index) -> None:
    everything = mixes(tracks, index)[3]
    some = mixes(tracks, index, ("bass", "vocals"))[3]
    assert torch.equal(some["target"], everything["target"][[2, 0]])
    assert torch.equal(some["mixture"], everything["mixture"])


def test_silence_and_gain_options(tracks, index) -> None:
    assert not mixes(tracks, index, silent_prob=1.0)[0]["mixture"].any()
    example = mixes(tracks, index, silent_prob=0.0, gain=(1.0, 1.0))[0]
    window = example["target"][0].numpy()
    listed = [tracks[t].read("vocals", s, SEGMENT) for t, s in index.windows["vocals"]]
    assert any(np.array_equal(window, candidate) for candidate in listed)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_aligned_examples_lie_as_in_their_song(tracks, index, places, shift: float) -> None:
    augmentation = Augmentation(
        aligned_prob=1.0, same_stem_prob=0.5, time_shift_prob=shift, time_shift_seconds=0.05
    )
    options = {"silent_prob": 0.0, "gain": (1.0, 1.0)}
    dataset = mixes(tracks, index, augmentation=augmentation, **options)
    drawn = set()
    for i in range(20):
        stems = zip(STEMS, dataset[i]["target"].numpy(), strict=True)
        found = [places(stem, window) for stem, window in stems]
        assert all(place == found[0] and len(place) == 1 for place in found)
        drawn |= set(found[0])
    assert len(drawn) > 5


def test_an_aligned_example_keeps_together_where_a_file_fails(tracks, index, places) -> None:
    (tracks[1].folder / "bass.wav").write_bytes(b"no longer a wav")
    dataset = mixes(
        tracks,
        index,
        silent_prob=0.0,
        gain=(1.0, 1.0),
        augmentation=Augmentation(aligned_prob=1.0),
    )
    for i in range(12):
        stems = dict(zip(STEMS, dataset[i]["target"].numpy(), strict=True))
        (place,) = places("vocals", stems["vocals"])
        assert places("drums", stems["drums"]) == [place]
        assert place[0] != 1
    assert dataset.broken.nonzero().tolist() == [[1, 2]]


def test_aligned_examples_follow_the_activity_of_the_targets(tracks, index, places) -> None:
    windows = {stem: rows[:2] if stem == "vocals" else rows for stem, rows in index.windows.items()}
    few = replace(index, windows=windows)
    options = {"silent_prob": 0.0, "gain": (1.0, 1.0)}
    dataset = mixes(
        tracks, few, ("vocals",), augmentation=Augmentation(aligned_prob=1.0), **options
    )
    drawn = set()
    for i in range(12):
        example = dataset[i]
        drawn |= set(places("vocals", example["target"][0].numpy()))
    assert drawn == {(int(track), int(start)) for track, start in windows["vocals"]}


def test_aligned_examples_are_so_many_and_move_no_others(tracks, index) -> None:
    plain = mixes(tracks, index)
    some = mixes(tracks, index, augmentation=Augmentation(aligned_prob=0.3))
    alike = [torch.equal(plain[i]["target"], some[i]["target"]) for i in range(200)]
    assert 110 <= sum(alike) <= 170  # 140 +- 6.5
    for i in np.flatnonzero(~np.array(alike)):
        levels = [x[i]["target"].abs().amax(dim=(1, 2)) for x in (plain, some)]
        assert torch.equal(levels[0] > 0, levels[1] > 0)  # gains and silences stay


def stream(dataset: RandomMixes, count: int, workers: int, **counter: int) -> torch.Tensor:
    loader = DataLoader(
        dataset, batch_size=2, sampler=ExampleCounter(**counter), num_workers=workers
    )
    batches = itertools.islice(loader, count // 2)
    return torch.cat([batch["mixture"] for batch in batches])


@pytest.mark.parametrize("workers", [1, 2])
def test_stream_is_the_same_for_any_number_of_workers(tracks, index, workers: int) -> None:
    dataset = mixes(tracks, index)
    expected = stream(dataset, 12, workers=0)
    assert torch.equal(stream(dataset, 12, workers), expected)
    assert len({tuple(row[0, :3].tolist()) for row in expected}) == 12
    assert not torch.equal(stream(mixes(tracks, index, seed=8), 12, 0), expected)


def test_stream_resumes_and_splits_over_ranks(tracks, index) -> None:
    dataset = mixes(tracks, index)
    expected = stream(dataset, 12, workers=0)
    assert torch.equal(stream(dataset, 8, 0, start=4), expected[4:])
    ranks = [stream(dataset, 4, 0, start=4, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), expected[4:])
    assert list(ExampleCounter(3, stop=10, rank=1, world_size=3)) == [4, 7]


def test_corrupt_file_is_reported_once_and_replaced_by_another(tracks, index, caplog) -> None:
    whole = [mixes(tracks, index)[i] for i in range(40)]
    path = tracks[1].folder / "vocals.wav"
    path.write_bytes(b"no longer a wav")
    dataset = mixes(tracks, index)
    damaged = [dataset[i] for i in range(40)]
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert dataset.broken.nonzero().tolist() == [[1, 0]]
    changed = 0
    for before, after in zip(whole, damaged, strict=True):
        assert bool(after["target"][0].any()) == bool(before["target"][0].any())
        assert torch.equal(after["target"][1:], before["target"][1:])
        changed += not torch.equal(after["target"][0], before["target"][0])
    assert 5 <= changed <= 25
    assert all(torch.equal(dataset[i]["mixture"], damaged[i]["mixture"]) for i in range(40))


def test_broken_files_are_known_to_the_main_process(tracks, index) -> None:
    (tracks[2].folder / "bass.wav").unlink()
    dataset = mixes(tracks, index)
    stream(dataset, 20, workers=2)
    assert dataset.broken.nonzero().tolist() == [[2, 2]]


def test_all_files_corrupt_ends_in_one_line(tracks, index) -> None:
    for track in tracks:
        (track.folder / "drums.wav").write_bytes(b"")
    with pytest.raises(InputError, match="50 reads of 'drums' failed in a row"):
        mixes(tracks, index, silent_prob=0.0)[0]


def test_aligned_segments_are_the_song_itself(tracks, index) -> None:
    dataset = AlignedSegments(tracks, index, ("vocals", "other"))
    assert len(dataset) == len(index.windows["vocals"])
    track, start = index.windows["vocals"][5]
    example = dataset[5]
    read = [tracks[track].read(stem, start, SEGMENT) for stem in STEMS]
    np.testing.assert_array_equal(example["target"].numpy(), np.stack([read[0], read[3]]))
    mixture = tracks[track].read("mixture", start, SEGMENT)
    np.testing.assert_array_equal(example["mixture"].numpy(), mixture)  # int16 sums are exact


def test_aligned_segments_are_evenly_chosen(tracks, index) -> None:
    everything = AlignedSegments(tracks, index, ("vocals",))
    some = AlignedSegments(tracks, index, ("vocals",), max_segments=4)
    last = len(everything) - 1
    chosen = [everything.windows.tolist().index(row) for row in some.windows.tolist()]
    assert chosen == [0, round(last / 3), round(2 * last / 3), last]
    assert len(AlignedSegments(tracks, index, ("vocals",), max_segments=10**6)) == last + 1


def test_no_active_window_and_unknown_stem(tracks, tmp_path: Path, make_folder_track) -> None:
    make_folder_track(tmp_path / "quiet" / "test" / "a", vocals=np.zeros((44_100, 2)))
    quiet = open_dataset(tmp_path / "quiet", "test")
    index = build_activity_index(quiet, STEMS, SEGMENT)
    for build in (AlignedSegments, lambda *args: RandomMixes(*args, seed=0)):
        with pytest.raises(InputError, match="no active 0.1 s window of 'vocals' in 1 tracks"):
            build(quiet, index, ("vocals",))
        with pytest.raises(InputError, match="unknown target stems .*piano.*choose from vocals"):
            build(quiet, index, ("piano",))
    assert len(AlignedSegments(quiet, index, ("vocals", "bass"))) > 0


def test_reads_and_failures_of_all_workers_are_counted(tracks, index) -> None:
    dataset = mixes(tracks, index, silent_prob=0.0)
    stream(dataset, 10, workers=0)
    assert (dataset.failures.reads, dataset.failures.failed) == (40, 0)
    (tracks[1].folder / "bass.wav").unlink()
    stream(dataset, 40, workers=2)
    counted = dataset.failures
    assert counted.reads >= 200 + counted.failed
    assert 5 < counted.failed < 60  # a third of the draws of one stem in four
    assert counted.failed_share == counted.failed / counted.reads


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_stop_with_their_share_and_a_file(
    tracks, index, workers: int, monkeypatch
) -> None:
    monkeypatch.setattr(failures, "_FEWEST", 40)
    (tracks[1].folder / "bass.wav").unlink()
    dataset = mixes(tracks, index, silent_prob=0.0, max_failed_share=0.02)
    message = r"(?s)\d+\.\d% of the latest reads .*max_failed_share=0.02 allows.*1/bass.wav has"
    with pytest.raises(InputError, match=message):
        stream(dataset, 60, workers)
    tolerant = mixes(tracks, index, silent_prob=0.0, max_failed_share=0.5)
    assert len(stream(tolerant, 60, workers)) == 60


def test_recent_failures_weigh_more_than_a_long_good_past() -> None:
    counter = failures.ReadFailures(max_failed_share=0.05)
    error = CorruptAudioError("x.wav has disappeared", Path("x.wav"))
    for _ in range(20_000):
        counter.succeeded()
    with pytest.raises(InputError, match=r"5\.\d% of the latest reads"):
        for _ in range(40):
            counter.failure(error, torch.zeros((), dtype=torch.uint8))
    assert counter.failed < 30
    few = failures.ReadFailures(max_failed_share=0.05)
    for _ in range(100):
        few.failure(error, torch.zeros((), dtype=torch.uint8))


def test_validation_goes_on_without_a_lost_segment(tracks, index, caplog) -> None:
    dataset = AlignedSegments(tracks, index, ("vocals",))
    before = [dataset[i] for i in range(len(dataset))]
    (tracks[0].folder / "drums.wav").write_bytes(b"")
    after = [dataset[i] for i in range(len(dataset))] + [dataset[0]]
    lost = [number for number, example in enumerate(after[:-1]) if example is None]
    assert lost == np.flatnonzero(dataset.windows[:, 0] == 0).tolist()
    assert dataset.unreadable.nonzero().flatten().tolist() == lost
    assert len(caplog.records) == len(lost)
    assert str(tracks[0].folder / "drums.wav") in caplog.text
    batch = collate_readable([after[lost[0]], after[-2]])
    assert torch.equal(batch["mixture"], before[len(dataset) - 1]["mixture"][None])
    assert collate_readable([None, None]) is None
