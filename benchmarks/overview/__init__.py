"""What the README shows: the noise and a step with both kinds of heap, and whole loops with real U-Nets."""
