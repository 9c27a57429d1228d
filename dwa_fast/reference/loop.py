"""The published recover loop, seeded: hooks on every BatchNorm layer, one batch after the other, torch.optim.Adam.

It shares the configuration and the drawn schedules with the package, and no arithmetic: the tests compare `synthesize` with it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.config import Normalisation, SynthesisConfig
from dwa_fast.models.batchnorm import batchnorm_layers, given
from dwa_fast.recipes import Recipe
from dwa_fast.schedule import Schedule, make_schedule
from dwa_fast.seeding import generator, normal


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """What the published program does beside the paper; each is off unless named. The fast path offers none of them."""

    keep_adjusted_weights: bool = False  # θ̃ is not undone between batches, so that it drifts
    keep_weight_gradients: bool = False  # weights take gradients in all T iterations; they leak into the next batch's first ascent step
    leak_image_gradient: bool = False  # the K ascent passes add to the gradient of the images in Adam's first step

    @classmethod
    def published(cls) -> Quirks:
        """All of them: the program as released for ImageNet."""
        return cls(keep_adjusted_weights=True, keep_weight_gradients=True, leak_image_gradient=True)


@dataclass(frozen=True)
class LoopResult:
    """What the loop leaves behind."""

    images: Tensor  # [N, C, H, W], normalised
    losses: Tensor  # [batches, T, 3] float32: cross-entropy, R_mean, R_var
    parameters: list[Tensor]  # the weights when the loop ended


class StatisticsHook:
    """Distance of one BatchNorm layer's input from its running statistics, or from `aim`, taken at each forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        self.mean_distance = torch.empty(0)
        self.var_distance = torch.empty(0)
        self.aim: Sequence[Tensor] | None = None  # mean and variance, [C] each; None: the running ones
        self.ran = False  # layers that no forward pass reaches take no part
        self._handle = layer.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        channels = given(args, kwargs).transpose(0, 1).flatten(1)
        running_mean, running_var = layer.running_mean, layer.running_var
        if running_mean is None or running_var is None:
            raise ValueError("the layer keeps no running statistics")
        self.ran = True
        mean, var = self.aim or (running_mean, running_var)
        self.mean_distance = torch.norm(channels.mean(1) - mean, 2)
        self.var_distance = torch.norm(channels.var(1, unbiased=False) - var, 2)

    def close(self) -> None:
        """Take the hook off the layer."""
        self._handle.remove()


def recover(
    teacher: nn.Module | Sequence[nn.Module],  # several take turns, from iteration to iteration of each batch
    images: Tensor,  # [N, C, H, W], normalised
    labels: Tensor,  # [N] int64
    recipe: Recipe,
    *,
    seed: int = 0,
    quirks: Quirks | None = None,
    class_statistics: Sequence[Mapping[str, Tensor]] | None = None,  # of each teacher, by layer: [2, classes, C], means and variances
) -> LoopResult:
    """Run the loop over all batches, in the precision and on the device of the images. The teacher itself is not changed.

    With class_statistics each batch is of one class, and matched with that class's instead of the running statistics (LPLD).
    The published program has one teacher; with several, all of its quirks but the leak into the images' gradient are those of each.
    """
    config, quirks = recipe.synthesis, quirks or Quirks()
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    models = [copy.deepcopy(each).to(images.device, images.dtype).eval() for each in teachers]
    originals = [copy.deepcopy(model).requires_grad_(False) for model in models]
    on_original = config.matching_weights == "original"
    hooks = [[StatisticsHook(layer) for layer in batchnorm_layers(each).values()] for each in (originals if on_original else models)]
    finished, losses = [], []
    for number, start in enumerate(range(0, len(images), config.batch_size)):
        stop = start + config.batch_size
        schedule = make_schedule(config, images.shape[2], images.shape[3], seed=seed, batch=number)
        first = config.stage_sizes[0] if config.stage_sizes else tuple(images.shape[2:])
        real, leak = _resize(images[start:stop], first), None
        for place, (original, model) in enumerate(zip(originals, models, strict=True)):
            if number and not quirks.keep_adjusted_weights:
                _copy_parameters(original, model)
            if not quirks.keep_weight_gradients:
                model.zero_grad()
            model.requires_grad_(True)
            source = generator(seed, f"ascent {place}" if place else "ascent", number)
            leak = _adjust(model, real, labels[start:stop], config, schedule, source)
            model.requires_grad_(quirks.keep_weight_gradients)
        for matched, own_hooks, own in zip(originals if on_original else models, hooks, class_statistics or (), strict=False):
            (label,) = labels[start:stop].unique().tolist()
            for name, hook in zip(batchnorm_layers(matched), own_hooks, strict=True):
                hook.aim = [each[label].to(images) for each in own[name]]
        batch = images[start:stop].clone()
        if config.initial == "noise":
            batch = normal(generator(seed, "noise", number), tuple(batch.shape)).to(batch)
        batch, rows = _refine(
            models,
            originals if on_original else None,
            hooks,
            batch,
            labels[start:stop],
            config,
            recipe.data,
            schedule,
            leak if quirks.leak_image_gradient and len(models) == 1 else None,
            number,
        )
        finished.append(batch)
        losses.append(rows)
    for hook in (hook for own in hooks for hook in own):
        hook.close()
    parameters = [p.detach().clone() for model in models for p in model.parameters()]
    return LoopResult(torch.cat(finished), torch.stack(losses).float().cpu(), parameters)


