"""MSST's configuration of a `bs_mamba2`: the YAML beside its weights, read and written.

ZFTurbo/Music-Source-Separation-Training, whose keys of the section `model` are the authors' too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from models.bsmamba2 import BSMamba2Config
from models.errors import InputError

_FIXED = ("d_state", "d_conv", "expand", "headdim", "band_widths")
_WHOLE_NUMBERS = {
    "dim",
    "depth",
    "num_stems",
    "stft_n_fft",
    "stft_hop_length",
    "mask_estimator_depth",
}


@dataclass(frozen=True)
class MsstConfig:
    """What MSST's YAML says of weights; None, or nothing, where it does not say."""

    path: Path
    model: dict[str, Any]
    hop_length: int | None
    sample_rate: int | None
    stem_names: tuple[str, ...]

    @property
    def n_fft(self) -> int | None:
        return self.model.get("stft_n_fft")

    @property
    def audio_channels(self) -> int | None:
        return {True: 2, False: 1, None: None}[self.model.get("stereo")]

    def complete(self, config: BSMamba2Config) -> BSMamba2Config:
        """`config`, as the weights imply it, with what this adds: hop, rate, names of stems.

        Raises InputError if it contradicts the weights, or cannot be.
        """
        for key in ("dim", "depth", "num_stems", "mask_estimator_depth"):
            if key in self.model and self.model[key] != getattr(config, key):
                raise InputError(
                    f"{self.path}: model.{key} is {self.model[key]},"
                    f" the weights have {getattr(config, key)}"
                )
        names = self.stem_names
        try:
            return replace(
                config,
                hop_length=self.hop_length or config.hop_length,
                sample_rate=self.sample_rate or config.sample_rate,
                stem_names=names if len(names) == config.num_stems else config.stem_names,
            )
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error


def read_msst_config(path: Path) -> MsstConfig:
    """MSST's YAML. Raises InputError, naming the key, if the file is none."""
    values = _read_yaml(path)
    if not _is_msst(values):
        raise InputError(f"{path}: not a configuration of MSST: has no section model")
    return _parse(path, values)


def find_msst_config(weights: Path) -> MsstConfig | None:
    """The YAML of the same name beside weights; None if there is none, or it is not MSST's."""
    path = weights.with_suffix(".yaml")
    values = _read_yaml(path) if path.is_file() else None
    return _parse(path, values) if _is_msst(values) else None


def _is_msst(values: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(values, dict) and isinstance(values.get("model"), dict)


def _parse(path: Path, values: dict[str, Any]) -> MsstConfig:
    model = _section(path, values, "model")
    audio = _section(path, values, "audio")
    training = _section(path, values, "training")
    for key in _WHOLE_NUMBERS & set(model):
        _require(path, f"model.{key}", model[key], int)
    built = {
        "stft_win_length": model.get("stft_n_fft", BSMamba2Config.n_fft),
        "stft_normalized": False,
        "mamba_gmlp": False,
    }
    for key, value in built.items():
        if model.get(key, value) != value:
            raise InputError(f"{path}: model.{key} is {model[key]}, only {value} can be computed")
    if "stereo" in model:
        _require(path, "model.stereo", model["stereo"], bool)
    if audio.get("sample_rate") is not None:
        _require(path, "audio.sample_rate", audio["sample_rate"], int)
    target = training.get("target_instrument")
    names = [target] if target else training.get("instruments") or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: training.instruments is {names!r}, a list of names is needed")
    hop = model.get("stft_hop_length")
    return MsstConfig(path, model, hop, audio.get("sample_rate"), tuple(names))


def _section(path: Path, values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name) or {}
    if not isinstance(section, dict):
        raise InputError(f"{path}: {name} is {section!r}, a section is needed")
    return section


def _require(path: Path, key: str, value: Any, kind: type) -> None:
    is_sound = isinstance(value, bool) if kind is bool else type(value) is int and value > 0
    if not is_sound:
        needed = "a whole number above 0" if kind is int else "true or false"
        raise InputError(f"{path}: {key} is {value!r}, {needed} is needed")


def to_msst(config: BSMamba2Config) -> str:
    """The YAML that goes with the bare state dict, for `--model_type bs_mamba2` of MSST.

    MSST loads both if the network has the shape that is written into its code; where it has not,
    a warning says so.
    """
    import yaml

    warn_of_fixed_shape(config)
    segment = 8 * config.sample_rate
    target = config.stem_names[0] if config.num_stems == 1 else None
    values = {
        "audio": {
            "chunk_size": segment,
            "num_channels": config.audio_channels,
            "sample_rate": config.sample_rate,
            "min_mean_abs": 0.0,
        },
        "model": model_section(config),
        "training": {
            "instruments": [*config.stem_names, "other"] if target else list(config.stem_names),
            "target_instrument": target,
            "use_amp": True,
        },
        "inference": {"batch_size": 1, "dim_t": segment // config.hop_length + 1, "num_overlap": 2},
    }
    return yaml.safe_dump(values, sort_keys=False)


def model_section(config: BSMamba2Config) -> dict[str, Any]:
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


def warn_of_fixed_shape(config: BSMamba2Config) -> None:
    """Neither the authors' code nor MSST's reads these from a configuration."""
    for key in _FIXED:
        needed = getattr(BSMamba2Config(), key)
        if getattr(config, key) != needed:
            what = "are other" if key == "band_widths" else f"is {getattr(config, key)}"
            how = "the paper's 62 bands" if key == "band_widths" else needed
            warnings.warn(
                f"{key} {what}: the code of the authors and of MSST has {how} built in and cannot"
                " load these weights",
                stacklevel=3,
            )
            return


def _read_yaml(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, and takes the tuples that MSST's files are written with."""

    def construct_tuple(loader: yaml.SafeLoader, node: Any) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(node))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a configuration of MSST: {error}") from error
