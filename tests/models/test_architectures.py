"""Networks by name: shapes at every size, the published numbers of weights, what small images change, and sizes that are refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError
from dwa_fast.models.architectures import ARCHITECTURES, TokenBatchNorm, build, build_on_meta

WEIGHTS = {  # of 1000 classes, as torchvision and the authors of DeiT publish them
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet-v2": 3_504_872,
    "shufflenet-v2": 2_278_604,
    "efficientnet-b0": 5_288_548,
    "vgg16-bn": 138_365_992,
    "deit-tiny": 5_717_416,
    "deit-tiny-bn": 5_717_416,
}


def on_paper(name: str, *, size: int, channels: int = 3, classes: int = 7) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return build(name, classes=classes, channels=channels, size=size)


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (28, 3), (32, 1), (224, 3)])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith(("resnet34", "resnet101"))])
def test_every_network_takes_grey_and_coloured_images_of_every_size(name: str, size: int, channels: int) -> None:
    if name == "vgg16-bn" and size < 32:
        with pytest.raises(InputError, match="vgg16-bn needs images of at least 32 pixels"):
            on_paper(name, size=size)
    else:
        logits = on_paper(name, size=size, channels=channels)(torch.zeros(2, channels, size, size, device="meta"))
        assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", WEIGHTS)
def test_number_of_weights_is_the_published_one(name: str) -> None:
    assert sum(p.numel() for p in on_paper(name, size=224, classes=1000).parameters()) == WEIGHTS[name]


def last_features(network: nn.Module, size: int) -> Tensor:
    """What the last convolution gives."""
    seen: list[Tensor] = []
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    convolutions[-1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    network(torch.zeros(2, 3, size, size, device="meta"))
    return seen[0]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet-v2", "shufflenet-v2", "efficientnet-b0"])
def test_cifar_variants_halve_the_resolution_three_times(name: str) -> None:
    assert last_features(on_paper(name, size=32), 32).shape[2:] == (1, 1)
    assert last_features(on_paper(f"{name}-cifar", size=32), 32).shape[2:] == (4, 4)


def test_small_vgg_has_one_linear_layer_and_the_max_pools_that_fit() -> None:
    for size, pools in ((8, 3), (16, 4), (32, 5), (64, 5)):
        network = on_paper("vgg16-bn-cifar", size=size)
        assert sum(isinstance(layer, nn.MaxPool2d) for layer in network.modules()) == pools
        assert [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)] == ["classifier"]
        assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 13


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (128, 16), (96, 8), (64, 8), (32, 4), (28, 2), (16, 2), (8, 2), (2, 2)])
def test_patches_of_the_transformer_follow_the_size(size: int, patch: int) -> None:
    first = on_paper("deit-tiny", size=size).get_submodule("conv_proj")
    assert isinstance(first, nn.Conv2d)
    assert first.kernel_size == first.stride == (patch, patch)


def test_every_norm_of_the_transformer_is_replaced() -> None:
    network = on_paper("deit-tiny-bn", size=32)
    assert not [layer for layer in network.modules() if isinstance(layer, nn.LayerNorm)]
    assert sum(isinstance(layer, nn.BatchNorm1d) for layer in network.modules()) == 2 * 12 + 1


def test_token_norm_takes_statistics_over_batch_and_sequence() -> None:
    torch.manual_seed(0)
    tokens, norm = torch.randn(4, 9, 6) * 3 + 1, TokenBatchNorm(6)
    normed = norm(tokens)
    flat = tokens.reshape(-1, 6)
    wanted = (flat - flat.mean(0)) / (flat.var(0, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(normed.reshape(-1, 6), wanted, atol=1e-5)
    assert torch.allclose(norm.norm.running_mean, 0.1 * flat.mean(0))  # type: ignore[arg-type]


REFUSED = {
    "unknown": ("vit", 224, "unknown architecture 'vit'; known: resnet18, "),
    "size": ("resnet18", 0, "size must be an integer of at least 1, got 0"),
    "vgg": ("vgg16-bn", 31, "vgg16-bn needs images of at least 32 pixels, got size 31"),
    "convnet": ("convnet128", 1, "convnet128 needs images of at least 2 pixels, got size 1"),
    "deit": ("deit-tiny", 33, "deit-tiny cuts images into patches of 2, 4, 8 or 16 pixels; size must be a multiple of 2, got 33"),
    "deit bn": ("deit-tiny-bn", 7, "deit-tiny-bn cuts images into patches of 2, 4, 8 or 16 pixels; size must be a multiple of 2, got 7"),
}


@pytest.mark.parametrize(("name", "size", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(name: str, size: int, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        build(name, classes=7, size=size)


def test_networks_on_the_meta_device_have_names_and_shapes_and_no_memory() -> None:
    network, real = build_on_meta("resnet18-cifar", classes=7, channels=1, size=32), build("resnet18-cifar", classes=7, channels=1, size=32)
    assert {name: (value.shape, value.device.type) for name, value in network.state_dict().items()} == {
        name: (value.shape, "meta") for name, value in real.state_dict().items()
    }
    assert build_on_meta("resnet18-cifar", classes=7, channels=1, size=32) is network
