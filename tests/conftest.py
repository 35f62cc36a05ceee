"""What tests share: golden cases, error ratios that name their tensor, a fixed seed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BSMAMBA2_SCAN", raising=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Golden cases of the authors' network, computed in float64 (see tests/reference)."""

    def load(name: str) -> dict[str, Any]:
        with np.load(REFERENCE / name) as file:
            return {
                key: json.loads(str(value)) if key.endswith("config") else torch.from_numpy(value)
                for key, value in file.items()
            }

    return load


@pytest.fixture
def have_devices(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tell torch what this machine has: `have_devices(gpus, mps)`."""

    def have(gpus: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


@pytest.fixture
def refuse_folder(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let no folder of a name be listed: root may read what its permissions forbid."""
    scandir = os.scandir

    def refuse(name: str) -> None:
        def scan(path: Any) -> Any:
            if Path(path).name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr("os.scandir", scan)

    return refuse


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every uninitialised tensor with NaN: whatever a kernel leaves unwritten shows."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, plain=plain, **k: plain(*a, **k).fill_(float("nan"))
        )


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Relative error ||a - b|| / ||b|| below a bound, named by the tensor; NaN never passes."""

    def check(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
        assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
        wide = torch.complex128 if expected.is_complex() else torch.float64
        actual, expected = actual.detach().to(wide), expected.detach().to(wide)
        scale = expected.norm().clamp_min(1e-30)
        error = ((actual - expected).norm() / scale).item()
        assert error < bound, f"{name}: relative error {error:.2e}, allowed {bound:.0e}"

    return check
