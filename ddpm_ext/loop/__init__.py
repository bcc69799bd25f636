"""The sampling loop, which turns noise into samples, and its options."""
