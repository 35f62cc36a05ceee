"""Scores of a track and their summary, against numbers that follow from the signals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.metrics import bss_eval, csdr, usdr
from evaluation.scoring import StemScores, as_json, score_track, summarise

RATE = 4000
NAN = float("nan")


def noise(seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((2, 3 * RATE))


def row(usdr_value: float, **fields) -> StemScores:
    values = {"track": "t", "stem": "vocals", "estimate": "model"}
    values |= {"csdr": 1.0, "isr": NAN, "sir": 2.0, "sar": 3.0, "usdr": usdr_value} | fields
    return StemScores(**values)


def test_vocals_model_is_scored_against_the_accompaniment() -> None:
    vocals, accompaniment = noise(0), noise(1)
    mixture = vocals + accompaniment
    estimate = vocals + 0.1 * accompaniment
    model, unprocessed = score_track("t", mixture, {"vocals": vocals}, {"vocals": estimate}, RATE)
    assert (model.estimate, unprocessed.estimate) == ("model", "mixture")
    frames = bss_eval(
        np.stack([vocals, mixture - vocals]),
        np.stack([estimate, mixture - estimate]),
        RATE,
        RATE,
    )
    for score in ("isr", "sir", "sar"):
        assert getattr(model, score) == np.median(frames[score.upper()][0])
    assert model.csdr == csdr(vocals, estimate, RATE)
    assert model.csdr == pytest.approx(np.median(frames["SDR"][0]), abs=1e-9)
    assert model.usdr == usdr(vocals, estimate)
    # A tenth of an equally loud source is 20 dB below; the mixture holds all of it.
    assert model.sir == pytest.approx(20, abs=0.5)
    assert unprocessed.sir == pytest.approx(0, abs=1.0)
    assert unprocessed.usdr == pytest.approx(0, abs=0.5)


def test_a_complete_set_of_stems_needs_no_remainder() -> None:
    stems = {"vocals": noise(0), "drums": noise(1)}
    mixture = stems["vocals"] + stems["drums"] + 1e-5 * noise(2)
    outputs = {name: stem + 0.1 * noise(3) for name, stem in stems.items()}
    rows = score_track("t", mixture, stems, outputs, RATE, is_complete=True)
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
    arguments = ("t", vocals + noise(1), {"vocals": vocals}, {"vocals": vocals + noise(2)}, RATE)
    full, fast = score_track(*arguments)[0], score_track(*arguments, scorer="closed-form")[0]
    assert (fast.csdr, fast.usdr) == (full.csdr, full.usdr)
    assert math.isnan(fast.sir)


def test_silent_reference_leaves_only_usdr() -> None:
    silence = np.zeros((2, 3 * RATE))
    scores = score_track("t", noise(1), {"vocals": silence}, {"vocals": noise(2)}, RATE)[0]
    assert all(math.isnan(v) for v in (scores.csdr, scores.isr, scores.sir, scores.sar))
    assert scores.usdr == usdr(silence, noise(2))


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
    assert values["usdr"] is None
    assert values["isr"] is None
    assert values["csdr"] == 1.0
    assert values["track"] == "t"
