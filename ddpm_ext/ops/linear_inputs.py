"""The inputs and results of the linear step beside those of a plain step, declared once for Python.

A test holds the signatures of ops.linear_step and of its twin in `reference`, and the compiled operator's schema, to
this list; csrc/core/linear.def is the list of the C++ side.
"""

from __future__ import annotations

from ddpm_ext.ops.input_kinds import Kind

__all__ = ["LINEAR_INPUTS"]

# In the order of the compiled operator's arguments.
LINEAR_INPUTS: dict[str, Kind] = {
    "uncond_output": Kind.OF_MODEL,
    "output_scale": Kind.PER_SAMPLE,
    "x_start": Kind.LIKE_X,
    "x_start_scale": Kind.PER_SAMPLE,
    "history1": Kind.LIKE_X,
    "history2": Kind.LIKE_X,
    "history3": Kind.LIKE_X,
    "out_copy": Kind.RESULT,
    "x0_out": Kind.RESULT,
    "history_out": Kind.RESULT,
}
