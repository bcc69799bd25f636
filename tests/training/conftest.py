import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More don't help models so small, and runs in other processes have one, too. A run needs what it writes with."""
    for module in ("safetensors", "matplotlib"):
        pytest.importorskip(module)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
