"""The notebooks' cells run from top to bottom, and hold what they printed and drew."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

# What each prints, and how many pictures it holds.
BOOKS = {"tutorial": ("largest difference: ", "6 calls, distance to"), "diffusers": ("largest difference: ", "fitted")}


def cells(root, name):
    return json.loads((root / "examples" / f"{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", BOOKS)
def test_it_holds_its_pictures(root, name):
    outputs = [output for cell in cells(root, name) for output in cell.get("outputs", [])]
    said = "".join(line for output in outputs for line in output.get("text", []))
    assert all(words in said for words in BOOKS[name])
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) == 3 and all(len(picture) > 3000 for picture in pictures)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
@pytest.mark.parametrize("name", BOOKS)
def test_its_cells_run(root, tmp_path, monkeypatch, capsys, name):
    """With a denoiser that takes no time in the network's place."""
    import matplotlib
    from diffusers import UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput

    def quick(self, sample, timestep, return_dict=True, **_):
        t = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1, 1, 1)
        noise = sample * (t + 1) / 1000  # all of it at first
        return UNet2DOutput(noise) if return_dict else (noise,)

    monkeypatch.setattr(UNet2DModel, "forward", quick)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells(root, name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    assert all(words in capsys.readouterr().out for words in BOOKS[name][:1])
    matplotlib.pyplot.close("all")
