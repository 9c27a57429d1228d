#!/bin/sh
# torch.autocast keeps the rounded copies of weights until the outermost autocast of the thread is left, and one with enabled=False counts. A
# training loop whose forward passes are under autocast, each step for itself, trains as usual; inside `with torch.autocast(device,
# enabled=False)`, which is meant to shield it, every step reads the weights of the first one: the loss never changes, without an error.
# cache_enabled=False on the inner one is right everywhere.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import sys

import torch
from torch.nn.functional import cross_entropy

print("torch", torch.__version__)


def losses(around, **inner):
    """The first and the last loss of a linear layer that learns 16 examples in 20 steps, its products in bfloat16."""
    torch.manual_seed(0)
    layer, images, labels = torch.nn.Linear(8, 4), torch.randn(16, 8), torch.randint(4, (16,))
    optimiser, found = torch.optim.SGD(layer.parameters(), lr=0.5), []
    with around:
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, **inner):
                loss = cross_entropy(layer(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
    return found[0], found[-1]


alone = losses(contextlib.nullcontext())
shielded = losses(torch.autocast("cpu", enabled=False))
uncached = losses(torch.autocast("cpu", enabled=False), cache_enabled=False)
for name, (first, last) in {"alone": alone, "inside one that is off": shielded, "there without a cache": uncached}.items():
    print(f"{name}: loss {first:.4f} -> {last:.4f}")
as_described = alone[1] < 0.8 * alone[0] and shielded[1] == shielded[0] and uncached == alone
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
