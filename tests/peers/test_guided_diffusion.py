"""guided-diffusion's choice of timesteps. Its steps are in test_accelerated_guided_diffusion.py, whose objects take
them by our rows; test_accelerated_guided_diffusion_costs.py has their images beside those of our own loops."""

import pytest
from support.choices import for_many

from ddpm_ext.tables.spacing import section_timesteps

respace = pytest.importorskip("guided_diffusion.respace")


@for_many(100)
def test_sections(choose):
    """space_timesteps, whose positions are added up in floating point."""
    timesteps = choose.integer(10, 4000)
    counts = choose.several(lambda: choose.integer(1, timesteps // 5), 1, 5)
    assert section_timesteps(timesteps, counts).flip(0).tolist() == sorted(respace.space_timesteps(timesteps, counts))
