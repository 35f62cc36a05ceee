"""Weights under the authors' names: their Lightning files, and MSST's `bs_mamba2`.

EuiYeonKim/BSMamba2@42eb8c8 saves `{"state_dict": {"model.layers...": ...}, ...}`; MSST
(ZFTurbo/Music-Source-Separation-Training) the same names without the prefix, bare or under
`state`, `state_dict` or `model_state_dict`, with a YAML file beside. Our names are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from models.bsmamba2 import BSMamba2Config
from models.errors import InputError
from models.msst import model_section, warn_of_fixed_shape

CONTAINERS = ("state_dict", "state", "model_state_dict")
PREFIXES = ("model.", "module.", "_orig_mod.")  # Lightning, DistributedDataParallel, torch.compile
OUR_CONFIG = "bsmamba2_config"  # beside the weights in the files that we write for others
TS_BSMAMBA2 = ("BN_mask.", "separator_mask.")  # arXiv 2409.06245, `bs_mamba2` in MSST before 1.0.19


def plain_weights(content: Any, source: str) -> dict[str, Tensor]:
    """The float32 state dict of a foreign file's content, without wrappers' prefixes.

    Raises InputError if it holds no weights, or those of TS-BSMamba2.
    """
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise InputError(f"{source}: holds no weights; give a checkpoint of BSMamba2")
    weights = _without_prefixes(dict(content))
    if any(name.startswith(TS_BSMAMBA2) for name in weights):
        raise InputError(f"{source}: weights of TS-BSMamba2, which is another network")
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wrappers may be nested in any order: strips until nothing changes."""
    for prefix in PREFIXES:
        rest = [name for name in weights if not name.startswith(prefix)]
        # A Lightning module also saves the STFT windows that its featurizers keep as buffers.
        if len(rest) < len(weights) and all(name.endswith("window") for name in rest):
            return _without_prefixes(
                {k.removeprefix(prefix): v for k, v in weights.items() if k not in rest}
            )
    return weights


def ema_weights(content: Any, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The averaged weights of the authors' training, which their `state_dict` is not.

    They lie in the first optimizer's state, in the order of the parameters. Raises InputError if
    there are none that fit.
    """
    try:
        average = list(content["optimizer_states"][0]["ema"])
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{source}: holds no averaged (EMA) weights") from error
    shapes = [tuple(getattr(value, "shape", ())) for value in average]
    if shapes != [tuple(value.shape) for value in weights.values()]:
        raise InputError(f"{source}: its averaged (EMA) weights do not fit its state_dict")
    return dict(zip(weights, (value.float() for value in average), strict=True))


def infer_config(
    weights: Mapping[str, Tensor],
    source: str,
    n_fft: int | None = None,
    audio_channels: int | None = None,
) -> BSMamba2Config:
    """The configuration that the shapes of the authors' weight names imply.

    STFT hop and sample rate leave no trace in the weights: the paper's are taken. So do bins and
    channels but for their product: where `n_fft` and `audio_channels` are not given, those are
    taken with which n_fft is a power of two, which no weights allow for both mono and stereo.

    Raises:
        InputError: the names or shapes are of another architecture, or of another n_fft or
            number of channels.
    """

    def count(pattern: str) -> int:
        found = [re.match(pattern, name) for name in weights]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    mixer = "layers.0.0.forward_blocks.0.mixer"
    try:
        dim = weights["final_norm.gamma"].shape[0]
        nheads = weights[f"{mixer}.A_log"].shape[0]
        d_inner = weights[f"{mixer}.norm.weight"].shape[0]
        channels, _, d_conv = weights[f"{mixer}.conv1d.weight"].shape
        bands = count(r"band_split\.to_features\.(\d+)\.")
        sizes = [weights[f"band_split.to_features.{k}.0.gamma"].shape[0] for k in range(bands)]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{source}: weights of another architecture than BSMamba2 ({error} is missing)"
        ) from error
    stems = count(r"mask_estimators\.(\d+)\.")
    names = ("vocals",) if stems == 1 else tuple(f"stem{i + 1}" for i in range(stems))
    n_fft, audio_channels = _bins_and_channels(sizes, n_fft, audio_channels, source)
    try:
        return BSMamba2Config(
            dim=dim,
            depth=count(r"layers\.(\d+)\."),
            d_state=(channels - d_inner) // 2,
            d_conv=d_conv,
            expand=d_inner // dim,
            headdim=d_inner // nheads,
            num_stems=stems,
            audio_channels=audio_channels,
            n_fft=n_fft,
            hop_length=min(BSMamba2Config.hop_length, n_fft // 2),
            mask_estimator_depth=1 + count(r"mask_estimators\.0\.to_freqs\.0\.0\.(\d+)\.") // 2,
            stem_names=names,
            band_widths=tuple(size // (2 * audio_channels) for size in sizes),
        )
    except (InputError, ZeroDivisionError) as error:
        raise InputError(f"{source}: weights of no BSMamba2 ({error})") from error


def _bins_and_channels(
    sizes: Sequence[int], n_fft: int | None, audio_channels: int | None, source: str
) -> tuple[int, int]:
    """n_fft and channels of bands of `sizes` features, which are bins x channels x 2."""
    total = sum(sizes)
    for channels in (2, 1) if audio_channels is None else (audio_channels,):
        bins = total // (2 * channels)
        if any(size % (2 * channels) for size in sizes) or bins < 2:
            continue
        found = 2 * (bins - 1)
        is_power = found & (found - 1) == 0
        if found == n_fft or (n_fft is None and is_power):
            return found, channels
    channels_text = {None: "mono or stereo", 1: "mono", 2: "stereo"}[audio_channels]
    n_fft_text = "an n_fft that is a power of two" if n_fft is None else f"n_fft {n_fft}"
    raise InputError(
        f"{source}: its bands have {total} features, which are not those of {channels_text} with"
        f" {n_fft_text}; give the configuration of these weights (--msst-yaml)"
    )


def to_official(config: BSMamba2Config, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Content of a Lightning file with the authors' names.

    Their evaluate.py and inference.py load it if the network has the shape that is written into
    their code; where it has not, a warning says so. We load it in either case.
    """
    warn_of_fixed_shape(config)
    return {
        "state_dict": {f"model.{name}": value for name, value in weights.items()},
        "hyper_parameters": {"model": model_section(config)},
        OUR_CONFIG: asdict(config),
    }
