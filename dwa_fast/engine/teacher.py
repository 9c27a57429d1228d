"""Teachers made ready for synthesis: checked, copied, and rewritten so that every BatchNorm layer keeps its input's moments."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dwa_fast.engine import fuse
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import TRACING, return_stream, take_stream, trace_step
from dwa_fast.engine.comparison import Response, difference, network_response, teacher_response
from dwa_fast.engine.fuse import BatchNormAct, Rewritten, trace
from dwa_fast.engine.layers import StemConv, replace_strided_pointwise
from dwa_fast.errors import InputError, first_line
from dwa_fast.models.batchnorm import MomentsHook, batchnorm_layers
from dwa_fast.models.finite import check_finite_weights
from dwa_fast.models.wrappers import copied, describe_output, unwrapped
from dwa_fast.seeding import generator, normal

log = logging.getLogger("dwa_fast")

_ALIGNED = 16  # elements; the partial sums of each layer begin at a multiple of it
_TRIED = 3  # images on which the teacher and its copy are compared
_ROUNDING = 100.0  # factor on the fp32 tolerance in a lower precision
_PERTURBATION = 0.02  # relative standard deviation of a change of the weights, which shows weights that a trace has made constants
_OTHER_LAYERS = "teacher runs other BatchNorm layers, or on other shapes, from one forward pass to the next"
_NOISE = 0.1  # standard deviation of the noise on these images: no two alike, no pre-activation exactly 0


@dataclass(frozen=True)
class MatchingPlan:
    """What `matching_loss` needs beside the moments: fixed for a network and a batch size, on the device.

    Where the operators leave partial sums, those of all layers lie in one arena, which `matching_gradient` adds up in one launch.
    """

    variances: Tensor  # [ΣC] that are aimed at
    channel_ptr: Tensor  # [L + 1] int64
    counts: Tensor  # [L] int64
    weights: Tensor  # [L]
    means: Tensor | None = None  # [ΣC] by how much the means that are aimed at exceed the running ones; None: 0
    arena: Tensor | None = None  # [S] the layers' partial sums
    slices: Mapping[BatchNormAct | MomentsHook, Tensor] = field(default_factory=dict)  # [2, R, C] each layer's part of it
    places: Tensor | None = None  # [2, L] int64: where each part begins, and its R
    finished: Tensor | None = None  # [1] int32: the kernel's counter
    stream: Any = None  # on which the arena is added up, beside the classifier
    forward_done: Any = None  # event after the last layer of a forward pass

    @classmethod
    def of(
        cls,
        layers: Sequence[BatchNormAct | MomentsHook],
        first_layer_weight: float,
        *,
        in_arena: bool = False,
        aim: Tensor | None = None,  # [2, ΣC] means and variances of the plan; None: the running statistics
    ) -> MatchingPlan:
        """The plan of these layers, each with the count of its last call."""
        variances = torch.cat([layer.running_var for layer in layers]) if aim is None else aim[1]
        device = variances.device
        sizes = torch.tensor([0] + [len(layer.running_var) for layer in layers], device=device)
        counts = torch.tensor([layer.count for layer in layers], device=device)
        weights = torch.tensor([first_layer_weight] + [1.0] * (len(layers) - 1), dtype=variances.dtype, device=device)
        plan = cls(variances, sizes.cumsum(0), counts, weights, None if aim is None else aim[0])
        if not in_arena:
            return plan
        shapes = [(2, layer.rows, len(layer.running_var)) for layer in layers]
        starts = list(itertools.accumulate((math.prod(shape) + -math.prod(shape) % _ALIGNED for shape in shapes), initial=0))
        arena = torch.zeros(starts[-1], dtype=variances.dtype, device=device)
        return replace(
            plan,
            arena=arena,
            slices={
                layer: arena[start:][: math.prod(shape)].view(shape) for layer, start, shape in zip(layers, starts, shapes, strict=False)
            },
            places=torch.tensor([starts[:-1], [shape[1] for shape in shapes]], device=device),
            finished=torch.zeros(1, dtype=torch.int32, device=device),
            stream=take_stream(device) if device.type == "cuda" else None,
            forward_done=torch.cuda.Event() if device.type == "cuda" else None,
        )


class _ReshapingViews(TorchFunctionMode):
    """Inside, `x.view(…)` copies where the layout of x does not allow a view, as it does for channels-last features."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        sizes = args[1:]
        if func is Tensor.view and not kwargs and not isinstance(sizes[0], torch.dtype):
            func = Tensor.reshape
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """A copy of the teacher, in eval mode, whose BatchNorm layers keep their inputs' moments."""

    def __init__(self, rewritten: Rewritten, execution: Execution) -> None:
        super().__init__()
        self.operators = execution.operators
        self._views = _ReshapingViews if execution.channels_last else nullcontext
        self.module = rewritten.module
        self.layers = rewritten.layers
        self.traced = rewritten.traced
        self.capture_error: str | None = None  # why steps with this network cannot be captured, if so
        self._plans: dict[tuple[float, ...], MatchingPlan] = {}
        self._arena_plans: dict[torch.Size, MatchingPlan] = {}  # those with an arena of partial sums, by shape of the images
        self._arena_plan: MatchingPlan | None = None  # the one whose arena holds the partial sums of the last forward pass
        self._shape = torch.Size()  # of its images
        self._aim: Tensor | None = None  # [2, ΣC] what all plans aim at instead of the running statistics; it stays where it is

    @property
    def takes_blocks(self) -> bool:
        """Whether `forward` also takes images as [N, C, H/2, 2, W/2, 2]: their gradient is then not moved to [N, C, H, W]."""
        if not isinstance(self.module, torch.fx.GraphModule):
            return False
        images = self.module.graph.find_nodes(op="placeholder")[0]
        return all(user.op == "call_module" and isinstance(self.module.get_submodule(str(user.target)), StemConv) for user in images.users)

    def release(self) -> None:
        """Take the hooks off the layers, which may be the teacher's own."""
        for layer in self.layers.values():
            if isinstance(layer, MomentsHook):
                layer.remove()

    def close(self) -> None:
        """Return the streams of a GPU; the network cannot be used any more."""
        for plan in self._plans.values():
            if plan.stream is not None:
                return_stream(plan.stream)
        self._plans.clear()
        self._arena_plans.clear()

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Inside, the weights take gradients."""
        self.requires_grad_(True)
        try:
            yield
        finally:
            self.requires_grad_(False)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W], normalised; see `takes_blocks`
        *,
        deferred: bool = False,
    ) -> Tensor:  # [N, classes] logits
        """Logits; the moments of all layers are then ready for `matching`, or, deferred, for `matching_gradient` alone."""
        self.forget()
        self._shape = images.shape
        self._arena_plan = self._arena_plans.get(images.shape) if deferred else None
        for layer in self.layers.values():
            layer.partials = self._arena_plan.slices.get(layer) if self._arena_plan else None
            layer.written = self._arena_plan.forward_done if self._arena_plan else None
        with self._views():
            logits: Tensor = self.module(images)
        return logits

    def refresh(self) -> None:
        """Prepare for the weights as they are now; to be called whenever they have changed, before gradients of the images are taken."""
        for layer in self.modules():
            if isinstance(layer, StemConv):
                layer.refresh()

    def forget(self) -> None:
        """Drop the moments of the last forward pass; they may hold an autograd graph, and a module that does cannot be copied."""
        for layer in self.layers.values():
            layer.sums.clear()

    def aim(self, statistics: Mapping[str, Tensor]) -> None:
        """Match these statistics from now on, not the running ones; where steps are captured, the first time before that.

        Args:
            statistics: by name of the layer, mean and variance of its channels, [2, C].
        """
        pairs = [(layer, statistics[name].to(layer.running_mean)) for name, layer in self.layers.items()]
        aim = torch.cat([torch.stack([mean - layer.running_mean, variance]) for layer, (mean, variance) in pairs], 1)
        self._aim = aim if self._aim is None else self._aim.copy_(aim)

    def matching(
        self,
        first_layer_weight: float,
    ) -> Tensor:  # [2]: R_mean, R_var
        """Matching terms of the last forward pass (Eq. 3), once; layers that it did not reach take no part.

        Raises:
            InputError: a layer ran more than once, so that it has no single batch statistic.
        """
        used, plan = self._plan(first_layer_weight)
        sums = torch.cat([layer.sums.pop() for layer in used], 1)
        return self.operators.matching_loss(sums, plan.variances, plan.channel_ptr, plan.counts, plan.weights, plan.means)

    def matching_gradient(
        self,
        first_layer_weight: float,
        grad: Tensor,  # [2], of R_mean and R_var
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # [2]; per layer [2, C]; per layer [2, C]
        """Matching terms of the last forward pass, once, the layers' moments, and the gradient of each.

        Where the forward pass has left partial sums, on a GPU, this runs beside what was queued behind the last BatchNorm layer, and only
        `join` waits for it.

        Raises:
            InputError: as `matching`, or other layers ran than the last time.
        """
        used, plan = self._plan(first_layer_weight, in_arena=self.operators.partial_rows is not None)
        moments = [layer.sums.pop() for layer in used]
        constants = plan.variances, plan.channel_ptr, plan.counts, plan.weights, grad
        if self._arena_plan is None:
            if plan.arena is not None:
                self._arena_plans[self._shape] = plan
            terms, gradient = self.operators.matching_gradient(torch.cat(moments, 1), *constants, means=plan.means)
        elif self._arena_plan is plan:
            with torch.cuda.stream(plan.stream):
                if plan.stream is not None:
                    plan.stream.wait_event(plan.forward_done)
                terms, gradient = self.operators.matching_gradient(plan.arena, *constants, plan.places, plan.finished, plan.means)
        else:
            raise InputError(_OTHER_LAYERS)
        return terms, moments, list(gradient.split([len(layer.running_var) for layer in used], 1))

    def join(self) -> None:
        """Let the current stream wait for `matching_gradient`."""
        if self._arena_plan is not None and self._arena_plan.stream is not None:
            torch.cuda.current_stream(self._arena_plan.stream.device).wait_stream(self._arena_plan.stream)

    def _plan(self, first_layer_weight: float, *, in_arena: bool = False) -> tuple[list[BatchNormAct | MomentsHook], MatchingPlan]:
        """The layers of the last forward pass, and what is fixed for them."""
        for name, layer in self.layers.items():
            if len(layer.sums) > 1:
                raise InputError(f"BatchNorm layer {name!r} runs {len(layer.sums)} times in a forward pass; each layer may run once")
        used = [layer for layer in self.layers.values() if layer.sums]
        if self._aim is not None and len(used) < len(self.layers):
            raise InputError(_OTHER_LAYERS)
        shape = (in_arena, first_layer_weight, self._aim is not None, *(layer.count for layer in used))
        if shape not in self._plans:
            self._plans[shape] = MatchingPlan.of(used, first_layer_weight, in_arena=in_arena, aim=self._aim)
        return used, self._plans[shape]


def prepare(
    teacher: nn.Module,
    images: Tensor,  # [N, C, H, W], normalised; a few of them are used for the comparison
    execution: Execution,
    *,
    batch_sizes: Sequence[int] = (),  # numbers of images of the batches that will run
    sizes: Sequence[tuple[int, int]] = (),  # heights and widths that they will have
) -> tuple[Network, int]:
    """A checked copy on the device, which keeps its layers' statistics, and its number of classes. The teacher itself is not changed.

    The copy is compared with the teacher on a few images like the given ones: logits, the statistics of every layer's input, the gradients
    of both to the images, the gradient of the logits to every weight. If a traced copy differs, one that calls the
    teacher's own forward pass is used instead. Threads prepare one at a time.

    Raises:
        TypeError: teacher is not a module.
        InputError: it has no BatchNorm layer that runs, keeps no running statistics, cannot take the images, gives no [N, classes] logits
            or others every time, or no copy of it agrees with it.
    """
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    if unwrapped(teacher).training:
        log.warning("teacher was in train mode; a copy of it in eval mode is used")
    exact = replace(execution, precision="fp32") if execution.precision == "tf32" else execution  # a copy is compared to 1e-3
    with TRACING, torch.inference_mode(False), exact.arithmetic():
        module = copied(teacher, execution.device, execution.master_dtype)
        trial = _trial_images(images, execution)
        layers = _layers(module)
        check_finite_weights(module)
        expected = _check_teacher(module, layers, trial)
        resized = [F.interpolate(trial, size, mode="bilinear") for size in dict.fromkeys(sizes) if size != trial.shape[2:]]
        for each in resized:
            with _taking(each):
                _check_logits(module(each))
        layers = {name: layer for name, layer in layers.items() if name in expected.gaps}
        with _perturbed_weights(module):
            perturbed = teacher_response(module, layers, trial, gradients=False)
        others = [_tiled(trial, size) for size in {*batch_sizes} - {len(trial)}] + resized
        network = _verified_network(module, layers, expected, perturbed, trial, execution, others)
    return network, expected.logits.shape[1]


def _trial_images(images: Tensor, execution: Execution) -> Tensor:
    """Three images like the given ones, and no two alike."""
    some = images[torch.arange(_TRIED, device=images.device) % len(images)].detach().clone()
    noise = normal(generator(0, "trial"), tuple(some.shape)).to(some)
    return (some + _NOISE * noise).to(execution.device, execution.master_dtype)


def _layers(module: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers of a copy, checked."""
    layers = batchnorm_layers(module)
    if not layers:
        raise InputError(
            f"teacher must have BatchNorm layers (1d, 2d or 3d), whose statistics are matched; {type(module).__name__} has none"
        )
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(f"BatchNorm layer {name!r} keeps no running statistics; it needs track_running_stats=True")
        if layer.training:
            raise InputError(f"BatchNorm layer {name!r} stays in train mode after eval(), so that its statistics would change")
    if layers.keys() == {""}:
        raise InputError(f"teacher must be a classifier that gives [N, classes] logits, got a single {type(module).__name__}")
    return layers


