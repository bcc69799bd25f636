"""What knows nothing of diffusion: checks of arguments, files, seeds, optional packages, ranks."""
