#!/bin/sh
# torch.optim.SGD and AdamW with fused=True on a CPU walk parameter, gradient and state in the order of their memory, whatever their strides
# are. A network that was made channels-last and resumes from a checkpoint whose state is contiguous (or gets such gradients) takes wrong
# steps, without an error; the same optimisers with fused=False are right, and on CUDA the mismatch is refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "torch==2.14.1" "numpy"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
optimisers = {"SGD": lambda weights, fused: torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=fused)}
optimisers["AdamW"] = lambda weights, fused: torch.optim.AdamW(weights, lr=0.1, fused=fused)


def weights_after(make, fused, state_is_contiguous):
    """Two steps of a channels-last weight, with its state loaded from a checkpoint between them."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
    optimiser = make([weight], fused)
    gradient = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        weight.grad = gradient.clone()
        optimiser.step()
        content = optimiser.state_dict()
        if state_is_contiguous:
            for values in content["state"].values():
                values.update({name: value.contiguous() for name, value in values.items() if torch.is_tensor(value)})
        optimiser.load_state_dict(content)
    return weight.detach().contiguous()


as_described = True
for name, make in optimisers.items():
    exact = weights_after(make, False, False)
    errors = {
        (fused, contiguous): float((weights_after(make, fused, contiguous) - exact).abs().max())
        for fused in (False, True)
        for contiguous in (False, True)
    }
    for (fused, contiguous), error in errors.items():
        print(f"{name}, fused={fused}, state {'contiguous' if contiguous else 'channels-last'}: weights off by {error:.1e}")
    as_described &= errors.pop((True, True)) > 0.01 and max(errors.values()) < 1e-5
print("as described" if as_described else "CHANGED")
sys.exit(0 if as_described else 1)
PYTHON
