"""`python -m ddpm_ext.demo`: digits by the model that comes with the package, and what a step costs."""
