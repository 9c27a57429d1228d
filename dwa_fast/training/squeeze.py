"""Squeeze: train the teacher on the real images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Progress, SqueezeConfig, check_integer, plain
from dwa_fast.data.digest import image_digest
from dwa_fast.data.images import ImageSet, check_image_set, check_shape
from dwa_fast.data.loader import ImageCache, RandomSampler, TrainingBatch, TrainingLoader, batch_sizes
from dwa_fast.engine.backend import own_defaults, resolve_device
from dwa_fast.engine.training_form import training_form
from dwa_fast.recipes import Recipe, check_recipe
from dwa_fast.threads import THREADS, threads_of
from dwa_fast.training.fit import check_batches, check_set, fit, new_network, predict, remedy, resolve_precision
from dwa_fast.training.state import TrainingState

_FAST_SMOOTHING, _FAST_RISE = 0.1, 0.2  # label smoothing, and the share of the epochs in which the learning rate rises


@own_defaults()
def squeeze(
    data: ImageSet,
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint_file: str | Path | None = None,
    tested: Callable[[nn.Module, int], object] | None = None,
    test_every: int = 0,
) -> nn.Module:
    """A teacher in eval mode, trained on all of `data` with SGD and the schedule of the recipe.

    Args:
        recipe: architecture, size, mean, std and settings of the training.
        progress: called with the finished steps and the total.
        checkpoint_file: written between epochs. The same call resumes from it and gives the same bits. Remove it once the teacher is saved.
        device: "auto", "cpu", "cuda", "cuda:1", …; default: the recipe's.
        test_every: call `tested` after every so many epochs; 0: never.
        tested: called with the network and the number of finished epochs.
    Raises:
        InputError: the checkpoint is of other settings, an image cannot be read, a label is not the number of a class, a batch of one image
            is too small for the architecture, or the training diverges.
    """
    check_image_set(data)
    check_recipe(recipe)
    check_shape(data, recipe.data)
    seed, test_every = plain(seed), plain(test_every)
    check_integer("seed", seed, 0)
    check_integer("test_every", test_every, 0)
    config, device = recipe.squeeze, resolve_device(str(device or recipe.synthesis.device))
    fast = config.one_cycle
    check_set(data, "training images")
    precision = resolve_precision(config.precision, device)
    shape = {"classes": len(data.class_names), "channels": recipe.data.channels, "size": recipe.data.size}
    model = new_network(recipe.architecture, **shape, seed=seed, device=device)
    check_batches(lambda: copy.deepcopy(model), data, batch_sizes(len(data.labels), config.batch_size), device, "network")
    optimizer = sgd(model, config)
    sampler = RandomSampler(data, config, seed=seed, purpose="squeeze")
    loader = TrainingLoader(ImageCache(data, device, config.memory_limit), sampler, recipe.data, config.padding)
    forward = training_form(model.train(), data.image_shape, device)

    def losses(batch: TrainingBatch) -> list[Tensor]:
        logits = predict(forward, batch.images, precision)
        return [F.cross_entropy(logits, batch.labels, label_smoothing=_FAST_SMOOTHING if fast else 0.0)]

    fit(
        model,
        optimizer,
        loader,
        losses,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        one_cycle=fast,
        warmup_epochs=_FAST_RISE * config.epochs if fast else 0,
        seed=seed,
        remedy=lambda: remedy(config, precision),
        state=TrainingState(Path(checkpoint_file), training_settings(data, recipe, device, seed)) if checkpoint_file else None,
        progress=progress,
        test=(lambda epochs: tested(model, epochs)) if tested else None,
        test_every=test_every,
    )
    return model.eval()


def training_settings(data: ImageSet, recipe: Recipe, device: torch.device, seed: int) -> dict[str, Any]:
    """Everything that the teacher of `squeeze` depends on; JSON values."""
    settings = {**recipe.settings("squeeze"), "architecture": recipe.architecture, "size": recipe.data.size, "seed": seed}
    settings |= {"precision": resolve_precision(recipe.squeeze.precision, device), "device": device.type, THREADS: threads_of(device)}
    del settings["memory_limit"]  # decides where the images are held, not their values
    return settings | {"real_images": image_digest(data)}


def sgd(model: nn.Module, config: SqueezeConfig, fused: bool | None = True) -> torch.optim.SGD:
    """SGD as the settings say; `fused` as in PyTorch."""
    rate, momentum, decay = config.learning_rate, config.momentum, config.weight_decay
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay, nesterov=config.one_cycle, fused=fused)
