"""What a run computes with: device, precision, optimizer, and the network on every rank."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import BSMamba2
from models.device import TRAINING_KINDS, pick_device
from models.errors import InputError
from training.config import Config, TrainingSection
from training.distributed import World

AUTOCAST_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Network = nn.Module  # [b, c, t] -> [b, n, c, t]


def resolve_device(name: str, world: World) -> torch.device:
    """The device that `training.device` names, on this rank.

    Raises:
        InputError: this machine does not have it, or several ranks would share it.
    """
    device = pick_device(name, TRAINING_KINDS, "training.device")
    if device.type != "cuda":
        return device
    if world.size > 1 and device.index is not None:
        raise InputError(f"training.device: '{name}' is one GPU for {world.size} ranks; use cuda")
    index = device.index if device.index is not None else world.local_rank
    if index >= (count := torch.cuda.device_count()):
        raise InputError(f"{index + 1} processes or more for {count} GPUs: start fewer")
    return torch.device("cuda", index)


def apply_switches(settings: TrainingSection) -> None:
    """Set torch's global switches and seed as the configuration asks."""
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = settings.tf32
    if settings.deterministic:
        # Read when cuBLAS starts; without it its products may differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Of no use here, where no kernel reads what it has not written.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
        torch.backends.cudnn.benchmark = False
    if settings.deterministic != torch.are_deterministic_algorithms_enabled():  # a slow import
        # Warnings name what has no deterministic form, and the run goes on.
        torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    torch.manual_seed(settings.seed)


def make_optimizer(model: BSMamba2, settings: TrainingSection) -> torch.optim.AdamW:
    """AdamW that decays all parameters alike, as the authors' training does."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_network(model: BSMamba2, config: Config) -> Network:
    """The model's forward pass, through torch.compile where the configuration asks."""
    if not config.training.compile:
        return model
    return torch.compile(model)  # type: ignore[return-value]


def replicate(network: Network, device: torch.device, world: World) -> Network:
    """The network with its gradients averaged over the ranks, where there are several.

    The exchange of a bucket of gradients runs beside the rest of the backward pass.
    """
    if not world.is_distributed:
        return network
    return DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,  # the STFT window is the same everywhere
        gradient_as_bucket_view=True,
    )
