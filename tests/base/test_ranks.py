"""Which rank a process is, and which GPU it takes."""

import pytest

from ddpm_ext.base.ranks import Ranks, ranks


@pytest.mark.parametrize(
    ("size", "rank", "local", "expected"),
    [
        (None, None, None, Ranks(0, 1, 0)),
        ("8", "5", "1", Ranks(5, 8, 1)),
        ("8", "5", None, Ranks(5, 8, 5)),
        ("2", None, None, r"RANK: got nothing in the environment, expected a whole number in \[0, 2\)"),
        ("0", None, None, "WORLD_SIZE: got 0"),
        ("2", "1", "-1", "LOCAL_RANK: got -1"),
    ],
)
def test_rank_from_the_environment(monkeypatch, size, rank, local, expected):
    for name, value in {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": local}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if isinstance(expected, Ranks):
        assert ranks() == expected
    else:
        with pytest.raises(ValueError, match=expected):
            ranks()


def test_each_rank_has_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Ranks(3 + i, 7, i).device("cuda") for i in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert [Ranks(3, 4, 3).device(name) for name in ("cuda:0", "cpu")] == ["cuda:0", "cpu"]
    assert Ranks().device("cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Ranks(1, 2, 1).device("cuda") == "cuda"  # the command refuses it later, with the reason
