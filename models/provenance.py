"""What computed a result: the commit of this code and the versions of what it runs on."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch", "numpy", "triton", "mamba-ssm", "causal-conv1d",
    "museval", "scipy", "librosa", "soundfile",
)  # fmt: skip


@functools.cache
def provenance() -> dict[str, str]:
    """`commit` ("unknown" outside a git checkout, with "+changes" where files differ from it),
    `python`, and the version of every package of `PACKAGES` that is installed."""
    found = {"commit": git_commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """What the processor calls itself."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str:
    """The commit of the checkout that holds this file."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str:
    """What git prints, empty where it fails or is not installed."""
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
