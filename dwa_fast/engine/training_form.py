"""Networks made ready for training steps: fused layers, channels-last, and the parameters of the network itself."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

from dwa_fast.engine.backend import fused_causes, fused_operators, repeatable
from dwa_fast.engine.capture import TRACING
from dwa_fast.engine.cpu_convolutions import replace_cpu_convolutions
from dwa_fast.engine.fuse import BatchNormAct, fuse_neighbours
from dwa_fast.engine.layers import StridedPointwise, replace_global_means, replace_pools, replace_strided_pointwise
from dwa_fast.engine.symbolic import symbolic
from dwa_fast.errors import InputError, first_line
from dwa_fast.models.batchnorm import batchnorm_layers, is_plain, planes
from dwa_fast.reference.ops import Operators
from dwa_fast.seeding import generator, normal, seeded_layers
from dwa_fast.threads import torch_threads

log = logging.getLogger("dwa_fast")

_TRIED = 8  # images that a network and its form are compared on
_TOLERANCE, _TIGHT_TOLERANCE = 1e-2, 1e-4  # a variance of so few values magnifies rounding; that of a whole batch less
# In a deep network much more: then the form is compared with float64, and may be a few times as far from it as the network itself
_TIMES_ITS_OWN_ERROR, _LARGEST_TOLERANCE = 10, 0.1

Forward = Callable[[Tensor], Tensor]  # [N, C, H, W] → [N, classes]


class _TrainedBatchNormAct(BatchNormAct):
    """A BatchNorm layer in the mode that it was in, with what was fused into it; it keeps no moments."""

    def __init__(self, layer: Any, operators: Operators) -> None:
        super().__init__(layer, operators)
        self.momentum, self.batches = getattr(layer, "momentum", None), getattr(layer, "num_batches_tracked", None)
        self.trains = layer.training

    def forward(self, input: Tensor, skip: Tensor | None = None, other: BatchNormAct | None = None) -> Tensor:
        """f(BatchNorm(input) [+ skip]), or the largest or mean of it in each window; no two layers are joined in training."""
        y, added = planes(input), None if skip is None else planes(skip).to(input.dtype)  # under autocast one of them may be float32
        behind = self.activation, self.slope
        windows, averages = (None, False) if self.windows is None else (self.windows[:3], self.windows.averages)
        if self.trains:
            layer = self.running_mean, self.running_var, self.weight, self.bias, self._next_momentum(), self.eps
            z = self.operators.batch_norm_act(y, *layer, added, *behind, windows, averages)
        elif windows is not None:
            z, _ = self.operators.bn_act_pool(y, *self.statistics, *windows, *behind, with_sums=False, averages=averages)
        else:
            z, _ = self.operators.bn_act(y, *self.statistics, added, *behind, with_sums=False)
        return z if input.dim() == 4 else z.view(input.shape)

    def _next_momentum(self) -> float:
        if self.batches is not None:
            self.batches += 1
        if self.momentum is not None:
            return float(self.momentum)
        return 0.0 if self.batches is None else 1 / float(self.batches)  # a plain average over all batches


def training_form(
    module: nn.Module,  # in the mode in which it will run
    image_shape: tuple[int, int, int],  # channels, height, width
    device: torch.device,
) -> Forward:
    """The forward pass of a module as its steps run it, in the module's present mode: fused and channels-last.

    It reads and changes the parameters and running statistics of the module, whatever is loaded into them later. It is compared with the
    module on a few random images, and where its forward pass reads sizes on as many as each batch has; where it cannot be made, or
    differs, it is the module itself, and the log says why.
    """
    if fused_causes(device):
        return module
    try:
        with TRACING, torch_threads(1), torch.enable_grad(), repeatable(), seeded_layers(0, device), _undisturbed(module):
            trial = normal(generator(0, "trial"), (_TRIED, *image_shape)).to(device)
            with _without_other_random_numbers():
                form = _traced(module, trial)
                cause = _difference(module, form, trial)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        cause = first_line(error)
    return _layer_by_layer(module, device, cause) if cause else FusedForm(form, module, device)


def _layer_by_layer(module: nn.Module, device: torch.device, cause: str) -> Forward:
    log.info("network runs layer by layer, not fused: %s", cause)
    layout = torch.channels_last if takes_channels_last(module, device) else torch.contiguous_format
    return lambda images: module(images.contiguous(memory_format=layout))


class FusedForm:
    """The fused layers of a network, which have its parameters; from a batch on for which they differ, the network itself."""

    def __init__(self, layers: torch.fx.GraphModule, module: nn.Module, device: torch.device) -> None:
        self._layers, self._module, self._device = layers, module, device
        self._plain: Forward | None = None
        self._tried = {_TRIED}  # numbers of images for which both have been compared

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] → [N, classes]."""
        if self._plain is None and len(images) not in self._tried and self._layers.meta["reads_sizes"]:
            self._try(images)
        if self._plain is not None:
            return self._plain(images)
        logits: Tensor = self._layers(_channels_last(images))
        return logits

    def _try(self, images: Tensor) -> None:
        self._tried.add(len(images))
        trial = normal(generator(0, "trial"), tuple(images.shape)).to(self._device)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False), _undisturbed(self._module):
            try:
                cause = _difference(self._module, self._layers, trial, gradients=False, tolerance=_TIGHT_TOLERANCE)
            except RuntimeError as error:  # shapes that do not fit
                cause = first_line(error)
        if cause:
            self._plain = _layer_by_layer(self._module, self._device, f"with {len(images)} images {cause}")


