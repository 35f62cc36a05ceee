"""Weights under the authors' names: their Lightning files, and MSST's `bs_mamba2`.

EuiYeonKim/BSMamba2@42eb8c8 saves `{"state_dict": {"model.layers...": ...}, ...}`; MSST
(ZFTurbo/Music-Source-Separation-Training) the same names without the prefix, bare or under
`state`, `state_dict` or `model_state_dict`, with a YAML file beside. Our names are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from models.bsmamba2 import BSMamba2Config
from models.errors import InputError

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
    weights = dict(content)
    for prefix in PREFIXES:
        rest = [name for name in weights if not name.startswith(prefix)]
        # A Lightning module also saves the STFT windows that its featurizers keep as buffers.
        if len(rest) < len(weights) and all(name.endswith("window") for name in rest):
            weights = {k.removeprefix(prefix): v for k, v in weights.items() if k not in rest}
    if any(name.startswith(TS_BSMAMBA2) for name in weights):
        raise InputError(f"{source}: weights of TS-BSMamba2, which is another network")
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


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


def infer_config(weights: Mapping[str, Tensor], source: str) -> BSMamba2Config:
    """The configuration that the shapes of the authors' weight names imply.

    STFT hop and sample rate leave no trace in the weights: the paper's are taken.

    Raises:
        InputError: the names or shapes are of another architecture.
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
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{source}: weights of another architecture than BSMamba2 ({error} is missing)"
        ) from error
    stems = count(r"mask_estimators\.(\d+)\.")
    names = ("vocals",) if stems == 1 else tuple(f"stem{i + 1}" for i in range(stems))
    # 1025 bins of a channel and its two parts: the channels follow from the paper's n_fft.
    audio_channels = max(1, sum(sizes) // (2 * 1025))
    widths = tuple(size // (2 * audio_channels) for size in sizes)
    return BSMamba2Config(
        dim=dim,
        depth=count(r"layers\.(\d+)\."),
        d_state=(channels - d_inner) // 2,
        d_conv=d_conv,
        expand=d_inner // dim,
        headdim=d_inner // nheads,
        num_stems=stems,
        audio_channels=audio_channels,
        n_fft=2 * (sum(widths) - 1),
        mask_estimator_depth=1 + count(r"mask_estimators\.0\.to_freqs\.0\.0\.(\d+)\.") // 2,
        stem_names=names,
        band_widths=widths,
    )


def msst_config(path: Path, config: BSMamba2Config) -> BSMamba2Config:
    """`config`, as the weights imply it, with what MSST's YAML adds: hop, rate, names of stems.

    Raises InputError if the file is no such YAML, or contradicts the weights.
    """
    values = _read_yaml(path)
    model, audio, training = (values.get(key) or {} for key in ("model", "audio", "training"))
    for key, field in (
        ("dim", "dim"),
        ("depth", "depth"),
        ("num_stems", "num_stems"),
        ("stft_n_fft", "n_fft"),
        ("mask_estimator_depth", "mask_estimator_depth"),
    ):
        if key in model and model[key] != getattr(config, field):
            raise InputError(
                f"{path}: model.{key} is {model[key]}, the weights have {getattr(config, field)}"
            )
    target = training.get("target_instrument")
    names = [target] if target else list(training.get("instruments") or [])
    return replace(
        config,
        hop_length=model.get("stft_hop_length", config.hop_length),
        sample_rate=audio.get("sample_rate", config.sample_rate),
        stem_names=tuple(names) if len(names) == config.num_stems else config.stem_names,
    )


def to_official(config: BSMamba2Config, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Content of a Lightning file that the authors' evaluate.py and inference.py load."""
    return {
        "state_dict": {f"model.{name}": value for name, value in weights.items()},
        "hyper_parameters": {"model": _msst_model(config)},
        OUR_CONFIG: asdict(config),
    }


def to_msst(config: BSMamba2Config) -> str:
    """The YAML that goes with the bare state dict, for `--model_type bs_mamba2` of MSST."""
    import yaml

    segment = 8 * config.sample_rate
    target = config.stem_names[0] if config.num_stems == 1 else None
    values = {
        "audio": {
            "chunk_size": segment,
            "num_channels": config.audio_channels,
            "sample_rate": config.sample_rate,
            "min_mean_abs": 0.0,
        },
        "model": _msst_model(config),
        "training": {
            "instruments": [*config.stem_names, "other"] if target else list(config.stem_names),
            "target_instrument": target,
            "use_amp": True,
        },
        "inference": {"batch_size": 1, "dim_t": segment // config.hop_length + 1, "num_overlap": 2},
    }
    return yaml.safe_dump(values, sort_keys=False)


def _msst_model(config: BSMamba2Config) -> dict[str, Any]:
    return {
        "dim": config.dim,
        "depth": config.depth,
        "stereo": config.audio_channels == 2,
        "num_stems": config.num_stems,
        "stft_n_fft": config.n_fft,
        "stft_hop_length": config.hop_length,
        "stft_win_length": config.n_fft,
        "stft_normalized": False,
        "mask_estimator_depth": config.mask_estimator_depth,
        "module_type": "mamba2",
        "mamba_gmlp": False,
    }


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, and takes the tuples that MSST's files are written with."""

    def construct_tuple(loader: yaml.SafeLoader, node: Any) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(node))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a configuration of MSST: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise InputError(f"{path}: not a configuration of MSST: has no section model")
    return values
