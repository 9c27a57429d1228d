"""Plain PyTorch twins of the operators, and the published loop: the oracle of everything else. Runs on any device."""
