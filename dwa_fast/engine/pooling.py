"""Mean pooling between a teacher's blocks: by our operator, which PyTorch's own of a CPU needs several times as long for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dwa_fast.models.modules import has_hooks, replace_layers


class MeanPool(nn.Module):
    """An AvgPool2d whose square windows touch and do not overlap."""

    def __init__(self, window: int, operator: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.window, self.operator = window, operator

    @staticmethod
    def window_of(layer: nn.Module) -> int | None:
        """The side of the windows of a layer that can be replaced; None for others."""
        if type(layer) is not nn.AvgPool2d or has_hooks(layer) or layer.divisor_override is not None or layer.ceil_mode:
            return None
        sizes = {*_pair(layer.kernel_size), *_pair(layer.stride)}
        return sizes.pop() if len(sizes) == 1 and _pair(layer.padding) == (0, 0) else None

    def forward(
        self,
        y: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, H // window, W // window]
        """The means."""
        return self.operator(y, self.window)

    def extra_repr(self) -> str:
        """Its window."""
        return f"{self.window}"


def replace_pools(module: nn.Module, operator: Callable[[Tensor, int], Tensor]) -> None:
    """Replace every suitable mean pooling below `module`."""

    def replacement(layer: nn.Module) -> MeanPool | None:
        window = MeanPool.window_of(layer)
        return None if window is None else MeanPool(window, operator)

    replace_layers(module, replacement)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)