def apply_view(images: Tensor, schedule: Schedule, step: int) -> Tensor:
    """The view of iteration `step`."""
    top, left, height, width, flip, down, right = schedule.rows[step].tolist()
    if (height, width) != tuple(images.shape[2:]):
        crop = images[:, :, top : top + height, left : left + width]
        images = F.interpolate(crop, size=images.shape[2:], mode="bilinear", align_corners=False)
    if flip:
        images = images.flip(3)
    return torch.roll(images, shifts=(down, right), dims=(2, 3))


def _resize(images: Tensor, size: int | tuple[int, ...]) -> Tensor:
    """Bilinear, without antialiasing."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for old, new in zip(source.parameters(), target.parameters(), strict=True):
            new.copy_(old)


def _adjust(
    model: nn.Module, images: Tensor, labels: Tensor, config: SynthesisConfig, schedule: Schedule, source: np.random.Generator
) -> Tensor | None:
    """θ → θ̃ in K steps along the normalised gradient of the cross-entropy; returns what the passes leave in the images' gradient."""
    if not config.adjusts:
        return None
    parameters = list(model.parameters())
    if config.ascent == "random":
        total = sum(p.numel() for p in parameters)
        noise = normal(source, (total,)).to(images).split([p.numel() for p in parameters])
        _step(parameters, [part.view_as(p) for part, p in zip(noise, parameters, strict=True)], config.rho, True)
        return None
    images = images.clone().requires_grad_(True)
    for _ in range(config.steps):
        F.cross_entropy(model(apply_view(images, schedule, 0)), labels).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        _step(parameters, gradients, config.rho / config.steps, config.normalize_ascent)
        model.zero_grad()
    return images.grad


def _step(parameters: list[nn.Parameter], directions: list[Tensor], radius: float, normalize: bool) -> None:
    norm = torch.stack([torch.norm(d, 2) for d in directions]).norm(2)
    scale = radius / (norm + 1e-12) if normalize else radius
    with torch.no_grad():
        for p, d in zip(parameters, directions, strict=True):
            p.add_(d * scale)


