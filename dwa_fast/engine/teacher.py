"""Teachers made ready for synthesis: checked, copied, rewritten as a `Network`, and compared with the original."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwa_fast.engine import fuse
from dwa_fast.engine.backend import Execution
from dwa_fast.engine.capture import TRACING, trace_step
from dwa_fast.engine.comparison import Response, difference, network_response, teacher_response
from dwa_fast.engine.fuse import trace
from dwa_fast.engine.layers import replace_strided_pointwise
from dwa_fast.engine.network import Network
from dwa_fast.errors import InputError, first_line
from dwa_fast.models.batchnorm import batchnorm_layers
from dwa_fast.models.finite import check_finite_weights, refuse_probabilities
from dwa_fast.models.wrappers import copied, describe_output, unwrapped
from dwa_fast.seeding import generator, normal, seeded_layers

log = logging.getLogger("dwa_fast")

_TRIED = 3  # images on which the teacher and its copy are compared
_ROUNDING = 100.0  # factor on the fp32 tolerance in a lower precision
_PERTURBATION = 0.02  # relative standard deviation of a change of the weights, which shows weights that a trace has made constants
_NOISE = 0.1  # standard deviation of the noise on these images: no two alike, no pre-activation exactly 0


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
        drawn = list(module.parameters())
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
        network.drawn = list(dict.fromkeys([*drawn, *network.parameters()]))
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
    with seeded_layers(0, trial.device), _taking(trial):
        first = module(trial)
        _check_logits(first)
        refuse_probabilities(first, "teacher")
        first = first.detach()
        expected = teacher_response(module, layers, trial, gradients=True)
    if expected.gradients and not (expected.gradients.logits.isfinite().all() and expected.gradients.matching.isfinite().all()):
        raise InputError("gradients of the teacher are not finite, though its logits are: some weights are too large, or damaged")
    if expected.gradients and not (expected.gradients.logits.any() or expected.gradients.matching.any()):
        raise InputError(
            "gradients of the teacher with respect to the images are 0 everywhere, so that nothing could be refined: "
            "its forward pass must not detach() or round them"
        )
    if not expected.gaps:
        raise InputError(
            f"none of the {len(layers)} BatchNorm layers of the teacher runs in a forward pass, so that no statistics can be matched"
        )
    if not _alike(first, expected.logits):
        with seeded_layers(1, trial.device):
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
        if "does not require grad" in str(error):
            raise InputError(
                "teacher gives logits that have no gradient with respect to its images and weights, which the synthesis needs; "
                "its forward pass must not run under torch.no_grad() or detach() them"
            ) from error
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


class PrecisionError(InputError):
    """A teacher cannot run in a precision, or computes something else in it."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}; ask for precision fp32")
        self.cause = cause


@contextmanager
def check_precision(network: Network, images: Tensor, execution: Execution) -> Iterator[None]:
    """Around the cast of the weights to the precision that will run: afterwards the network must give nearly the same.

    Raises:
        PrecisionError: it cannot run in that precision, or its results differ.
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
        raise PrecisionError(f"teacher does not work in {execution.precision}: {cause}")
