from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from models.errors import InputError
from training.config import load_config
from training.data.inspect import CONFIG, _spans, main
from training.loaders import Loaders
from training.run_folder import RunFolder

RATE = 44_100


@pytest.fixture
def root(tmp_path: Path, make_folder_track) -> Path:
    root = tmp_path / "it's: a set"
    quiet = np.random.default_rng(5).integers(-4000, 4000, (2 * RATE, 2))
    quiet[RATE:] = 0
    make_folder_track(root / "train" / "a", seconds=2, vocals=quiet)
    make_folder_track(root / "train" / "b$x $y", seconds=2, seed=1)
    make_folder_track(root / "train" / "c", seconds=2, seed=2)
    make_folder_track(root / "test" / "d", seconds=2, seed=3)
    return root


def words(root: Path, *more: str) -> list[str]:
    return [str(root), "data.segment_seconds=0.5", *more]


def test_report_counts_what_is_there(root: Path, capsys) -> None:
    soundfile.write(root / "train" / "b$x $y" / "bass.wav", np.zeros(2 * RATE), RATE, "PCM_24")
    assert main(words(root)) == 0
    out = capsys.readouterr().out
    assert f"{root}: 4 tracks, 0.00 h, 0 broken" in out
    assert "train: 3 tracks" in out and "test: 1 tracks" in out
    assert "sample formats: PCM_16 (15 stems), PCM_24 (1 stems)" in out
    assert "channels: stereo (15 stems), mono (1 stems)" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "%" in line}
    assert rows["drums"] == ["100.0%", "28", "0", "0"]
    assert rows["bass"] == ["75.0%", "21", "1", "0"]
    assert rows["vocals"] == ["85.7%", "24", "0", "0"]


def test_everything_broken_is_listed_with_its_reason(root: Path, capsys) -> None:
    (root / "train" / "a" / "bass.wav").unlink()
    soundfile.write(root / "train" / "b$x $y" / "drums.wav", np.zeros((96_000, 2)), 48_000)
    (root / "test" / "d" / "mixture.wav").unlink()
    cut = root / "train" / "c" / "other.wav"
    assert main(words(root)) == 0
    out = capsys.readouterr().out
    assert "1 tracks, 0.00 h, 3 broken" in out
    broken = [line for line in out.splitlines() if line.startswith("broken: ")]
    assert len(broken) == 3
    for name, reason in (
        ("a/bass.wav", "missing"),
        ("b$x $y/drums.wav", "48000 Hz"),
        ("d/mixture.wav", "missing"),
    ):
        assert any(name in line and reason in line for line in broken)
    cut.write_bytes(b"")
    assert main(words(root)) == 0
    assert "0 tracks, 0.00 h, 4 broken" in capsys.readouterr().out
    with pytest.raises(InputError, match="every track of 'train' is broken"):
        main(words(root, "--listen", "1"))


def test_examples_are_those_of_the_run(root: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "heard"
    changes = ["model.stem_names=[drums, bass]", "model.num_stems=2", "data.polarity_prob=0.5"]
    assert main(words(root, *changes, "--listen", "3", "--output", str(out))) == 0
    assert len(list(out.iterdir())) == 9
    config = load_config(
        CONFIG, [f'data.root="{root}"', f"run.dir={tmp_path / 'run'}", *words(root, *changes)[1:]]
    )
    mixes = Loaders(config, RunFolder(config.run.dir)).mixes
    for i in range(3):
        for number, name in enumerate(("drums", "bass")):
            heard, rate = soundfile.read(out / f"00{i}_{name}.wav", dtype="float32")
            assert rate == RATE
            np.testing.assert_array_equal(heard.T, mixes[i]["target"][number])
        heard, _ = soundfile.read(out / f"00{i}_mixture.wav", dtype="float32")
        np.testing.assert_array_equal(heard.T, mixes[i]["mixture"])


def test_picture_shows_a_row_a_track(root: Path, tmp_path: Path, capsys) -> None:
    from matplotlib.image import imread

    path = tmp_path / "pictures" / "activity.png"
    assert main(words(root, "--picture", str(path))) == 0
    image = imread(path)
    red = np.isclose(image[..., :3], [0.839, 0.153, 0.157], atol=0.01).all(-1).sum(axis=1)
    heights = red[red > 100]
    # Vocals rest in the second half of one of the four tracks.
    assert heights.min() / heights.max() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(InputError, match="activity.xyz: the picture cannot be written"):
        main(words(root, "--picture", str(tmp_path / "activity.xyz")))
    assert not (tmp_path / "activity.xyz").exists()


def test_overlapping_windows_are_one_stretch() -> None:
    starts = np.array([0, 50, 100, 300, 350])
    assert _spans(starts, 100, 10) == [(0.0, 20.0), (30.0, 15.0)]
    assert _spans(np.array([], np.int64), 100, 10) == []


def test_no_data_root_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no folder 'train' .* name the folder"):
        main([str(tmp_path)])
    with pytest.raises(InputError, match="data.silent_prop: unknown key"):
        main([str(tmp_path), "data.silent_prop=1"])
