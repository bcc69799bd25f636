"""How the samples of a run are divided into files."""

from support.exact_run import COUNT, SHAPE, SIZE

from ddpm_ext.bulk.shards import Shards


def test_shards(tmp_path):
    shards = Shards(tmp_path, COUNT, SIZE, SHAPE)
    assert len(shards) == 6
    assert [i for index in range(6) for i in shards.ids(index)] == list(range(COUNT))
    assert shards.path(1) == tmp_path / "shards" / "000000004-000000007.npy"
    assert shards.path(5).name == "000000020-000000022.npy"
    assert shards.missing() == list(range(6))
