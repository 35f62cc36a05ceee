"""The Mamba-2 mixer (arXiv 2405.21060) and the bidirectional block of BSMamba2 (arXiv 2508.14556).

Parameter names are those of the authors' checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.conv import causal_conv1d
from models.dispatch import compute_dtype, package_built, run_scan
from models.errors import InputError
from models.scan import selective_scan
from models.scan.mamba_ssm import gated_norm_kernel

if TYPE_CHECKING:
    from models.scan.triton_plan import MixerParameters

# Read at call time: with all of them False everything runs in PyTorch.
TRITON_AVAILABLE = find_spec("triton") is not None
MAMBA_SSM_AVAILABLE = package_built("mamba_ssm", "selective_scan_cuda")
CAUSAL_CONV1D_AVAILABLE = package_built("causal_conv1d", "causal_conv1d_cuda")

NORM_EPS = 1e-5
FUSED_TAPS = range(2, 5)  # d_conv of what runs as one Triton block
_tried: set[tuple[object, ...]] = set()  # whose backward pass is known to work


def rms_normalize(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def gated_norm(y: Tensor, z: Tensor, backend: str = "chunked") -> Tensor:
    """y silu(z) over its root mean square, without the norm's weight. First derivatives only.

    backend: of the scan; `ssd` takes mamba-ssm's kernel for this too.
    """
    if backend == "ssd":
        return gated_norm_kernel(y, z, NORM_EPS)
    return _GatedNorm.apply(y, z)


class _GatedNorm(torch.autograd.Function):
    """Keeps y and z alone: the float32 steps between them and the result are four times as large.

    With v = y silu(z), n = v r and c = mean(dn n): dv = r (dn - c n).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(y, z)
        wide = torch.promote_types(y.dtype, torch.float32)  # the product overflows float16
        return rms_normalize(F.silu(z.to(wide)).mul_(y)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor, Tensor]:
        y, z = ctx.saved_tensors
        wide = torch.promote_types(y.dtype, torch.float32)
        s = torch.sigmoid(z.to(wide))
        gate = z * s
        v = y * gate
        r = torch.rsqrt(v.square().mean(-1, keepdim=True) + NORM_EPS)
        n = v.mul_(r)
        dn = dn.to(wide)
        dv = (dn - (dn * n).mean(-1, keepdim=True) * n).mul_(r)
        dz = s.addcmul_(gate, 1 - s).mul_(dv).mul_(y)
        return dv.mul_(gate).to(y.dtype), dz.to(z.dtype)


class Mamba2Mixer(nn.Module):
    """One direction: projection, convolution, selective scan, gated norm, projection.

    Args:
        d_model: features of input and output.
        d_state: state size n.
        d_conv: taps of the causal convolution.
        expand: d_inner = expand * d_model.
        headdim: channels a head p; d_inner must be a multiple.

    Raises:
        InputError: headdim does not divide d_inner.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 4,
        headdim: int = 64,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        if self.d_inner % headdim:
            raise InputError(
                f"headdim {headdim} does not divide expand * dim = {self.d_inner}; "
                "change headdim, dim or expand"
            )
        self.d_state = d_state
        self.headdim = headdim
        self.nheads = self.d_inner // headdim
        self.scan_backend = scan_backend
        d_xbc = self.d_inner + 2 * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + d_xbc + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(d_xbc, d_xbc, d_conv, groups=d_xbc)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads))
        self.A_log = nn.Parameter(torch.empty(self.nheads))
        self.D = nn.Parameter(torch.ones(self.nheads))
        self.norm = nn.RMSNorm(self.d_inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's start: steps log-uniform in 0.001 .. 0.1, decay rates uniform in 1 .. 16."""
        dt = torch.empty(self.nheads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus inverse
        self.A_log.copy_(torch.empty(self.nheads).uniform_(1, 16).log())

    def forward(self, u: Tensor) -> Tensor:
        """`[b, l, d_model]` -> the same shape."""
        projected = self.in_proj(u)
        inner = run_scan(self.scan_backend, u, lambda name: self.core(projected, name), fused=False)
        return self.out_proj(inner * self.norm.weight.to(inner.dtype))

    def core(self, projected: Tensor, backend: str) -> Tensor:
        """Between the projections: `[b, l, z | x | B | C | dt]` -> `[b, l, d_inner]`.

        The gated norm's weight is left to the caller, who may fold it into what follows.
        """
        sizes = [self.d_inner, self.d_inner + 2 * self.d_state, self.nheads]
        z, xbc, dt = projected.split(sizes, dim=-1)
        xbc = causal_conv1d(xbc, self.conv1d.weight[:, 0], self.conv1d.get_parameter("bias"))
        x, B, C = xbc.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias)  # b l h
        A = -torch.exp(self.A_log.to(wide))  # h
        heads = x.unflatten(-1, (self.nheads, self.headdim))  # b l h p
        y = selective_scan(heads, dt, A, B, C, self.D, backend)
        return gated_norm(y.flatten(2), z, backend)


