"""The paper's authors' wiring of a block, around mamba-ssm's own `Mamba2`: what to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.bsmamba2 import BSMamba2, BSMamba2Config
from models.mamba2 import NORM_EPS, Mamba2Block


class PeerBlock(nn.Module):
    """Two `mamba_ssm.modules.mamba2.Mamba2`, the second on a flipped copy, and a merge."""

    def __init__(self, config: BSMamba2Config, own: Mamba2Block) -> None:
        super().__init__()
        from mamba_ssm.modules.mamba2 import Mamba2

        def direction() -> nn.ModuleDict:
            mixer = Mamba2(
                config.dim,
                d_state=config.d_state,
                d_conv=config.d_conv,
                expand=config.expand,
                headdim=config.headdim,
            )
            norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
            return nn.ModuleDict({"norm": norm, "mixer": mixer})

        self.forward_blocks = nn.ModuleList([direction()])
        self.backward_blocks = nn.ModuleList([direction()])
        self.linear = nn.ConvTranspose1d(2 * config.dim, config.dim, 1)
        self.load_state_dict(own.state_dict())

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """`[b, t, k, d]` along `axis`; same shape."""
        moved = x.movedim(axis, -2)
        sequences = moved.flatten(0, -3).contiguous()  # b l d
        ahead = self._run(self.forward_blocks[0], sequences)
        back = self._run(self.backward_blocks[0], sequences.flip(1)).flip(1)
        merged = self.linear(torch.cat([ahead, back], dim=-1).transpose(1, 2)).transpose(1, 2)
        return (sequences + merged).view(moved.shape).movedim(-2, axis)

    @staticmethod
    def _run(direction: nn.Module, x: Tensor) -> Tensor:
        norm, mixer = direction.get_submodule("norm"), direction.get_submodule("mixer")
        return x + mixer(norm(x))


def peer_network(config: BSMamba2Config, own: BSMamba2) -> BSMamba2:
    """`own` with the authors' blocks, the weights the same."""
    peer = BSMamba2(config)
    peer.load_state_dict(own.state_dict())
    for pair, ours in zip(peer.layers, own.layers, strict=True):
        assert isinstance(pair, nn.ModuleList) and isinstance(ours, nn.ModuleList)
        for axis, block in enumerate(ours):
            assert isinstance(block, Mamba2Block)
            pair[axis] = PeerBlock(config, block)
    return peer
