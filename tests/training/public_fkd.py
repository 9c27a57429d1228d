"""SRe2L's FKD files by their public rules, in plain PyTorch, torchvision and Pillow: nothing of this program is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop, to_tensor

SEED = 42  # hard-coded in the published reader


def grey(path: str) -> Image.Image:
    return Image.open(path).convert("L")


def sampler(count: int, batch_size: int) -> BatchSampler:
    generator = torch.Generator()
    generator.manual_seed(SEED)
    return BatchSampler(RandomSampler(TensorDataset(torch.arange(count)), generator=generator), batch_size, drop_last=False)


def view(picture: Image.Image, crop: Tensor, flip: bool) -> Tensor:
    width, height = picture.size
    top, left, rows, columns = crop[0].item() * height, crop[1].item() * width, crop[2].item() * height, crop[3].item() * width
    picture = resized_crop(picture, top, left, rows, columns, [height, width])
    return to_tensor(hflip(picture) if flip else picture)


def mixed(images: Tensor, partner: Tensor | None, share: float | None, box: list[int] | None) -> Tensor:
    if partner is None:
        return images
    if box is None:
        assert share is not None
        return share * images + (1 - share) * images[partner]
    a1, b1, a2, b2 = box
    images[:, :, a1:a2, b1:b2] = images[partner, :, a1:a2, b1:b2]
    return images


def batches(fkd: Path, images: Path, mean: float, std: float, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a student of train_FKD.py gets: the mixed images, [B, 1, S, S] float64 normalised, and the stored logits."""
    data = ImageFolder(str(images), loader=grey)
    entries = list(fkd.iterdir())
    files = sorted((fkd / "epoch_0").iterdir(), key=lambda path: int(path.name.split("_")[1].split(".tar")[0]))
    sizes = [torch.load(path, weights_only=True)[1].size(0) for path in (files[0], files[-1])]
    count = sizes[0] * (len(files) - 1) + sizes[1]
    assert epochs <= len(entries)
    assert count == len(data)
    order, reader = sampler(count, sizes[0]), sampler(len(data), sizes[0])
    for epoch in range(epochs):
        by_first = {indices[0]: batch for batch, indices in enumerate(order)}
        for indices in reader:
            content = torch.load(fkd / f"epoch_{epoch}" / f"batch_{by_first[indices[0]]}.tar", weights_only=True)
            yield student_batch(data, indices, content, mean, std)


def student_batch(data: ImageFolder, indices: list[int], content: list[Any], mean: float, std: float) -> tuple[Tensor, Tensor]:
    crops, flipped, partner, share, box, logits = content[:6]
    assert len(indices) == len(logits)
    views = [view(data[index][0], crop, bool(flip)) for index, crop, flip in zip(indices, crops, flipped, strict=True)]
    return mixed((torch.stack(views).double() - mean) / std, partner, share, box), logits


def pool_batches(fkd: Path, images: Path, mean: float, std: float) -> Iterator[tuple[Tensor, Tensor]]:
    """All batches of a pool of LPLD, whose images are in its file of the order."""
    data = ImageFolder(str(images), loader=grey)
    order = {int(epoch): indices for epoch, indices in json.loads((fkd / "sampler_indices_epoch.json").read_text()).items()}
    size = len(torch.load(fkd / "epoch_0" / "batch_0.tar", weights_only=True)[1])
    for epoch in range(max(order) + 1):
        for batch, start in enumerate(range(0, len(order[epoch]), size)):
            content = torch.load(fkd / f"epoch_{epoch}" / f"batch_{batch}.tar", weights_only=True)
            yield student_batch(data, order[epoch][start : start + size], content, mean, std)


def write(
    fkd: Path, images: Path, teacher: torch.nn.Module, mean: float, std: float, batch_size: int, epochs: int, mixing: str
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Files as generate_soft_label.py leaves them, with NumPy integers in boxes; gives each batch's images, as the teacher saw them."""
    data, seen = ImageFolder(str(images), loader=grey), []
    order, random = sampler(len(data), batch_size), np.random.RandomState(0)
    for epoch in range(epochs):
        (fkd / f"epoch_{epoch}").mkdir(parents=True)
        for batch, indices in enumerate(order):
            crops, flips, views = [], [], []
            for index in indices:
                picture, _ = data[index]
                boxes = RandomResizedCrop.get_params(picture, [0.08, 1.0], [3 / 4, 4 / 3])
                crops.append(torch.FloatTensor([edge / picture.size[place % 2 - 1] for place, edge in enumerate(boxes)]))
                flips.append(bool(torch.rand(1) < 0.5))
                picture = resized_crop(picture, *boxes, size=[*picture.size])
                views.append(to_tensor(hflip(picture) if flips[-1] else picture))
            stacked = (torch.stack(views) - mean) / std
            partner, share, box = None, None, None
            if mixing != "none":
                partner, share = torch.randperm(len(indices)), random.beta(1.0, 1.0)
            if mixing == "cutmix":
                side = stacked.size(2)
                cut, x, y = int(side * np.sqrt(1.0 - share)), random.randint(side), random.randint(side)
                edges = [np.clip(centre + sign * (cut // 2), 0, side) for sign in (-1, 1) for centre in (x, y)]
                assert all(type(edge) is np.int64 for edge in edges)
                box = edges
            stacked = mixed(stacked, partner, share, box)
            with torch.no_grad():
                logits = teacher(stacked).half()
            torch.save(
                [torch.stack(crops), torch.tensor(flips), partner, share, box, logits], fkd / f"epoch_{epoch}" / f"batch_{batch}.tar"
            )
            seen.append((indices, stacked, logits))
    return seen
