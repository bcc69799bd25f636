"""Names of samplers and spacings that people type and other libraries use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any

# Other names than ours, by their letters and digits alone. Case, punctuation and AFFIXES need no entry.
OTHER_NAMES = {
    "eulera": "euler_ancestral",
    "dpm2a": "dpm_2_ancestral",
    "dpmpp2sa": "dpmpp_2s_ancestral",
    "dpmsolvermultistep": "dpmpp_2m",
    "unipcbh2": "unipc",
    "pndm": "plms",
    "ays": "align_your_steps",
}
# What k-diffusion, diffusers and ComfyUI put around a name: k_euler, sample_heun, LMSDiscreteScheduler.
AFFIXES = ("^$", "^(k|sample)|(scheduler|gpu)$", "^(k|sample)|(discrete|multistep)?(scheduler)?$")
SHOWN = 3


def find_name(given: str, known: Collection[str]) -> str | None:
    """The one of the known names that is meant; None where none is. A known name is itself."""
    if given in known:
        return given
    own = {_key(name): name for name in known}
    own |= {key: name for key, name in OTHER_NAMES.items() if name in known}
    return next((own[key] for affix in AFFIXES if (key := re.sub(affix, "", _key(given))) in own), None)


def nearest_names(given: str, known: Collection[str]) -> str:
    """Those that look most like it, for an error's text."""
    own = {_key(name): name for name in known}
    near = difflib.get_close_matches(_key(given), own, SHOWN, cutoff=0.0)
    return ", ".join(repr(own[key]) for key in near)


def check_options(given: Collection[str], known: Collection[str], what: str) -> None:
    """Raises TypeError, with the names that look most like it, for an option that is not known.

    what: what takes the options, for the message.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"{name} is no option of {what}, expected one such as {nearest_names(name, known)}")


def sampler_and_spacing(
    given: str, spacing: Any, samplers: Collection[str], spacings: Collection[str]
) -> tuple[str, str | None]:
    """The known names of a sampler, which may have a spacing after it as in "DPM++ 2M Karras", and of the spacing.

    Args:
        spacing: the one that is given beside it. One that is not known stays as it is.

    Raises:
        ValueError: an unknown sampler, or one with another spacing in its name.
    """
    if isinstance(spacing, str):
        spacing = find_name(spacing, spacings) or spacing
    sampler = find_name(given, samplers)
    if sampler is not None:
        return sampler, spacing
    key = _key(given)
    for name in sorted(spacings, key=len, reverse=True):  # "beta_sigmas" before "sigmas"
        sampler = find_name(key.removesuffix(_key(name)), samplers) if key.endswith(_key(name)) else None
        if sampler is not None:
            if spacing not in (None, name):
                raise ValueError(
                    f"spacing is {spacing!r} beside sampler {given!r}, expected {name!r} or none beside it"
                )
            return sampler, name
    raise ValueError(f"sampler is {given!r}, expected a name such as {nearest_names(given, samplers)}")


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))
