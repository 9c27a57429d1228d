"""Triton twins of dwa_fast.ops.cross_entropy and log_losses_: what an iteration does with its losses, in two launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwa_fast.kernels.layout import on_device_of

_ROWS = 256  # losses that log_losses_ adds up at a time


@triton.jit(do_not_specialize=["classes", "images"])
def _cross_entropy_kernel(logits, labels, losses, gradient, scale, classes, images, BLOCK: tl.constexpr):
    """losses_i = log Σ_c exp(x_c) − x_y,   gradient_c = scale/N · (softmax(x)_c − [c = y])   of image i = program_id(0)."""
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < classes
    x = tl.load(logits + image * classes + column, mask=inside, other=float("-inf")).to(tl.float32)
    label = tl.load(labels + image)
    largest = tl.max(x, axis=0)
    powers = tl.where(inside, tl.exp(x - largest), 0.0)
    total = tl.sum(powers, axis=0)
    chosen = tl.sum(tl.where(column == label, x, 0.0), axis=0)
    tl.store(losses + image, tl.log(total) + largest - chosen)
    grad_logits = (tl.div_rn(powers, total) - tl.where(column == label, 1.0, 0.0)) * (scale / images)
    tl.store(gradient + image * classes + column, grad_logits.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["images", "iterations"])
def _log_losses_kernel(losses, step, image_losses, matching, images, iterations, BLOCK: tl.constexpr):
    """losses_t = (Σ image_losses / N, R_mean, R_var),   t ← (t + 1) mod T;   one program, so that the order is fixed."""
    t = tl.load(step)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    start = 0
    while start < images:
        image = start + tl.arange(0, BLOCK)
        total += tl.load(image_losses + image, mask=image < images, other=0.0).to(tl.float64)
        start += BLOCK
    tl.store(losses + 3 * t, (tl.sum(total, axis=0) / images).to(tl.float32))
    tl.store(losses + 3 * t + 1, tl.load(matching))
    tl.store(losses + 3 * t + 2, tl.load(matching + 1))
    tl.debug_barrier()  # every thread has read the counter
    tl.store(step, (t + 1) % iterations)


def cross_entropy(
    logits: Tensor,  # [N, C] float32, bfloat16 or float16
    labels: Tensor,  # [N] int64
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Loss of every image, [N] float32, and the gradient of scale times their mean, like the logits. One launch."""
    images, classes = logits.shape
    logits = logits.contiguous()
    losses, gradient = torch.empty(images, dtype=torch.float32, device=logits.device), torch.empty_like(logits)
    block = triton.next_power_of_2(classes)
    if images:
        with on_device_of(logits):
            _cross_entropy_kernel[(images,)](
                logits, labels.contiguous(), losses, gradient, scale, classes, images, BLOCK=block, num_warps=4 if block <= 4096 else 16
            )
    return losses, gradient


def log_losses_(
    losses: Tensor,  # [T, 3] float32, row t written
    step: Tensor,  # [] int64: t, advanced
    image_losses: Tensor,  # [N] float32
    matching: Tensor,  # [2] float32
) -> None:
    """losses_t = (mean of image_losses, R_mean, R_var); t ← (t + 1) mod T. One launch."""
    with on_device_of(losses):
        _log_losses_kernel[(1,)](losses, step, image_losses, matching, len(image_losses), len(losses), BLOCK=_ROWS, num_warps=1)
