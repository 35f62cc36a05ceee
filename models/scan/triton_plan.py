"""Sizes, geometry and launch options of the Triton mixer: what its kernels are called with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCAN_SIZES = ("D_INNER", "D_XBC", "H", "P", "N", "SPLITS", "Q", "BLOCK_N", "BLOCK_P", "PRECISION")

# What state_key takes of shared memory for float32 tiles of 64 steps: H100 and A100 have it.
WIDE_BYTES = 163_840


class Launch(NamedTuple):
    """Launch options of one kernel; `maxnreg` 0 leaves the registers to the compiler."""

    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int = 0

    def options(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": self.maxnreg} if self.maxnreg else {})


class Gpu(NamedTuple):
    """What decides on launches; the defaults are those of Triton's interpreter."""

    shared_bytes: int = 0  # that one program can have
    has_tf32: bool = False  # tensor cores that take float32, rounded

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Gpu:
        if device.type != "cuda":
            return Gpu()
        driver = triton.runtime.driver.active.utils
        shared = driver.get_device_properties(device.index)["max_shared_mem"]
        is_nvidia = torch.version.hip is None
        return Gpu(shared, is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0))


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes (powers of two, at least 16) and the launch options of the large kernels."""

    chunk: int  # steps in a chunk
    headdim_tile: int = 64  # at most this much of a head at once
    # Measured on an H100: the third stage is worth more than a third program an SM.
    state_forward: Launch = Launch(4, 3)
    chunk_forward: Launch = Launch(4, 3)
    sweep_forward: Launch = Launch(4, 1)  # a stage of prefetch costs the second program an SM
    state_query: Launch = Launch(4, 3)
    state_backward: Launch = Launch(4, 3)
    state_key: Launch = Launch(4, 3)
    chunk_backward: Launch = Launch(4, 3)

    @staticmethod
    def choose(dtype: torch.dtype, length: int, d_state: int, gpu: Gpu) -> KernelConfig:
        """The configuration for a sequence length: one chunk where the sequence fits in it."""
        wide = dtype == torch.float32
        longest = 64 if d_state <= 128 else 32
        if wide and gpu.shared_bytes < WIDE_BYTES:
            longest //= 2
        chunk = max(16, min(longest, triton.next_power_of_2(length)))
        if not wide:
            return KernelConfig(chunk)
        if gpu.has_tf32:
            return KernelConfig(chunk, 64, *[Launch(4, 1)] * 7)
        # With one stage, ptxas keeps chunk_forward's tiles in local memory.
        return KernelConfig(chunk, 64, Launch(8, 1), Launch(8, 2), *[Launch(8, 1)] * 5)


class MixerParameters(NamedTuple):
    """Float32 parameters, the two directions stacked on the first axis."""

    conv_weight: Tensor  # 2 d_conv (d_inner + 2 n): taps first, the last is the current step
    conv_bias: Tensor  # 2 (d_inner + 2 n)
    dt_bias: Tensor  # 2 h
    A_log: Tensor  # 2 h
    D: Tensor  # 2 h

    def floats(self) -> MixerParameters:
        return MixerParameters(*(tensor.float().contiguous() for tensor in self))


@dataclass(frozen=True)
class Plan:
    """Geometry and sizes of one call, in the kernels' argument order."""

    sequences: int
    geometry: tuple[int, ...]  # inner, outer and inner stride, step, length, chunks
    width: int
    d_inner: int
    d_xbc: int
    nheads: int
    headdim: int
    d_state: int
    d_conv: int
    splits: int
    block_n: int
    block_p: int
    precision: str
    config: KernelConfig

    @property
    def chunks(self) -> int:
        return self.geometry[-1]

    @property
    def length(self) -> int:
        return self.geometry[-2]

    @property
    def tiles(self) -> int:
        return self.nheads * self.splits

    @property
    def programs(self) -> int:
        return self.sequences * 2 * self.chunks

    @property
    def several(self) -> bool:
        return self.chunks > 1

    def sizes(self, *names: str) -> dict[str, int | str]:
        """The named compile-time constants."""
        values: dict[str, int | str] = {
            "W": self.width,
            "D_INNER": self.d_inner,
            "D_XBC": self.d_xbc,
            "H": self.nheads,
            "P": self.headdim,
            "N": self.d_state,
            "D_CONV": self.d_conv,
            "SPLITS": self.splits,
            "Q": self.config.chunk,
            "BLOCK_N": self.block_n,
            "BLOCK_P": self.block_p,
            "BLOCK_H": triton.next_power_of_2(self.nheads),
            "HAS_STATE": self.several,
            "PRECISION": self.precision,
        }
        return {name: values[name] for name in names}


