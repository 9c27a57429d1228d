#!/bin/sh
# torchvision.transforms.Normalize is an nn.Module, and many teachers carry one in front: nn.Sequential(Normalize(mean, std), network). Its
# mean and std are constants, yet such a network can be neither exported nor compiled as one graph: the forward pass makes a tensor of std
# and branches on whether any of it is 0, which a trace with fake tensors takes for a value of the data. The error says "data-dependent" and
# names no transform. torchvision.transforms.v2.Normalize computes the same bits, tests the list instead, and can be exported and compiled.
# torch.jit.trace and torch.func.vmap take either.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.2" "numpy"
"$folder/venv/bin/python" -W ignore - 2> "$folder/graphs" <<'PYTHON'  # torch.export prints every graph that it gives up
import logging
import sys

import torch
import torchvision
from torch import nn
from torchvision.transforms import Normalize, v2

logging.disable(logging.CRITICAL)
print("torch", torch.__version__, "torchvision", torchvision.__version__)
torch.manual_seed(0)
images, network = torch.rand(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ways = {
    "torch.export": lambda whole: torch.export.export(whole, (images,)),
    "torch.export, not strict": lambda whole: torch.export.export(whole, (images,), strict=False),
    "torch.compile, fullgraph": lambda whole: torch.compile(whole, fullgraph=True, backend="eager")(images),
    "torch.jit.trace": lambda whole: torch.jit.trace(whole, images),
}
found = {}
for version, transform in (("v1", Normalize(mean, std)), ("v2", v2.Normalize(mean, std))):
    whole = nn.Sequential(transform, network).eval()
    for name, way in ways.items():
        try:
            way(whole)
            said = "works"
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:70]}"
        found[version, name] = said == "works"
        print(f"{version}, {name}: {said}")
same = torch.equal(Normalize(mean, std)(images), v2.Normalize(mean, std)(images))
print("same bits:", same)
wanted = {(version, name): version == "v2" or name == "torch.jit.trace" for version, name in found}
as_described = found == wanted and same
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
