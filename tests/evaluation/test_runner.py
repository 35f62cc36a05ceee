"""Parallel, resumable scoring of files, and what happens to bad ones."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from evaluation import runner
from evaluation.estimates import open_folder_source
from evaluation.evaluate import main
from evaluation.metrics import csdr, usdr
from evaluation.records import TrackStore
from evaluation.result import read_evaluation
from evaluation.runner import Runner
from evaluation.scoring import TrackScores
from models.errors import InputError
from training.data.prepare import main as prepare
from training.data.sources import open_dataset

MAIN = Path(__file__).parents[2]
RATE = 44100
TRACKS = ("first song", "second song")


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32", always_2d=True)[0].T


@pytest.fixture
def estimates(dataset: Path, tmp_path: Path) -> Path:
    """Another separator's folder: a little of the mixture in every estimate."""
    root = tmp_path / "other separator"
    for name in TRACKS:
        folder = dataset / "test" / name
        audio = read(folder / "vocals.wav") + 0.1 * read(folder / "mixture.wav")
        (root / name).mkdir(parents=True)
        soundfile.write(root / name / "vocals.wav", audio.T, RATE, subtype="FLOAT")
    return root


def evaluate(dataset: Path, estimates: Path, *options: object) -> int:
    arguments = ["--data", dataset, "--estimates", estimates, *options]
    return main([str(argument) for argument in arguments])


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    soundfile.write(path, change(read(path)).T, RATE, subtype="FLOAT")


def test_folders_of_another_separator(dataset: Path, estimates: Path, tmp_path: Path) -> None:
    assert evaluate(dataset, estimates, "--output", tmp_path / "run") == 0
    evaluation = read_evaluation(tmp_path / "run")
    assert evaluation.label == "other separator"
    row = evaluation.tracks[0].rows[0]
    reference = read(dataset / "test" / "first song" / "vocals.wav")
    estimate = read(estimates / "first song" / "vocals.wav")
    assert row.csdr == pytest.approx(csdr(reference, estimate), abs=1e-9)
    assert row.usdr == pytest.approx(usdr(reference, estimate), abs=1e-9)
    excerpt = read(tmp_path / "run" / "excerpts" / "first song" / "vocals.flac")
    np.testing.assert_allclose(excerpt, estimate[:, : excerpt.shape[1]], atol=2**-15)


def test_layout_of_flat_file_names(dataset: Path, estimates: Path) -> None:
    for name in TRACKS:
        shutil.move(estimates / name / "vocals.wav", estimates / f"{name}_vocals.wav")
    tracks = open_dataset(dataset, "test")
    source = open_folder_source(estimates, "test", tracks)
    assert source.stems == ("vocals",)
    assert source.inputs(tracks[1]) == [estimates / "second song_vocals.wav"]


def test_two_files_for_one_estimate_are_named(dataset: Path, estimates: Path) -> None:
    old = estimates / "first song" / "vocals.wav"
    new = estimates / "first song_vocals.flac"
    new.write_bytes(old.read_bytes())
    tracks = open_dataset(dataset, "test")
    with pytest.raises(InputError, match=f"{old} and {new}: both may be the estimate"):
        open_folder_source(estimates, "test", tracks)


def test_processes_give_the_scores_of_one(dataset: Path, estimates: Path) -> None:
    tracks = open_dataset(dataset, "test")
    source = open_folder_source(estimates, "test", tracks)
    alone, together = (Runner(jobs=jobs).run(tracks, source) for jobs in (1, 2))
    assert [scores.track for scores in together] == list(TRACKS)
    assert repr([s.rows for s in alone]) == repr([s.rows for s in together])


