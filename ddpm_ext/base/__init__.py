"""General helpers that do not depend on diffusion: argument checks, files, seeds, optional packages, ranks, types."""
