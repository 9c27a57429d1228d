"""Replaces layers below a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(layer: nn.Module) -> bool:
    """Whether hooks add to what the layer's forward does; such a layer is never replaced, since the hooks would be lost."""
    return any(getattr(layer, hooks, None) for hooks in _HOOKS)


def replace_layers(root: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every layer, anywhere in the tree, for which `replacement` returns another."""
    replacements: dict[nn.Module, nn.Module | None] = {}  # by layer: a layer that is shared stays shared
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if child not in replacements:
                replacements[child] = replacement(child)
            new = replacements[child]
            if new is not None:
                setattr(parent, name, new)
