"""Rewrites a teacher so that every BatchNorm layer, with the addition and ReLU behind it where they can be traced, is one operator call."""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.shape_prop import ShapeProp

from dwa_fast.backend import Operators
from dwa_fast.convolution import replace_convolutions
from dwa_fast.layers import replace_layers
from dwa_fast.pooling import replace_pools
from dwa_fast.stem import replace_stems

log = logging.getLogger("dwa_fast")

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # the layers whose input statistics are matched

_ADDITIONS = {operator.add, torch.add}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_}
_DROPOUTS = {nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
_DROPPING = {F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"  # by name: importing torchvision loads Triton, and teachers may do without it
_AGREEMENT = 1e-3  # largest relative difference of the logits at which a traced teacher is taken for the teacher


class BatchNormAct(nn.Module):
    """A BatchNorm layer in eval mode, with what was fused into it, that keeps the shifted moments of its input for the matching loss."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: BatchNorm, operators: Operators) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)
        self.operators = operators
        self.skip = False  # whether forward adds a second argument
        self.relu = False
        self.sums: list[Tensor] = []  # one [2, C] per call of the last forward pass
        self.count = 0  # N·H·W of the last call

    def forward(
        self,
        y: Tensor,  # [N, C], or with positions in one, two or three dimensions behind
        skip: Tensor | None = None,  # like y
    ) -> Tensor:  # like y
        """relu(BatchNorm(y) [+ skip]) with the running statistics."""
        statistics = self.running_mean, self.running_var, self.weight, self.bias, self.eps
        z, sums = self.operators.bn_act(planes(y), *statistics, None if skip is None else planes(skip), self.relu)
        self.sums.append(sums)
        self.count = y.numel() // y.shape[1]
        return z if y.dim() == 4 else z.view(y.shape)

    def extra_repr(self) -> str:
        """What was fused, as `dwa-fast info` shows it."""
        return "BatchNorm" + (" + addition" if self.skip else "") + (" + ReLU" if self.relu else "")


@dataclass(frozen=True)
class Rewritten:
    """A rewritten teacher and its recording layers by name, in module order."""

    module: nn.Module
    layers: dict[str, BatchNormAct]
    traced: bool  # whether neighbours of the BatchNorm layers could be fused


def batchnorm_layers(module: nn.Module) -> dict[str, BatchNorm]:
    """Every BatchNorm layer, 1d, 2d or 3d, by name, in module order."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BATCHNORM)}


def planes(
    features: Tensor,  # [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]
) -> Tensor:  # [N, C, H, W]
    """The input of a BatchNorm layer as the operators take it; tokens [N, S, C], transposed, are a channels-last tensor where they lie."""
    if features.dim() == 4:
        return features
    return features.flatten(3) if features.dim() > 4 else features.view(*features.shape, *[1] * (4 - features.dim()))


def rewrite(
    module: nn.Module,
    operators: Operators,
    images: Tensor,  # [n, C, H, W]: the logits for these must stay what they were
) -> Rewritten:
    """Replace every BatchNorm layer of `module`, which is consumed; neighbours are fused where tracing works and keeps the logits."""
    names = list(batchnorm_layers(module))
    if operators.fuses:
        fused = _fused(module, operators, images)
        if fused is not None:
            layers = {name: layer for name, layer in fused.named_modules() if isinstance(layer, BatchNormAct)}
            return Rewritten(fused, {name: layers[name] for name in names if name in layers}, traced=True)
    replaced = {}
    for name, layer in batchnorm_layers(module).items():
        replaced[name] = BatchNormAct(layer, operators)
        _replace(module, layer, replaced[name])
    return Rewritten(module, replaced, traced=False)


def _fused(module: nn.Module, operators: Operators, images: Tensor) -> nn.Module | None:
    """The traced module with fused layers; None, and a line in the log, where that cannot be done or would change the logits."""
    try:
        traced = torch.fx.symbolic_trace(module)
        with torch.no_grad():
            expected = module(images)
            ShapeProp(traced).propagate(images)
    except Exception as error:  # tracing runs the teacher's own code, which may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("teacher cannot be traced (%s); its BatchNorm layers are fused without their neighbours", reason)
        return None
    _erase_identities(traced)
    for node in list(traced.graph.nodes):
        layer = _submodule(traced, node)
        if isinstance(layer, BATCHNORM):
            _fuse(traced, node, BatchNormAct(layer, operators))
    replace_stems(traced)
    replace_convolutions(traced)
    replace_pools(traced, operators.mean_pool)
    traced.graph.lint()
    traced.recompile()
    with torch.no_grad():
        difference = (traced(images) - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)
    for layer in traced.modules():
        if isinstance(layer, BatchNormAct):
            layer.sums.clear()
    if not difference < _AGREEMENT:
        log.warning("the traced teacher gives other logits; its BatchNorm layers are fused without their neighbours")
        return None
    return traced


def _erase_identities(traced: torch.fx.GraphModule) -> None:
    """Take out what does nothing in eval mode, so that it stands between no BatchNorm and its addition."""
    for node in list(traced.graph.nodes):
        if _is_identity(traced, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def _fuse(traced: torch.fx.GraphModule, node: torch.fx.Node, layer: BatchNormAct) -> None:
    """Put the layer in place of the node, and of the addition and ReLU that alone use its result."""
    _replace(traced, traced.get_submodule(str(node.target)), layer)
    chain, arguments = [node], [node.args[0]]
    for user in _sole_users(node):
        if _is_addition(user, chain[-1]) and not layer.relu and not layer.skip:
            arguments.append(next(other for other in user.args if other is not chain[-1]))
            layer.skip = True
        elif _is_relu(traced, user) and not layer.relu:
            layer.relu = True
        else:
            break
        chain.append(user)
    with traced.graph.inserting_before(chain[-1]):
        new = traced.graph.call_module(str(node.target), tuple(arguments))
    new.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(new)
    for old in reversed(chain):
        traced.graph.erase_node(old)


def _sole_users(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """The node that alone uses this one, the one that alone uses that one, and so on."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node


def _is_addition(node: torch.fx.Node, summand: torch.fx.Node) -> bool:
    """Whether the node adds another tensor of the same shape to the summand."""
    if node.op != "call_function" or node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return False
    others = [other for other in node.args if other is not summand]
    if len(others) != 1 or not isinstance(others[0], torch.fx.Node):
        return False
    shapes = [getattr(each.meta.get("tensor_meta"), "shape", None) for each in (summand, others[0])]
    return shapes[0] is not None and shapes[0] == shapes[1]


def _is_relu(traced: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    if node.op == "call_module":
        return type(_submodule(traced, node)) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELUS


def _is_identity(traced: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether the node hands its only input on: nn.Identity, and dropout and stochastic depth that are not in training."""
    if len(node.all_input_nodes) != 1:
        return False
    layer = _submodule(traced, node)
    if layer is not None:
        return type(layer) is nn.Identity or (type(layer) in _DROPOUTS and not layer.training)
    drops = node.target in _DROPPING or getattr(node.target, "__module__", None) == _STOCHASTIC_DEPTH
    if node.op != "call_function" or not callable(node.target) or not drops:
        return False
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments["training"] is False


def _submodule(traced: torch.fx.GraphModule, node: torch.fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` hangs in the tree."""
    replace_layers(root, lambda layer: new if layer is old else None)
