"""The spectrogram network in ONNX answers as in PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import BSMamba2, BSMamba2Config, InputError
from models.checkpoint import save_checkpoint
from models.convert import main
from models.export import RealSpectrogramNetwork, export_onnx

CONFIG = BSMamba2Config(
    dim=8,
    depth=1,
    d_state=16,
    headdim=16,
    band_widths=(100, 100, 825),
)


def test_the_network_in_real_numbers_is_the_network() -> None:
    config = replace(CONFIG, num_stems=2, stem_names=("vocals", "drums"))
    model = BSMamba2(config).eval()
    spec = torch.randn(2, 2, 1025, 5, 2)
    with torch.no_grad():
        stems = RealSpectrogramNetwork(model)(spec)
        expected = torch.view_as_real(model.forward_spectrogram(torch.view_as_complex(spec)))
    torch.testing.assert_close(stems, expected)


@pytest.mark.slow
def test_onnxruntime_agrees_on_another_input(tmp_path: Path, assert_close, capfd) -> None:
    """100 frames: longer than a chunk of the scan, so that its recurrence is exported too."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = BSMamba2(CONFIG).eval()
    save_checkpoint(tmp_path / "a.pt", CONFIG, model.state_dict())
    target = tmp_path / "a.onnx"
    seconds = str(99 * 441 / 44100)
    assert main(["export", str(tmp_path / "a.pt"), str(target), "--seconds", seconds]) == 0
    captured = capfd.readouterr()
    assert "100 frames, differs from PyTorch by" in captured.out
    assert captured.err == ""
    session = runtime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["config"])["dim"] == 8
    spec = torch.randn(1, 2, 1025, 100, 2)
    spec[..., :7, :] = 0  # silence
    (stems,) = session.run(None, {"spectrogram": spec.numpy()})
    with torch.no_grad():
        expected = model.forward_spectrogram(torch.view_as_complex(spec))
    assert_close("stems", torch.from_numpy(stems), torch.view_as_real(expected), 1e-4)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(InputError, match="export to ONNX needs onnx: pip install onnx"):
        export_onnx(BSMamba2(CONFIG), tmp_path / "a.onnx", 10)
    assert not (tmp_path / "a.onnx").exists()
