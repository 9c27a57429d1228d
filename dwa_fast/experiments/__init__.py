"""Experiments: sets made once, students measured on them once, and the tables of the paper as lists of such cells."""
