"""Inference without launch overhead: the network as a CUDA graph.

A short clip takes more time to launch than to compute: some 600 kernels for the paper's network.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from models.bsmamba2 import BSMamba2
from models.dispatch import compute_dtype

MAX_GRAPHS = 4  # shapes kept; each holds its activations


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    spec: Tensor
    stems: Tensor


class GraphedNetwork:
    """`model` for inference: the second call of a shape and precision records, later ones replay.

    A shape seen once, such as a short file, runs as it is: recording takes several times as long.
    The graph reads the weights where they lie, so in-place updates are seen. Calls that need
    gradients, and those on other devices, run the model as it is.

    Args:
        model: in evaluation mode; moving it to another device asks for a new GraphedNetwork.
    """

    def __init__(self, model: BSMamba2) -> None:
        self.model = model
        self._captured: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()
        self._seen: set[tuple[object, ...]] = set()

    def __call__(self, waveform: Tensor) -> Tensor:
        """Separate `[b, c, t]` -> `[b, n, c, t]`."""
        stems = self.forward_spectrogram(self.model.stft(waveform))
        return self.model.istft(stems, waveform.shape[-1])

    def forward_spectrogram(self, spec: Tensor) -> Tensor:
        """As `BSMamba2.forward_spectrogram`."""
        if spec.device.type != "cuda" or torch.is_grad_enabled():
            return self.model.forward_spectrogram(spec)
        key = (spec.shape, spec.device, compute_dtype(spec.real))
        if key not in self._seen:
            self._seen.add(key)
            return self.model.forward_spectrogram(spec)
        if key not in self._captured:
            self._captured[key] = self._capture(spec)
            if len(self._captured) > MAX_GRAPHS:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.spec.copy_(spec)
        captured.graph.replay()
        return captured.stems.clone()

    def _capture(self, spec: Tensor) -> _Captured:
        # Tensors of inference mode could not be written to outside of it. A cast of a weight that
        # lies in autocast's cache would be a constant of the graph, and freed after it.
        kind = spec.device.type
        no_cache = torch.autocast(
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
        )
        with torch.inference_mode(False), torch.no_grad(), no_cache:
            static = torch.empty_like(spec).copy_(spec)
            side = torch.cuda.Stream(spec.device)
            side.wait_stream(torch.cuda.current_stream(spec.device))
            with torch.cuda.stream(side):  # compiles kernels and sets libraries up
                for _ in range(2):
                    self.model.forward_spectrogram(static)
            torch.cuda.current_stream(spec.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                stems = self.model.forward_spectrogram(static)
        return _Captured(graph, static, stems)
