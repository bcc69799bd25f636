"""The mixins for schedulers and pipelines of diffusers, TableScheduler, and tuning of step tables for pipelines."""
