#!/bin/sh
# torch.compile on a CPU: code that was generated for AVX-512 is taken from the cache on a processor (or with a limit, as here) that offers AVX2 only,
# compiled again for its half as wide vectors, and silently writes only a part of the result. A cache folder in a home directory that
# machines of two kinds share is enough. The other way round the process was seen to die, which is not tried here.
# Only where the processor has AVX-512.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy" setuptools
cat > "$folder/step.py" <<'PYTHON'
import torch


@torch.compile
def step(x):
    return (x.double() * 1.0).float() + torch.sin(x) * 2


x = torch.arange(100, dtype=torch.float32).reshape(10, 10)
error = float((step(x) - (x + torch.sin(x) * 2)).abs().max())
print(torch.__version__, torch.backends.cpu.get_cpu_capability(), "largest error", error)
PYTHON
export TORCHINDUCTOR_CACHE_DIR="$folder/cache"
first=$("$folder/venv/bin/python" "$folder/step.py")
second=$(ATEN_CPU_CAPABILITY=avx2 "$folder/venv/bin/python" "$folder/step.py")
fresh=$(ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR="$folder/other" "$folder/venv/bin/python" "$folder/step.py")
printf '%s\nthen, with the same cache: %s\nwith a cache of its own:   %s\n' "$first" "$second" "$fresh"
case "$first" in *AVX512*) ;; *) echo "needs AVX-512"; exit 2 ;; esac
small() { echo "$1" | awk '{ exit !($NF < 1e-3) }'; }
if small "$first" && ! small "$second" && small "$fresh"; then echo "as described"; else echo "CHANGED"; exit 1; fi
