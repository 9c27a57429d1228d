"""Files: atomic writes, safe reads, image decoding."""
