#!/bin/sh
# In most of timm's convolutional networks the BatchNorm layers are nn.BatchNorm2d by isinstance, and hold the activation behind them too.
# torch.nn.SyncBatchNorm.convert_sync_batchnorm, as PyTorch recommends for several GPUs, replaces them by layers without it: the converted
# network has the same weights, loads and saves the same checkpoints, raises nothing, and computes other logits, since all its ReLU or SiLU
# are gone. So is any code that replaces layers found by isinstance, or takes what a BatchNorm layer returns for what it normalised.
# timm.layers.convert_sync_batchnorm keeps the activations; timm's ResNets have plain BatchNorm layers and convert well with either.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.2" "timm==1.0.31" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

print("torch", torch.__version__, "timm", timm.__version__)
torch.manual_seed(0)
images = torch.randn(4, 3, 64, 64)
changed = {}
for name in ("efficientnet_b0", "mobilenetv2_100", "densenet121", "resnetv2_50", "resnet18"):
    network = timm.create_model(name, num_classes=10)
    with torch.no_grad():
        network.train()(images)  # running statistics of its own
        network.eval()
        logits = network(images)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
        of_timm = convert_sync_batchnorm(copy.deepcopy(network)).eval()
        off = [float((each(images) - logits).abs().max() / logits.abs().max()) for each in (converted, of_timm)]
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    hold = sum(not isinstance(getattr(layer, "act", nn.Identity()), nn.Identity) for layer in layers)
    same = converted.state_dict().keys() == network.state_dict().keys()
    print(f"{name}: {hold} of {len(layers)} BatchNorm layers hold an activation; logits off by {off[0]:.1e} (PyTorch), {off[1]:.1e} (timm)")
    changed[name] = off[0] > 0.1 and same and off[1] < 1e-5 if hold else max(off) < 1e-5
as_described = all(changed.values())
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
