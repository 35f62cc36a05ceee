"""Whole runs of a tiny network: what they write, how they resume, stop and fail."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from models import BSMamba2, load_checkpoint
from models.checkpoint import read_checkpoint
from models.errors import InputError, run_command
from training.config import load_config
from training.distributed import World
from training.logbook import Logbook
from training.run_folder import RunFolder
from training.train import main
from training.trainer import Trainer

MAIN = Path(__file__).parents[2]


def train(config: Path, *words: str) -> int:
    return main(["--config", str(config), *words])


def read_rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def make_trainer(config: Path, *overrides: str) -> Trainer:
    parsed = load_config(config, overrides)
    return Trainer(parsed, RunFolder(parsed.run.dir), None)


def assert_equal(left: Any, right: Any, name: str = "state") -> None:
    """Bitwise equality of nested containers of tensors."""
    assert type(left) is type(right), name
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_equal(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), name
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{name}.{number}")
    else:
        assert left == right, name


def test_a_run_writes_what_it_promises(tiny_config: Path, tmp_path: Path) -> None:
    words = ["run.tensorboard=true", "training.keep_checkpoints=1", "data.num_workers=1"]
    assert train(tiny_config, *words) == 0
    run = tmp_path / "run"
    files = {path.name for path in (run / "checkpoints").iterdir()}
    assert files == {"last.pt", "best.pt", "step_00000002.pt"}
    assert load_config(run / "config.yaml").training.keep_checkpoints == 1
    rows = read_rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        spectral = sum(row[f"loss_stft_{w}"] for w in (4096, 2048, 1024, 512, 256))
        assert row["loss"] == pytest.approx(10 * row["loss_time"] + spectral, rel=1e-5)
        assert row["learning_rate"] == 1e-2
        assert row["grad_norm"] > 0 and row["seconds_per_step"] > 0
    assert ["valid_usdr" in row for row in rows] == [False, False, False, True]
    best = read_checkpoint(run / "checkpoints" / "best.pt")
    assert (best.training["step"], best.training["usdr"]) == (4, rows[-1]["valid_usdr"])
    assert best.training["provenance"]["torch"] == torch.__version__
    assert isinstance(load_checkpoint(run / "checkpoints" / "best.pt"), BSMamba2)
    assert_tensorboard(run / "tensorboard", rows)


def assert_tensorboard(folder: Path, rows: list[dict[str, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "loss_time", "learning_rate", "grad_norm", "valid_usdr"} <= set(tags["scalars"])
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    kinds = ("mixture", "estimate", "truth")
    assert set(tags["audio"]) == {f"vocals/{n}/{kind}" for n in (1, 2) for kind in kinds}
    assert tags["images"] == ["vocals/1/spectrograms", "vocals/2/spectrograms"]


def test_resumed_run_equals_an_uninterrupted_one(tiny_config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["training.validate_every=2", "training.ema_share=0.1"]
    words += ["curriculum.target_gain=2", "curriculum.release_sdr=-50"]
    assert train(tiny_config, f"run.dir={whole}", *words) == 0
    words.append(f"run.dir={parts}")
    assert train(tiny_config, *words, "training.max_steps=2") == 0
    with (parts / "metrics.jsonl").open("a") as file:
        # A run that was killed had gone on beyond its last checkpoint.
        file.write('{"step": 3, "loss": -1}\n{"step": 4, "lo')
    assert train(tiny_config, "--resume", "auto", *words) == 0
    states = [read_checkpoint(run / "checkpoints" / "last.pt") for run in (whole, parts)]
    for state in states:
        del state.training["seconds"], state.training["config"]
    assert_equal(states[0].state_dict, states[1].state_dict)
    assert_equal(states[0].training, states[1].training)
    assert states[1].training["examples"] == 8
    for row, other in zip(read_rows(whole), read_rows(parts), strict=True):
        for name in ("step", "loss", "grad_norm", "valid_usdr", "target_gain"):
            assert row.get(name) == other.get(name)
    assert read_rows(whole)[-1]["target_gain"] < 2


def test_accumulated_batches_equal_one_large_batch(tiny_config: Path) -> None:
    weights = []
    for words in (
        ["training.batch_size=4", "training.accumulation=1"],
        ["training.batch_size=1", "training.accumulation=4"],
    ):
        trainer = make_trainer(tiny_config, *words)
        trainer.train_step(trainer.loaders.training(0))
        gradients = [state["exp_avg"] for state in trainer.optimizer.state.values()]
        weights.append(torch.cat([g.flatten() for g in gradients]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-7)


def test_one_step_is_adamw_on_the_clipped_gradient(tiny_config: Path) -> None:
    trainer = make_trainer(tiny_config, "training.accumulation=1", "training.clip_norm=0.01")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    means = trainer.train_step(trainer.loaders.training(0))
    first = trainer.optimizer.state
    moments = {n: first[p]["exp_avg"] for n, p in trainer.model.named_parameters()}
    # After one step exp_avg is 0.1 of the gradient, which was clipped to 0.01.
    norm = torch.cat([m.flatten() for m in moments.values()]).norm() / 0.1
    assert float(means["grad_norm"]) > 0.01
    assert float(norm) == pytest.approx(0.01, rel=1e-3)
    for name, parameter in trainer.model.named_parameters():
        gradient = moments[name] / 0.1
        update = gradient / (gradient.abs() + 1e-8)
        expected = before[name] * (1 - 1e-2 * 0.01) - 1e-2 * update
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_averaged_weights_ship_unless_asked_otherwise(tiny_config: Path, tmp_path: Path) -> None:
    assert train(tiny_config, "run.dir=" + str(tmp_path / "ema")) == 0
    assert train(tiny_config, "run.dir=" + str(tmp_path / "raw"), "training.save_ema=false") == 0
    ema, raw = (
        read_checkpoint(tmp_path / run / "checkpoints" / "last.pt") for run in ("ema", "raw")
    )
    assert_equal(raw.state_dict, dict(ema.training["weights"]))
    assert_equal(raw.training["ema"], ema.state_dict)
    assert not torch.equal(
        ema.state_dict["final_norm.gamma"], ema.training["weights"]["final_norm.gamma"]
    )


def test_learns_and_validates_with_several_stems(tiny_config: Path, tmp_path: Path) -> None:
    words = ["model.stem_names=[bass, vocals]", "model.num_stems=2", "training.max_steps=6"]
    assert train(tiny_config, *words, "training.validate_every=3") == 0
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["valid_loss"] < rows[2]["valid_loss"]
    both = (rows[-1]["valid_usdr_bass"] + rows[-1]["valid_usdr_vocals"]) / 2
    assert rows[-1]["valid_usdr"] == pytest.approx(both)


def test_bf16_is_autocast_over_float32_weights(tiny_config: Path) -> None:
    plain = make_trainer(tiny_config)
    half = make_trainer(tiny_config, "training.precision=bf16")
    batch = next(plain.loaders.training(0))
    estimates = [trainer.estimate(batch["mixture"]) for trainer in (plain, half)]
    error = (estimates[0] - estimates[1]).norm() / estimates[0].norm()
    assert 1e-4 < float(error.detach()) < 3e-2
    half.backward(batch)
    assert {p.grad.dtype for p in half.model.parameters() if p.grad is not None} == {torch.float32}


def test_time_limit_validates_saves_and_ends(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "seconds", property(lambda trainer: 61.0 * trainer.step))
    assert train(tiny_config, "training.max_minutes=3") == 0
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "valid_usdr" in rows[-1]
    assert rows[-1]["seconds_left"] == 0
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").training["step"] == 3


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_signal_finishes_the_step_and_saves(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    step = Trainer.train_step

    def step_and_signal(self: Trainer, batches: Any) -> Any:
        os.kill(os.getpid(), number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step_and_signal)
    handler = signal.getsignal(number)
    assert train(tiny_config) == code
    assert signal.getsignal(number) is handler
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").training["step"] == 1
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1]


def test_second_interrupt_stops_at_once(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_twice(self: Trainer, batches: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config)
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ),
)
def test_memory_error_names_the_remedy(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def run_out(self: Trainer, batches: Any) -> Any:
        raise error

    monkeypatch.setattr(Trainer, "train_step", run_out)
    with pytest.raises(InputError, match="training.batch_size.*model.gradient_checkpointing"):
        train(tiny_config)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Files that would grow beyond `limit` bytes fail to, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_the_last_checkpoint_whole(tiny_config: Path, tmp_path: Path) -> None:
    words = ["--resume", "auto", "training.validate_every=100"]
    assert train(tiny_config, "training.max_steps=2", *words) == 0
    folder = tmp_path / "run" / "checkpoints"
    with (
        file_size_limit(2_000_000),
        pytest.raises(InputError, match=r"last.pt: cannot be written: .*MiB are free.*--resume"),
    ):
        train(tiny_config, "training.max_steps=100", *words)
    assert read_checkpoint(folder / "last.pt").training["step"] == 2
    assert not list(folder.glob(".*"))
    assert train(tiny_config, "training.max_steps=4", *words) == 0
    assert read_checkpoint(folder / "last.pt").training["step"] == 4


def test_full_disk_met_by_the_metrics_is_one_line(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Logbook, row: dict[str, float]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Logbook, "write", fill)
    with pytest.raises(InputError, match=r"run: cannot be written: No space left.*--resume auto"):
        train(tiny_config)


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        # The DataLoader's signal handler raises wherever the run is.
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", InputError,
         r"^a data worker died \(.*data.num_workers"),
        ("inductor: [Errno 28] No space left on device: '/tmp/torchinductor'", RuntimeError,
         "torchinductor"),
    ],
    ids=["a worker's death is one line", "another fault is not put on the workers"],
)  # fmt: skip
def test_faults_during_a_step(
    message: str,
    kind: type[Exception],
    told: str,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def update(self: Trainer) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(Trainer, "update", update)
    with pytest.raises(kind, match=told):
        train(tiny_config)


def test_going_back_gives_up_the_checkpoints_of_later_steps(
    tiny_config: Path, tmp_path: Path
) -> None:
    words = ["training.checkpoint_every=1", "training.keep_checkpoints=3"]
    assert train(tiny_config, *words) == 0
    folder = tmp_path / "run" / "checkpoints"
    back = folder / "step_00000002.pt"
    assert train(tiny_config, *words, "training.max_steps=3", "--resume", str(back)) == 0
    names = {path.name for path in folder.glob("step_*")}
    assert names == {"step_00000001.pt", "step_00000002.pt"}
    assert read_checkpoint(folder / "last.pt").training["step"] == 3


def test_the_checkpoint_resumed_from_stays_however_its_path_is_written(
    tiny_config: Path, tmp_path: Path
) -> None:
    words = ["training.checkpoint_every=1", "training.keep_checkpoints=1"]
    assert train(tiny_config, *words, "training.max_steps=2") == 0
    folder = tmp_path / "run" / "checkpoints"
    last = f"{folder}/../checkpoints/last.pt"
    assert train(tiny_config, *words, "training.max_steps=3", "--resume", last) == 0
    assert [path.name for path in folder.glob("step_*")] == ["step_00000002.pt"]


def test_precision_may_change_between_two_parts_of_a_run(tiny_config: Path) -> None:
    for steps, precision in enumerate(("fp32", "fp16", "bf16", "fp16"), start=1):
        words = [f"training.max_steps={steps}", f"training.precision={precision}"]
        assert train(tiny_config, *words, "--resume", "auto") == 0


def test_parts_of_a_write_that_was_killed_are_removed(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (folder / f".last.{dead.pid}.partial.pt").write_bytes(b"half")
    at_work = folder / f".last.{os.getppid()}.partial.pt"
    at_work.write_bytes(b"half")
    assert train(tiny_config, "training.max_steps=1") == 0
    assert list(folder.glob(".*")) == [at_work]


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(
    tiny_config: Path, tmp_path: Path
) -> None:
    assert train(tiny_config, "training.max_steps=2") == 0
    best = tmp_path / "run" / "checkpoints" / "last.pt"
    words = [f"run.dir={tmp_path / 'tuned'}", f"training.init_from={best}"]
    trainer = make_trainer(tiny_config, *words)
    saved = read_checkpoint(best).state_dict
    assert trainer.step == 0
    assert_equal(saved, dict(trainer.model.state_dict()))
    assert_equal(saved, dict(trainer.weights()))
    # Weights of one stem may start another.
    drums = make_trainer(tiny_config, *words, "model.stem_names=[drums]")
    assert_equal(saved, dict(drums.model.state_dict()))
    with pytest.raises(InputError, match=r"^model.d_state: the checkpoint has 8"):
        make_trainer(tiny_config, *words, "model.d_state=16")


def test_dry_run_does_everything_and_leaves_nothing(
    tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert train(tiny_config, "--dry-run") == 0
    text = caplog.text
    for part in ("step: ", "validation: ", "peak memory: ", "checkpoints: ", "a real run fits"):
        assert part in text
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert train(tiny_config, "training.max_steps=1") == 0


def test_dry_run_refuses_a_disk_too_small(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="0.0 GiB are free.*training.keep_checkpoints"):
        train(tiny_config, "--dry-run")


def test_profile_writes_a_trace(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, steps in {"_WAIT": 0, "_WARMUP": 1, "_ACTIVE": 1}.items():
        monkeypatch.setattr(f"training.rehearsal.{name}", steps)
    assert train(tiny_config, "--profile") == 0
    with gzip.open(tmp_path / "run" / "profile" / "rank0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "train_step" in names
    assert any("AdamW" in str(name) for name in names)


def test_a_validation_that_is_not_finite_is_told(
    tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tiny_config, "training.learning_rate=1e30", "training.max_steps=2") == 0
    assert "step 2: the averaged weights give estimates that are not finite" in caplog.text
    assert not (tmp_path / "run" / "checkpoints" / "best.pt").exists()


def test_a_refused_file_of_the_data_is_not_one_of_the_run(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Trainer, batches: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/vocals.wav")

    monkeypatch.setattr(Trainer, "train_step", refuse)
    with pytest.raises(PermissionError, match="/data/vocals.wav"):
        train(tiny_config)


def test_learning_rate_falls_on_a_plateau(tiny_config: Path, tmp_path: Path) -> None:
    words = [
        "training.schedule=plateau",
        "training.plateau_patience=1",
        "training.plateau_factor=0.1",
    ]
    words += ["training.validate_every=1", "training.learning_rate=1e-20"]
    # The weights stay, so the score does; resuming keeps the count.
    assert train(tiny_config, *words, "training.max_steps=2") == 0
    assert train(tiny_config, *words, "training.max_steps=4", "--resume", "auto") == 0
    rates = [row["learning_rate"] for row in read_rows(tmp_path / "run")]
    assert rates == pytest.approx([1e-20, 1e-20, 1e-21, 1e-22])


def test_deterministic_runs_are_identical(tiny_config: Path, tmp_path: Path) -> None:
    words = ["training.deterministic=true", "training.max_steps=2"]
    try:
        for name in ("one", "two"):
            assert train(tiny_config, *words, f"run.dir={tmp_path / name}") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = (read_checkpoint(tmp_path / n / "checkpoints" / "last.pt") for n in ("one", "two"))
    assert_equal(one.state_dict, two.state_dict)


def test_run_keeps_its_log_over_all_parts(
    tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # the command sets it itself where nobody did
    for steps in (1, 2):
        assert train(tiny_config, f"training.max_steps={steps}", "--resume", "auto") == 0
    text = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "finished at step 1" in text and "finished at step 2" in text


def test_new_run_does_not_overwrite_an_old_one(tiny_config: Path) -> None:
    assert train(tiny_config, "training.max_steps=1") == 0
    with pytest.raises(InputError, match="already holds a run: go on with --resume auto"):
        train(tiny_config)


def test_resume_auto_starts_afresh_in_an_empty_folder(tiny_config: Path, tmp_path: Path) -> None:
    assert train(tiny_config, "--resume", "auto", "training.max_steps=1") == 0
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_resume_skips_a_damaged_checkpoint(
    tiny_config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["training.checkpoint_every=1", "training.max_steps=3", "training.keep_checkpoints=2"]
    assert train(tiny_config, *words) == 0
    folder = tmp_path / "run" / "checkpoints"
    for name in ("last.pt", "step_00000002.pt"):
        os.truncate(folder / name, 5000)  # in place: no other name may share it
    (folder / "step_00000002_good.pt").write_bytes(b"set aside by somebody")
    caplog.set_level(logging.INFO)
    assert train(tiny_config, "--resume", "auto", *words) == 0
    damaged = [r.getMessage() for r in caplog.records if "or damaged" in r.getMessage()]
    pairs = zip(("last.pt", "step_00000002"), damaged, strict=True)
    assert all(name in line for name, line in pairs)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "parameters" in log and damaged[0] in log and "resumed at step 1" in log
    assert read_checkpoint(folder / "last.pt").training["step"] == 3
    assert {p.name for p in folder.glob("step*")} == {
        "step_00000001.pt", "step_00000002.pt", "step_00000002_good.pt",
    }  # fmt: skip
    for path in folder.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="none of its checkpoints can be read"):
        train(tiny_config, "--resume", "auto", *words)


def test_a_killed_and_resumed_run_is_one_curve_in_tensorboard(
    tiny_config: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    run = tmp_path / "run"
    assert train(tiny_config, "run.tensorboard=true", "training.max_steps=2") == 0
    # A run that was killed had gone on beyond its last checkpoint.
    with SummaryWriter(str(run / "tensorboard"), purge_step=1) as beyond:
        for step in (1, 2, 3, 4):
            beyond.add_scalar("loss", -1.0, step)
    assert train(tiny_config, "run.tensorboard=true", "--resume", "auto") == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.value == -1 for event in events] == [True, True, False, False]


def test_a_row_tells_of_the_rank_that_waits_longest(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = World.gather

    def with_another(self: World, value: Any) -> list[Any]:
        if isinstance(value, dict) and "data_wait_share" in value:
            return [value, value | {"data_wait_share": 0.75}]
        return gather(self, value)

    monkeypatch.setattr(World, "gather", with_another)
    assert train(tiny_config, "training.max_steps=1") == 0
    assert read_rows(tmp_path / "run")[0]["data_wait_share"] == 0.75


def test_resume_from_elsewhere_takes_a_folder_of_its_own(tiny_config: Path, tmp_path: Path) -> None:
    one, other = (f"run.dir={tmp_path / name}" for name in ("one", "other"))
    for run in (one, other):
        assert train(tiny_config, run, "training.max_steps=1") == 0
    last = str(tmp_path / "one" / "checkpoints" / "last.pt")
    with pytest.raises(InputError, match="other already holds another run than .*one"):
        train(tiny_config, other, "--resume", last)
    third = f"run.dir={tmp_path / 'third'}"
    state = torch.load(last, weights_only=True)
    state["training"]["best_usdr"] = 100.0  # the first run's affair
    torch.save(state, last)
    assert train(tiny_config, third, "--resume", last, "training.max_steps=2") == 0
    assert (tmp_path / "third" / "checkpoints" / "best.pt").exists()


def test_signals_wait_for_the_last_checkpoint(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save_last

    def slow(self: RunFolder, *args: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        save(self, *args)  # type: ignore[arg-type]

    def too_late(number: int, frame: object) -> None:
        raise AssertionError("the signal met the process's own handler")

    monkeypatch.setattr(RunFolder, "save_last", slow)
    before = [signal.signal(number, too_late) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert train(tiny_config, "training.max_steps=1") == 0
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").training["step"] == 1


def test_a_run_that_cannot_write_is_one_line(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("training.run_folder.try_writing", refuse)
    with pytest.raises(InputError, match="run: nothing can be written there: Read-only"):
        train(tiny_config, "training.max_steps=1")
    monkeypatch.undo()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        train(tiny_config, "training.max_steps=1")


def test_what_ends_a_run_is_in_its_log(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Trainer, batches: object) -> None:
        raise InputError("the third rail is live")

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(InputError, match="third rail"):
        train(tiny_config)
    assert "ERROR the third rail is live" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_missing_tensorboard_is_one_line(
    words: list[str], tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"TensorBoard cannot be used .*run.tensorboard=false"):
        train(tiny_config, "run.tensorboard=true", *words)


def test_resume_refuses_what_does_not_fit(tiny_config: Path, tmp_path: Path) -> None:
    assert train(tiny_config, "training.max_steps=1") == 0
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(InputError, match=r"best.pt: holds weights alone"):
        train(tiny_config, "--resume", str(folder / "best.pt"))
    with pytest.raises(InputError, match=r"^model.d_state: the checkpoint has 8, the .* 16"):
        train(tiny_config, "--resume", "auto", "model.d_state=16")
    with pytest.raises(InputError, match="absent.pt"):
        train(tiny_config, "--resume", str(tmp_path / "absent.pt"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.root=/no/such/folder"], "error: data root /no/such/folder"),
        (["training.batch_siz=2"], "error: training.batch_siz: unknown key"),
        (["training.device=cuda:99"], "error: training.device 'cuda:99': not on this machine"),
        (["data.segment_seconds=3"], "error: no active 3 s window"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: train(tiny_config, *words))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_command_line_reports_bad_input_and_leaves_nothing(
    tiny_config: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "training.train", "--config", str(tiny_config)]
    result = subprocess.run(
        [*command, "data.root=/no/such/folder"], cwd=MAIN, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "/no/such/folder" in result.stderr
    assert not (tmp_path / "run").exists()
