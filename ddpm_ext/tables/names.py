"""Finds samplers and spacings by names in other spellings, as people type them or other libraries write them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

# {another library's name, reduced to letters and digits: ddpm_ext's name}. A name that differs from ddpm_ext's only in
# case, punctuation or AFFIXES needs no entry.
OTHER_NAMES = {
    "eulera": "euler_ancestral",
    "dpm2a": "dpm_2_ancestral",
    "dpmpp2sa": "dpmpp_2s_ancestral",
    "dpmsolvermultistep": "dpmpp_2m",
    "unipcbh2": "unipc",
    "pndm": "plms",
    "ays": "align_your_steps",
}
# Patterns of the prefixes and suffixes that k-diffusion, diffusers and ComfyUI add to a name: k_euler, sample_heun,
# LMSDiscreteScheduler. They are tried in this order; the first one removes nothing.
AFFIXES = ("^$", "^(k|sample)|(scheduler|gpu)$", "^(k|sample)|(discrete|multistep)?(scheduler)?$")
MOST_SUGGESTIONS = 3  # the most names that an error suggests


def find_name(input_name: str, known: Collection[str]) -> str | None:
    """The known name that `input_name` means, or None."""
    if input_name in known:
        return input_name
    names = {_key(name): name for name in known}
    names |= {key: name for key, name in OTHER_NAMES.items() if name in known}
    return next((names[key] for affix in AFFIXES if (key := re.sub(affix, "", _key(input_name))) in names), None)


def nearest_names(input_name: str, known: Collection[str]) -> str:
    """The known names that look most like `input_name`, as text for an error message."""
    names = {_key(name): name for name in known}
    similar_keys = difflib.get_close_matches(_key(input_name), names, MOST_SUGGESTIONS, cutoff=0.0)
    return ", ".join(repr(names[key]) for key in similar_keys)


def check_options(names: Collection[str], known: Collection[str], taker: str) -> None:
    """Raises TypeError for an unknown option; the message has the known names that look most like it.

    taker: the function or object that takes the options, for the message.
    """
    for name in names:
        if name not in known:
            raise TypeError(f"{name} is no option of {taker}, expected one such as {nearest_names(name, known)}")


def sampler_and_spacing(
    input_name: str, spacing: Any, samplers: Collection[str], spacings: Collection[str]
) -> tuple[str, str | None]:
    """The known names of a sampler and its spacing, from names as people type them.

    Args:
        input_name: the sampler's name. It may end with the name of a spacing, as in "DPM++ 2M Karras".
        spacing: the caller's spacing or None. A spacing that is no known name, such as "ddim25", is returned unchanged:
            the caller decides whether it is valid.

    Raises:
        ValueError: an unknown sampler, or a sampler's name that ends with a spacing other than `spacing`.
    """
    if isinstance(spacing, str):
        spacing = find_name(spacing, spacings) or spacing
    sampler = find_name(input_name, samplers)
    if sampler is not None:
        return sampler, spacing
    key = _key(input_name)
    for name in sorted(spacings, key=len, reverse=True):  # "linear_quadratic" before "quadratic"
        sampler = find_name(key.removesuffix(_key(name)), samplers) if key.endswith(_key(name)) else None
        if sampler is not None:
            if spacing not in (None, name):
                raise ValueError(f"spacing is {spacing!r} with sampler {input_name!r}, expected {name!r} or None")
            return sampler, name
    raise ValueError(f"sampler is {input_name!r}, expected a name such as {nearest_names(input_name, samplers)}")


def _key(name: str) -> str:
    """A name reduced to lower-case letters and digits, with "pp" for "++"."""
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))
