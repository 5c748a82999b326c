"""Learning rate by step, and AdamW with its groups. Called by tasks.train."""

import torch
from torch import nn

from tasks.recipe.config import TrainSettings


def lr_factor(step: int, total: int, train: TrainSettings) -> float:
    """Share of the highest learning rate at `step` (0-based) of `total`.

    linear: warm-up, then straight down to 0 (the reference). wsd: warm-up, stable, then straight down over the last
    `decay` of the steps.
    """
    warmup = round(train.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "linear":
        return (total - step) / max(1, total - warmup)
    decay = max(1, round(train.decay * total))
    return min(1.0, (total - step) / decay)


def make_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only. Groups keep the order of named_parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
