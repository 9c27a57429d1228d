"""Perterb: the published values of DWA's ascent step and of the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dwa_fast import InputError
from dwa_fast.compat import Perterb

EPSILON = 1e-12


def weights(device: torch.device, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Three weights with gradients, and one without."""
    shapes = [(4, 3, 3, 3), (7,), (2, 5), (3,)]
    made = [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    for p in made[:-1]:
        p.grad = torch.randn(p.shape).to(device, dtype)
    return made


def adam(images: Tensor) -> torch.optim.Optimizer:
    return torch.optim.Adam([images], lr=0.1, betas=(0.5, 0.9))


def by_hand(made: list[nn.Parameter], rho: float) -> list[Tensor]:
    """Where a step leads: p + rho·g/(‖g‖ + 1e-12), one norm over all."""
    norm = torch.cat([p.grad.flatten() for p in made if p.grad is not None]).norm()
    return [p.detach() + (0 if p.grad is None else rho * p.grad / (norm + EPSILON)) for p in made]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_first_step_by_hand(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    made = weights(device, dtype)
    perterb = Perterb(iter(made), adam(torch.zeros(1)), rho=0.3)
    wanted = by_hand(made, 0.3)
    before = [p.detach().clone() for p in made]
    perterb.first_step()
    for p, old, new in zip(made, before, wanted, strict=True):
        assert torch.allclose(p, new, rtol=tolerance, atol=tolerance)
        if p.grad is not None:
            assert torch.allclose(perterb.state[p]["e_w"], new - old, rtol=1e3 * tolerance, atol=tolerance)
    assert sum(float((p - old).detach().square().sum()) for p, old in zip(made, before, strict=True)) == pytest.approx(0.09, rel=1e-5)
    assert all(p.grad is not None for p in made[:-1])


def test_zero_grad_forgets_the_gradients() -> None:
    made = weights(torch.device("cpu"))
    Perterb(made, adam(torch.zeros(1))).first_step(True)
    assert all(p.grad is None for p in made)


def test_the_default_length_is_the_published_one() -> None:
    made = weights(torch.device("cpu"))
    perterb = Perterb(made, adam(torch.zeros(1)))
    wanted = by_hand(made, 0.05)
    perterb.first_step()
    assert all(torch.allclose(p, new, rtol=1e-14) for p, new in zip(made, wanted, strict=True))
    assert [group["rho"] for group in perterb.param_groups] == [0.05]


def test_second_step_takes_back_the_last_move_and_steps_the_base_optimiser(device: torch.device) -> None:
    made = weights(device)
    images = nn.Parameter(torch.zeros(3, device=device))
    images.grad = torch.tensor([1.0, -2.0, 3.0], device=device)
    perterb = Perterb(made, adam(images))
    perterb.first_step()
    once = [p.detach().clone() for p in made]
    perterb.first_step()
    perterb.second_step(zero_grad=True)
    assert all(torch.allclose(p, back, rtol=1e-14) for p, back in zip(made, once, strict=True))
    assert images.tolist() == pytest.approx([-0.1, 0.1, -0.1])
    assert all(p.grad is None for p in made)
    assert images.grad is not None  # the images are the base optimiser's


def test_groups_share_one_norm_and_keep_what_they_were_given() -> None:
    made = weights(torch.device("cpu"))
    perterb = Perterb([{"params": made[:1]}, {"params": made[1:]}], adam(torch.zeros(1)), 0.3, adaptive=False)
    wanted = by_hand(made, 0.3)
    perterb.first_step()
    assert all(torch.allclose(p, new, rtol=1e-14) for p, new in zip(made, wanted, strict=True))
    assert [group["adaptive"] for group in perterb.param_groups] == [False, False]


def test_step_with_a_closure_is_first_step_closure_second_step() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    images = nn.Parameter(torch.zeros(1))
    seen = []

    def closure() -> None:
        seen.append(p.detach().clone())
        (p.square().sum() / 2 + images.sum()).backward()

    closure()
    Perterb([p], adam(images), rho=0.5).step(closure)
    assert torch.allclose(seen[1], torch.tensor([3.3, 4.4], dtype=torch.float64))
    assert torch.allclose(p.detach(), torch.tensor([3.0, 4.0], dtype=torch.float64), rtol=1e-14)
    assert images.item() == pytest.approx(-0.1)


def test_it_climbs() -> None:
    """K steps of ρ/K on a cross-entropy raise it by about ρ·‖g‖."""
    network, images, labels = nn.Linear(5, 3), torch.randn(8, 5), torch.randint(3, (8,))
    perterb = Perterb(network.parameters(), adam(torch.zeros(1)), rho=0.1 / 4)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(network(images), labels)
        losses.append(loss.item())
        loss.backward()
        perterb.first_step(True)
    assert losses == sorted(losses)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "rho": (lambda: Perterb(weights(torch.device("cpu")), adam(torch.zeros(1)), rho=-1), "rho must be a finite number of at least 0"),
    "gradients": (
        lambda: Perterb(nn.Linear(2, 2).parameters(), adam(torch.zeros(1))).first_step(),
        "Perterb.first_step wants gradients: no weight has one; call backward() first",
    ),
    "frozen": (
        lambda: Perterb(nn.Linear(2, 2).requires_grad_(False).parameters(), adam(torch.zeros(1))).first_step(),
        "Perterb.first_step wants gradients, but requires_grad is off for every weight: switch it on, as with teacher.requires_grad_(True)",
    ),
    "closure": (
        lambda: Perterb(weights(torch.device("cpu")), adam(torch.zeros(1))).step(),
        "Perterb.step wants a closure that does a forward and backward pass, got None",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        call()


def test_the_class_of_an_optimiser_is_no_optimiser() -> None:
    """As other implementations of sharpness-aware minimisation take one."""
    with pytest.raises(TypeError, match=re.escape("base_optimizer must be an optimiser, such as Adam([images]), got the class SGD")):
        Perterb(weights(torch.device("cpu")), torch.optim.SGD)  # type: ignore[arg-type]


def test_scalars_of_numpy_and_mixed_precisions() -> None:
    made = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float16, torch.float32, torch.float64)]
    for p in made:
        p.grad = torch.ones_like(p)
    Perterb(made, adam(torch.zeros(1)), rho=np.float32(3)).first_step()  # type: ignore[arg-type]
    assert [p.tolist() for p in made] == [pytest.approx([1.0] * 3, rel=1e-3)] * 3
