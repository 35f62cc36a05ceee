"""The evaluation command on a tiny network and data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from evaluation.evaluate import main
from evaluation.metrics import csdr, usdr
from evaluation.scoring import SCORERS
from models import load_checkpoint
from models.errors import InputError

ROOT = Path(__file__).parents[2]


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


def run(checkpoint: Path, data: Path, *options: object) -> None:
    arguments = ["--checkpoint", checkpoint, "--data", data, "--device", "cpu", *options]
    assert main(list(map(str, arguments))) == 0


def test_table_and_json_hold_the_scores_of_the_network(
    checkpoint: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "scores.json"
    run(checkpoint, dataset, "--json", path, "--scorer", "museval")
    report = json.loads(path.read_text())
    folder = dataset / "test" / "first song"
    mixture, vocals = read(folder / "mixture.wav"), read(folder / "vocals.wav")
    with torch.inference_mode():
        estimate = load_checkpoint(checkpoint)(torch.from_numpy(mixture)[None])[0, 0].numpy()
    model, unprocessed = report["tracks"][:2]
    assert (model["track"], model["stem"], model["estimate"]) == ("first song", "vocals", "model")
    assert model["usdr"] == pytest.approx(usdr(vocals, estimate), abs=1e-5)
    assert model["csdr"] == pytest.approx(csdr(vocals, estimate), abs=1e-5)
    assert unprocessed["usdr"] == pytest.approx(usdr(vocals, mixture), abs=1e-9)
    assert all(isinstance(model[score], float) for score in ("sdr", "isr", "sir", "sar"))
    # The second track has no vocals: museval's scores are undefined there.
    assert report["tracks"][2]["csdr"] is None
    summary = {(s["estimate"], s["score"]): s for s in report["summary"]}
    assert summary["model", "csdr"]["mean"] == model["csdr"]
    assert summary["model", "csdr"]["undefined_tracks"] == 1
    assert summary["model", "usdr"]["tracks"] == 2
    assert report["config"]["dim"] == 8
    assert report["protocol"]["name"] == "ours"
    assert report["versions"]["torch"] == torch.__version__
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.json"]

    table = capsys.readouterr().out.splitlines()
    labels = ["cSDR", "uSDR", "SI-SDR", "leakage", "bleedless", "fullness", "SDR"]
    labels += ["ISR", "SIR", "SAR"]
    assert table[0].split() == ["track", "stem", "estimate", *labels]
    line = next(line for line in table if line.startswith("first song") and "model" in line)
    names = ("csdr", "usdr", "si_sdr", "leakage", "bleedless", "fullness", "sdr", "isr")
    scores = ["nan" if model[n] is None else f"{model[n]:.2f}" for n in names]
    assert line.split()[-10:-2] == scores
    statistics = [line.split()[0] for line in table if "over tracks " in line]
    assert statistics == ["mean", "mean", "std", "std", "median", "median"]
    assert any(
        "cSDR of vocals (model): undefined on 1 of 2 tracks" in line and "second song" in line
        for line in table
    )


def test_protocols_differ_where_chunks_join(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from separation.separator import Separator

    vocals = {}
    for name, seconds in (("ours", 1.0), ("paper", 1.0), ("whole", 8.0)):
        with monkeypatch.context() as patch:
            chosen = partial(Separator.from_checkpoint, chunk_seconds=seconds)
            patch.setattr(Separator, "from_checkpoint", chosen)
            protocol = "paper" if name == "paper" else "ours"
            options = ("--protocol", protocol, "--tracks", 1, "--save-estimates", tmp_path / name)
            run(checkpoint, dataset, "--json", tmp_path / f"{name}.json", *options)
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["protocol"]["chunk_seconds"] == seconds
        assert report["protocol"]["overlap"] == {"ours": 0.25, "paper": 0.0}[protocol]
        assert len(report["tracks"]) == 2
        assert {s["score"] for s in report["summary"]} == set(SCORERS["closed-form"])
        vocals[name] = read(tmp_path / name / "first song" / "vocals.wav")

    def error(name: str, seconds: float) -> float:
        """Largest difference from the whole track around a point of time."""
        middle = round(seconds * 44100)
        near = slice(middle - 500, middle + 500)
        return float(np.abs(vocals[name] - vocals["whole"])[:, near].max())

    # Side by side, chunks join at 1 and 2 s; ours share 0.75 to 1 s and 1.5 to 1.75 s.
    joined = min(error("paper", 1), error("paper", 2))
    assert joined > 20 * error("paper", 1.5)
    assert joined > 20 * max(error("ours", s) for s in (0.75, 0.875, 1, 1.5, 1.625, 1.75, 2))
    assert error("ours", 0.875) > 0


def test_bad_input_is_one_line_and_exit_code_2(checkpoint: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "evaluation.evaluate", "--checkpoint", checkpoint]
        + ["--data", tmp_path / "absent"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "absent" in result.stderr


def test_bad_arguments(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.pt"):
        run(tmp_path / "no.pt", dataset)
    with pytest.raises(InputError, match="--tracks 0"):
        run(checkpoint, dataset, "--tracks", 0)
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(InputError, match=r"scores\.json: cannot be written"):
        run(checkpoint, dataset, "--json", blocker / "scores.json")


def test_stem_that_the_data_set_lacks(dataset: Path, tmp_path: Path) -> None:
    from models import BSMamba2, BSMamba2Config
    from models.checkpoint import save_checkpoint

    config = BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16, stem_names=("piano",))
    save_checkpoint(tmp_path / "piano.pt", config, BSMamba2(config).state_dict())
    with pytest.raises(InputError, match="first song: no stem piano"):
        run(tmp_path / "piano.pt", dataset)


def test_a_data_set_of_another_rate_and_other_stems(tmp_path: Path) -> None:
    from evaluation import report
    from evaluation.experiments import __main__ as experiments
    from models import BSMamba2, BSMamba2Config
    from models.checkpoint import save_checkpoint

    rate, stems = 48_000, ("piano", "voice")
    for index, name in enumerate(("a", "b")):
        folder = tmp_path / "data" / "test" / name
        folder.mkdir(parents=True)
        audio = 0.05 * np.random.default_rng(index).standard_normal((2, 9 * rate, 2))
        for stem, samples in zip(stems, audio, strict=True):
            soundfile.write(folder / f"{stem}.wav", samples, rate)
        soundfile.write(folder / "mixture.wav", audio.sum(axis=0), rate)
    config = BSMamba2Config(
        dim=8, depth=1, d_state=16, headdim=16, stem_names=("piano",), sample_rate=rate
    )
    save_checkpoint(tmp_path / "piano.pt", config, BSMamba2(config).state_dict())
    data = tmp_path / "data"
    options = ("--data-stems", "piano,voice", "--output", tmp_path / "run")
    run(tmp_path / "piano.pt", data, *options)
    irm = ["--baseline", "irm", "--data", data, "--stems", "piano", "--data-stems", "piano,voice"]
    assert main([str(option) for option in [*irm, "--output", tmp_path / "irm"]]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert {row["stem"] for row in scores["tracks"]} == {"piano"}
    bands = ["bands", str(tmp_path / "run"), "--stem", "piano", "-o", str(tmp_path / "out")]
    assert experiments.main(bands) == 0
    page = tmp_path / "page.html"
    assert report.main([str(tmp_path / "run"), str(tmp_path / "irm"), "-o", str(page)]) == 0
    assert page.read_text().count("data:audio/mpeg") >= 8
    with pytest.raises(InputError, match="--stems drums: .* piano, voice"):
        main([str(option) for option in [*irm[:5], "drums", *irm[6:]]])
