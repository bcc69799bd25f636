"""The inputs and results of the extended step beside those of a plain step, declared once for Python.

A test holds the signatures of ops.extended_step and of its twin in `reference`, and the compiled operator's schema, to
this list; csrc/core/extras.def is the list of the C++ side.
"""

from __future__ import annotations

from ddpm_ext.ops.input_kinds import Kind

__all__ = ["EXTENDED_INPUTS"]

# In the order of the compiled operator's arguments.
EXTENDED_INPUTS: dict[str, Kind] = {
    "uncond_output": Kind.OF_MODEL,
    "output_scale": Kind.PER_SAMPLE,
    "model_variance": Kind.OF_MODEL,
    "log_variance": Kind.FLAG,
    "x_start": Kind.LIKE_X,
    "x_start_scale": Kind.PER_SAMPLE,
    "history": Kind.LIKE_X,
    "gradient": Kind.LIKE_X,
    "known": Kind.LIKE_X,
    "mask": Kind.LIKE_X,
    "out_copy": Kind.RESULT,
    "x0_out": Kind.RESULT,
}
