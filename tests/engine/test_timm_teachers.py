"""A dozen of timm's families as teachers, with fresh weights: first losses and gradients against the untouched network."""

from __future__ import annotations

import copy

import pytest
import torch

from dwa_fast.engine.backend import resolve
from dwa_fast.engine.teacher import prepare
from tests.nets import alive, distance, expected_gradient, image_gradient

timm = pytest.importorskip("timm")

FAMILIES: dict[str, int] = {  # by name, the pixels of an image
    "resnet18": 32,
    "skresnet18": 32,  # plain layers beside BatchNormAct2d
    "mobilenetv3_small_050": 32,
    "mobilenetv4_conv_small_035": 32,
    "efficientnet_b0": 32,
    "regnetx_002": 32,
    "regnety_002": 32,
    "repvgg_a0": 32,
    "ghostnet_050": 32,
    "hardcorenas_a": 32,
    "ese_vovnet19b_dw": 32,
    "mobilevit_xxs": 64,
    "levit_128s": 224,
    "test_resnet": 32,
}
QUICK = {"skresnet18", "mobilenetv3_small_050", "regnety_002", "test_resnet"}
BACKENDS = ["reference", "fused"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES])
def test_family_can_be_a_teacher(name: str, backend: str) -> None:
    torch.manual_seed(0)
    module, size = alive(timm.create_model(name, num_classes=7)).requires_grad_(False), FAMILIES[name]
    images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 6])
    network, classes = prepare(module, images, resolve(backend, "fp32", "cpu"))  # type: ignore[arg-type]
    assert classes == 7
    assert network.traced == (backend == "fused")
    wanted, wanted_terms = expected_gradient(copy.deepcopy(module).double(), images.double(), labels)
    plain, plain_terms = expected_gradient(module, images, labels)
    got, got_terms = image_gradient(network, images, labels)
    assert distance(got_terms, wanted_terms) < max(2 * distance(plain_terms, wanted_terms), 1e-6)
    # Where rounding decides on which side of 0 the input of a ReLU lies, either may differ from float64 by more than the other.
    assert distance(got, wanted) < max(2 * distance(plain, wanted), 1e-2)
