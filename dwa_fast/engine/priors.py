"""SRe2L's optional priors on what the teacher sees: total variation, and the length of an image."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(
    seen: Tensor,  # [N, C, H, W], float32 or wider
) -> Tensor:  # []
    """‖∂→x‖₂ + ‖∂↓x‖₂ + ‖∂↗x‖₂ + ‖∂↘x‖₂, each norm over all differences between such neighbours in the batch (SRe2L's tv_l2)."""
    right = seen[:, :, :, :-1] - seen[:, :, :, 1:]
    down = seen[:, :, :-1] - seen[:, :, 1:]
    up_right = seen[:, :, 1:, :-1] - seen[:, :, :-1, 1:]
    down_right = seen[:, :, :-1, :-1] - seen[:, :, 1:, 1:]
    return torch.stack([torch.linalg.vector_norm(each) for each in (right, down, up_right, down_right)]).sum()


def mean_norm(
    seen: Tensor,  # [N, C, H, W], float32 or wider
) -> Tensor:  # []
    """The mean of ‖x_n‖₂ over the images (SRe2L's l2_scale)."""
    norms: Tensor = torch.linalg.vector_norm(seen, dim=(1, 2, 3))
    return norms.mean()
