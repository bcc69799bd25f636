"""`python -m ddpm_ext.demo`: draws digits with the model that comes with the package, and times a step."""
