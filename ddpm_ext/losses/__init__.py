"""Training losses, timestep samplers, the likelihood of a model, and log-probabilities of a sampler's steps."""
