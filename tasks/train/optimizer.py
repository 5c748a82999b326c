"""Creates AdamW with its parameter groups, and computes the learning-rate schedules.

    optimizer = make_optimizer(student, run.train)
    set_lr(optimizer, run.train.lr * lr_factor(step, run.total_steps, run.train))

The schedule depends on the step only, so a resumed run needs no scheduler state.
"""

import torch
from torch import nn

from tasks.recipe.config import TrainSettings


def lr_factor(step: int, total: int, train: TrainSettings) -> float:
    """Returns the learning rate at `step` (0-based) of `total`, as a fraction of train.lr.

    linear: linear warm-up, then linear decay to 0 (as in the DistilBERT code). wsd: warm-up, stable phase, then linear
    decay over the last train.decay of the steps (warmup-stable-decay, MiniCPM, arXiv:2404.06395).
    """
    warmup = round(train.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if train.schedule == "linear":
        return (total - step) / max(1, total - warmup)
    decay = max(1, round(train.decay * total))
    return min(1.0, (total - step) / decay)


def make_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.AdamW:
    """Creates a fused AdamW; weight decay applies to matrices only. Groups keep the order of model.parameters()."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
