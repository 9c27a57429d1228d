"""Networks by name: torchvision's, on request for small images, the two small ones that the field uses beside them, and timm's."""

from __future__ import annotations

import difflib
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dwa_fast.config import check_choice, check_integer
from dwa_fast.errors import InputError

_VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)  # channels of its convolutions; a max-pool behind each row
_PATCHES = (16, 8, 4, 2)  # pixels per side of a transformer's patch: the largest that cuts an image into rows of at least 8

_NEAR = 3  # names of timm that an error suggests


class ConvNet(nn.Module):
    """ConvNet-128 of the distillation literature: blocks of 3×3 convolution, BatchNorm, ReLU, 2×2 mean pooling; one linear layer."""

    def __init__(self, classes: int, channels: int, size: int, width: int = 128) -> None:
        super().__init__()
        _check_size("convnet128", size, 2)
        depth = max(1, min(3 if size <= 32 else size.bit_length() - 3, size.bit_length() - 1))
        blocks: list[nn.Module] = []
        for index in range(depth):
            blocks += [
                nn.Conv2d(channels if index == 0 else width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, classes]
        """Logits."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class SmallResNet(nn.Module):
    """Three residual blocks of 16, 32 and 64 channels, two of them with a stride-2 skip: for images of 8 to 32 pixels."""

    def __init__(self, classes: int, channels: int, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        from torchvision.models.resnet import (  # imported late: torchvision loads Triton, which importing dwa_fast must not
            BasicBlock,
            conv1x1,
        )

        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        blocks, before = [], widths[0]
        for width in widths:
            skip = None if width == before else nn.Sequential(conv1x1(before, width, 2), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(before, width, stride=1 if skip is None else 2, downsample=skip))
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(before, classes)

    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, classes]
        """Logits."""
        logits: Tensor = self.fc(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


class TokenBatchNorm(nn.Module):
    """BatchNorm1d in the place of a LayerNorm over tokens: the statistics of a channel are over batch and sequence."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(
        self,
        tokens: Tensor,  # [N, S, C]
    ) -> Tensor:  # [N, S, C]
        """BatchNorm of every channel; the transposed tensor is a view of the same memory."""
        normed: Tensor = self.norm(tokens.transpose(1, 2)).transpose(1, 2)
        return normed


def _resnet(depth: int, *, cifar_stem: bool) -> Callable[[int, int, int], nn.Module]:
    def make(classes: int, channels: int, size: int) -> nn.Module:
        import torchvision.models

        network: nn.Module = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
        if cifar_stem:  # 3×3 stride 1 and no max-pool, for 32 and 64 pixels
            network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        elif channels != 3:
            network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        return network

    return make


def _torchvision(model: str, *, cifar_stem: bool) -> Callable[[int, int, int], nn.Module]:
    """A network that halves the resolution five times, or in its CIFAR variant three times."""

    def make(classes: int, channels: int, size: int) -> nn.Module:
        import torchvision.models

        network: nn.Module = getattr(torchvision.models, model)(num_classes=classes)
        if cifar_stem:
            _keep_resolution(network)
        _take_channels(network, channels)
        return network

    return make


def _vgg16(classes: int, channels: int, size: int) -> nn.Module:
    _check_size("vgg16-bn", size, 32)
    return _torchvision("vgg16_bn", cifar_stem=False)(classes, channels, size)


def _vgg16_cifar(classes: int, channels: int, size: int) -> nn.Module:
    """The convolutions of VGG-16, as many of its max-pools as the image has room for, a mean over what is left, one linear layer."""
    from torchvision.models.vgg import make_layers

    plan: list[Any] = []
    for index, row in enumerate(_VGG16):
        plan += [*row, "M"] if size >> (index + 1) else row
    features = make_layers(plan, batch_norm=True)
    _take_channels(features, channels)
    layers = {"features": features, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(512, classes)}
    return nn.Sequential(OrderedDict(layers))


