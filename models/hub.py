"""Weights on the Hugging Face hub: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    from models.hub import PretrainedBSMamba2

    model = PretrainedBSMamba2.from_pretrained("someone/bsmamba2-vocals")
    model.push_to_hub("me/my-vocals")

Needs huggingface_hub. A repository holds `model.safetensors` (the configuration in its metadata),
`config.json` and the model card.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.bsmamba2 import BSMamba2
from models.card import model_card
from models.checkpoint import Checkpoint, build_model, read_checkpoint, save_checkpoint
from models.files import write_text

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError("models.hub needs huggingface_hub: pip install huggingface_hub") from error

WEIGHTS = "model.safetensors"


class PretrainedBSMamba2(BSMamba2, ModelHubMixin, library_name="bsmamba2"):
    """A BSMamba2 that the hub can load and save."""

    def _save_pretrained(self, save_directory: Path) -> None:
        found = Checkpoint(self.config, self.state_dict(), {})
        save_checkpoint(save_directory / WEIGHTS, self.config, found.state_dict)
        values = json.dumps(asdict(self.config), indent=2)
        write_text(save_directory / "config.json", values + "\n")
        card = save_directory / "README.md"
        if not card.exists():  # keep what its owner wrote
            write_text(card, model_card(found, "BSMamba2", WEIGHTS))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> PretrainedBSMamba2:
        """Raises the hub's own errors, and InputError if the file holds another network."""
        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            downloaded = hf_hub_download(
                model_id,
                WEIGHTS,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
            path = Path(downloaded)
        found = read_checkpoint(path)
        model = cls(found.config)
        model.load_state_dict(build_model(found, str(path)).state_dict())
        return model.eval()
