"""Rewrites a teacher: every BatchNorm layer, with the addition, activation and pooling behind it, is one operator call; two that are
added are one call too."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import Argument

from dwa_fast.engine.activation_nodes import Match, changed_in_place, match
from dwa_fast.engine.cpu_convolutions import replace_cpu_convolutions
from dwa_fast.engine.layers import SampledConv, replace_convolutions, replace_global_means, replace_pools, replace_stems
from dwa_fast.engine.pool_nodes import Windows, match_pool
from dwa_fast.engine.symbolic import symbolic
from dwa_fast.models.batchnorm import MomentsHook, given, is_plain, planes
from dwa_fast.models.modules import has_hooks, replace_layers
from dwa_fast.ops.activation import Activation, title
from dwa_fast.reference.ops import Operators

_ADDITIONS = {operator.add, torch.add}
_DROPOUTS = {nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
_DROPPING = {F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_UNPOOLED = {"hardswish"}  # activations whose gradient does not fit the registers of a GPU beside a pooling
_UNAVERAGED = {*_UNPOOLED, "relu6"}  # and beside one that takes the mean
_UNJOINED = {"relu6"}  # and beside a second layer
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"  # by name: importing torchvision loads Triton, and teachers may do without it


class BatchNormAct(nn.Module):
    """A BatchNorm layer in eval mode, with what was fused into it, that keeps the shifted moments of its input for the matching loss."""

    running_mean: Tensor
    running_var: Tensor
    slope: Tensor | None

    def __init__(self, layer: Any, operators: Operators) -> None:
        """Take the place of a plain BatchNorm layer, whose weights and statistics these are."""
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)
        self.operators = operators
        self.skip = False  # whether forward adds a second argument
        self.joins = False  # whether forward applies another layer, its third argument, to that
        self.joined = False  # whether another layer's forward applies this one
        self.with_alias = False  # whether forward also gives an alias of its result: for two uses, whose gradients the operator adds
        self.alias_stride = 1  # of the rows and columns of the result whose pixels the alias has
        self.activation: Activation = "none"
        self.register_buffer("slope", None)  # of leaky_relu: [1] or [C]
        self.windows: Windows | None = None  # of a pooling behind it all
        self.leaves_skip = False  # whether the gradient of the skip is left to the layer that the skip comes from
        self.measures = True  # whether forward takes the moments
        self.sums: list[Tensor] = []  # one [2, C] per call of the last forward pass
        self.count = 0  # N·H·W of the last call
        self.rows = 1  # of partial sums that the last call leaves or would leave
        self.partials: Tensor | None = None  # [2, rows, C]: where they are left; the values of `sums` are then undefined
        self.written: Any = None  # the event of a GPU that is recorded behind it then

    def forward(
        self,
        input: Tensor,  # [N, C], or with positions in one, two or three dimensions behind; named as in the layers that it replaces
        skip: Tensor | None = None,  # like the input
        other: BatchNormAct | None = None,  # the skip's own layer, which keeps its moments
    ) -> Tensor | tuple[Tensor, ...]:  # like the input, or smaller
        """f(BatchNorm(input) [+ skip, or its BatchNorm]) with the running statistics, or the largest or mean of it in each window."""
        y = planes(input)
        result = self._call(y, None if skip is None else planes(skip), other)
        layers = [self] if other is None else [self, other]
        features, sums = result[: -len(layers)], result[-len(layers) :]
        if self.measures:
            kind = {"skip": self.skip, "joins": self.joins, "pools": self.windows is not None}
            rows = self.operators.partial_rows(y, self.activation, **kind) if self.operators.partial_rows else 1
            for layer, each in zip(layers, sums, strict=True):
                layer.sums.append(each)
                layer.count, layer.rows = y.numel() // y.shape[1], rows
        if self.written is not None:
            self.written.record()
        z = [each if input.dim() == 4 else each.view(input.shape) for each in features]
        return tuple(z) if self.with_alias else z[0]

    def _call(self, y: Tensor, skip: Tensor | None, other: BatchNormAct | None) -> tuple[Tensor, ...]:
        """What the operator gives: the result, its alias, the sums of this layer, those of the other one."""
        behind, alias = (self.activation, self.slope, self.partials), (self.with_alias, self.alias_stride)
        if other is not None:
            both = y, *self.statistics, skip, *other.statistics
            return self.operators.bn_act_join(*both, *behind, other.partials, *alias, self.measures)
        if self.windows is not None:
            *windows, averages = self.windows
            return self.operators.bn_act_pool(y, *self.statistics, *windows, *behind, self.with_alias, self.measures, averages)
        return self.operators.bn_act(y, *self.statistics, skip, *behind, *alias, self.measures, self.leaves_skip)

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        """m, v, γ, β and ε, as the operators take them."""
        return self.running_mean, self.running_var, self.weight, self.bias, self.eps

    def activate(self, matched: Match) -> None:
        """Apply an activation too; a PReLU's weight becomes a parameter of this layer."""
        self.activation = matched.activation
        if isinstance(matched.slope, nn.Parameter):
            del self.slope
            self.register_parameter("slope", matched.slope)
        elif matched.slope is not None:
            self.slope = self.running_mean.new_tensor([matched.slope])

    def extra_repr(self) -> str:
        """What was fused, as `dwa-fast info` shows it."""
        skip = ["BatchNorm of the skip"] if self.joins else ["addition"] if self.skip else []
        parts = ["BatchNorm of a skip" if self.joined else "BatchNorm", *skip]
        parts += [title(self.activation, self.slope)] if self.activates else []
        return " + ".join([*parts, *([self.windows.title] if self.windows else [])])

    @property
    def activates(self) -> bool:
        """Whether an activation was fused."""
        return self.activation != "none"


