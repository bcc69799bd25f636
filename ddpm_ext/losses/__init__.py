"""Training losses, timestep samplers, and the likelihood of a model."""
