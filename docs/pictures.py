"""Draws the pictures of the documentation: `make pictures`."""

from pathlib import Path

from ddpm_ext import GaussianDiffusion
from ddpm_ext.samplers import ddim
from ddpm_ext.spacing import make_grid, spaced_timesteps

FOLDER = Path(__file__).resolve().parent / "pictures"


def main() -> None:
    gd = GaussianDiffusion(1000)
    grid = make_grid(gd.alphas_cumprod, spaced_timesteps(1000, 50, "trailing"), betas=gd.betas)
    ddim(grid, eta=0.5).plot(FOLDER / "step_table.png")


if __name__ == "__main__":
    main()
