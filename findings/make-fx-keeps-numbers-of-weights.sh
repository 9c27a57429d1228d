#!/bin/sh
# make_fx refuses to read a number from a tensor that the traced function computed, and silently keeps the number of a tensor from outside,
# such as a weight: the graph goes on with it after the weight has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.fx.experimental.proxy_tensor import make_fx

print("torch", torch.__version__)
scale = torch.nn.Parameter(torch.tensor(2.0))
graph = make_fx(lambda x: x * scale.item())(torch.ones(2))
with torch.no_grad():
    scale.fill_(5.0)
kept = graph(torch.ones(2)).tolist()
print("number of a parameter, 2 while traced and 5 now:", kept)
try:
    make_fx(lambda x: x * x.sum().item())(torch.ones(2))
    refused = False
except RuntimeError as error:
    refused = True
    print("number of a computed tensor:", str(error).split(".")[0])
as_described = kept == [2.0, 2.0] and refused
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
