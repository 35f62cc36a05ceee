"""The hub's mixin, on folders of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import BSMamba2Config, InputError, load_checkpoint

pytest.importorskip("huggingface_hub")

CONFIG = BSMamba2Config(dim=8, depth=1, d_state=16, headdim=16, stem_names=("bass",))


def test_save_and_from_pretrained(tmp_path: Path) -> None:
    from models.hub import PretrainedBSMamba2

    model = PretrainedBSMamba2(CONFIG)
    model.save_pretrained(tmp_path / "repo")
    files = sorted(path.name for path in (tmp_path / "repo").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert "Separates bass" in (tmp_path / "repo" / "README.md").read_text()
    loaded = PretrainedBSMamba2.from_pretrained(tmp_path / "repo")
    assert loaded.config == CONFIG
    assert not loaded.training
    waveform = torch.randn(1, 2, 3000)
    with torch.no_grad():
        assert torch.equal(loaded(waveform), model.eval()(waveform))
    # The same file is a checkpoint like any other.
    assert load_checkpoint(tmp_path / "repo" / "model.safetensors").config == CONFIG


def test_a_folder_of_another_network(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from models.hub import PretrainedBSMamba2

    save_file({"layer.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="another architecture than BSMamba2"):
        PretrainedBSMamba2.from_pretrained(tmp_path)
