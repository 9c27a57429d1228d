"""Files: written whole, read without running anything from them, decoded."""
