"""What the launchers share: memory order of activations and images, and the device to launch on."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor itself where its memory is already [N, H, W, C], else a copy that is."""
    return tensor.contiguous(memory_format=torch.channels_last)


def laid_out_like(result: Tensor, model: Tensor) -> Tensor:
    """A channels-last result with the strides that torch.empty_like gives the model; a copy only where the model is not channels-last."""
    if model.is_contiguous(memory_format=torch.channels_last):
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: this makes it the tensor's."""
    return torch.cuda.device_of(tensor)
