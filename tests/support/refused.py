"""Checks that a call is refused with an error."""

import pytest


def refused(error, message, call, /, *arguments, **options):
    """Checks that call(*arguments, **options) raises `error`, whose text contains the pattern `message`."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)
