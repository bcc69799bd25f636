"""ddpm_ext.demo, and the eager step that the fused one is compared with."""

import numpy as np
import pytest
import torch

from ddpm_ext import GaussianDiffusion
from ddpm_ext.demo.eager import EagerDiffusion

SHAPE = (5, 2, 4, 3)


def test_eager_step_is_the_same_mathematics(normal, device):
    eager, ours = EagerDiffusion(), GaussianDiffusion()
    x, predicted = normal(2, *SHAPE)
    t = torch.tensor([0, 1, 500, 998, 999], device=device)
    torch.manual_seed(1)
    stepped = eager.p_sample(predicted, x, t)
    noised = eager.q_sample(x, t)
    torch.manual_seed(1)
    noise = [torch.randn(SHAPE, device=device) for _ in range(2)]
    # The largest difference measured was 2e-6: the eager form rounds each coefficient to float32.
    assert torch.allclose(stepped, ours.p_sample(lambda x_t, t: predicted, x, t, noise=noise[0]), atol=1e-5)
    assert torch.allclose(noised, ours.q_sample(x, t, noise=noise[1]), atol=1e-5)


def test_demo_writes_three_pictures(tmp_path):
    for module in ("diffusers", "safetensors"):
        pytest.importorskip(module)
    image = pytest.importorskip("PIL.Image")
    from ddpm_ext.demo.__main__ import draw_shapes

    paths = draw_shapes(tmp_path / "demo", steps=4)
    assert [path.name for path in paths] == ["samples.png", "guidance.png", "trajectory.png"]
    sizes = []
    for path in paths:
        with image.open(path) as opened:
            sizes.append(opened.size)
            assert np.asarray(opened.convert("L")).std() > 10
    assert min(sizes[0]) > 500  # eight by ten shapes, each visible
    assert sizes[1][0] == sizes[0][0]  # a column for each class


def test_demo_errors_are_one_sentence(tmp_path, capsys):
    pytest.importorskip("tqdm")
    from ddpm_ext.demo.__main__ import main

    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 2
    written = capsys.readouterr().err
    assert written.startswith("demo: out: cannot write")
    assert written.count("\n") == 1
