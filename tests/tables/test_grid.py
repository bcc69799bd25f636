"""A grid of a schedule's own timesteps."""

import pytest
import torch

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.schedules import make_betas

LEVELS = (1 - make_betas("scaled_linear", 1000)).cumprod(0)


def test_grid_of_neighbours_has_the_schedules_betas():
    betas = make_betas("linear", 1000)
    levels = (1 - betas).cumprod(0)
    grid = make_grid(levels, [999, 998, 500, 1, 0], betas=betas)
    assert torch.equal(grid.betas[[0, 3, 4]], betas[[999, 1, 0]])
    torch.testing.assert_close(grid.betas[[1, 2]], 1 - levels[[998, 500]] / levels[[500, 1]], rtol=1e-15, atol=0)
    assert torch.equal(grid.alphas_cumprod, torch.cat([levels[[999, 998, 500, 1, 0]], levels.new_ones(1)]))
    last = make_grid(levels, [1, 0], betas=betas, final=levels[0].item())
    assert last.betas[-1] == 0  # the last step does not change the level


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: make_grid(LEVELS, [5, 5]), ValueError, "the same timestep twice"),
        (lambda: make_grid(LEVELS, [1000]), ValueError, "timestep reaches from 1000 to 1000, expected all in 0 <="),
        (lambda: make_grid(LEVELS, [0.5]), TypeError, "timestep has dtype torch.float32, expected int64"),
        (lambda: make_grid(LEVELS, []), TypeError, "timestep has dtype"),
        (lambda: make_grid(LEVELS, torch.zeros(2, 2, dtype=torch.int64)), ValueError, r"timestep has shape \(2, 2\)"),
        (lambda: make_grid(LEVELS + 1, [5]), ValueError, "alphas_cumprod reaches from"),
        (lambda: make_grid(LEVELS, [5], final=1.5), ValueError, "final is 1.5"),
        (lambda: make_grid(LEVELS, [5], betas=LEVELS[:3]), ValueError, r"betas have shape \(3,\)"),
        (lambda: make_grid([0.5], [0]), TypeError, "alphas_cumprod is a list"),
    ],
)
def test_bad_grids(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_part_of_a_grid():
    """It is the grid of some of the steps, which follow one on another."""
    grid = make_grid(LEVELS, [4, 2, 1, 0])
    part = grid[1:3]
    assert part.timestep.tolist() == [2, 1] and torch.equal(part.alphas_cumprod, grid.alphas_cumprod[1:4])
    for steps in (slice(None, None, 2), slice(None, None, -1)):
        with pytest.raises(ValueError, match=f"grid is sliced with a step of {steps.step}, expected none"):
            grid[steps]