@dataclass(frozen=True)
class Rewritten:
    """A rewritten teacher and what keeps the moments of its layers' inputs, by name, in module order."""

    module: nn.Module
    layers: dict[str, BatchNormAct | MomentsHook]
    traced: bool  # whether neighbours of the BatchNorm layers could be fused


def trace(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    operators: Operators,
    images: Tensor,  # [3, C, H, W]
) -> Rewritten:
    """The traced module with fused layers; `module` keeps its own.

    Raises:
        Exception: of any kind, where the module cannot be traced.
    """
    traced = symbolic(module, images, layers.values())
    _erase_identities(traced)
    fused: dict[nn.Module, BatchNormAct] = {}
    for layer in layers.values():
        if is_plain(layer) and fuse_neighbours(traced, layer, new := BatchNormAct(layer, operators)):
            fused[layer] = new
    _join(traced)
    _share(traced)
    if operators.partial_rows is not None:  # on a GPU
        _leave_gradients(traced)
    replace_stems(traced)
    if operators.fuses:
        replace_cpu_convolutions(traced, operators)
    replace_convolutions(traced)
    replace_pools(traced, operators.mean_pool)
    replace_global_means(traced)
    traced.graph.lint()
    traced.recompile()
    return Rewritten(traced, {name: fused.get(layer) or MomentsHook(layer, operators) for name, layer in layers.items()}, traced=True)


def replace(module: nn.Module, layers: Mapping[str, nn.Module], operators: Operators) -> Rewritten:
    """The module itself, which is changed: its plain layers are replaced where fused operators are to run, the others get a hook."""
    fused = {layer: BatchNormAct(layer, operators) for layer in layers.values() if operators.fuses and is_plain(layer)}
    replace_layers(module, lambda layer: fused.get(layer))
    return Rewritten(module, {name: fused.get(layer) or MomentsHook(layer, operators) for name, layer in layers.items()}, traced=False)


def _erase_identities(traced: torch.fx.GraphModule) -> None:
    """Take out what does nothing in eval mode, so that it stands between no BatchNorm and its addition."""
    for node in list(traced.graph.nodes):
        if _is_identity(traced, node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)


def fuse_neighbours(traced: torch.fx.GraphModule, layer: nn.Module, new: BatchNormAct) -> bool:
    """Put `new` in place of a BatchNorm layer and of what follows it; False where it is not called exactly once."""
    calls = [node for node in traced.graph.nodes if _submodule(traced, node) is layer]
    if len(calls) != 1 or len(calls[0].args) + len(calls[0].kwargs) != 1:
        return False
    _fuse(traced, calls[0], new)
    return True


def _fuse(traced: torch.fx.GraphModule, node: torch.fx.Node, layer: BatchNormAct) -> None:
    """Put the layer in place of the node, and of the addition, activation and pooling that alone use its result."""
    before = traced.get_submodule(str(node.target))
    replace_layers(traced, lambda each: layer if each is before else None)
    chain: list[torch.fx.Node] = [node]
    arguments: list[Argument] = [given(node.args, node.kwargs)]
    for user in _sole_users(node):
        if _is_addition(user, chain[-1]) and not layer.activates and not layer.skip:
            arguments.append(next(other for other in user.args if other is not chain[-1]))
            layer.skip = True
        elif not layer.activates and (matched := _activation(traced, layer, user, arguments, chain[-1])) is not None:
            layer.activate(matched)
        elif (windows := match_pool(traced, user, chain[-1])) is not None and _takes_pool(layer, windows):
            layer.windows = windows
        else:
            break
        chain.append(user)
        if layer.windows is not None:
            break
    with traced.graph.inserting_before(chain[-1]):
        new = traced.graph.call_module(str(node.target), tuple(arguments))
    new.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(new)
    for old in reversed(chain):
        traced.graph.erase_node(old)


