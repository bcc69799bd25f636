"""Which rank a process is, and which GPU it takes."""

import pytest

from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.ranks import Ranks


def test_rank_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.ranks() == Ranks(0, 1, 0)
    for values, expected in (
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, Ranks(5, 8, 1)),
        ({"WORLD_SIZE": "8", "RANK": "5"}, Ranks(5, 8, 5)),
    ):
        with monkeypatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            assert distributed.ranks() == expected
    for values, message in (
        ({"WORLD_SIZE": "2"}, r"RANK: got nothing in the environment, expected a whole number in \[0, 2\)"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: got 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got two"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK: got -1"),
    ):
        with monkeypatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                distributed.ranks()


def test_each_rank_has_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Ranks(rank, 4, rank).device("cuda") for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Ranks(3, 4, 3).device("cuda:0") == "cuda:0"
    assert Ranks(3, 4, 3).device("cpu") == "cpu"
    assert Ranks().device("cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Ranks(1, 2, 1).device("cuda") == "cuda"  # the command refuses it later, with the reason
