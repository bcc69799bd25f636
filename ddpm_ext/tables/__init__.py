"""A diffusion as numbers: schedules, spacings and the rows of step tables. No model and no samples."""
