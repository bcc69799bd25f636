"""A check of a refusal."""

import pytest


def refused(error, message, call, /, *arguments, **options):
    """call(*arguments, **options) raises the error, in whose text the pattern `message` is found."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)
