"""General helpers that know nothing of diffusion: argument checks, files, seeds, optional packages, ranks, types."""
