"""A package, so that `python -m benchmarks.gpu` can't find another folder of this name."""
