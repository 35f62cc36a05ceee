"""The spectrogram network as ONNX, for programs without PyTorch.

STFT, chunks and inverse STFT stay outside: they are a few lines in any language, and ONNX has no
complex numbers. Input `spectrogram` and output `stems` hold them as pairs (real, imaginary):
float32 [1, channel, freq, frame, 2] -> [1, stem, channel, freq, frame, 2], one chunk of a fixed
length.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.bsmamba2 import BSMamba2
from models.errors import InputError, log_level
from models.files import whole_file
from models.scan import chunked

INPUT, OUTPUT = "spectrogram", "stems"
TOLERANCE = 1e-4  # relative error of onnxruntime on the CPU against PyTorch
OPSET = 18


class RealSpectrogramNetwork(nn.Module):
    """`BSMamba2.forward_spectrogram` in real numbers."""

    def __init__(self, model: BSMamba2) -> None:
        super().__init__()
        self.model = model

    def forward(self, spec: Tensor) -> Tensor:
        """`[b, c, f, t, 2]` -> `[b, n, c, f, t, 2]`"""
        features = spec.permute(0, 3, 2, 1, 4).flatten(2)  # b t fc2
        stems = [self._product(mask, spec) for mask in self.model.masks(features)]
        return torch.stack(stems, dim=1)

    def _product(self, mask: Tensor, spec: Tensor) -> Tensor:
        """Complex product; mask `[b, t, f c 2]`, spec and result `[b, c, f, t, 2]`."""
        channels = self.model.config.audio_channels
        pairs = mask.unflatten(-1, (-1, channels, 2)).permute(0, 3, 2, 1, 4)  # b c f t 2
        real, imaginary = pairs.unbind(-1)
        a, b = spec.unbind(-1)
        return torch.stack([real * a - imaginary * b, real * b + imaginary * a], dim=-1)


def export_onnx(model: BSMamba2, path: str | Path, frames: int) -> float:
    """Write the spectrogram network for chunks of `frames` STFT frames, and check it.

    Needs onnx and onnxscript, and onnxruntime for the check. The configuration lies in the
    metadata under `config`, as JSON.

    Returns:
        Relative error of onnxruntime's output on noise against PyTorch's, below TOLERANCE.

    Raises:
        InputError: a package is missing, or the check fails (then nothing is written).
    """
    path = Path(path)
    onnx, _ = _import("onnx"), _import("onnxscript")
    runtime = _import("onnxruntime")
    if "external_data" not in signature(torch.onnx.export).parameters:
        raise InputError(f"torch {torch.__version__} cannot export to ONNX: 2.5 or newer can")
    config = model.config
    network = RealSpectrogramNetwork(model).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.audio_channels, config.n_fft // 2 + 1, frames, 2)
    example = torch.randn(shape, generator=generator)
    with whole_file(path) as temporary:
        with _quiet_exporter(), _scans_in_one_piece():
            torch.onnx.export(
                network,
                (example,),
                temporary,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        exported = onnx.load(temporary)
        entry = exported.metadata_props.add()
        entry.key, entry.value = "config", json.dumps(asdict(config))
        onnx.save(exported, temporary)
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        (output,) = session.run([OUTPUT], {INPUT: example.numpy()})
        with torch.inference_mode():
            spec = torch.view_as_complex(example)
            expected = torch.view_as_real(model.forward_spectrogram(spec))
        error = float((torch.from_numpy(output) - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise InputError(f"{path}: differs from PyTorch by {error:.1e}, nothing was written")
    return error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's own deprecations and its regrets about torchvision."""
    with (
        log_level(logging.ERROR, "torch.onnx", "onnxscript", "onnx_ir"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _scans_in_one_piece() -> Iterator[None]:
    """Slices fit a scan into a CPU's cache; in a graph each would be a copy of the whole scan."""
    kept = chunked.SLICE_ELEMENTS
    chunked.SLICE_ELEMENTS = sys.maxsize
    try:
        yield
    finally:
        chunked.SLICE_ELEMENTS = kept


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"export to ONNX needs {name}: pip install {name}") from error