def takes_channels_last(module: nn.Module, device: torch.device) -> bool:
    """Whether a module that is not fused may have its images and weights channels-last: some layers crash on a CPU then."""
    return device.type != "cpu" or not any(map(StridedPointwise.suits, module.modules()))


def _traced(module: nn.Module, trial: Tensor) -> torch.fx.GraphModule:
    layers = batchnorm_layers(module).values()
    traced = symbolic(module, trial[:3], list(layers))
    operators = fused_operators(trial.device)
    for layer in layers:
        if _is_fusible(layer):
            fuse_neighbours(traced, layer, _TrainedBatchNormAct(layer, operators))
    if trial.device.type == "cpu":
        replace_strided_pointwise(traced)
        replace_cpu_convolutions(traced, operators, large_tiles=True)
        replace_pools(traced, operators.mean_pool)
        replace_global_means(traced)
    for node in traced.graph.find_nodes(op="call_method", target="view"):
        if not any(isinstance(each, torch.dtype) for each in node.args):
            node.target = "reshape"  # the layout of channels-last features may not allow a view
    traced.recompile()
    return traced


def _is_fusible(layer: nn.Module) -> bool:
    kept = all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))
    return is_plain(layer) and kept and not (layer.training and isinstance(layer, nn.SyncBatchNorm))


def _channels_last(images: Tensor) -> Tensor:
    """The same images with their channels innermost; one channel too, whose strides alone say so."""
    n, c, h, w = images.shape
    return images.permute(0, 2, 3, 1).reshape(n, h * w * c).view(n, h, w, c).permute(0, 3, 1, 2)


@contextmanager
def _without_other_random_numbers() -> Iterator[None]:
    """Raise InputError where random numbers of Python or NumPy are drawn inside, which a trace would keep; they are not used up."""
    before, arrays = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 - others draw from it
    try:
        yield
        if random.getstate() != before or not _equal_states(np.random.get_state(legacy=False), arrays):  # noqa: NPY002
            raise InputError("its forward pass draws random numbers of Python or NumPy")
    finally:
        random.setstate(before)
        np.random.set_state(arrays)  # noqa: NPY002


def _equal_states(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal_states(value, other[name]) for name, value in one.items())
    return bool(np.array_equal(one, other))


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Afterwards the buffers of the module are what they were."""
    buffers = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


def _difference(module: nn.Module, form: nn.Module, trial: Tensor, *, gradients: bool = True, tolerance: float = _TOLERANCE) -> str | None:
    """What the form gives otherwise than the module: logits, running statistics or gradients of the weights; None if nothing."""
    with _undisturbed(module):
        expected = _response(module, module, trial, gradients)
    exact: dict[str, Tensor] = {}
    for (what, value), got in zip(expected.items(), _response(form, module, _channels_last(trial), gradients).values(), strict=True):
        if _near(got, value, tolerance):
            continue
        if not exact:
            wide = copy.deepcopy(module).double()
            exact = _response(wide, wide, trial.double(), gradients)
        own_error = float((value - exact[what]).norm()) / max(float(exact[what].norm()), torch.finfo(torch.double).tiny)
        if not _near(got, exact[what], min(_LARGEST_TOLERANCE, _TIMES_ITS_OWN_ERROR * own_error)):
            return f"its {what} would be off by {float((got - value).norm()):.2g} of {float(value.norm()):.2g}"
    return None


def _near(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    return float((got - expected).norm()) <= tolerance * float(expected.norm())


def _response(form: nn.Module, module: nn.Module, images: Tensor, gradients: bool) -> dict[str, Tensor]:
    weights = [p for p in module.parameters() if p.requires_grad and gradients]
    with seeded_layers(0, images.device):
        logits = form(images)
        of_weights = torch.autograd.grad(logits.square().mean(), weights, materialize_grads=True) if weights else ()

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.double), *(each.detach().double().flatten().cpu() for each in tensors)])

    return {"logits": flat([logits]), "running statistics": flat(module.buffers()), "gradients": flat(of_weights)}
