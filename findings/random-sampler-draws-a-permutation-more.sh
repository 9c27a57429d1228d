#!/bin/sh
# torch.utils.data.RandomSampler draws one permutation more in every epoch than it yields: after the images of the epoch it draws another for
# the remainder of num_samples, of which it takes nothing. So the order of the second epoch is not the generator's second permutation but its
# third, and a program that repeats the order with torch.randperm is right in the first epoch and wrong in all others, without an error. Soft
# labels in the FKD format of SRe2L hold no names of images: the reader finds them by the order of such a sampler, seeded once.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils.data import RandomSampler

print("torch", torch.__version__)
count = 10
sampler = RandomSampler(range(count), generator=torch.Generator().manual_seed(42))
epochs = [list(sampler) for _ in range(3)]
source = torch.Generator().manual_seed(42)
drawn = [torch.randperm(count, generator=source).tolist() for _ in range(6)]
places = [drawn.index(order) for order in epochs]
for number, order in enumerate(epochs):
    print(f"epoch {number}: {order}, permutation {places[number]} of the generator")
as_described = places == [0, 2, 4]
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
