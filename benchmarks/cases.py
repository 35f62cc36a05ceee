"""What is timed: the scan, the convolution, one block, the network, each by every implementation.

Sizes are the paper's unless told otherwise. A clip of s seconds has 100 s + 1 frames of 62 bands:
62 sequences of 100 s + 1 steps along time, 100 s + 1 sequences of 62 steps along the bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peer import PeerBlock, peer_network
from models import BSMamba2, BSMamba2Config, mamba2
from models.bsmamba2 import BAND_AXIS, TIME_AXIS
from models.conv import causal_conv1d, conv_backends
from models.dispatch import SCAN_BACKENDS, missing
from models.graphs import GraphedNetwork
from models.mamba2 import Mamba2Block
from models.scan import IMPLEMENTATIONS

PEER = "peer (mamba_ssm Mamba2)"
GRAPH = "triton-graph"  # replayed as a CUDA graph
REFERENCES = ("sequential", "nn.Conv1d")  # of speed-up and error


@dataclass(frozen=True)
class Setting:
    """Where and how everything runs."""

    device: torch.device
    dtype: torch.dtype
    config: BSMamba2Config
    batch: int
    backends: tuple[str, ...] = ()

    def wants(self, backend: str) -> bool:
        """Whether an implementation is asked for; without a choice all are."""
        return not self.backends or backend in self.backends

    def frames(self, seconds: float) -> int:
        """STFT frames of a clip."""
        return int(seconds * self.config.sample_rate) // self.config.hop_length + 1


@dataclass(frozen=True)
class Case:
    """One thing to time, by one implementation.

    Attributes:
        what: the part, with its axis.
        backend: the implementation; "sequential", in float32, is the reference of all others.
        inputs: tensors that get gradients, parameters aside.
        run: inputs -> output.
        parameters: get gradients too.
        frames: sequences x steps, or band-frames of the network.
        trains: whether a backward pass is to be timed.
    """

    what: str
    backend: str
    inputs: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]
    frames: int
    trains: bool = True


def runnable_backends(setting: Setting, whole_block: bool) -> list[str]:
    """Scan backends that can run here, the reference first; `triton` needs a whole block."""
    probe = torch.empty(0, device=setting.device, dtype=setting.dtype)
    names = [name for name in reversed(SCAN_BACKENDS) if name != "auto"]
    if not whole_block:
        names = [name for name in names if name in IMPLEMENTATIONS]
    return [name for name in names if missing(name, probe) is None]


def scan_cases(setting: Setting, seconds: float) -> Iterator[Case]:
    """One direction's scan alone, along both axes."""
    config = setting.config
    heads = config.expand * config.dim // config.headdim
    for axis, sequences, length in _axes(setting, seconds):
        shape = (sequences, length)
        make = _maker(setting.device)
        x = make(*shape, heads, config.headdim)
        dt = nn.functional.softplus(make(*shape, heads) - 4)
        A = -(make(heads).abs() * 4 + 1)
        B, C = make(*shape, config.d_state), make(*shape, config.d_state)
        D = make(heads)
        for name in runnable_backends(setting, whole_block=False):
            dtype = torch.float32 if name == "sequential" else setting.dtype
            inputs = (x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D)
            run = IMPLEMENTATIONS[name]
            yield Case(f"scan, {axis}", name, inputs, run, (), sequences * length)


def conv_cases(setting: Setting, seconds: float) -> Iterator[Case]:
    """The causal convolution alone, along both axes; `nn.Conv1d` is the reference."""
    config = setting.config
    channels = config.expand * config.dim + 2 * config.d_state
    for axis, sequences, length in _axes(setting, seconds):
        make = _maker(setting.device)
        x, bias = make(sequences, length, channels), make(channels)
        weight = make(channels, config.d_conv) / config.d_conv

        def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            padding, groups = weight.shape[1] - 1, len(weight)
            y = nn.functional.conv1d(
                x.transpose(1, 2), weight[:, None], bias, padding=padding, groups=groups
            )
            return nn.functional.silu(y[..., : x.shape[1]]).transpose(1, 2)

        runs: dict[str, Callable[..., Tensor]] = {"nn.Conv1d": plain}
        for name in conv_backends(x, weight):
            runs[name] = partial(causal_conv1d, backend=name)
        for name, run in runs.items():
            dtype = setting.dtype
            inputs = (x.to(dtype), weight.to(dtype), bias.to(dtype))
            yield Case(f"conv, {axis}", name, inputs, run, (), sequences * length)


