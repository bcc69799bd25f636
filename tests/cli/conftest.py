import pytest
from support.command_line import save_pets, save_tiny

NEEDED = ("diffusers", "matplotlib", "PIL.Image", "safetensors", "sklearn", "tqdm")


@pytest.fixture(autouse=True, scope="session")
def extras():
    """What nearly every command needs."""
    for module in NEEDED:
        pytest.importorskip(module)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pets(tmp_path_factory):
    return save_pets(tmp_path_factory.mktemp("model") / "pets")