def _takes_pool(layer: BatchNormAct, windows: Windows) -> bool:
    return not layer.skip and layer.activation not in (_UNAVERAGED if windows.averages else _UNPOOLED)


def _join(traced: torch.fx.GraphModule) -> None:
    """Take a BatchNorm layer whose result a fused layer alone uses, as its skip, into that one, where nothing was fused into it."""
    for node in list(traced.graph.nodes):
        layer, before = _submodule(traced, node), node.args[1] if len(node.args) == 2 else None
        if not isinstance(layer, BatchNormAct) or layer.activation in _UNJOINED:
            continue
        if not isinstance(before, torch.fx.Node) or len(before.users) != 1 or before is node.args[0]:
            continue
        other = _submodule(traced, before)
        if isinstance(other, BatchNormAct) and not other.skip and not other.activates and not other.windows:
            layer.joins = other.joined = True
            with traced.graph.inserting_before(node):
                node.args = node.args[0], before.args[0], traced.graph.get_attr(str(before.target))
            traced.graph.erase_node(before)


def _share(traced: torch.fx.GraphModule) -> None:
    """Give the two branches of a residual block a result each, so that the operator adds their gradients, and autograd does not.

    Where one begins with a strided 1×1 convolution, its result is what that one reads.
    """
    for node in list(traced.graph.nodes):
        layer = _submodule(traced, node)
        users = sorted(node.users, key=lambda user: user.meta.get("shape") is None)  # those that read its shape alone come last
        if not isinstance(layer, BatchNormAct) or len(users) < 2 or changed_in_place(traced, node):
            continue
        layer.with_alias = True
        with traced.graph.inserting_after(node):
            first, alias = (traced.graph.call_function(operator.getitem, (node, place)) for place in range(2))
        strided = None if layer.windows or users[1].meta.get("shape") is None else _strided(traced, users)
        for user in users:
            user.replace_input_with(node, first if user is users[0] or strided else alias)
        if strided is not None:
            before = traced.get_submodule(str(strided.target))
            replace_layers(traced, {before: (conv := SampledConv(before))}.get)  # type: ignore[arg-type]
            layer.alias_stride, strided.args = conv.step, (first, alias)


def _leave_gradients(traced: torch.fx.GraphModule) -> None:
    """Leave the gradient of a residual block's skip to the layer that the skip comes from, where that one then reads less than is written.

    So it is in the last block of a stage, whose result has one use, or a second one that takes a part of its pixels.
    """
    for node in traced.graph.nodes:
        layer, skip = _submodule(traced, node), node.args[1] if len(node.args) == 2 else None
        if not isinstance(layer, BatchNormAct) or not isinstance(skip, torch.fx.Node) or skip.target is not operator.getitem:
            continue
        before = _submodule(traced, skip.all_input_nodes[0])
        if not isinstance(before, BatchNormAct) or skip.args[1] != 1 or len(skip.users) > 1:
            continue
        written = layer.with_alias and layer.alias_stride == 1  # two whole gradients are no less than their sum, written and read
        if not written and not before.windows and before.alias_stride == 1 and layer.activation == before.activation == "relu":
            layer.leaves_skip = True


def _strided(traced: torch.fx.GraphModule, users: list[torch.fx.Node]) -> torch.fx.Node | None:
    """The first of them that is a strided 1×1 convolution, called here alone."""
    layers = [_submodule(traced, node) for node in traced.graph.nodes]
    suited = (user for user in users if SampledConv.suits(layer := _submodule(traced, user)) and layers.count(layer) == 1)
    return next((user for user in suited if len(user.args) == 1 and not user.kwargs), None)


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
    shapes = [each.meta.get("shape") for each in (summand, others[0])]
    return shapes[0] is not None and shapes[0] == shapes[1]


def _activation(
    traced: torch.fx.GraphModule, layer: BatchNormAct, node: torch.fx.Node, arguments: list[Argument], value: torch.fx.Node
) -> Match | None:
    """The activation that the node applies to `value`, where the layer can apply it to its arguments instead."""
    matched = match(traced, node, value)
    if matched is None or not matched.fits(len(layer.running_mean), layer.running_mean.dtype):
        return None
    # Every activation but ReLU reads the skip again in the backward pass, and autograd refuses a write into it before that.
    kept = [each for each in arguments[1:] if isinstance(each, torch.fx.Node)] if matched.activation != "relu" else []
    return None if any(changed_in_place(traced, each) for each in kept) else matched


def _is_identity(traced: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    """Whether the node hands its only input on: nn.Identity, and dropout and stochastic depth that are not in training."""
    if len(node.all_input_nodes) != 1:
        return False
    layer = _submodule(traced, node)
    if layer is not None and has_hooks(layer):
        return False
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
