"""The operators that `bench_operators.py` measures: their inputs, their calls and the bytes that they must move.

To add an operator, add a row to `OPERATORS`: what of a network it works on, from `operator_subjects.py`, its inputs, its call, and the
bytes that it must move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import operator_subjects as subjects
import torch
from operator_subjects import Images, Layer, Layers, Network, Subject, Weights
from torch import Tensor

from dwa_fast.engine.backend import fused_operators
from dwa_fast.recipes import recipe
from dwa_fast.reference.ops import Operators
from dwa_fast.schedule import HEIGHT, WIDTH, make_schedule

Inputs = dict[str, Any]
Call = Callable[[], tuple[Tensor, ...]]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CORNER = 1e-2  # no input of a ReLU is closer to 0: there the gradient depends on the last bit


def copied(inputs: Inputs) -> Inputs:
    """The same numbers elsewhere in memory, laid out the same."""
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def doubled(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    exact = copied(inputs)
    for name, value in exact.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            exact[name] = value.double()
        elif isinstance(value, torch.dtype):
            exact[name] = torch.float64
    return exact


def _features(layer: Layer, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of bn_act with the magnitudes of a trained network, and gradients of its results."""
    channels = layer.shape[1]

    def features(scale: float, offset: float = 0.0) -> Tensor:
        return (torch.randn(layer.shape, device=device) * scale + offset).to(dtype, memory_format=torch.channels_last)

    def vector(low: float, high: float) -> Tensor:
        return torch.empty(channels, device=device).uniform_(low, high)

    inputs: Inputs = {
        "y": features(1.5, 0.3),
        "mean": vector(-0.5, 0.5),
        "var": vector(0.1, 2.1),
        "weight": vector(0.5, 1.5),
        "bias": vector(-0.3, 0.3),
        "eps": 1e-5,
        "skip": features(1.5, 0.3) if layer.skip else None,
        "activation": layer.activation,
        **(layer.windows._asdict() if layer.windows else {}),
    }
    if layer.joins:
        ranges = {"mean": (-0.5, 0.5), "var": (0.1, 2.1), "weight": (0.5, 1.5), "bias": (-0.3, 0.3)}
        inputs |= {f"skip_{name}": vector(*limits) for name, limits in ranges.items()} | {"skip_eps": 1e-5}
    if layer.activation == "relu":
        operator, names = ("bn_act_join", _BN_ACT_JOIN) if layer.joins else ("bn_act", _BN_ACT)
        before, *_ = getattr(Operators("exact"), operator)(*(doubled(inputs)[name] for name in names[:-1]))
        inputs["y"] = torch.where(before.abs() < _CORNER, inputs["y"] + 1, inputs["y"])
    return inputs | {"grad_z": features(1e-3), "grad_sums": torch.randn(2, channels, device=device) * 1e-6}