def _check_teacher(module: nn.Module, layers: Mapping[str, nn.Module], trial: Tensor) -> Response:
    """The teacher's own response to the trial images, checked."""
    with torch.random.fork_rng(devices=[trial.device] if trial.is_cuda else []):
        torch.manual_seed(0)
        with _taking(trial):
            first = module(trial)
            _check_logits(first)
            first = first.detach()
            expected = teacher_response(module, layers, trial, gradients=True)
    if expected.gradients and not (expected.gradients.logits.isfinite().all() and expected.gradients.matching.isfinite().all()):
        raise InputError("gradients of the teacher are not finite, though its logits are: some weights are too large, or damaged")
    if not expected.gaps:
        raise InputError(
            f"none of the {len(layers)} BatchNorm layers of the teacher runs in a forward pass, so that no statistics can be matched"
        )
    if not _alike(first, expected.logits):
        with torch.random.fork_rng(devices=[trial.device] if trial.is_cuda else []):
            torch.manual_seed(1)
            again = module(trial).detach()
        if _alike(first, again):
            raise InputError(
                "teacher gives other logits when gradients of its weights or of the images are required: "
                "its forward pass depends on requires_grad"
            )
        raise InputError(
            "teacher gives other logits for the same images each time: it draws random numbers in eval mode "
            "(such as F.dropout without training=self.training)"
        )
    return expected


