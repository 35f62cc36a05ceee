"""Measurements as rows: printed as Markdown, saved as JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from models.files import write_text
from models.provenance import processor_name, provenance

Cell = str | float | int | None


def environment(device: torch.device, **more: str) -> dict[str, str]:
    """What a number depends on: hardware, driver, versions, date."""
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "mamba-ssm": "not installed",
        "causal-conv1d": "not installed",
        **provenance(),
    }
    if device.type == "cuda":
        facts["driver"] = driver_version()
        facts["cuda"] = str(torch.version.cuda)
    else:
        facts["threads"] = str(torch.get_num_threads())
    return facts | more


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def driver_version() -> str:
    """The NVIDIA driver's version."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]


def show(value: Cell) -> str:
    """A cell for people: three significant digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value and abs(value) < 1e-2:
            return f"{value:.1e}"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def markdown_table(rows: Sequence[dict[str, Cell]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table with aligned columns."""
    cells = [[show(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[i]) for line in cells)) if cells else len(column)
        for i, column in enumerate(columns)
    ]

    def line(values: Sequence[str]) -> str:
        padded = [v.ljust(w) for v, w in zip(values, widths, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(columns), rule, *(line(values) for values in cells)])


def save(path: Path | None, content: object) -> None:
    """Write what is measured so far, if a file is asked for: a run of minutes may be cut off."""
    if path is not None:
        write_text(path, json.dumps(content, indent=1) + "\n")
