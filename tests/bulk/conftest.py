import pytest
from support.exact_run import COUNT, make_draw


@pytest.fixture(scope="session")
def truth():
    """All samples, drawn in one batch."""
    return make_draw()(0, COUNT)