@contextmanager
def _taking(images: Tensor) -> Iterator[None]:
    """Inside, an error of the teacher says which images it cannot take."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # of a product, of a BatchNorm, of a transformer
        if isinstance(error, InputError):
            raise
        raise InputError(f"teacher cannot take images of shape {tuple(images.shape[1:])}: {first_line(error)}") from error


def _alike(logits: Tensor, others: Tensor) -> bool:
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise InputError(f"teacher must give [N, classes] logits, got {describe_output(logits)}")
    if not torch.isfinite(logits).all():
        raise InputError("teacher gives logits that are not finite, though its weights are; its activations overflow")


def _verified_network(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    expected: Response,
    perturbed: Response,  # with perturbed weights
    trial: Tensor,
    execution: Execution,
    others: Sequence[Tensor],  # images of other numbers and sizes
) -> Network:
    """The fastest copy of the teacher that computes what the teacher does."""
    inputs = trial.to(memory_format=torch.channels_last) if execution.channels_last else trial
    if execution.device.type == "cpu" and execution.channels_last:
        replace_strided_pointwise(module)

    if execution.operators.fuses:
        responses = [teacher_response(module, layers, each, gradients=False) for each in others]
        try:
            network = Network(trace(module, layers, execution.operators, trial), execution)
            cause = difference(expected, network_response(network, module, inputs, gradients=True), layers)
            for each, response in zip(others, responses, strict=True):
                given = each.to(memory_format=execution.memory_format)
                cause = cause or difference(response, network_response(network, module, given, gradients=False), layers)
            if cause is None:
                with _perturbed_weights(module):
                    mismatch = difference(perturbed, network_response(network, module, inputs, gradients=False), layers)
                if mismatch is None:
                    return network
                cause = f"with other weights {mismatch}"
            network.release()
            cause = f"the trace differs: {cause}"
        except Exception as error:  # tracing runs the teacher's own code, which may raise anything
            cause = first_line(error)
        log.warning("teacher cannot be traced (%s); its BatchNorm layers are fused without their neighbours", cause)
    network = Network(fuse.replace(module, layers, execution.operators), execution)
    try:
        cause = difference(expected, network_response(network, module, inputs, gradients=True), layers)
    except RuntimeError as error:
        cause = first_line(error)
    if cause is not None:
        raise InputError(f"back-end {execution.backend!r} does not compute what the teacher does: {cause}; another back-end may")
    if execution.captures or execution.backend == "compiled":
        network.capture_error = _capture_error(network, module, inputs)
    return network


def _capture_error(network: Network, module: nn.Module, images: Tensor) -> str | None:
    """Why the forward pass of a network that was not traced cannot be captured, such as branches on values; None where it can."""
    captured = torch.zeros_like(network(images).detach())

    def step() -> None:
        captured.copy_(network(images).detach())

    try:
        repeat = trace_step(step)
        with _perturbed_weights(module), torch.no_grad():
            repeat(torch.empty(0))
            if not _alike(network(images), captured):
                raise RuntimeError("it computes with numbers that it reads from its weights")
    except Exception as error:  # of any kind: this traces the teacher's own code
        cause = first_line(error)
        log.warning("teacher cannot be captured (%s); its own code is called in every step, which is a little slower", cause)
        return cause
    finally:
        network.forget()
    return None


@contextmanager
def _perturbed_weights(module: nn.Module) -> Iterator[None]:
    """Inside, every weight is perturbed, as by an ascent: a copy that has baked in the old weights then differs."""
    weights = [weight for weight in module.parameters() if weight.is_floating_point()]
    originals = [weight.detach().clone() for weight in weights]
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1 + _PERTURBATION * torch.randn(weight.shape, generator=source).to(weight))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def _tiled(images: Tensor, size: int) -> Tensor:
    """That many images: the given ones, repeated."""
    return images[torch.arange(size, device=images.device) % len(images)]


@contextmanager
def check_precision(network: Network, images: Tensor, execution: Execution) -> Iterator[None]:
    """Around the cast of the weights to the precision that will run: afterwards the network must give nearly the same.

    Raises:
        InputError: it cannot run in that precision, or its results differ.
    """
    if execution.dtype == execution.master_dtype:
        yield
        return
    trial = _trial_images(images, execution).to(memory_format=execution.memory_format)
    with execution.arithmetic():
        expected = network_response(network, network, trial, gradients=False)
    yield
    with execution.arithmetic():
        try:
            got = network_response(network, network, trial.to(execution.dtype), gradients=True)
            cause = difference(expected, got, network.layers, _ROUNDING)
        except RuntimeError as error:
            cause = first_line(error)
    if cause is not None:
        raise InputError(f"teacher does not work in {execution.precision}: {cause}; ask for precision fp32")
