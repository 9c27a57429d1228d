"""Distilled sets on disk: made batch by batch, resumed, verified, exchanged with other programs."""
