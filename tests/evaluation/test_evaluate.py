"""The evaluation command on a tiny network and data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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

    monkeypatch.setattr(Separator, "chunk_seconds", 1.0)
    scores = {}
    for protocol in ("ours", "paper"):
        path = tmp_path / f"{protocol}.json"
        options = ("--protocol", protocol, "--tracks", 1)
        run(checkpoint, dataset, "--json", path, *options)
        report = json.loads(path.read_text())
        assert report["protocol"]["overlap"] == {"ours": 0.25, "paper": 0.0}[protocol]
        assert len(report["tracks"]) == 2
        assert {s["score"] for s in report["summary"]} == set(SCORERS["closed-form"])
        scores[protocol] = report["tracks"][0]["usdr"]
    assert 1e-6 < abs(scores["ours"] - scores["paper"]) < 1


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
