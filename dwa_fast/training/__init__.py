"""Training of teachers and students: squeeze, validate, relabel."""
