#!/bin/sh
# torch.backends.fp32_precision = "ieee" is meant for all back-ends, but in PyTorch 2.11 the convolutions and RNNs of cuDNN stay in
# TensorFloat-32: their own setting begins as "tf32", not as one that follows. In 2.14 they follow, and cudnn.allow_tf32, the older name of
# the same setting, can no longer be read: it raises. So neither name tells on both versions; cudnn.conv.fp32_precision does. Needs no GPU.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 2.11.0 2.14.1; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "torch==$version" "numpy"
    "$folder/$version/bin/python" - <<'PYTHON'
import sys

import torch

b = torch.backends


def state():
    try:
        older = b.cudnn.allow_tf32
    except RuntimeError:
        older = "raises"
    return {"matmul": b.cuda.matmul.fp32_precision, "conv": b.cudnn.conv.fp32_precision, "rnn": b.cudnn.rnn.fp32_precision, "allow_tf32": older}


print("torch", torch.__version__)
print("as installed:            ", state())
b.fp32_precision = "ieee"
found = state()
print("fp32_precision = 'ieee': ", found)
follows = not torch.__version__.startswith("2.11.")
kind = "ieee" if follows else "tf32"
expected = {"matmul": "ieee", "conv": kind, "rnn": kind, "allow_tf32": "raises" if follows else True}
b.cudnn.conv.fp32_precision = "ieee"
as_described = found == expected and b.cudnn.conv.fp32_precision == "ieee"
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
done
