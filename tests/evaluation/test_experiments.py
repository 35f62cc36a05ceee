"""Experiments and the report, on evaluations of a small data set."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from evaluation import evaluate, report
from evaluation.comparison import compare
from evaluation.experiments import __main__ as experiments
from evaluation.experiments import sparsity
from evaluation.experiments.bands import by_frequency
from evaluation.hdemucs import separate_with_hdemucs
from evaluation.listening import chosen_tracks, sound_uri
from evaluation.oracles import MASKS, apply_mask
from evaluation.result import names_of, read_evaluation
from models.errors import InputError
from training.data.sources import open_dataset

RATE = 44100
STEMS = ("vocals", "drums", "bass", "other")
# Seconds in which the vocals of each track sound.
VOCALS = {"always": [(0, 9)], "half": [(0, 4)], "never": []}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three test tracks of 9 s of noise in bands of its own for each stem."""
    root = tmp_path_factory.mktemp("sparse")
    for index, (name, spans) in enumerate(VOCALS.items()):
        rng = np.random.default_rng(index)
        folder = root / "test" / name
        folder.mkdir(parents=True)
        noise = rng.standard_normal((len(STEMS), 9 * RATE, 2))
        stems = 0.05 * (noise + np.roll(noise, 1, axis=1) * np.array([1, -1, 0, 1])[:, None, None])
        active = np.zeros(9 * RATE)
        for start, stop in spans:
            active[start * RATE : stop * RATE] = 1
        stems[0] *= active[:, None]
        for stem, samples in zip(STEMS, stems, strict=True):
            soundfile.write(folder / f"{stem}.wav", samples, RATE, subtype="FLOAT")
        soundfile.write(folder / "mixture.wav", stems.sum(axis=0), RATE, subtype="FLOAT")
    return root


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of the experiment `baselines`: evaluations of both oracles in OUT/runs."""
    out = tmp_path_factory.mktemp("baselines")
    assert experiments.main(["baselines", "--data", str(data), "-o", str(out)]) == 0
    return out


def test_oracles_lie_above_the_mixture(runs: Path) -> None:
    result = json.loads((runs / "baselines.json").read_text())
    medians = {row["estimate"]: row["csdr"]["median"] for row in result["rows"]}
    assert list(medians) == ["mixture", "irm", "icm"]
    assert medians["irm"] > medians["mixture"] + 3
    assert medians["icm"] > medians["irm"] + 3
    assert result["rows"][0]["csdr"]["per_track"]["never"] is None
    assert (runs / "baselines.png").stat().st_size > 5000


def test_masks_of_known_signals() -> None:
    torch.manual_seed(0)
    stem, silence = torch.randn(1, 2, RATE // 4), torch.zeros(1, 2, RATE // 4)
    for mask in MASKS.values():
        alone = apply_mask(stem, stem, mask)
        torch.testing.assert_close(alone, stem, atol=1e-5, rtol=0)
        assert apply_mask(silence, stem, mask).abs().max() == 0
        assert apply_mask(stem, silence, mask).abs().max() == 0
    # Twice the mixture is out of reach of a ratio mask, and in reach of a complex one.
    torch.testing.assert_close(
        apply_mask(2 * stem, stem, MASKS["icm"]), 2 * stem, atol=1e-4, rtol=0
    )
    assert apply_mask(2 * stem, stem, MASKS["irm"]).abs().max() <= stem.abs().max()


def test_sparsity_bins_segments_and_tracks(runs: Path, tmp_path: Path) -> None:
    arguments = ["sparsity", str(runs / "runs" / "irm"), "-o", str(tmp_path)]
    assert experiments.main(arguments) == 0
    rows = json.loads((tmp_path / "sparsity.json").read_text())["rows"]
    found = {(row["estimate"], row["active"]): row for row in rows}
    assert {row["estimate"] for row in rows} == {"irm", "mixture"}
    counts = {name: found["irm", name]["segments"] for name in sparsity.BINS}
    # Segments of 8 s; the ninth second of each track joins none. "half" sounds for 4 of 8 s.
    assert counts == {"0 %": 1, "to 25 %": 0, "25-50 %": 1, "50-75 %": 0, "75-100 %": 1}
    assert [found["irm", name]["tracks"] for name in sparsity.BINS] == [1, 0, 1, 0, 1]
    assert found["irm", "0 %"]["sdr"] is None
    assert found["irm", "0 %"]["leakage"] == -120
    assert found["mixture", "25-50 %"]["leakage"] == pytest.approx(0, abs=1e-6)
    assert found["irm", "75-100 %"]["sdr"] > found["mixture", "75-100 %"]["sdr"] + 3
    assert (tmp_path / "sparsity.png").stat().st_size > 5000


def test_bands_find_where_a_mask_helps(runs: Path, tmp_path: Path) -> None:
    arguments = ["bands", str(runs / "runs" / "irm"), "-o", str(tmp_path)]
    assert experiments.main(arguments) == 0
    result = json.loads((tmp_path / "bands.json").read_text())
    irm, mixture = result["rows"]
    assert (irm["estimate"], mixture["estimate"]) == ("irm", "mixture")
    assert len(irm["bands"]) == len(result["band_centres_hz"]) == 62
    assert all(a > b for a, b in zip(irm["regions"], mixture["regions"], strict=True))
    # The vocals' noise is low-passed, the drums' high-passed: the mixture is worse at the top.
    assert mixture["regions"][0] > mixture["regions"][4]


def test_bands_need_one_sample_rate(runs: Path) -> None:
    one = read_evaluation(runs / "runs" / "irm")
    tracks = [replace(track, sample_rate=2 * track.sample_rate) for track in one.tracks]
    with pytest.raises(InputError, match="their bands are not the same frequencies"):
        by_frequency([one, replace(one, tracks=tracks)], "vocals")


@pytest.mark.parametrize("rate", (44_100, 44_056, 96_000))
def test_sound_of_any_rate_goes_into_a_page(rate: int) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    kind, _, data = sound_uri(np.stack([tone, tone]), rate).partition(",")
    assert kind == "data:audio/mpeg;base64"
    audio, _ = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert len(audio) == pytest.approx(44_100, abs=3000)


def test_lengths_change_the_input_of_the_network(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lengths", "--checkpoint", checkpoint, "--data", dataset, "--tracks", 1]
    arguments += ["--device", "cpu", "--lengths", "0.5,1", "-o", tmp_path]
    assert experiments.main([str(a) for a in arguments]) == 0
    result = json.loads((tmp_path / "lengths.json").read_text())
    assert [row["seconds"] for row in result["rows"]] == [0.5, 1.0]
    assert result["protocol"] == "paper"
    run = read_evaluation(tmp_path / "runs" / "0.5s")
    assert run.report["protocol"]["chunk_seconds"] == 0.5
    short, long = (row["usdr_mean"] for row in result["rows"])
    assert short != long
    assert f"{short:.2f}" in capsys.readouterr().out


def test_report_is_one_page_without_links(runs: Path, tmp_path: Path) -> None:
    folders = [str(runs / "runs" / name) for name in ("irm", "icm")]
    path = tmp_path / "report.html"
    assert report.main([*folders, "-o", str(path), "--title", "a < b"]) == 0
    page = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "<h1>a &lt; b</h1>" in page
    # Two tracks have a cSDR: best and worst, each with mixture, truth and two estimates.
    assert page.count("data:audio/mpeg") == 8
    assert page.count("data:image/png") == 3 + 2
    row = re.search(r"<td[^>]*>irm - icm</td><td[^>]*>cSDR</td>(.*)", page)
    cells = re.findall(r">([^<]+)</td>", row[0]) if row else []
    assert cells[4:] == ["0 / 2", "2", "0.5"]


def test_report_without_the_data_set_says_so(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "report.html"
    arguments = [str(runs / "runs" / "irm"), "-o", str(path), "--data", str(tmp_path / "gone")]
    assert report.main(arguments) == 0
    assert "gone does not exist" in caplog.text
    assert "Left out: data root" in path.read_text(encoding="utf-8")


def test_runs_that_are_none(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(InputError, match="holds no evaluation"):
        report.main([str(tmp_path)])
    twice = read_evaluation(runs / "runs" / "irm")
    with pytest.raises(InputError, match="named twice"):
        names_of([twice, twice])
    with pytest.raises(InputError, match="has no scores of drums; it has vocals"):
        experiments.main(["bands", str(twice.folder), "--stem", "drums", "-o", str(tmp_path)])


def test_names_that_two_things_would_share(runs: Path, data: Path, tmp_path: Path) -> None:
    """The checkpoint's row and the mixture's have names of their own."""
    from models import BSMamba2, BSMamba2Config
    from models.checkpoint import save_checkpoint

    config = BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16)
    save_checkpoint(tmp_path / "tiny.pt", config, BSMamba2(config).state_dict())
    folder = tmp_path / "model"
    for name in VOCALS:
        (folder / name).mkdir(parents=True)
        (folder / name / "vocals.wav").symlink_to(data / "test" / name / "vocals.wav")
    command = ["baselines", "--data", data, "--checkpoint", tmp_path / "tiny.pt", "--baseline"]
    command += ["irm", "--estimates", folder, "-o", tmp_path / "out"]
    with pytest.raises(InputError, match="model: two estimates of this name"):
        experiments.main([str(word) for word in command])
    pair = []
    for parent in ("a", "b"):
        found = read_evaluation(runs / "runs" / "irm")
        pair.append(replace(found, folder=tmp_path / parent / "mixture"))
    assert names_of(pair) == ["a/mixture", "b/mixture"]
    lone = replace(pair[0], report=pair[0].report | {"label": "mixture"})
    assert names_of([lone]) == ["a/mixture"]


def test_chosen_tracks_are_best_median_worst(runs: Path) -> None:
    chosen = chosen_tracks(read_evaluation(runs / "runs" / "irm"), "vocals")
    assert [kind for kind, _, _ in chosen] == ["best", "worst"]
    assert chosen[0][2] >= chosen[1][2]


def test_paired_comparison() -> None:
    first = {f"t{i}": 5.0 + 0.1 * i for i in range(8)}
    second = {name: value - 1 - 0.01 * i for i, (name, value) in enumerate(first.items())}
    found = compare(first | {"alone": 3.0}, second | {"t0": float("nan")})
    assert (found.tracks, found.wins, found.losses) == (7, 7, 0)
    assert found.median == pytest.approx(1.04)
    # Seven differences of one sign: two of the 2^7 equally likely sign patterns.
    assert found.p_value == pytest.approx(2 / 2**7)
    assert compare(first, first).p_value == 1
    assert compare({}, first).tracks == 0


def test_hdemucs_is_asked_for_the_right_stems(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with torchaudio's interface: stem i is the mixture over 2^i."""

    class Model(torch.nn.Module):
        sources = ("drums", "bass", "other", "vocals")

        def forward(self, mixture: torch.Tensor) -> torch.Tensor:
            assert abs(float(mixture.mean())) < 0.1
            return torch.stack([mixture / 2**i for i in range(4)], dim=1)

    pipelines = ModuleType("torchaudio.pipelines")
    bundle = SimpleNamespace(get_model=Model, sample_rate=RATE)
    pipelines.HDEMUCS_HIGH_MUSDB_PLUS = bundle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
    monkeypatch.setitem(sys.modules, "torchaudio.pipelines", pipelines)
    separate, rate = separate_with_hdemucs(("vocals", "drums"), torch.device("cpu"))
    assert rate == RATE
    track = open_dataset(data, "test")[0]
    outputs = separate(track)
    mixture = track.read("mixture")
    np.testing.assert_allclose(outputs[1], mixture, atol=1e-5)
    np.testing.assert_allclose(outputs[0], mixture / 8, atol=1e-3)
    with pytest.raises(InputError, match="no stem piano; it has drums"):
        separate_with_hdemucs(("piano",), torch.device("cpu"))


def test_hdemucs_without_torchaudio_is_one_line(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(InputError, match="hdemucs needs a torchaudio that loads") as error:
        evaluate.main(["--baseline", "hdemucs", "--data", str(data)])
    assert "\n" not in str(error.value)
