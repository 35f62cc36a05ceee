"""The benchmark measures, compares, and reports what fails."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import benchmark_mamba_ssm
from benchmarks import training_step
from benchmarks.report import markdown_table, show
from benchmarks.timing import measure
from models import InputError, mamba2

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch):
    monkeypatch.setattr(benchmark_mamba_ssm, "measure", partial(measure, budget_s=0.01))


def test_rows_have_times_and_errors_and_land_in_the_file(tmp_path, capsys):
    path = tmp_path / "new" / "run.json"
    arguments = ["--device", "cpu", "--seconds", "0.05", "--parts", "scan", "conv"]
    assert benchmark_mamba_ssm.main([*arguments, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "Verdict: conv" in printed and "| speed-up" in printed
    content = json.loads(path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    rows = {(r["what"], r["backend"], r["pass"]): r for r in content["rows"]}
    assert len(rows) == 16  # scan and conv, two axes, two implementations, two passes
    for (what, backend, _), row in rows.items():
        assert row["median ms"] > 0 and row["frames/s"] > 0
        assert row["error"] < 1e-5
        if backend in ("sequential", "nn.Conv1d"):
            assert row["speed-up"] == 1 and row["error"] == 0, what
    sequences, steps = 62, 6
    row = rows[(f"scan, time axis ({sequences} x {steps})", "chunked", "forward")]
    assert row["frames/s"] == pytest.approx(1e3 * sequences * steps / row["median ms"])


def test_only_the_backends_asked_for_run(capsys):
    arguments = ["--device", "cpu", "--seconds", "0.05", "--parts", "scan"]
    assert benchmark_mamba_ssm.main([*arguments, "--backends", "chunked"]) == 0
    printed = capsys.readouterr().out
    assert "nothing to compare" in printed
    assert "| chunked" in printed and "| sequential" not in printed


def test_out_of_memory_is_a_cell():
    def run():
        raise torch.OutOfMemoryError("2 GiB")

    timing = measure(run, CPU)
    assert timing.median_ms is None and timing.failure == "out of memory"


def test_inputs_that_do_not_fit_are_a_cell_and_other_failures_too(capsys):
    arguments = ["--device", "cpu", "--seconds", "0.05", "--batch", "1000000000", "--parts", "conv"]
    assert benchmark_mamba_ssm.main(arguments) == 0
    assert "out of memory" in capsys.readouterr().out

    def run():
        raise RuntimeError("no kernel image is available\nfor execution")

    assert measure(run, CPU).failure == "failed: RuntimeError: no kernel image is available"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "fast"], "--backends fast: unknown; choose among triton, ssd"),
        (["--backends", "ssd", "--training"], "--backends ssd: mamba-ssm is not installed"),
        (["--backends", "peer"], "--backends peer .*: it needs mamba-ssm"),
        (["--backends", "causal_conv1d"], "causal_conv1d: it needs mamba-ssm and causal-conv1d on"),
        (["--seconds", "nan"], "must be positive numbers"),
        (["--device", "meta"], "--device 'meta': expected one of auto, cpu, cuda"),
    ],
)
def test_what_cannot_run_is_named(arguments, message, monkeypatch):
    monkeypatch.setattr(mamba2, "CAUSAL_CONV1D_AVAILABLE", True)  # which has no CPU form
    with pytest.raises(InputError, match=message):
        benchmark_mamba_ssm.main(["--device", "cpu", *arguments])


def test_verdict_is_of_the_longest_clip_and_needs_two_rows():
    def row(seconds, backend, ms):
        return {
            "seconds": seconds, "what": "scan", "pass": "forward", "backend": backend,
            "median ms": ms,
        }  # fmt: skip

    rows = [row(8.0, "a", 3.0), row(8.0, "b", 1.0), row(1.0, "a", 1.0), row(1.0, "b", 2.0)]
    assert "8 s: b is the fastest" in benchmark_mamba_ssm.verdict(rows)
    assert "nothing to compare" in benchmark_mamba_ssm.verdict([])
    assert "no backend" in training_step.verdict([{"backend": "ssd", "step ms": "out of memory"}])


def test_training_step_halves_the_batch_until_it_fits(monkeypatch):
    tried = []

    def step(setting, backend, seconds, batch):
        tried.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError("2 GiB")
        return {"data": 1.0}, 500.0, 3.0

    monkeypatch.setattr(training_step, "_measure", step)
    monkeypatch.setattr(training_step, "runnable_backends", lambda *_, **__: ["chunked"])
    setting = benchmark_mamba_ssm.make_setting(benchmark_mamba_ssm.parse(["--device", "cpu"]))
    setting, fits = replace(setting, batch=5), 1
    row = training_step.rows(setting, [8.0])[-1]
    assert tried[-3:] == [5, 2, 1]
    assert row["note"] == "out of memory with 2" and row["examples/s"] == 2.0
    fits = 0
    assert training_step.rows(setting, [8.0])[-1]["step ms"] == "out of memory"


def test_median_is_of_the_calls_after_the_first():
    calls = []
    timing = measure(lambda: calls.append(1), CPU, budget_s=0.0001)
    assert timing.repeats == len(calls) - 2 >= 3
    assert timing.median_ms is not None and timing.warmup_s is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--device", "nonsense"], "--device 'nonsense': expected one of auto, cpu, cuda"),
        (["--device", "cuda"], "--device 'cuda': not on this machine"),
        (["--seconds", "-1"], "must be positive"),
        (["--batch", "0"], "must be positive"),
    ),
)
def test_bad_arguments_are_named(arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        benchmark_mamba_ssm.main(arguments)


def test_an_override_of_every_backend_is_refused(monkeypatch):
    monkeypatch.setenv("BSMAMBA2_SCAN", "chunked")
    with pytest.raises(InputError, match="BSMAMBA2_SCAN is set"):
        benchmark_mamba_ssm.main(["--device", "cpu"])


def test_tables_show_three_digits_and_dashes():
    rows = [{"a": 0.000123, "b": None}, {"a": 12345.6, "b": "x"}]
    assert [show(row["a"]) for row in rows] == ["1.2e-04", "12346"]
    lines = markdown_table(rows, ("a", "b")).splitlines()
    assert lines[0] == "| a       | b |" and lines[2] == "| 1.2e-04 | - |"