class _Direction(nn.Module):
    """A pre-norm and its mixer."""

    def __init__(self, norm: nn.RMSNorm, mixer: Mamba2Mixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def input_weight(self) -> Tensor:
        """in_proj with the norm's weight folded in `[z | x | B | C | dt, d_model]`."""
        return self.mixer.in_proj.weight * self.norm.weight

    def output_weight(self, merge: Tensor) -> Tensor:
        """Gated norm's weight, out_proj and this direction's half of the merge, as one map.

        merge `[d_model, d_model]`, input rows first -> `[d_inner, d_model]`.
        """
        projection = self.mixer.out_proj.weight * self.mixer.norm.weight
        with torch.autocast(merge.device.type, enabled=False):
            return projection.T @ merge


def stacked(modules: Sequence[nn.Module], name: str) -> Tensor:
    """The parameters called `name` of modules of one shape, as one tensor."""
    return torch.stack([module.get_parameter(name) for module in modules])


def stack_parameters(directions: Sequence[nn.Module]) -> MixerParameters:
    """What the Triton kernels take: both directions' parameters on the first axis."""
    from models.scan.triton_plan import MixerParameters

    mixers = [d.get_submodule("mixer") for d in directions]
    names = ("conv1d.bias", "dt_bias", "A_log", "D")
    taps = torch.stack([m.get_parameter("conv1d.weight")[:, 0].T for m in mixers])  # 2 tap c
    return MixerParameters(taps, *(stacked(mixers, name) for name in names))


class Mamba2Block(nn.Module):
    """Two mixers, one a direction, merged by a linear map, with residuals inside.

        F = x + M_f(R_f(x)),   G = x + flip(M_b(R_b(flip(x)))),   y = x + [F ; G] W + b

    All of it is linear around the two cores, so the merge W is applied through the output
    projections: y = x + x (W_f + W_b) + core_f (O_f W_f) + core_b (O_b W_b) + b.

    Arguments as for `Mamba2Mixer`.

    Attributes:
        keeps_work: keep projection and convolution for the backward pass, which on Triton computes
            them again otherwise.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 4,
        headdim: int = 64,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()

        def direction() -> nn.ModuleList:
            mixer = Mamba2Mixer(d_model, d_state, d_conv, expand, headdim)
            return nn.ModuleList([_Direction(nn.RMSNorm(d_model, eps=NORM_EPS), mixer)])

        self.scan_backend = scan_backend
        self.d_conv = d_conv
        self.keeps_work = False
        self.forward_blocks = direction()
        self.backward_blocks = direction()
        self.linear = nn.ConvTranspose1d(2 * d_model, d_model, 1)

    def forward(self, x: Tensor, axis: int = -2) -> Tensor:
        """Run along `axis` of `[..., d_model]`, the contract being `[b, l, d_model]`; same shape.

        Raises:
            InputError: the scan backend is unknown or cannot run here.
        """
        has_kernel = x.ndim in (3, 4) and axis % x.ndim in range(1, x.ndim - 1)
        return run_scan(
            self.scan_backend,
            x,
            lambda backend: self._forward(x, axis, backend),
            has_kernel and self.d_conv in FUSED_TAPS,
            lambda backend: self._try_backward(x, axis, backend),
        )

    def _forward(self, x: Tensor, axis: int, backend: str) -> Tensor:
        if backend == "triton":
            return self._fused(x, axis)
        moved = x.movedim(axis, -2)
        sequences = moved.flatten(0, -3) if moved.ndim > 3 else moved  # b l d
        merged = self._merge(sequences.contiguous(), backend)  # b l d
        return merged.view(moved.shape).movedim(-2, axis)

    def _try_backward(self, x: Tensor, axis: int, backend: str) -> None:
        """Raise what a kernel raises in its first backward pass of a kind."""
        key = (backend, x.device, compute_dtype(x), axis % x.ndim, x.shape[axis])
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or key in _tried:
            return
        sample = x.detach()
        if backend == "triton":  # mamba-ssm's kernels tune themselves on what they get first
            for other in set(range(x.ndim - 1)) - {axis % x.ndim}:
                sample = sample.narrow(other, 0, 1)
        sample = sample.clone().requires_grad_()
        # Apart from the graph: gradient checkpointing counts what is kept.
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            torch.autograd.grad(self._forward(sample, axis, backend).sum(), sample)
        _tried.add(key)

    def _merge(self, x: Tensor, backend: str) -> Tensor:
        normal = rms_normalize(x)  # b l d
        merge_f, merge_b = self.linear.weight[:, :, 0].chunk(2)  # d d
        y = F.linear(x, (merge_f + merge_b).T, self.linear.bias) + x  # b l d
        y = y + self._run(self.forward_blocks[0], normal, merge_f, backend)
        return y + self._run(self.backward_blocks[0], normal.flip(1), merge_b, backend).flip(1)

    def _fused(self, x: Tensor, axis: int) -> Tensor:
        """Both directions at once along `axis`, without a copy of x: see `triton_block`."""
        from models.scan.triton_block import mamba2_block

        if x.ndim == 3:  # b l d
            return self._fused(x[:, :, None], 1)[:, :, 0]
        directions = [self.forward_blocks[0], self.backward_blocks[0]]
        mixers = [d.get_submodule("mixer") for d in directions]
        dtype = compute_dtype(x)
        merge = self.linear.weight[:, :, 0].unflatten(0, (2, -1))  # 2 d d
        w_in = stacked(mixers, "in_proj.weight") * stacked(directions, "norm.weight")[:, None]
        projection = stacked(mixers, "out_proj.weight") * stacked(mixers, "norm.weight")[:, None]
        with torch.autocast(x.device.type, enabled=False):
            w_out = torch.bmm(projection.mT, merge)  # 2 i d
        return mamba2_block(
            x.to(dtype),
            w_in.flatten(0, 1).to(dtype),
            w_out.flatten(0, 1).to(dtype),
            merge.sum(0).to(dtype),
            self.linear.get_parameter("bias").to(dtype),
            stack_parameters(directions),
            "time" if axis % 4 == 1 else "band",
            torch.get_float32_matmul_precision() != "highest",
            self.keeps_work,
        )

    @staticmethod
    def _run(direction: nn.Module, normal: Tensor, merge: Tensor, backend: str) -> Tensor:
        assert isinstance(direction, _Direction)
        inner = direction.mixer.core(F.linear(normal, direction.input_weight()), backend)
        return F.linear(inner, direction.output_weight(merge).T)  # b l d
