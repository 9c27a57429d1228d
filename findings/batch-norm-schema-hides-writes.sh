#!/bin/sh
# PyTorch's operator schemas leave out writes and aliases. native_batch_norm in training changes both running statistics, though its schema
# marks no argument as written and says that it is not mutable; the result of _unsafe_view, which every copying reshape ends with, shares the
# memory of its argument, and the schema declares no alias. Whoever decides by schemas what of a captured graph is constant goes wrong.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

aten = torch.ops.aten
print("torch", torch.__version__)
norm, view = aten.native_batch_norm.default, aten._unsafe_view.default
mean, variance = torch.zeros(3), torch.ones(3)
norm(torch.arange(12.0).view(4, 3), None, None, mean, variance, True, 0.1, 1e-5)
declared = norm._schema.is_mutable, [argument.name for argument in norm._schema.arguments if argument.alias_info is not None]
print("native_batch_norm: mutable, arguments with aliases:", declared, "; running mean and variance afterwards:", mean.tolist(), variance.tolist())
source = torch.arange(4.0)
result = view(source, [2, 2])
shares = result.data_ptr() == source.data_ptr()
aliases = [each.alias_info for each in [*view._schema.arguments, *view._schema.returns]]
print("_unsafe_view: shares memory:", shares, "; declared aliases:", aliases)
as_described = declared == (False, []) and bool(mean.any()) and not torch.equal(variance, torch.ones(3)) and shares and not any(aliases)
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