def _geometry(shape: torch.Size, axis: str) -> tuple[int, int, int, int, int, int]:
    """(sequences, inner, outer stride, inner stride, step, length), strides in tokens."""
    batch, frames, bands = shape[:3]
    if axis == "band":
        return batch * frames, 1, bands, 0, 1, bands
    return batch * bands, bands, frames * bands, 1, bands, frames


def _check(proj: Tensor, params: MixerParameters, axis: str) -> None:
    if axis not in ("time", "band"):
        raise ValueError(f"axis must be 'time' or 'band', got {axis!r}")
    if proj.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"the triton mixer takes float32, bfloat16 or float16, got {proj.dtype}")
    if proj.dim() != 5 or proj.shape[3] != 2 or not proj.is_contiguous():
        raise ValueError(f"proj must be contiguous [b, t, k, 2, width], got {tuple(proj.shape)}")
    d_conv, d_xbc = params.conv_weight.shape[1:]
    nheads, width = params.dt_bias.shape[1], proj.shape[-1]
    d_inner = width - d_xbc - nheads
    if not 2 <= d_conv <= 4:
        raise ValueError(f"the triton mixer takes d_conv from 2 to 4, got {d_conv}")
    if d_inner <= 0 or d_inner % nheads or d_xbc <= d_inner or (d_xbc - d_inner) % 2:
        raise ValueError(f"width {width} does not split into z, xBC ({d_xbc}) and dt ({nheads})")


def _precision(allow_tf32: bool, gpu: Gpu) -> str:
    """How float32 tiles are multiplied."""
    if allow_tf32:
        return "tf32"
    # Each factor as the sum of two TF32 numbers: as exact as float32, and on the tensor cores.
    return "tf32x3" if gpu.has_tf32 else "ieee"


def make_plan(
    proj: Tensor, params: MixerParameters, axis: str, allow_tf32: bool, config: KernelConfig | None
) -> Plan:
    _check(proj, params, axis)
    d_conv, d_xbc = params.conv_weight.shape[1:]
    nheads, width = params.dt_bias.shape[1], proj.shape[-1]
    d_inner = width - d_xbc - nheads
    d_state, headdim = (d_xbc - d_inner) // 2, d_inner // nheads
    sequences, *strides, length = _geometry(proj.shape, axis)
    gpu = Gpu.of(proj.device)
    config = config or KernelConfig.choose(proj.dtype, length, d_state, gpu)
    block_n = max(16, triton.next_power_of_2(d_state))
    # A head's state tile stays within 64 x 128; a wider head takes `splits` tiles.
    limit = max(16, min(config.headdim_tile, 8192 // block_n))
    block_p = min(max(16, triton.next_power_of_2(headdim)), limit)
    return Plan(
        sequences=sequences,
        geometry=(*strides, length, triton.cdiv(length, config.chunk)),
        width=width,
        d_inner=d_inner,
        d_xbc=d_xbc,
        nheads=nheads,
        headdim=headdim,
        d_state=d_state,
        d_conv=d_conv,
        splits=triton.cdiv(headdim, block_p),
        block_n=block_n,
        block_p=block_p,
        precision=_precision(allow_tf32, gpu),
        config=config,
    )
