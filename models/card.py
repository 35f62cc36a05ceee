"""The model card that goes with published weights."""

from __future__ import annotations

from models.bsmamba2 import BSMamba2Config
from models.checkpoint import Checkpoint

CARD = """\
---
library_name: bsmamba2
license: {license}
tags:
- audio-to-audio
- music-source-separation
- mamba2
---
# {title}

BSMamba2 ([arXiv 2508.14556](https://arxiv.org/abs/2508.14556)): band-split, dual-path,
bidirectional Mamba-2. Separates {stems} from music.

| | |
| --- | --- |
| stems | {stems} |
| input | {channels} channel(s) at {rate} Hz; other rates are resampled |
| parameters | {parameters:,} |
| dim, depth, d_state | {dim}, {depth}, {d_state} |
| STFT | n_fft {n_fft}, hop {hop} |
{training}
```
python -m separation.separate song.mp3 --checkpoint {file} -o separated/
```

Training data, evaluation and intended use: to be filled in by whoever publishes the weights.
"""


def model_card(found: Checkpoint, title: str, file: str, license: str | None = None) -> str:
    """Markdown with the front matter of the Hugging Face hub: what the file itself knows."""
    config: BSMamba2Config = found.config
    known = {
        "training steps": found.training.get("step"),
        "uSDR on its validation segments": found.training.get("usdr"),
    }
    rows = [
        f"| {name} | {value:.2f} dB |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in known.items()
        if value is not None
    ]
    return CARD.format(
        license=license or "unknown",
        title=title,
        stems=", ".join(config.stem_names),
        channels=config.audio_channels,
        rate=config.sample_rate,
        parameters=sum(value.numel() for value in found.state_dict.values()),
        dim=config.dim,
        depth=config.depth,
        d_state=config.d_state,
        n_fft=config.n_fft,
        hop=config.hop_length,
        training="".join(f"{row}\n" for row in rows),
        file=file,
    )