def _refine(
    models: list[nn.Module],
    originals: list[nn.Module] | None,
    hooks: list[list[StatisticsHook]],
    images: Tensor,
    labels: Tensor,
    config: SynthesisConfig,
    normalisation: Normalisation,
    schedule: Schedule,
    leak: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor]:
    low, high = (torch.tensor(bound, dtype=images.dtype, device=images.device)[:, None, None] for bound in normalisation.bounds)
    losses = []
    initial, sizes = images, config.stage_sizes or (tuple(images.shape[2:]),)
    length, longer = config.iterations // len(sizes), config.iterations % len(sizes)
    choices = _choices(config, len(models))
    starts = [stage * length + min(stage, longer) for stage in range(len(sizes))]
    refined = _refined(labels, config)
    for step in range(config.iterations):
        if step in starts:
            size, share = sizes[starts.index(step)], config.stage_mix if step else 0.0
            images = share * _resize(images.detach(), size) + (1 - share) * _resize(initial, size)
            images.requires_grad_(True)
            optimizer = torch.optim.Adam([images], lr=config.learning_rate, betas=(0.5, 0.9), eps=1e-8)
        optimizer.param_groups[0]["lr"] = float(schedule.learning_rates[step])
        optimizer.zero_grad()
        if step == 0 and leak is not None:
            images.grad = leak.clone()
        places = refined[step]
        view = apply_view(images[places], schedule, step)
        terms = torch.zeros(3).to(view)
        for place, weight in choices[(step if config.teacher_turns == "iteration" else number) % len(choices)]:
            original = originals[place] if originals else None
            terms = terms + weight * _terms(models[place], original, hooks[place], view, labels[places], config.first_layer_weight)
        (terms[0] + config.lambda_mean * terms[1] + config.lambda_var * terms[2] + _priors(view, config)).backward()
        optimizer.step()
        with torch.no_grad():
            images[places] = images[places].clamp(low, high)
        losses.append(terms.detach())
    return images.detach(), torch.stack(losses)


def _refined(labels: Tensor, config: SynthesisConfig) -> list[Any]:
    """The images that each iteration refines: all, or those of the first q groups of each class in round q (DELT)."""
    if config.rounds == 1:
        return [slice(None)] * config.iterations
    groups = torch.zeros(len(labels), dtype=torch.int64)
    for label in labels.unique():
        (own,) = np.nonzero((labels == label).cpu().numpy())
        for number, group in enumerate(np.array_split(own, config.rounds)):
            groups[torch.from_numpy(group)] = number
    spans = np.array_split(np.arange(config.iterations), config.rounds)
    return [(groups <= number).nonzero().flatten().to(labels.device) for number, span in enumerate(spans) for _ in span]


def _choices(config: SynthesisConfig, count: int) -> list[list[tuple[int, float]]]:
    """All choices of the teachers that an iteration may have, each with its weight."""
    priors = torch.tensor(config.teacher_priors or [0.0] * count, dtype=torch.float64)
    places = [list(each) for each in itertools.combinations(range(count), config.teachers_together)]
    return [list(zip(each, (priors[each] / 5).softmax(0).tolist(), strict=True)) for each in places]


def _terms(
    model: nn.Module, original: nn.Module | None, hooks: list[StatisticsHook], view: Tensor, labels: Tensor, first: float
) -> Tensor:  # [3]: cross-entropy, R_mean, R_var
    """The terms of one teacher's loss."""
    ce = F.cross_entropy(model(view), labels)
    if original is not None:
        original(view)
    factors = [first] + [1.0] * (len(hooks) - 1)
    used = list(zip(factors, (hook for hook in hooks if hook.ran), strict=False))
    mean = sum((w * hook.mean_distance for w, hook in used), torch.zeros(()).to(ce))
    var = sum((w * hook.var_distance for w, hook in used), torch.zeros(()).to(ce))
    return torch.stack([ce, mean, var])


def _priors(view: Tensor, config: SynthesisConfig) -> Tensor:
    """SRe2L's total variation and mean norm of the view, weighted; nothing where both weights are 0."""
    total = torch.zeros(()).to(view)
    if config.tv_l2:
        across, along = view.diff(dim=3), view.diff(dim=2)
        falling, rising = (each[:, :, :-1, :-1] - each[:, :, 1:, 1:] for each in (view, view.flip(3)))
        total = total + config.tv_l2 * sum((torch.norm(each, 2) for each in (across, along, falling, rising)), total)
    if config.l2_scale:
        total = total + config.l2_scale * view.flatten(1).norm(dim=1).mean()
    return total
