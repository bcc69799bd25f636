"""Measurements of speed and quality; a package, so that `python -m benchmarks.gpu` finds no other folder."""
