"""Squeeze: train the teacher on the real images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dwa_fast.augment import augment
from dwa_fast.config import SqueezeConfig
from dwa_fast.datasets import ImageSet, normalise
from dwa_fast.seeding import generator
from dwa_fast.training import Progress, batches, cosine, fresh, step_count


def squeeze(
    data: ImageSet,
    architecture: str,
    config: SqueezeConfig,
    *,
    size: int,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """A teacher in eval mode, trained on all of `data` with SGD and a cosine learning rate.

    Args:
        architecture: a name of `architectures.ARCHITECTURES`.
        size: height and width of the images, pixels.
        progress: called with the steps done and the steps in all.
    """
    model = fresh(architecture, classes=len(data.class_names), channels=config.channels, size=size, seed=seed, device=device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=False
    )
    source = generator(seed, "squeeze")
    total, done = config.epochs * step_count(len(data.labels), config.batch_size), 0
    for _ in range(config.epochs):
        for indices in batches(len(data.labels), config.batch_size, source):
            optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(done, total)
            images = normalise(augment(data.load(indices.tolist()).to(device), config, source), config)
            loss = F.cross_entropy(model(images), data.labels[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if progress:
                progress(done, total)
    return model.eval()
