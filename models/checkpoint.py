"""Reading and writing weights: our checkpoints, safetensors, and the authors' Lightning files.

Reading never executes pickled code (`weights_only=True`).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.bsmamba2 import BSMamba2, BSMamba2Config
from models.errors import InputError
from models.files import whole_file

FORMAT = "bsmamba2"
VERSION = 1
PREFIXES = ("model.", "module.", "_orig_mod.")  # Lightning, DistributedDataParallel, torch.compile


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        config: shape of the network.
        state_dict: the weights that ship (in our files the EMA's).
        training: what a run needs to go on, empty in files that are not a run's.
    """

    config: BSMamba2Config
    state_dict: dict[str, Tensor]
    training: dict[str, Any]


def save_checkpoint(
    path: str | Path,
    config: BSMamba2Config,
    state_dict: Mapping[str, Tensor],
    training: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all: temporary file, fsync, rename.

    A name that ends in `.safetensors` gets the weights and the configuration alone.

    Args:
        path: file to write; its folder is made where needed.
        config: shape of the network.
        state_dict: weights that ship.
        training: state of the run, of tensors and plain containers.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with whole_file(path) as temporary:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            metadata = {"format": FORMAT, "config": json.dumps(asdict(config))}
            save_file(tensors, temporary, metadata=metadata)
        else:
            content = {"format": FORMAT, "version": VERSION, "config": asdict(config)}
            torch.save(content | {"state_dict": tensors, "training": training or {}}, temporary)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read any file that holds BSMamba2 weights.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a checkpoint, or damaged: {reason}") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content.get("version", 0) > VERSION:
            raise InputError(f"{path}: written by a newer version of this project; update it")
        config = _config_from(content["config"], path)
        return Checkpoint(config, content["state_dict"], content["training"])
    weights = _plain_weights(content, path)
    return Checkpoint(infer_config(weights, str(path)), weights, {})


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> BSMamba2:
    """The network of a checkpoint, in evaluation mode on `device`.

    Raises:
        InputError: the file is missing, damaged, or of another architecture.
    """
    found = read_checkpoint(path)
    # The network is built without memory, then takes the tensors of the file.
    with torch.device("meta"):
        model = BSMamba2(found.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.state_dict.items()}
    if wanted != given:
        raise InputError(f"{path}: {_difference(wanted, given)}")
    model.load_state_dict(found.state_dict, assign=True)
    model.window = torch.hann_window(found.config.n_fft)
    return model.to(device).eval()


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


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file, or damaged: {error}") from error
    if metadata.get("format") == FORMAT:
        return Checkpoint(_config_from(json.loads(metadata["config"]), path), weights, {})
    weights = _plain_weights(weights, path)
    return Checkpoint(infer_config(weights, str(path)), weights, {})


def _config_from(values: dict[str, Any], path: Path) -> BSMamba2Config:
    known = {field.name for field in fields(BSMamba2Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(
            f"{path}: configuration has the unknown key {unknown[0]}; update this project"
        )
    # How the weights run is this machine's matter, not the file's.
    return replace(BSMamba2Config(**values), scan_backend="auto")


def _plain_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict of a foreign file, without wrappers' prefixes."""
    for key in ("state_dict", "state"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise InputError(f"{path}: holds no weights; give a checkpoint of BSMamba2")
    weights = dict(content)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _difference(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str:
    for name in wanted:
        if name not in given:
            return f"not a BSMamba2 of one configuration: the weight {name} is missing"
        if wanted[name] != given[name]:
            return f"{name} has shape {given[name]}, {wanted[name]} is needed"
    return f"the weight {sorted(set(given) - set(wanted))[0]} is none of BSMamba2's"