def test_scored_tracks_are_kept_and_changed_ones_scored_again(
    dataset: Path, estimates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    evaluate(dataset, estimates, "--output", run)
    before = (run / "scores.json").read_text()
    scored: list[str] = []

    def note(self: TrackStore, scores: TrackScores, key: str) -> None:
        scored.append(scores.track)

    monkeypatch.setattr(TrackStore, "save", note)
    evaluate(dataset, estimates, "--output", run)
    assert scored == []
    assert json.loads(before)["tracks"] == json.loads((run / "scores.json").read_text())["tracks"]
    rewrite(estimates / "first song" / "vocals.wav", lambda audio: 0.5 * audio)
    evaluate(dataset, estimates, "--output", run)
    assert scored == ["first song"]


def test_an_estimate_that_changes_meanwhile_is_scored_again(
    dataset: Path, estimates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, estimate = tmp_path / "run", estimates / "first song" / "vocals.wav"
    save = TrackStore.save

    def replace_and_save(self: TrackStore, scores: TrackScores, key: str) -> None:
        if scores.track == "first song":
            rewrite(estimate, lambda audio: 0.5 * audio)
        save(self, scores, key)

    with monkeypatch.context() as patch:
        patch.setattr(TrackStore, "save", replace_and_save)
        evaluate(dataset, estimates, "--output", run)
    before = read_evaluation(run).tracks[0].rows[0].usdr
    evaluate(dataset, estimates, "--output", run)
    assert read_evaluation(run).tracks[0].rows[0].usdr != before


def test_a_track_without_its_excerpt_is_scored_again(
    dataset: Path, estimates: Path, tmp_path: Path
) -> None:
    evaluate(dataset, estimates, "--output", tmp_path / "run")
    excerpt = tmp_path / "run" / "excerpts" / "first song" / "vocals.flac"
    content = excerpt.read_bytes()
    excerpt.unlink()
    evaluate(dataset, estimates, "--output", tmp_path / "run")
    assert excerpt.read_bytes() == content


def test_a_folder_holds_one_evaluation(dataset: Path, estimates: Path, tmp_path: Path) -> None:
    evaluate(dataset, estimates, "--output", tmp_path / "run", "--tracks", 1)
    moved = estimates.rename(tmp_path / "another")
    with pytest.raises(InputError, match="estimates was .*name another --output"):
        evaluate(dataset, moved, "--output", tmp_path / "run", "--tracks", 1)
    (tmp_path / "run" / "identity.json").write_text("[]")
    with pytest.raises(InputError, match=r"identity\.json: damaged"):
        evaluate(dataset, moved, "--output", tmp_path / "run", "--tracks", 1)


def test_nan_in_one_estimate_loses_no_other(dataset: Path, estimates: Path, tmp_path: Path) -> None:
    def spoil(audio: np.ndarray) -> np.ndarray:
        audio[1, RATE] = np.nan
        return audio

    path = estimates / "first song" / "vocals.wav"
    clean = path.read_bytes()
    rewrite(path, spoil)
    scores = tmp_path / "scores.json"
    with pytest.raises(InputError, match=r"NaN.*first at 1\.000 s.*the other 1 tracks are kept"):
        evaluate(dataset, estimates, "--json", scores)
    assert not scores.exists()
    kept = tmp_path / ".scores.json.tracks"
    assert [file.name for file in kept.iterdir()] == ["second song.json"]
    path.write_bytes(clean)
    evaluate(dataset, estimates, "--json", scores)
    assert len(json.loads(scores.read_text())["tracks"]) == 4
    assert not kept.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no such estimate"),
        (lambda path: rewrite(path, lambda audio: audio[:, 1:]), "110249 samples.*has 110250"),
        (lambda path: rewrite(path, lambda audio: audio[:1]), r"1 channel\(s\)"),
        (lambda path: soundfile.write(path, np.zeros((9, 2)), 48000), "48000 Hz"),
        (lambda path: path.write_bytes(b"no audio"), "not readable audio"),
    ],
)
def test_bad_estimates_are_named_before_any_work(
    dataset: Path,
    estimates: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    change(estimates / "second song" / "vocals.wav")
    with pytest.raises(InputError, match=f"second song/vocals.wav: .*{message}") as error:
        evaluate(dataset, estimates, "--output", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "tracks").exists()


def test_estimates_that_are_not_there(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        evaluate(dataset, tmp_path / "absent")
    with pytest.raises(InputError, match="nothing for first song; expected"):
        evaluate(dataset, tmp_path)


def test_museval_files_are_read_by_museval(dataset: Path, estimates: Path, tmp_path: Path) -> None:
    evaluate(dataset, estimates, "--museval-json", tmp_path / "museval", "--tracks", 1)
    from museval import EvalStore

    store = EvalStore()
    store.add_eval_dir(str(tmp_path / "museval"))
    reference = read(dataset / "test" / "first song" / "vocals.wav")
    estimate = read(estimates / "first song" / "vocals.wav")
    found = store.agg_frames_scores()["first song", "vocals", "SDR"]
    assert found == pytest.approx(csdr(reference, estimate), abs=1e-5)


def test_kept_estimates_are_scored_again_as_a_folder(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    stems = tmp_path / "stems"
    options = ["--data", dataset, "--tracks", 1, "--output"]
    model = ["--checkpoint", checkpoint, "--device", "cpu", *options, tmp_path / "model"]
    assert main([str(option) for option in model]) == 0
    # The scores are kept, the estimates were not: the track is separated once more.
    assert main([str(option) for option in (*model, "--save-estimates", stems)]) == 0
    assert main([str(option) for option in ("--estimates", stems, *options, tmp_path / "own")]) == 0
    first, second = (read_evaluation(tmp_path / name).tracks[0].rows for name in ("model", "own"))
    assert first[0].csdr == second[0].csdr
    assert [row.estimate for row in second] == ["stems", "mixture"]


def test_kept_estimates_never_replace_the_true_stems(dataset: Path, estimates: Path) -> None:
    before = (dataset / "test" / "first song" / "vocals.wav").read_bytes()
    options = ["--baseline", "irm", "--data", dataset, "--save-estimates", dataset / "test"]
    with pytest.raises(InputError, match="holds the data set itself"):
        main([str(option) for option in options])
    assert (dataset / "test" / "first song" / "vocals.wav").read_bytes() == before
    with pytest.raises(InputError, match="files already"):
        evaluate(dataset, estimates, "--save-estimates", estimates)


@pytest.fixture
def prepared(dataset: Path, tmp_path: Path) -> Path:
    """A data set with copies for training beside it; the vocals of `first song` are float."""
    root = tmp_path / "prepared"
    shutil.copytree(dataset, root)
    rewrite(root / "test" / "first song" / "vocals.wav", lambda audio: 40 * audio)
    assert prepare([str(root), "--all"]) == 0
    return root


def test_the_copies_for_training_hide_no_true_stem(prepared: Path) -> None:
    path = prepared / "test" / "first song" / "vocals.wav"
    before = path.read_bytes()
    (prepared / "link").symlink_to(prepared / "test")
    for folder in ("", "test", "link", "test/first song", "test/new", "valid"):
        options = ["--baseline", "irm", "--data", prepared, "--save-estimates", prepared / folder]
        with pytest.raises(InputError, match="holds the data set itself"):
            main([str(option) for option in options])
    assert path.read_bytes() == before


def test_the_truth_is_the_data_set_and_no_clipped_copy(prepared: Path, tmp_path: Path) -> None:
    options = ["--baseline", "irm", "--data", prepared, "--tracks", 1, "--save-estimates"]
    options += [tmp_path / "stems", "--output", tmp_path / "run"]
    assert main([str(option) for option in options]) == 0
    reference = read(prepared / "test" / "first song" / "vocals.wav")
    assert np.abs(reference).max() > 2
    (row, _) = read_evaluation(tmp_path / "run").tracks[0].rows
    estimate = read(tmp_path / "stems" / "first song" / "vocals.wav")
    assert row.usdr == pytest.approx(usdr(reference, estimate), abs=1e-9)


def test_kept_estimates_of_another_source_are_refused(dataset: Path, tmp_path: Path) -> None:
    stems = tmp_path / "stems"
    options = ["--data", dataset, "--tracks", 1, "--save-estimates", stems, "--output"]
    for name in ("irm", "icm"):
        command = ["--baseline", name, "--data", dataset, "--tracks", 1]
        assert main([str(option) for option in [*command, "--output", tmp_path / name]]) == 0
    assert main([str(option) for option in ["--baseline", "irm", *options, tmp_path / "irm"]]) == 0
    made = (stems / "first song" / "vocals.wav").read_bytes()
    with pytest.raises(InputError, match="baseline was irm, is icm.*another --save-estimates"):
        main([str(option) for option in ["--baseline", "icm", *options, tmp_path / "icm"]])
    (stems / "identity.json").unlink()
    with pytest.raises(InputError, match="stems of an unknown origin.*another --save-estimates"):
        main([str(option) for option in ["--baseline", "icm", *options, tmp_path / "icm"]])
    assert (stems / "first song" / "vocals.wav").read_bytes() == made
    (stems / "identity.json").write_text("{")
    with pytest.raises(InputError, match=r"identity\.json: damaged"):
        main([str(option) for option in ["--baseline", "irm", *options, tmp_path / "irm"]])


def test_museval_takes_the_memory_that_is_available(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page cache holds counts as available; what a container may not use does not."""
    from evaluation import memory

    track = open_dataset(dataset, "test")[0]
    tracks = [track] * 100
    monkeypatch.setattr(runner, "processors", lambda: 8)
    need = memory.museval_bytes(track.frames, 1)
    proc, group = tmp_path / "meminfo", tmp_path / "cgroup"
    monkeypatch.setattr(memory, "MEMINFO", proc)
    monkeypatch.setattr(memory, "CGROUP", group)
    proc.write_text(f"MemFree:  1 kB\nMemAvailable:  {5 * need // 1024 + 1} kB\n")
    assert runner.choose_jobs(tracks, 1) == 5
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert runner.choose_jobs(tracks, 1) == 5
    (group / "memory.max").write_text(f"{4 * need}\n")
    (group / "memory.current").write_text(f"{2 * need}\n")
    assert runner.choose_jobs(tracks, 1) == 2
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {need}\n")
    assert runner.choose_jobs(tracks, 1) == 3
    proc.unlink()
    shutil.rmtree(group)
    assert 1 <= runner.choose_jobs(tracks, 1) <= 8


def test_stems_that_separation_made_of_the_mixtures(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    from separation.separate import main as separate

    out = tmp_path / "separated"
    command = [dataset / "test", "--checkpoint", checkpoint, "--device", "cpu", "--output", out]
    assert separate([str(option) for option in command]) == 0
    assert (out / "first song" / "mixture" / "vocals.wav").is_file()
    assert evaluate(dataset, out, "--stems", "vocals", "--output", tmp_path / "run") == 0
    model = ["--checkpoint", checkpoint, "--device", "cpu", "--data", dataset]
    assert main([str(option) for option in [*model, "--output", tmp_path / "model"]]) == 0
    scores = [read_evaluation(tmp_path / name).tracks[0].rows[0].usdr for name in ("run", "model")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_process_and_goes_on(
    dataset: Path, estimates: Path, tmp_path: Path
) -> None:
    """kill -9 of the first process once a track is saved."""
    root, run, whole = (tmp_path / name for name in ("data", "run", "whole"))
    for number in range(30):
        shutil.copytree(dataset / "test" / "first song", root / "test" / str(number))
        shutil.copytree(estimates / "first song", estimates / str(number))
    mark = f"EVALUATION_OF={tmp_path}"
    command = [sys.executable, "-m", "evaluation.evaluate", "--data", str(root)]
    command += ["--estimates", str(estimates), "--output", str(run), "--jobs", "2"]
    environment = os.environ | dict([mark.split("=", 1)])
    process = subprocess.Popen(command, cwd=MAIN, env=environment, stdout=subprocess.DEVNULL)
    soon = time.monotonic() + 120
    while not list(run.glob("tracks/*.json")) and time.monotonic() < soon:
        time.sleep(0.002)
    others = processes_with(mark) - {process.pid}
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert others  # the test has seen what it waits for
    while (left := processes_with(mark)) and time.monotonic() < soon:
        time.sleep(0.1)
    assert not left
    kept = {path.name: path.stat().st_mtime_ns for path in (run / "tracks").iterdir()}
    assert 1 <= len(kept) < 30
    for folder in (run, whole):
        assert evaluate(root, estimates, "--output", folder) == 0
    changed = [n for n, t in kept.items() if (run / "tracks" / n).stat().st_mtime_ns != t]
    assert not changed
    first, second = (repr(read_evaluation(folder).tracks) for folder in (run, whole))
    assert first == second  # as text: NaN is not equal to itself


def processes_with(mark: str) -> set[int]:
    """Living processes whose environment has a line."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


def test_an_interrupted_run_goes_on(
    dataset: Path, estimates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when the first track is saved: it is kept, and no process stays."""
    root, run = tmp_path / "data", tmp_path / "run"
    for name in ("...song", "1", "2", "3", "4", "5"):
        shutil.copytree(dataset / "test" / "first song", root / "test" / name)
        shutil.copytree(estimates / "first song", estimates / name)
    save = TrackStore.save

    def save_and_interrupt(self: TrackStore, scores: TrackScores, key: str) -> None:
        save(self, scores, key)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrackStore, "save", save_and_interrupt)
        evaluate(root, estimates, "--output", run, "--jobs", 2)
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
    kept = {path.name: path.stat().st_mtime_ns for path in (run / "tracks").iterdir()}
    assert len(kept) == 1
    with pytest.raises(InputError, match="is not finished"):
        read_evaluation(run)
    assert evaluate(root, estimates, "--output", run) == 0
    assert all((run / "tracks" / name).stat().st_mtime_ns == t for name, t in kept.items())
    assert len(read_evaluation(run).tracks) == 6
