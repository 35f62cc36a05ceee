"""The selective scan and the gated norm through the CUDA kernels of the mamba-ssm package."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CHUNK = 128  # measured faster than upstream's 256 on 801 steps
GRID_LIMIT = 65_535  # CUDA's limit on the grid axis that carries batch x chunks
INDEX_LIMIT = 2**31 - 1  # elements that the norm's kernel can address


def selective_scan_kernel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """Mamba-1's `selective_scan_fn`, dt and A repeated for the channels of a head.

    Keeps float32 precision; shapes as in `models.scan.selective_scan`.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    _, _, heads, headdim = x.shape
    channels = heads * headdim
    state = B.shape[-1]
    y = selective_scan_fn(
        x.flatten(2).transpose(1, 2).contiguous(),  # b hp l
        dt.repeat_interleave(headdim, dim=2).transpose(1, 2).contiguous().to(x.dtype),  # b hp l
        A.float().repeat_interleave(headdim)[:, None].expand(channels, state).contiguous(),  # hp n
        B.transpose(1, 2).contiguous(),  # b n l
        C.transpose(1, 2).contiguous(),  # b n l
        D.float().repeat_interleave(headdim),  # hp
    )
    return y.transpose(1, 2).unflatten(-1, (heads, headdim))  # b l h p


def ssd_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba-2's Triton kernels, `mamba_chunk_scan_combined`; multiplies in TF32 for float32 inputs.

    Shapes as in `models.scan.selective_scan`.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    length = x.shape[1]
    chunk = min(MAX_CHUNK, max(16, 1 << (length - 1).bit_length()))
    rows = GRID_LIMIT // -(-length // chunk)
    parts = [
        mamba_chunk_scan_combined(
            x_part, dt_part, A.float(), B_part[:, :, None], C_part[:, :, None], chunk, D=D.float()
        )
        for x_part, dt_part, B_part, C_part in zip(
            x.split(rows), dt.split(rows), B.split(rows), C.split(rows), strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gated_norm_kernel(y: Tensor, z: Tensor, eps: float) -> Tensor:
    """`models.mamba2.gated_norm` of `[b, l, d_inner]`, as the package's own Mamba2 computes it."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    weight = torch.ones(y.shape[-1], device=y.device)
    sequences = max(1, INDEX_LIMIT // (y.shape[1] * max(y.stride(1), z.stride(1))))
    parts = [
        rmsnorm_fn(y_part, weight, None, z=z_part, eps=eps, norm_before_gate=False)
        for y_part, z_part in zip(y.split(sequences), z.split(sequences), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