def _trained(layer: Layer, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of batch_norm_act; the statistics of the batch are those of y, so that a ReLU's corner is elsewhere."""
    inputs = _features(layer, dtype, device) | {"momentum": 0.1}
    while layer.activation == "relu":
        exact = doubled(inputs) | {"activation": "none"}
        near = Operators("exact").batch_norm_act(*(exact[name] for name in _BATCH_NORM_ACT)).abs() < _CORNER
        if not near.any():
            break
        inputs["y"] = torch.where(near, inputs["y"] + 0.1, inputs["y"])
    return inputs


_BATCH_NORM_ACT = ("y", "mean", "var", "weight", "bias", "momentum", "eps", "skip", "activation")
_LAYER = ("y", "mean", "var", "weight", "bias", "eps")
_BN_ACT = (*_LAYER, "skip", "activation")
_BN_ACT_JOIN = (*_LAYER, "skip", *(f"skip_{name}" for name in _LAYER[1:]), "activation")
_BN_ACT_POOL = (*_LAYER, "window", "stride", "padding", "activation")


def _bn_act(operators: Operators, inputs: Inputs) -> Call:
    inputs["y"].requires_grad_()
    return lambda: operators.bn_act(*(inputs[name] for name in _BN_ACT))


def _bn_act_backward(operators: Operators, inputs: Inputs) -> Call:
    """As in the inner loop: the weights are frozen, and the moments have a gradient."""
    leaves = [inputs[name].requires_grad_() for name in ("y", "skip") if inputs[name] is not None]
    results = operators.bn_act(*(inputs[name] for name in _BN_ACT))
    return lambda: torch.autograd.grad(results, leaves, (inputs["grad_z"], inputs["grad_sums"]), retain_graph=True)


def _bn_act_backward_ascent(operators: Operators, inputs: Inputs) -> Call:
    """As in the ascent: the weights have a gradient, and the moments are not used."""
    leaves = [inputs[name].requires_grad_() for name in ("y", "skip", "weight", "bias") if inputs[name] is not None]
    z, _ = operators.bn_act(*(inputs[name] for name in _BN_ACT))
    return lambda: torch.autograd.grad(z, leaves, inputs["grad_z"], retain_graph=True)


def _bn_act_join(operators: Operators, inputs: Inputs) -> Call:
    inputs["y"].requires_grad_()
    return lambda: operators.bn_act_join(*(inputs[name] for name in _BN_ACT_JOIN))


def _bn_act_join_backward(operators: Operators, inputs: Inputs) -> Call:
    """As in the inner loop, `_bn_act_backward`."""
    leaves = [inputs[name].requires_grad_() for name in ("y", "skip")]
    results = operators.bn_act_join(*(inputs[name] for name in _BN_ACT_JOIN))
    gradients = inputs["grad_z"], inputs["grad_sums"], inputs["grad_sums"]
    return lambda: torch.autograd.grad(results, leaves, gradients, retain_graph=True)


def _bn_act_join_traffic(inputs: Inputs) -> int:
    """Reads both inputs and m, v, γ, β of each; writes z, and two sums of each."""
    return 3 * inputs["y"].nbytes + 12 * inputs["mean"].nbytes


def _bn_act_join_backward_traffic(inputs: Inputs) -> int:
    """Reads both inputs, ∂L/∂z, m, v, γ, β and two vectors of each; writes the gradients of both inputs."""
    return 5 * inputs["y"].nbytes + 12 * inputs["mean"].nbytes


def _bn_act_pool(operators: Operators, inputs: Inputs) -> Call:
    inputs["y"].requires_grad_()
    return lambda: operators.bn_act_pool(*(inputs[name] for name in _BN_ACT_POOL), averages=inputs["averages"])


def _bn_act_pool_backward(operators: Operators, inputs: Inputs) -> Call:
    """As in the inner loop, `_bn_act_backward`."""
    leaf = inputs["y"].requires_grad_()
    z, sums = operators.bn_act_pool(*(inputs[name] for name in _BN_ACT_POOL), averages=inputs["averages"])
    gradient = inputs["grad_z"][:, :, : z.shape[2], : z.shape[3]].contiguous(memory_format=torch.channels_last)
    return lambda: torch.autograd.grad((z, sums), leaf, (gradient, inputs["grad_sums"]), retain_graph=True)


def _bn_act_pool_traffic(inputs: Inputs) -> int:
    """Reads y and m, v, γ, β; writes z, a place in 8 bits for each of it unless it is a mean, and both sums."""
    place = 0 if inputs["averages"] else 1
    return inputs["y"].nbytes + 6 * inputs["mean"].nbytes + _pooled_elements(inputs) * (inputs["y"].element_size() + place)


def _bn_act_pool_backward_traffic(inputs: Inputs) -> int:
    """Reads y, ∂L/∂z, the places, m, v, γ, β and two vectors; writes ∂L/∂y."""
    return _bn_act_pool_traffic(inputs) + inputs["y"].nbytes


def _pooled_elements(inputs: Inputs) -> int:
    n, c, *sizes = inputs["y"].shape
    return n * c * math.prod((size + 2 * inputs["padding"] - inputs["window"]) // inputs["stride"] + 1 for size in sizes)


def _bn_act_traffic(inputs: Inputs) -> int:
    """Reads y, the skip, and m, v, γ, β; writes z, both sums, and the bits that the gradient of a skip before a ReLU needs."""
    features = 2 if inputs["skip"] is None else 3
    return features * inputs["y"].nbytes + 6 * inputs["mean"].nbytes + _mask_bytes(inputs)


def _bn_act_backward_traffic(inputs: Inputs) -> int:
    """Reads y, ∂L/∂z, the bits, m, v, γ, β and two vectors or writes these; writes ∂L/∂y, and ∂L/∂skip unless that is ∂L/∂z."""
    bits = _mask_bytes(inputs)
    return (4 if bits else 3) * inputs["y"].nbytes + 6 * inputs["mean"].nbytes + bits


def _mask_bytes(inputs: Inputs) -> int:
    return math.ceil(inputs["y"].numel() / 8) if inputs["activation"] == "relu" and inputs["skip"] is not None else 0


def _batch_norm_act(operators: Operators, inputs: Inputs) -> Call:
    inputs["y"].requires_grad_()
    return lambda: (operators.batch_norm_act(*(inputs[name] for name in _BATCH_NORM_ACT)),)


def _batch_norm_act_backward(operators: Operators, inputs: Inputs) -> Call:
    leaves = [inputs[name].requires_grad_() for name in ("y", "skip", "weight", "bias") if inputs[name] is not None]
    z = operators.batch_norm_act(*(inputs[name] for name in _BATCH_NORM_ACT))
    return lambda: torch.autograd.grad(z, leaves, inputs["grad_z"], retain_graph=True)


def _batch_norm_act_traffic(inputs: Inputs) -> int:
    """Reads y twice, the skip, γ, β and both running statistics; writes z, the running statistics and the bits of `_bn_act_traffic`."""
    features = 3 if inputs["skip"] is None else 4
    return features * inputs["y"].nbytes + 6 * inputs["mean"].nbytes + _mask_bytes(inputs)


def _batch_norm_act_backward_traffic(inputs: Inputs) -> int:
    """Reads y and a gradient twice, the bits, μ, σ², γ, β; writes the gradients of y, γ, β and, behind an activation, of the skip."""
    bits = _mask_bytes(inputs)
    return (6 if bits else 5) * inputs["y"].nbytes + 6 * inputs["mean"].nbytes + bits


def _moments(operators: Operators, inputs: Inputs) -> Call:
    inputs["y"].requires_grad_()
    return lambda: (operators.moments(inputs["y"], inputs["mean"]),)


def _moments_backward(operators: Operators, inputs: Inputs) -> Call:
    leaf = inputs["y"].requires_grad_()
    sums = operators.moments(leaf, inputs["mean"])
    return lambda: torch.autograd.grad(sums, leaf, inputs["grad_sums"], retain_graph=True)


def _mean_pool(operators: Operators, inputs: Inputs) -> Call:
    inputs["y"].requires_grad_()
    return lambda: (operators.mean_pool(inputs["y"], 2),)


def _mean_pool_backward(operators: Operators, inputs: Inputs) -> Call:
    leaf = inputs["y"].requires_grad_()
    z = operators.mean_pool(leaf, 2)
    gradient = inputs["grad_z"][:, :, : z.shape[2], : z.shape[3]].contiguous(memory_format=torch.channels_last)
    return lambda: torch.autograd.grad(z, leaf, gradient, retain_graph=True)


def _mean_pool_traffic(inputs: Inputs) -> int:
    """One of both ways: the larger tensor and one of a quarter of its size."""
    n, c, h, w = inputs["y"].shape
    return inputs["y"].nbytes + n * c * (h // 2) * (w // 2) * inputs["y"].element_size()


def _convolution(name: str, operators: Operators, inputs: Inputs) -> Call:
    weight = _kernel(inputs)
    return lambda: (getattr(operators, name)(inputs["y"], weight),)


def _convolution_backward(name: str, operators: Operators, inputs: Inputs) -> Call:
    """As in the inner loop: the weights are frozen, but here their transform is made anew by every call."""
    leaf = inputs["y"].requires_grad_()
    z = getattr(operators, name)(leaf, _kernel(inputs))
    return lambda: torch.autograd.grad(z, leaf, inputs["grad_z"], retain_graph=True)


def _convolution_backward_ascent(name: str, operators: Operators, inputs: Inputs) -> Call:
    """As in the ascent and in trainings."""
    leaves = inputs["y"].requires_grad_(), _kernel(inputs).requires_grad_()
    z = getattr(operators, name)(*leaves)
    return lambda: torch.autograd.grad(z, leaves, inputs["grad_z"], retain_graph=True)


def _kernel(inputs: Inputs) -> Tensor:
    """The same numbers every time, [C, C, 3, 3]."""
    channels, like = inputs["y"].shape[1], inputs["y"]
    weight = torch.randn((channels, channels, 3, 3), generator=torch.Generator().manual_seed(harness.SEED), dtype=torch.float64)
    return (weight / math.sqrt(9 * channels)).float().to(like, memory_format=torch.channels_last)


def _convolution_traffic(inputs: Inputs) -> int:
    """One of both ways: reads the features or their gradient and the weights; writes the other one."""
    return 2 * inputs["y"].nbytes + 9 * inputs["y"].shape[1] ** 2 * inputs["y"].element_size()


def _convolution_ascent_traffic(inputs: Inputs) -> int:
    """Reads the features, their gradient and the weights; writes the gradients of features and weights."""
    return 3 * inputs["y"].nbytes + 2 * 9 * inputs["y"].shape[1] ** 2 * inputs["y"].element_size()


def _moments_traffic(inputs: Inputs) -> int:
    """Reads y and m; writes both sums."""
    return inputs["y"].nbytes + 3 * inputs["mean"].nbytes


def _moments_backward_traffic(inputs: Inputs) -> int:
    """Reads y, m and the gradient of both sums; writes ∂L/∂y."""
    return 2 * inputs["y"].nbytes + 3 * inputs["mean"].nbytes


def _statistics(subject: Layers, dtype: torch.dtype, device: torch.device) -> Inputs:
    sizes = torch.tensor(subject.channels)
    each = torch.tensor(subject.counts).repeat_interleave(sizes).to(device, torch.float32)
    variances = torch.rand(len(each), device=device) + 0.5
    shift = 0.1 * torch.randn(len(each), device=device)
    square = variances * (0.8 + 0.4 * torch.rand(len(each), device=device)) + shift.square()
    return {
        "sums": torch.stack([shift * each, square * each]).to(dtype),
        "variances": variances,
        "channel_ptr": torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(device),
        "counts": torch.tensor(subject.counts, device=device),
        "weights": torch.tensor([10.0] + [1.0] * (len(sizes) - 1), device=device),
    }


def _matching_loss(operators: Operators, inputs: Inputs) -> Call:
    inputs["sums"].requires_grad_()

    def call() -> tuple[Tensor, ...]:
        losses = operators.matching_loss(**inputs)
        return losses, *torch.autograd.grad(losses.sum(), inputs["sums"])

    return call


def _matching_loss_traffic(inputs: Inputs) -> int:
    """Reads everything; writes the gradient of the sums."""
    return inputs["sums"].nbytes + sum(tensor.nbytes for tensor in inputs.values())


def _pictures(subject: Images, dtype: torch.dtype, device: torch.device) -> Inputs:
    """A batch in the middle of its course: images, Adam's state, and the schedule at the crop of median area."""
    chosen = recipe(subject.recipe, iterations=101)
    config = chosen.synthesis
    schedule = make_schedule(config, *subject.shape[2:], seed=harness.SEED, batch=0)
    area = schedule.rows[:, HEIGHT] * schedule.rows[:, WIDTH]
    step = int(area.argsort()[50])

    def noise(scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(subject.shape, device=device)).contiguous(memory_format=torch.channels_last)

    return {
        "images": noise(),
        "rows": schedule.rows.to(device),
        "step": torch.tensor(step, device=device),
        "dtype": dtype,
        "seen_gradient": noise(1e-6).to(dtype),
        "seen_pixels": subject.shape[0] * subject.shape[1] * int(area[step]),
        "exp_avg": noise(1e-6),
        "exp_avg_sq": noise(1e-6).square(),
        "learning_rates": schedule.learning_rates.to(device),
        "low": torch.tensor(chosen.data.bounds[0], device=device),
        "high": torch.tensor(chosen.data.bounds[1], device=device),
    }


_VIEW = ("images", "rows", "step", "dtype")


def _view(operators: Operators, inputs: Inputs) -> Call:
    return lambda: (operators.view(*(inputs[name] for name in _VIEW)),)


def _view_adam_clip(operators: Operators, inputs: Inputs) -> Call:
    names = ("images", "seen_gradient", "exp_avg", "exp_avg_sq", "rows", "learning_rates", "step", "low", "high")

    def call() -> tuple[Tensor, ...]:
        operators.view_adam_clip_(*(inputs[name] for name in names))
        return inputs["images"], inputs["exp_avg"], inputs["exp_avg_sq"]

    return call


def _view_adam_clip_traffic(inputs: Inputs) -> int:
    """Reads the gradient of the view, x, m and v; writes x, m and v."""
    return inputs["seen_gradient"].nbytes + 6 * inputs["images"].nbytes


def _arena(subject: Weights, dtype: torch.dtype, device: torch.device) -> Inputs:
    weights = 0.02 * torch.randn(subject.count, device=device)
    compute = None if dtype == torch.float32 else weights.to(dtype)
    return {"weights": weights, "gradients": 1e-3 * torch.randn(subject.count, device=device), "compute": compute}


def _ascend(operators: Operators, inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        norm = operators.ascend_(inputs["weights"], inputs["gradients"], 0.015 / 12, compute=inputs["compute"])
        return norm, inputs["weights"], *([] if inputs["compute"] is None else [inputs["compute"]])

    return call


def _ascend_traffic(inputs: Inputs) -> int:
    """Reads g for the norm, then g and w; writes w, and the copy in compute precision."""
    return 4 * inputs["weights"].nbytes + (0 if inputs["compute"] is None else inputs["compute"].nbytes)


@dataclass(frozen=True)
class Operator:
    """A row of the table."""

    name: str
    subjects: Callable[[Network], list[Subject]]  # what of a network it works on, the largest first
    inputs: Callable[[Any, torch.dtype, torch.device], Inputs]
    call: Callable[[Operators, Inputs], Call]  # binds the inputs, which it may change
    traffic: Callable[[Inputs], int]  # fewest bytes that have to be read and written
    precisions: Sequence[str] = tuple(DTYPES)
    moves_memory: bool = True  # enough of it for a share of the copy ceiling to say something

    @property
    def function(self) -> str:
        """The name in `Operators`."""
        return self.name.split()[0].rstrip(",")

    def is_fused(self, device: torch.device) -> bool:
        """Whether it is ours on a device, not plain PyTorch in the place of one that is lacking."""
        return getattr(fused_operators(device), self.function) is not getattr(Operators("plain"), self.function)


def _convolutions(name: str, found: Callable[[Network], list[Subject]], precision: str) -> list[Operator]:
    calls = {
        "": (_convolution, _convolution_traffic),
        " backward": (_convolution_backward, _convolution_traffic),
        " backward, ascent": (_convolution_backward_ascent, _convolution_ascent_traffic),
    }
    return [Operator(name + way, found, _features, partial(call, name), traffic, (precision,)) for way, (call, traffic) in calls.items()]


OPERATORS = (
    Operator("bn_act", subjects.distinct_layers, _features, _bn_act, _bn_act_traffic),
    Operator("bn_act backward", subjects.distinct_layers, _features, _bn_act_backward, _bn_act_backward_traffic),
    Operator("bn_act backward, ascent", subjects.distinct_layers, _features, _bn_act_backward_ascent, _bn_act_backward_traffic),
    Operator("bn_act_join", subjects.joined_layers, _features, _bn_act_join, _bn_act_join_traffic),
    Operator("bn_act_join backward", subjects.joined_layers, _features, _bn_act_join_backward, _bn_act_join_backward_traffic),
    Operator("bn_act_pool", subjects.pooled_layers, _features, _bn_act_pool, _bn_act_pool_traffic),
    Operator("bn_act_pool backward", subjects.pooled_layers, _features, _bn_act_pool_backward, _bn_act_pool_backward_traffic),
    Operator("bn_act_pool, means", subjects.averaged_layers, _features, _bn_act_pool, _bn_act_pool_traffic),
    Operator("bn_act_pool backward, means", subjects.averaged_layers, _features, _bn_act_pool_backward, _bn_act_pool_backward_traffic),
    Operator("batch_norm_act", subjects.distinct_layers, _trained, _batch_norm_act, _batch_norm_act_traffic),
    Operator("batch_norm_act backward", subjects.distinct_layers, _trained, _batch_norm_act_backward, _batch_norm_act_backward_traffic),
    Operator("mean_pool", subjects.pooled, _features, _mean_pool, _mean_pool_traffic),
    Operator("mean_pool backward", subjects.pooled, _features, _mean_pool_backward, _mean_pool_traffic),
    *_convolutions("conv3x3", subjects.convolutions, "fp32"),
    *_convolutions("conv_product", subjects.small_convolutions, "bf16"),
    Operator("moments", subjects.inputs_of_layers, _features, _moments, _moments_traffic),
    Operator("moments backward", subjects.inputs_of_layers, _features, _moments_backward, _moments_backward_traffic),
    Operator("matching_loss, both ways", subjects.all_layers, _statistics, _matching_loss, _matching_loss_traffic, ("fp32",), False),
    Operator("view", subjects.images, _pictures, _view, lambda inputs: 4 * inputs["seen_pixels"] + inputs["seen_gradient"].nbytes),
    Operator("view_adam_clip_", subjects.images, _pictures, _view_adam_clip, _view_adam_clip_traffic),
    Operator("ascend_", subjects.weights, _arena, _ascend, _ascend_traffic),
)