def _deit_tiny(name: str, **norm: Callable[[int], nn.Module]) -> Callable[[int, int, int], nn.Module]:
    """DeiT-Tiny (arXiv 2012.12877, no distillation token): 12 layers, 3 heads, 192 channels; patches of 16 pixels at 224, of 4 at 32."""

    def make(classes: int, channels: int, size: int) -> nn.Module:
        from torchvision.models.vision_transformer import VisionTransformer

        fitting = [patch for patch in _PATCHES if size % patch == 0]
        if not fitting:
            raise InputError(f"{name} cuts images into patches of 2, 4, 8 or 16 pixels; size must be a multiple of 2, got {size}")
        patch = next((patch for patch in fitting if size // patch >= 8), fitting[-1])
        network: nn.Module = VisionTransformer(size, patch, 12, 3, 192, 768, num_classes=classes, **norm)
        _take_channels(network, channels)
        return network

    return make


def _keep_resolution(network: nn.Module) -> None:
    """Undo the first two halvings of the resolution, by stride or by max-pool, as the CIFAR ResNets do, for 32 and 64 pixels."""
    kinds = nn.Conv2d, nn.MaxPool2d
    halving = [name for name, layer in network.named_modules() if isinstance(layer, kinds) and layer.stride in (2, (2, 2))]
    for name in halving[:2]:
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
        else:
            _put(network, name, nn.Identity())


def _take_channels(network: nn.Module, channels: int) -> None:
    """Give the first convolution that many input channels, where it has others."""
    name, first = next((name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    if channels != first.in_channels:
        shape: dict[str, Any] = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding}
        _put(network, name, nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **shape))


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(network.get_submodule(parent), key, layer)


def _check_size(name: str, size: int, at_least: int) -> None:
    if size < at_least:
        raise InputError(f"{name} needs images of at least {at_least} pixels, got size {size}")


_HALVING = {"mobilenet-v2": "mobilenet_v2", "shufflenet-v2": "shufflenet_v2_x1_0", "efficientnet-b0": "efficientnet_b0"}

ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    **{f"resnet{depth}": _resnet(depth, cifar_stem=False) for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}-cifar": _resnet(depth, cifar_stem=True) for depth in (18, 34, 50, 101)},
    **{name: _torchvision(model, cifar_stem=False) for name, model in _HALVING.items()},
    **{f"{name}-cifar": _torchvision(model, cifar_stem=True) for name, model in _HALVING.items()},
    "vgg16-bn": _vgg16,
    "vgg16-bn-cifar": _vgg16_cifar,
    "deit-tiny": _deit_tiny("deit-tiny"),
    "deit-tiny-bn": _deit_tiny("deit-tiny-bn", norm_layer=TokenBatchNorm),
    "convnet128": ConvNet,
    "small-resnet": lambda classes, channels, size: SmallResNet(classes, channels),
}


TIMM = "timm:"  # before a name: a network of timm


def check_architecture(what: str, name: Any) -> None:
    """Raise InputError unless that is the name of an architecture, ours or timm's."""
    if isinstance(name, str) and name.startswith(TIMM):
        _check_timm(name.removeprefix(TIMM))
    else:
        check_choice(what, name, list(ARCHITECTURES))


def _check_timm(name: str) -> Any:
    """timm, which knows that network."""
    try:
        import timm
    except ImportError as error:
        raise InputError(f"{TIMM}{name} needs timm, which is not installed: pip install 'dwa-fast[timm]'") from error
    if not timm.is_model(name):  # also keeps out names such as hf-hub:…, which timm would download
        near = difflib.get_close_matches(name, timm.list_models(), n=_NEAR)
        raise InputError(f"timm {timm.__version__} has no network {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    return timm


def _timm(name: str, classes: int, channels: int, size: int) -> nn.Module:
    """A network of timm with fresh weights; nothing is downloaded."""
    timm = _check_timm(name)
    try:
        config = timm.get_pretrained_cfg(name)
        sized = {"img_size": size} if config is not None and config.fixed_input_size else {}
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **sized)
    except Exception as error:  # whatever the network raises for a size or a number of channels that it cannot have
        raise InputError(f"timm cannot build {name} for {classes} classes, {channels} channels and size {size}: {error}") from error
    return network


def build(name: str, *, classes: int, channels: int = 3, size: int = 224) -> nn.Module:
    """A network with fresh weights, which take [N, channels, size, size] to [N, classes].

    Args:
        name: a torchvision network, made for 224 pixels; the same with "-cifar", for images of 32 and 64: a stem of stride 1, and one more
            halving less (VGG-16: one linear layer); deit-tiny, whose patches follow the size, and deit-tiny-bn, with BatchNorm for
            LayerNorm; convnet128; small-resnet; or "timm:NAME", a network of timm, where that is installed.
    Raises:
        InputError: no architecture of that name, timm is not installed, or a size that the network cannot have.
    """
    check_architecture("architecture", name)
    check_integer("classes", classes, 1)
    check_integer("channels", channels, 1)
    check_integer("size", size, 1)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), classes, channels, size)
    return ARCHITECTURES[name](classes, channels, size)


class _NoInitialisation(TorchFunctionMode):
    """Inside, random values are not drawn: on the meta device that takes most of the time of building a network."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=256)
def build_on_meta(name: str, *, classes: int, channels: int = 3, size: int = 224) -> nn.Module:
    """As `build`, without memory or values: layers, names and shapes alone. Callers share the network and must not change it."""
    with torch.device("meta"), _NoInitialisation():
        return build(name, classes=classes, channels=channels, size=size)
