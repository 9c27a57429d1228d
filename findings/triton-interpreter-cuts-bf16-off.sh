#!/bin/sh
# A kernel that casts float32 to bfloat16 rounds to nearest when it is compiled (cvt.rn in its PTX), and rounds towards zero under
# TRITON_INTERPRET=1: every result is at or below the right one, twice as wrong at worst, and biased. Subnormal
# numbers become 0 (powers of two) or another number, 1e-40 one that is ten times as large. So an interpreted test of a bf16 kernel neither
# proves the rounding nor may demand it, and sums over many interpreted casts drift. float16 is cast as PyTorch does.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "triton==3.8.0" "numpy"
cat > "$folder/kernels.py" <<'PYTHON'
import triton
import triton.language as tl


@triton.jit
def to_bf16(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


@triton.jit
def to_fp16(x, y, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y + at, tl.load(x + at).to(tl.float16))
PYTHON
cat > "$folder/compiled.py" <<'PYTHON'
import re

import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

source = ASTSource(fn=kernels.to_bf16, signature={"x": "*fp32", "y": "*bf16", "size": "constexpr"}, constexprs={"size": 256})
casts = set(re.findall(r"cvt\.\S*bf16\S*", triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
print("casts of the compiled kernel:", *sorted(casts))
raise SystemExit(0 if casts and all(cast.startswith("cvt.rn.") for cast in casts) else 1)
PYTHON
cat > "$folder/interpreted.py" <<'PYTHON'
import kernels
import torch
import triton

print("torch", torch.__version__, "triton", triton.__version__)
torch.manual_seed(0)
size = 4096
x = torch.rand(size) + 0.5


def cast(kernel, values, dtype):
    result = torch.empty(size, dtype=dtype)
    kernel[(1,)](values, result, size)
    return result


def errors(values, rounded):
    relative = (rounded.double() - values.double()) / values.double()
    return float(relative.abs().max() * 256), float(relative.mean() * 256)


found = {}
for name, kernel, dtype in (("bfloat16", kernels.to_bf16, torch.bfloat16), ("float16", kernels.to_fp16, torch.float16)):
    found[name] = cast(kernel, x, dtype)
    print(f"{name}: {float((found[name] != x.to(dtype)).float().mean()):.0%} of the results are not PyTorch's")
worst, mean = errors(x, found["bfloat16"])
worst_right, mean_right = errors(x, x.bfloat16())
print(f"relative error in units of 2^-8: interpreted at most {worst:.2f}, mean {mean:+.3f}; PyTorch {worst_right:.2f}, {mean_right:+.3f}")
small = torch.tensor([2.0**-127, 1e-40]).repeat(size // 2)
down = cast(kernels.to_bf16, small, torch.bfloat16)[:2].tolist()
print("subnormal numbers: {:.2e}, {:.2e}; as bfloat16 {:.2e}, {:.2e}".format(*small[:2].tolist(), *down))
as_described = (
    0.4 < (found["bfloat16"] != x.bfloat16()).float().mean() < 0.6
    and torch.equal(found["float16"], x.half())
    and bool((found["bfloat16"].float() <= x).all())
    and mean < -0.2 < -0.01 < mean_right
    and down[0] == 0
    and down[1] > 1e-39
)
raise SystemExit(0 if as_described else 1)
PYTHON
if (cd "$folder" && TRITON_CACHE_DIR="$folder/cache" venv/bin/python compiled.py && TRITON_INTERPRET=1 venv/bin/python interpreted.py); then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi
