"""What is taken from the teacher, and the t-SNE of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

from dwa_fast import InputError
from dwa_fast.data.datasets import digits
from dwa_fast.data.pixels import normalise
from dwa_fast.evaluation.embedding import embed, stream, tsne
from tests.nets import DIGITS, SIZE, real_images, small_teacher


@torch.no_grad()
def test_embedding_is_what_the_layers_see() -> None:
    convolutions = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten()]
    network = nn.Sequential(*convolutions, nn.Linear(48, 7), nn.Linear(7, 5))
    images = torch.randn(4, 1, 8, 8)
    seen = embed(network.train(), images)
    assert torch.equal(seen.convolution, network[:3](images))
    assert torch.equal(seen.features, network.eval()[:6](images))
    assert torch.equal(seen.logits, network(images))
    assert not any(layer._forward_hooks for layer in network.modules())


@torch.no_grad()
def test_the_convolution_of_a_skip_is_not_the_last_one() -> None:
    """A block of torchvision computes its skip after the convolutions beside it."""
    teacher = small_teacher()
    outputs: list[torch.Tensor] = []
    teacher.get_submodule("blocks.2.conv2").register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    assert torch.equal(embed(teacher, real_images()[0]).convolution, outputs[0])


@torch.no_grad()
def test_what_works_in_place_behind_the_convolution_does_not_change_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5), nn.ReLU(inplace=True))
    images = torch.randn(3, 1, 8, 8)
    seen = embed(network, images)
    assert torch.equal(seen.convolution, network[0](images))
    assert float(seen.convolution.min()) < 0


@torch.no_grad()
@pytest.mark.parametrize("part", ["se", "gate"])
def test_a_gate_of_squeeze_and_excitation_is_not_the_last_convolution(part: str) -> None:
    """By the name of its class, or of the part."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 3)
            self.add_module(part, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)) if part == "se" else SqueezeExcitation(4, 2))
            self.fc = nn.Linear(4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features = self.convolution(images)
            return self.fc((features * self.get_submodule(part)(features)).mean((2, 3)))

    network, images = Block(), torch.randn(2, 1, 8, 8)
    assert torch.equal(embed(network, images).convolution, network.convolution(images))


@torch.no_grad()
def test_without_a_linear_layer_the_logits_are_the_features() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    seen = embed(network, torch.randn(2, 1, 8, 8))
    assert torch.equal(seen.features, seen.logits)
    with pytest.raises(InputError, match="teacher must have a Conv2d to measure diversity on; Flatten has none"):
        embed(nn.Flatten(), torch.randn(2, 1, 8, 8))


@torch.no_grad()
def test_what_is_not_finite_is_refused() -> None:
    teacher, data = small_teacher(), digits("test", SIZE)
    teacher.get_buffer("stem.1.running_mean")[1] = float("nan")
    with pytest.raises(InputError, match=r"not finite: running_mean of layer 'stem\.1' \(1 NaN of 8\)"):
        next(stream(teacher, data, DIGITS.data, torch.device("cpu")))
    with pytest.raises(InputError, match="teacher gives logits that are not finite for 4 of 4 images"):
        embed(teacher, real_images(4)[0])
    network = nn.Sequential(nn.Conv2d(1, 2, 8, bias=False), nn.Flatten(), nn.ReLU(), nn.Linear(2, 3))
    nn.init.constant_(network[0].weight, -3e38)
    with pytest.raises(InputError, match="features of the teacher are not finite, though its logits are"):
        embed(network, torch.ones(2, 1, 8, 8))


def test_stream_gives_every_image_once() -> None:
    data, teacher = digits("test", SIZE), small_teacher()
    parts = list(stream(teacher, data, DIGITS.data, torch.device("cpu")))
    assert [index for indices, _, _ in parts for index in indices] == list(range(450))
    assert torch.equal(torch.cat([pixels for _, pixels, _ in parts]), data.load(range(450)))
    whole = embed(teacher, normalise(data.load(range(450)), DIGITS.data)).logits
    assert torch.allclose(torch.cat([seen.logits for _, _, seen in parts]), whole, atol=1e-5)


def test_tsne_keeps_clusters_apart_and_repeats() -> None:
    points = torch.randn(60, 4) + torch.arange(3.0).repeat_interleave(20)[:, None] * 50
    first, again = tsne(points, seed=1), tsne(points, seed=1)
    assert torch.equal(first, again)
    clusters = first.view(3, 20, 2)
    within = (clusters - clusters.mean(1, keepdim=True)).norm(dim=2).amax()
    assert torch.pdist(clusters.mean(1)).min() > 2 * within


def test_tsne_of_few_points() -> None:
    assert tsne(real_images(4)[0].flatten(1), seed=0).shape == (4, 2)
