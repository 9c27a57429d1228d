#!/bin/sh
# torch.load does not compare the checksums that torch.save writes into its archive: of a checkpoint in which one bit of a tensor has been
# flipped on the disk it gives a wrong weight and no error, where zipfile.testzip names the damaged part.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy==2.4.6"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import pathlib
import sys
import zipfile

import torch

path = pathlib.Path("weights.pt")
weights = torch.arange(1000, dtype=torch.float32)
torch.save({"weights": weights}, path)
content = bytearray(path.read_bytes())
content[content.index(weights.numpy().tobytes()) + 4 * 500 + 2] ^= 1 << 6  # a bit of the 500th value
path.write_bytes(content)
with zipfile.ZipFile(path) as archive:
    damaged = archive.testzip()
loaded = torch.load(path, weights_only=True)["weights"]
print("torch", torch.__version__)
print("zipfile.testzip:", damaged)
print("torch.load: no error; value 500 is", float(loaded[500]), "and was", float(weights[500]))
as_described = damaged == "weights/data/0" and int((loaded != weights).sum()) == 1
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
