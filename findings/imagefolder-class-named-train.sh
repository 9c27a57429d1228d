#!/bin/sh
# Hugging Face's imagefolder takes a class folder called "train" (CIFAR-100 has such a class) for a split: of the class folders
# train, cat and dog it loads one, without labels, and says nothing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "datasets==5.2.0" "pillow==13.0.0"
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import pathlib
import sys

import datasets
from PIL import Image


def load(*classes):
    root = pathlib.Path("-".join(classes))
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), (60 * number, 10 * index, 0)).save(root / name / f"{index}.png")
    return datasets.load_dataset("imagefolder", data_dir=str(root))


datasets.disable_progress_bars()
print("datasets", datasets.__version__)
good, bad = load("bus", "cat", "dog"), load("train", "cat", "dog")
for name, found in (("bus, cat, dog", good), ("train, cat, dog", bad)):
    print(f"class folders {name} of two images each:", {split: (len(part), sorted(part.features)) for split, part in found.items()})
as_described = (
    {split: (len(part), sorted(part.features)) for split, part in good.items()} == {"train": (6, ["image", "label"])}
    and {split: (len(part), sorted(part.features)) for split, part in bad.items()} == {"train": (2, ["image"])}
)
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
