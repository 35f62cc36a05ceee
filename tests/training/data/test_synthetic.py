from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from models.errors import InputError
from training.data import synthetic
from training.data.sources import STEMS, open_dataset
from training.data.synthetic import write_synthetic

SECONDS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "out"
    write_synthetic(out, tracks=4, seconds=SECONDS, seed=1)
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_layout_is_musdb18_hq(made: Path) -> None:
    assert [t.name for t in open_dataset(made, "train")] == ["synthetic-01", "synthetic-02"]
    assert [t.name for t in open_dataset(made, "valid")] == ["synthetic-03"]
    assert [t.name for t in open_dataset(made, "test")] == ["synthetic-04"]
    info = soundfile.info(made / "test" / "synthetic-04" / "vocals.wav")
    assert (info.samplerate, info.channels, info.subtype) == (44_100, 2, "PCM_16")
    assert info.frames == SECONDS * 44_100
    assert {path.name for path in made.iterdir()} == {"train", "test", "synthetic.json"}


def test_same_seed_same_bytes_and_other_seed_other_sound(made: Path, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "again", tracks=4, seconds=SECONDS, seed=1)
    assert contents(tmp_path / "again") == contents(made)
    write_synthetic(tmp_path / "other", tracks=3, seconds=2, seed=2)
    write_synthetic(tmp_path / "first", tracks=3, seconds=2, seed=1)
    first, other = contents(tmp_path / "first"), contents(tmp_path / "other")
    assert all(first[name] != other[name] for name in first)


def test_mixture_is_the_exact_sum_without_clipping(made: Path) -> None:
    for folder in made.glob("*/*/"):
        read = {
            stem: soundfile.read(folder / f"{stem}.wav", dtype="int16")[0].astype(int)
            for stem in (*STEMS, "mixture")
        }
        np.testing.assert_array_equal(read["mixture"], sum(read[stem] for stem in STEMS))
        peak = max(np.abs(audio).max() for audio in read.values())
        assert abs(peak - 0.9 * 32_767) <= 2


def test_voice_lies_below_the_rest_and_rests(made: Path) -> None:
    for subset in ("train", "test"):
        for track in open_dataset(made, subset):
            vocals = track.read("vocals").astype(np.float64)
            rest = track.read("mixture") - vocals
            ratio = 10 * np.log10(np.sum(vocals**2) / np.sum(rest**2))
            assert -3 < ratio < -0.5
            silent = np.mean(~vocals.any(axis=0))
            assert 0.1 < silent < 0.7


def test_tracks_differ(made: Path) -> None:
    """Average spectra of the voices of two tracks are far from proportional."""
    spectra = []
    for track in open_dataset(made, "train"):
        power = np.abs(np.fft.rfft(track.read("vocals").mean(axis=0))) ** 2
        spectra.append(power[:80_000].reshape(-1, 200).sum(axis=1))
    assert np.corrcoef(spectra)[0, 1] < 0.8


def test_overwrite_only_replaces_what_was_written_here(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_synthetic(out, tracks=3, seconds=2)
    with pytest.raises(InputError, match="is not empty.*--overwrite"):
        write_synthetic(out, tracks=3, seconds=2)
    write_synthetic(out, tracks=4, seconds=2, overwrite=True)
    assert len(list(out.glob("*/*/"))) == 4
    (out / synthetic.MANIFEST).unlink()
    with pytest.raises(InputError, match="holds other files"):
        write_synthetic(out, tracks=3, seconds=2, overwrite=True)
    assert len(list(out.glob("*/*/"))) == 4


@pytest.mark.parametrize(
    "options", [{"tracks": 2}, {"seconds": 1.9}, {"seconds": float("nan")}, {"seed": -1}]
)
def test_impossible_options(tmp_path: Path, options: dict) -> None:
    with pytest.raises(InputError, match="at least 3 tracks of 2 to 600 s and a seed of 0"):
        write_synthetic(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def interrupt(seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "make_track", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "out", tracks=3, seconds=2)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert synthetic.main([str(out), "--tracks", "3", "--seconds", "2"]) == 0
    assert capsys.readouterr().out == f"3 synthetic tracks of 2 s in {out}\n"
    again = subprocess.run(
        [sys.executable, "-m", "training.data.synthetic", str(out)],
        cwd=Path(synthetic.__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert line.startswith(f"error: {out} is not empty")
