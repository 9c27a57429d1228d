"""Crops of whole pixels: the bits of Pillow, and the distribution of torchvision's random resized crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import resized_crop

from dwa_fast.config import ValidationConfig
from dwa_fast.data.augment import Views, apply_views, draw_views
from dwa_fast.data.boxes import draw_boxes, resize_boxes
from dwa_fast.seeding import generator


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 37, 64])
def test_bits_are_those_of_pillow(side: int, channels: int) -> None:
    source = np.random.default_rng(side + channels)
    pixels = torch.from_numpy(source.integers(0, 256, (70, channels, side, side), dtype=np.uint8))
    boxes = draw_boxes(70, side, 0.001, source)
    boxes[0], boxes[1], boxes[2] = torch.tensor([0, 0, side, side]), torch.tensor([3, 1, 1, 1]), torch.tensor([side - 1, 0, 1, side])
    found = resize_boxes(pixels, boxes)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for image, box, own in zip(pixels, boxes.tolist(), found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())
        wanted = np.array(resized_crop(picture, *box, size=[side, side])).reshape(side, side, channels)
        assert np.array_equal(own.permute(1, 2, 0).numpy(), wanted), box
    flipped = apply_views(pixels, Views(boxes=boxes, flipped=torch.tensor([True, False] * 35)), 0)
    assert torch.equal(flipped[0::2], found[0::2].flip(3))
    assert torch.equal(flipped[1::2], found[1::2])


def test_boxes_are_distributed_as_torchvisions() -> None:
    """Means of places, sizes and areas within four standard errors."""
    count, side = 20_000, 24
    torch.manual_seed(0)
    image = torch.empty(1, side, side)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]).double()
    ours = draw_boxes(count, side, 0.08, np.random.default_rng(0)).double()
    assert bool(((ours[:, 2:] > 0) & (ours[:, :2] >= 0) & (ours[:, :2] + ours[:, 2:] <= side)).all())
    for one, two in ((ours, theirs), (ours[:, 2:].prod(1, keepdim=True), theirs[:, 2:].prod(1, keepdim=True)), (ours**2, theirs**2)):
        error = (one.var(0) / count + two.var(0) / count).sqrt()
        assert bool(((one.mean(0) - two.mean(0)).abs() < 4 * error).all())


def test_draws_of_a_seed_stay_as_they_are() -> None:
    """Sets of labels and trainings are resumed with them."""
    views = draw_views(4, ValidationConfig(augmentation="resized-crop", smallest_crop=0.3), generator(0, "pin"))
    assert views.crops is not None
    assert views.crops.tolist() == [
        pytest.approx([-0.6989188, 0.7460405, -0.1109612, 0.1028928], abs=1e-6),
        pytest.approx([-0.7796471, 0.786873, -0.153986, 0.0549239], abs=1e-6),
        pytest.approx([0.7770835, 0.6185257, 0.1175521, 0.2484165], abs=1e-6),
        pytest.approx([-0.5894591, 0.7112409, -0.2411809, -0.0324935], abs=1e-6),
    ]
    boxes = draw_boxes(4, 64, 0.3, generator(0, "pin"))
    assert boxes.tolist() == [[5, 13, 48, 45], [4, 11, 50, 50], [3, 12, 40, 50], [2, 5, 46, 38]]


def test_images_that_no_box_of_this_area_fits_stay_whole() -> None:
    assert torch.equal(draw_boxes(5, 1, 0.08, np.random.default_rng(0)), torch.tensor([[0, 0, 1, 1]] * 5, dtype=torch.int16))
