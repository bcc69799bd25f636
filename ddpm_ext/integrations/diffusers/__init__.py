"""diffusers' schedulers. Their coefficients are float32, and so the rows here start from those: see `jumps`."""
