"""diffusers' schedulers. Their coefficients are float32, so the rows here are made from those: see alphas.py."""
