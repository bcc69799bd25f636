"""From noise to samples: the sampling loop and its options."""
