"""Networks: by name, from checkpoints of any program, without wrappers; their BatchNorm layers."""
