"""The fast synthesis: teacher, ascent, refinement, and the back-ends that they run on."""
