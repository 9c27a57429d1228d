"""The released training loops, seeded by their caller: of students on soft labels (validate) and of teachers (squeeze).

Eager PyTorch in the precision of the images, contiguous tensors, the loss read in every step. They share no arithmetic with the package's
own training and are the peer `released` of the benchmark of training steps.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import SqueezeConfig, ValidationConfig


def train_student(
    student: nn.Module,
    teacher: nn.Module,  # in train mode where the released CIFAR script leaves it so
    batches: Iterable[Tensor],  # [B, C, H, W] each, normalised, augmented and mixed
    learning_rates: Iterable[float],  # of each step
    config: ValidationConfig,
) -> list[float]:
    """Train on the teacher's softened probabilities; gives the loss of every step. The student is changed in place."""
    student.train()
    if config.optimiser == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            student.parameters(), lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.weight_decay)
    losses = []
    for images, rate in zip(batches, learning_rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        images = images.contiguous()
        with torch.no_grad():
            target = F.softmax(teacher(images) / config.temperature, 1)
        loss = F.kl_div(F.log_softmax(student(images) / config.temperature, 1), target, reduction="batchmean")
        if config.scale_loss:
            loss = loss * config.temperature**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_teacher(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],  # images [B, C, H, W], normalised and augmented, and labels [B]
    learning_rates: Iterable[float],  # of each step
    config: SqueezeConfig,
) -> list[float]:
    """Train on the labels with SGD; gives the loss of every step. The network is changed in place."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay)
    losses = []
    for (images, labels), rate in zip(batches, learning_rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        loss = F.cross_entropy(network(images.contiguous()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
