from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from training.data import benchmark

NAMES = {
    "index": ["activity index of 3 tracks of 4 minutes", "active windows found"],
    "opening": [
        "reading the headers of 12 tracks",
        "opening 12 indexed tracks",
        "resident memory of a worker",
        "of which not shared",
    ],
}


@pytest.fixture
def short_songs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Songs of seconds in the place of minutes: what is tested is that it measures."""
    from training.data import synthetic

    write = synthetic.write_synthetic

    # The benchmark forks, so that its processes have this too.
    monkeypatch.setattr(synthetic, "write_synthetic", lambda out, **_: write(out, 3, 9))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_index_and_opening_are_measured(tmp_path: Path, short_songs, capfd) -> None:
    report = tmp_path / "report.json"
    words = ["--parts", "index", "opening", "--index-tracks", "3", "--open-tracks", "12"]
    words += ["--workers", "1", "--folder", str(tmp_path), "--json", str(report)]
    assert benchmark.main(words) == 0
    results = {r["name"]: r for r in json.loads(report.read_text())["results"]}
    assert len(results) == 6
    for name in NAMES["index"] + NAMES["opening"]:
        (full,) = [key for key in results if key.startswith(name)]
        assert results[full]["value"] > 0
    assert results["active windows found"]["value"] <= 3 * 4
    assert results["resident memory of a worker"]["value"] > 50
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert "goal: 400" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="musdb needs ffmpeg")
def test_loading_is_measured_beside_musdb(tmp_path: Path, short_songs, monkeypatch) -> None:
    pytest.importorskip("musdb")
    monkeypatch.setattr(benchmark, "BATCH", 1)
    monkeypatch.setattr(benchmark, "WARM_UP", 1)
    report = tmp_path / "report.json"
    words = ["--parts", "loading", "--workers", "1", "--seconds", "0.2"]
    assert benchmark.main([*words, "--folder", str(tmp_path), "--json", str(report)]) == 0
    values = {r["name"]: r["value"] for r in json.loads(report.read_text())["results"]}
    rates = [values[f"{form}, 1 workers"] for form in ("wav", "flac", "npy")]
    musdb = values["musdb's access to the same wav, 1 workers"]
    assert values["ours / musdb's"] == pytest.approx(rates[0] / musdb)
    assert min(rates) > musdb > 0
    assert 0 <= values["waiting, 1 workers, steps of 0.2 s"] < 100