def block_cases(setting: Setting, seconds: float) -> Iterator[Case]:
    """One bidirectional block under autocast, along both axes."""
    config = setting.config
    frames = setting.frames(seconds)
    bands = len(config.band_widths)
    x = _maker(setting.device)(setting.batch, frames, bands, config.dim)
    torch.manual_seed(0)
    shape = (config.dim, config.d_state, config.d_conv, config.expand, config.headdim)
    block = Mamba2Block(*shape).to(setting.device)
    for axis_name, axis in (("time axis", TIME_AXIS), ("band axis", BAND_AXIS)):
        runs: dict[str, nn.Module] = {}
        for name in runnable_backends(setting, whole_block=True):
            runs[name] = own = Mamba2Block(*shape, scan_backend=name).to(setting.device)
            own.load_state_dict(block.state_dict())
        if has_peer(setting):
            runs[PEER] = PeerBlock(config, block).to(setting.device)
        for name, module in runs.items():
            run = _under_autocast(setting, name, partial(module, axis=axis))
            what = f"block, {axis_name}"
            parameters = tuple(module.parameters())
            yield Case(what, name, (x,), run, parameters, setting.batch * frames * bands)


def network_cases(setting: Setting, seconds: float) -> Iterator[Case]:
    """The whole network, waveform to waveform, under autocast."""
    config = setting.config
    samples = int(seconds * config.sample_rate)
    waveform = _maker(setting.device)(setting.batch, config.audio_channels, samples)
    frames = setting.batch * setting.frames(seconds) * len(config.band_widths)
    torch.manual_seed(0)
    plain = BSMamba2(config)
    names = runnable_backends(setting, whole_block=True)
    for name in [*names, PEER] if has_peer(setting) else names:
        if name == PEER:
            model = peer_network(config, plain)
        else:
            model = BSMamba2(replace(config, scan_backend=name))
            model.load_state_dict(plain.state_dict())
        model.to(setting.device)
        run = _under_autocast(setting, name, model)
        yield Case("network", name, (waveform,), run, tuple(model.parameters()), frames)
        if name == "triton" and setting.device.type == "cuda":
            run = _under_autocast(setting, name, GraphedNetwork(model.eval()))
            yield Case("network", GRAPH, (waveform,), run, (), frames, trains=False)


def unavailable(setting: Setting, backend: str) -> str | None:
    """Why an implementation that was asked for by name cannot run here; None where it can."""
    probe = torch.empty(0, device=setting.device, dtype=setting.dtype)
    if backend in (PEER, "causal_conv1d"):
        built = mamba2.CAUSAL_CONV1D_AVAILABLE and setting.device.type == "cuda"
        there = has_peer(setting) if backend == PEER else built
        return None if there else "it needs mamba-ssm and causal-conv1d on a CUDA device"
    if backend == GRAPH and setting.device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    if backend in ("nn.Conv1d", "torch"):
        return None
    scan = "triton" if backend == GRAPH else backend
    if scan not in SCAN_BACKENDS or scan == "auto":
        names = [*SCAN_BACKENDS[1:], GRAPH, "peer", "nn.Conv1d", "torch", "causal_conv1d"]
        return f"unknown; choose among {', '.join(names)}"
    return missing(scan, probe)


def has_peer(setting: Setting) -> bool:
    """Whether mamba-ssm's own module can run here."""
    return (
        mamba2.MAMBA_SSM_AVAILABLE
        and mamba2.CAUSAL_CONV1D_AVAILABLE
        and setting.device.type == "cuda"
    )


def _axes(setting: Setting, seconds: float) -> Iterator[tuple[str, int, int]]:
    frames, bands = setting.frames(seconds), len(setting.config.band_widths)
    yield f"time axis ({setting.batch * bands} x {frames})", setting.batch * bands, frames
    yield f"band axis ({setting.batch * frames} x {bands})", setting.batch * frames, bands


def _maker(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def _under_autocast(
    setting: Setting, backend: str, run: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    enabled = setting.dtype != torch.float32 and backend != "sequential"

    def call(x: Tensor) -> Tensor:
        with torch.autocast(setting.device.type, setting.dtype, enabled=enabled):
            return run(x)

    return call
