"""`python -m ddpm_ext.demo`: draws shapes with the model that comes with the package, and times a step."""
