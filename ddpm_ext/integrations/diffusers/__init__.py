"""diffusers' schedulers. The rows are made from their float32 coefficients: see alphas.py."""
