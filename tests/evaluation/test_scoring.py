"""Scores of a track and their summary, against numbers that follow from the signals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from evaluation.metrics import bss_eval, csdr, usdr
from evaluation.oracles import separate_with_oracle
from evaluation.scoring import Signals, StemScores, as_json, summarise
from evaluation.scoring import score_track as score_signals
from evaluation.signals import array_reader, track_reader
from training.data.excerpt import write_excerpt
from training.data.sources import open_dataset

RATE = 4000
NAN = float("nan")


def noise(seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((2, 3 * RATE))


def score_track(
    mixture: np.ndarray,
    references: dict[str, np.ndarray],
    estimates: dict[str, np.ndarray],
    scorer: str = "museval",
    is_complete: bool = False,
) -> list[StemScores]:
    signals = Signals(
        "t",
        mixture.shape[1],
        RATE,
        array_reader(mixture),
        {stem: array_reader(audio) for stem, audio in references.items()},
        {stem: array_reader(audio) for stem, audio in estimates.items()},
        is_complete,
    )
    return score_signals(signals, scorer=scorer).rows


def row(usdr_value: float, **fields) -> StemScores:
    values = {"track": "t", "stem": "vocals", "estimate": "model"}
    values |= {"csdr": 1.0, "isr": NAN, "sir": 2.0, "sar": 3.0, "usdr": usdr_value} | fields
    return StemScores(**values)


def test_vocals_model_is_scored_against_the_accompaniment() -> None:
    vocals, accompaniment = noise(0), noise(1)
    mixture = vocals + accompaniment
    estimate = vocals + 0.1 * accompaniment
    model, unprocessed = score_track(mixture, {"vocals": vocals}, {"vocals": estimate})
    assert (model.estimate, unprocessed.estimate) == ("model", "mixture")
    frames = bss_eval(
        np.stack([vocals, mixture - vocals]),
        np.stack([estimate, mixture - estimate]),
        RATE,
        RATE,
    )
    for score in ("isr", "sir", "sar"):
        assert getattr(model, score) == np.median(frames[score.upper()][0])
    assert model.csdr == pytest.approx(csdr(vocals, estimate, RATE), abs=1e-9)
    assert model.csdr == pytest.approx(np.median(frames["SDR"][0]), abs=1e-9)
    assert model.usdr == pytest.approx(usdr(vocals, estimate), abs=1e-9)
    # A tenth of an equally loud source is 20 dB below; the mixture holds all of it.
    assert model.sir == pytest.approx(20, abs=0.5)
    assert unprocessed.sir == pytest.approx(0, abs=1.0)
    assert unprocessed.usdr == pytest.approx(0, abs=0.5)


def test_a_real_song_equals_museval(tmp_path: Path) -> None:
    """stempeg's excerpt under an ideal mask, alone and next to the accompaniment."""
    from museval import evaluate

    write_excerpt(tmp_path)
    track = open_dataset(tmp_path, "test")[0]
    vocals, mixture = track.read("vocals"), track.read("mixture")
    estimate = separate_with_oracle("irm", ("vocals",))(track)[0]
    signals = Signals(
        track.name,
        track.frames,
        track.sample_rate,
        track_reader(track, "mixture"),
        {"vocals": track_reader(track, "vocals")},
        {"vocals": array_reader(estimate)},
    )
    found = score_signals(signals)
    closed_form = found.details[0].energies.sdr
    single = evaluate(vocals.T[None], estimate.T[None])
    both = evaluate(
        np.stack([vocals.T, (mixture - vocals).T]), np.stack([estimate.T, (mixture - estimate).T])
    )
    for judge in (single, both):
        np.testing.assert_allclose(closed_form, judge[0][0], atol=1e-9, rtol=0)
    assert found.rows[0].csdr == pytest.approx(np.nanmedian(single[0][0]), abs=1e-9)
    assert found.rows[0].csdr > found.rows[1].csdr + 5


def test_a_complete_set_of_stems_needs_no_remainder() -> None:
    stems = {"vocals": noise(0), "drums": noise(1)}
    mixture = stems["vocals"] + stems["drums"] + 1e-5 * noise(2)
    outputs = {name: stem + 0.1 * noise(3) for name, stem in stems.items()}
    rows = score_track(mixture, stems, outputs, is_complete=True)
    assert [(r.stem, r.estimate) for r in rows] == [
        ("vocals", "model"),
        ("drums", "model"),
        ("vocals", "mixture"),
        ("drums", "mixture"),
    ]
    frames = bss_eval(np.stack(list(stems.values())), np.stack(list(outputs.values())), RATE, RATE)
    assert rows[1].sar == np.median(frames["SAR"][1])


def test_closed_form_gives_the_same_csdr_and_usdr() -> None:
    vocals = noise(0)
    arguments = (vocals + noise(1), {"vocals": vocals}, {"vocals": vocals + noise(2)})
    full, fast = score_track(*arguments)[0], score_track(*arguments, scorer="closed-form")[0]
    assert (fast.csdr, fast.usdr) == (full.csdr, full.usdr)
    assert full.sdr == pytest.approx(full.csdr, abs=1e-9)
    assert math.isnan(fast.sir)


def test_silent_reference_leaves_usdr_and_leakage() -> None:
    silence = np.zeros((2, 3 * RATE))
    scores = score_track(noise(1), {"vocals": silence}, {"vocals": noise(2)})[0]
    undefined = (scores.csdr, scores.si_sdr, scores.sdr, scores.isr, scores.sir, scores.sar)
    assert all(math.isnan(value) for value in undefined)
    assert scores.usdr == pytest.approx(usdr(silence, noise(2)), abs=1e-9)
    # Two noises of one power: the leakage is all of the mixture's level.
    assert scores.leakage == pytest.approx(0, abs=0.2)


def test_summary_leaves_out_undefined_tracks_and_counts_them() -> None:
    summaries = {s.score: s for s in summarise([row(2.0), row(4.0), row(9.0), row(NAN)])}
    summary = summaries["usdr"]
    assert (summary.mean, summary.median) == (5.0, 4.0)
    assert summary.std == pytest.approx(math.sqrt((9 + 1 + 16) / 3))
    assert (summary.tracks, summary.undefined_tracks) == (3, 1)
    assert math.isnan(summaries["isr"].median)
    assert (summaries["isr"].tracks, summaries["isr"].undefined_tracks) == (0, 4)


def test_summary_keeps_estimates_and_stems_apart() -> None:
    rows = [row(1.0), row(5.0, estimate="mixture"), row(7.0, stem="drums")]
    means = {(s.stem, s.estimate): s.mean for s in summarise(rows, ["usdr"])}
    assert means == {("vocals", "model"): 1, ("vocals", "mixture"): 5, ("drums", "model"): 7}


def test_json_has_null_for_what_json_lacks() -> None:
    values = as_json(row(float("inf")))
    assert values["usdr"] == "inf"
    assert values["isr"] is None
    assert values["csdr"] == 1.0
    assert values["track"] == "t"
