"""Causal depthwise convolution followed by SiLU: causal-conv1d's kernel or PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from models.dispatch import first_that_runs


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, backend: str = "auto") -> Tensor:
    """silu(bias + sum_j weight[:, j] x_{t - width + 1 + j}) a channel, zeros before the start.

    Args:
        x: `[b, l, d]`.
        weight: taps `[d, width]`, the last for the current step.
        bias: `[d]`.
        backend: "auto", "causal_conv1d" or "torch".

    Returns:
        `[b, l, d]` in the type of x.
    """
    if backend == "torch":
        return causal_conv1d_torch(x, weight, bias)
    if backend == "causal_conv1d":
        return causal_conv1d_kernel(x, weight, bias)
    names = conv_backends(x, weight)
    return first_that_runs(names, x, lambda name: causal_conv1d(x, weight, bias, name))


def conv_backends(x: Tensor, weight: Tensor) -> list[str]:
    """Implementations that can run here, in order of preference."""
    from models import mamba2  # read at call time: its flags may be changed by a user

    kernel = (
        mamba2.CAUSAL_CONV1D_AVAILABLE
        and x.device.type == "cuda"
        and x.element_size() <= 4
        and x.shape[2] % 8 == 0
        and 2 <= weight.shape[1] <= 4
    )
    return ["causal_conv1d", "torch"] if kernel else ["torch"]


def causal_conv1d_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` through `torch.conv1d`."""
    channels, width = weight.shape
    y = F.conv1d(
        x.transpose(1, 2),
        weight[:, None].to(x.dtype),
        bias.to(x.dtype),
        padding=width - 1,
        groups=channels,
    )  # b d l+width-1
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def causal_conv1d_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv1d` through the causal-conv1d package, whose kernel applies the SiLU itself."""
    from causal_conv1d import causal_conv1d_fn

    if any(stride % 8 for stride in x.stride()[:2]) or x.stride(2) != 1:
        x = x.contiguous()
    y = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu")  # b d l
    return y.transpose(1, 2)
