"""Reading and writing weights: our checkpoints, safetensors, and the files of others.

    python -m models.checkpoint export runs/x/checkpoints/best.pt vocals.safetensors
    python -m models.checkpoint export best.pt vocals.ckpt --to official
    python -m models.checkpoint info official.ckpt
    python -m models.checkpoint download msst-vocals

Reading never executes pickled code.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from models.bsmamba2 import BSMamba2, BSMamba2Config
from models.errors import InputError
from models.files import NO_ROOM, whole_file
from models.msst import find_msst_config, read_msst_config
from models.official import OUR_CONFIG, ema_weights, infer_config, plain_weights
from models.unpickle import read_pickled

__all__ = ["Checkpoint", "infer_config", "load_checkpoint", "read_checkpoint", "save_checkpoint"]

FORMAT = "bsmamba2"
VERSION = 1


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

    Raises:
        OSError: the file cannot be written; the old one is left as it was.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    if path.suffix != ".safetensors":
        content = {"format": FORMAT, "version": VERSION, "config": asdict(config)}
        save_pickled(path, content | {"state_dict": tensors, "training": training or {}})
        return
    from safetensors.torch import save

    # Its own writing leaves files that others may not read, and hides why it fails.
    content_bytes = save(tensors, {"format": FORMAT, "config": json.dumps(asdict(config))})
    with _whole_binary(path) as file:
        file.write(content_bytes)


def save_pickled(path: Path, content: dict[str, Any]) -> None:
    """Write what torch.save can, whole or not at all. Raises OSError if it cannot be written."""
    with _whole_binary(path) as file:
        try:
            # Given a path, torch keeps other threads from Python for 0.3 s.
            torch.save(content, file)
        except RuntimeError as error:
            # torch reports a failed write of any kind as a wrong position in its archive.
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise _disk_is_full(path) from error


@contextmanager
def _whole_binary(path: Path) -> Iterator[BinaryIO]:
    """A file to write, there whole or not at all; where there is no room, the error says so."""
    with whole_file(path) as temporary:
        try:
            with temporary.open("wb") as file:
                yield file
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise _disk_is_full(path) from error


def _disk_is_full(path: Path) -> OSError:
    free = shutil.disk_usage(path.absolute().parent).free / 2**20
    reason = f"the disk took only a part of it ({free:.0f} MiB are free)"
    return OSError(errno.ENOSPC, reason, str(path))


def read_checkpoint(
    path: str | Path, msst_yaml: str | Path | None = None, ema: bool = False
) -> Checkpoint:
    """Read any file that holds BSMamba2 weights.

    Args:
        path: our `.pt`, `.safetensors`, the authors' Lightning `.ckpt`, MSST's `.ckpt` or `.pth`.
        msst_yaml: the configuration beside MSST's weights; a file of the same name but `.yaml`
            is found by itself.
        ema: of the authors' files take the averaged weights; their state dict is the raw ones.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, msst_yaml)
    content = read_pickled(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content.get("version", 0) > VERSION:
            raise InputError(f"{path}: written by a newer version of this project; update it")
        missing = {"config", "state_dict", "training"} - set(content)
        if missing:
            raise InputError(f"{path}: damaged: {min(missing)} is missing")
        config = _config_from(content["config"], path)
        return Checkpoint(config, content["state_dict"], content["training"])
    weights = plain_weights(content, str(path))
    if ema:
        weights = ema_weights(content, weights, str(path))
    if isinstance(content.get(OUR_CONFIG), dict):
        return Checkpoint(_config_from(content[OUR_CONFIG], path), weights, {})
    return Checkpoint(_foreign_config(weights, path, msst_yaml), weights, {})


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> BSMamba2:
    """The network of a checkpoint, in evaluation mode on `device`.

    Raises:
        InputError: the file is missing, damaged, or of another architecture.
    """
    return build_model(read_checkpoint(path), str(path)).to(device).eval()


def build_model(found: Checkpoint, source: str) -> BSMamba2:
    """The network of a checkpoint, on the CPU.

    Raises:
        InputError: a weight is missing, misshapen or none of the network's.
    """
    # The network is built without memory, then takes the tensors of the file.
    with torch.device("meta"):
        model = BSMamba2(found.config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.state_dict.items()}
    if wanted != given:
        raise InputError(f"{source}: {_difference(wanted, given)}")
    halves = (torch.float16, torch.bfloat16)
    weights = {k: w.float() if w.dtype in halves else w for k, w in found.state_dict.items()}
    model.load_state_dict(weights, assign=True)
    model.window = torch.hann_window(found.config.n_fft)
    return model


def _foreign_config(
    weights: Mapping[str, Tensor], path: Path, msst_yaml: str | Path | None
) -> BSMamba2Config:
    """What shapes and the YAML, if there is one, say together."""
    found = find_msst_config(path) if msst_yaml is None else read_msst_config(Path(msst_yaml))
    if found is None:
        return infer_config(weights, str(path))
    source = f"{path} with {found.path}"
    return found.complete(infer_config(weights, source, found.n_fft, found.audio_channels))


def _read_safetensors(path: Path, msst_yaml: str | Path | None) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file, or damaged: {error}") from error
    if metadata.get("format") == FORMAT:
        try:
            values = json.loads(metadata["config"])
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: its metadata hold no configuration ({error})") from error
        return Checkpoint(_config_from(values, path), weights, {})
    weights = plain_weights(weights, str(path))
    return Checkpoint(_foreign_config(weights, path, msst_yaml), weights, {})


def _config_from(values: Any, path: Path) -> BSMamba2Config:
    if not isinstance(values, dict):
        raise InputError(f"{path}: its configuration cannot be used: it is no mapping")
    known = {field.name for field in fields(BSMamba2Config)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise InputError(
            f"{path}: configuration has the unknown key {unknown[0]}; update this project"
        )
    try:
        # How the weights run is this machine's matter, not the file's.
        return replace(BSMamba2Config(**values), scan_backend="auto")
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its configuration cannot be used: {error}") from error


def _difference(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str:
    for name in wanted:
        if name not in given:
            return f"not a BSMamba2 of one configuration: the weight {name} is missing"
        if wanted[name] != given[name]:
            return f"{name} has shape {given[name]}, {wanted[name]} is needed"
    return f"the weight {sorted(set(given) - set(wanted))[0]} is none of BSMamba2's"


if __name__ == "__main__":
    from models.convert import main
    from models.errors import run_command

    run_command(main)
