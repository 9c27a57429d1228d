#!/bin/sh
# torchvision's RandomResizedCrop draws area and aspect ratio, and rejects a crop that does not fit into the image; after ten rejections it
# takes the whole image (of a square one). So scale=(1, 1) with the usual aspect ratios is no crop at all, which is what RDED's released
# training of students, whose scale is (1/factor, 1), does on CIFAR and Tiny-ImageNet, where its factor is 1; and the nearer the smallest
# scale is to 1, the more often a view is the exact whole image, and the smaller the drawn area is on average than the scale's middle says.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torchvision
from torchvision.transforms import RandomResizedCrop

print("torchvision", torchvision.__version__)
size, draws = 224, 4000
image = torch.zeros(3, size, size)
torch.manual_seed(0)
whole, area = {}, {}
for smallest in (1.0, 0.9, 0.5, 0.08):
    boxes = [RandomResizedCrop.get_params(image, [smallest, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)]
    whole[smallest] = sum((height, width) == (size, size) for _, _, height, width in boxes) / draws
    area[smallest] = sum(height * width for _, _, height, width in boxes) / draws / size**2
    print(f"scale ({smallest}, 1): whole image {100 * whole[smallest]:.1f} %, mean area {area[smallest]:.3f}, middle of the scale {(1 + smallest) / 2:.3f}")
as_described = whole[1.0] == 1 and 0.03 < whole[0.9] < 0.5 and whole[0.08] < 0.01 and area[0.5] < 0.74
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
