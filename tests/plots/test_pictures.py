"""plots.pictures: conversion to uint8, grids, strips, trajectories, GIFs."""

import numpy as np
import pytest
import torch

from ddpm_ext import plots
from ddpm_ext.plots.pictures import _BETWEEN as BETWEEN
from ddpm_ext.plots.pictures import _GAP as GAP

Image = pytest.importorskip("PIL.Image")


def test_to_uint8_is_guided_diffusions():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 9.0]).view(1, 2, 2, 2)
    expected = ((values + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    found = plots.to_uint8(values)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.numpy())
    assert np.array_equal(plots.to_uint8(values.numpy()), found)
    assert plots.to_uint8(torch.full((1, 1, 1, 1), torch.nan)).item() == 0
    assert plots.to_uint8(torch.ones(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)).shape == (2, 4, 5, 3)
    for bad in (torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="images: got"):
            plots.to_uint8(bad)


def test_grid_places_rows_and_enlarges():
    """Small images become visible, and colours stay."""
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * 10
    picture = plots.grid(images, columns=3, scale=2)
    assert picture.shape == (2 * (2 + GAP) + GAP, 3 * (2 + GAP) + GAP, 3)
    for index in range(5):
        top, left = GAP + index // 3 * (2 + GAP), GAP + index % 3 * (2 + GAP)
        assert (picture[top : top + 2, left : left + 2] == index * 10).all()
    assert (picture[-GAP - 1, -GAP - 1] == BETWEEN).all()  # the last place is empty
    assert min(plots.grid(np.zeros((1, 8, 8, 1), np.uint8)).shape[:2]) > 60
    assert plots.grid(np.zeros((1, 100, 100, 3), np.uint8)).shape[0] == 100 + 2 * GAP
    coloured = plots.grid(np.array([[[[255, 0, 10]]], [[[1, 2, 3]]]], np.uint8), columns=2, scale=1)
    assert coloured.shape == (1 + 2 * GAP, 2 + 3 * GAP, 3)
    assert coloured[GAP, [GAP, 2 * GAP + 1]].tolist() == [[255, 0, 10], [1, 2, 3]]


def test_grid_bad_input():
    image = np.zeros((1, 8, 8, 1), np.uint8)
    for images, options, message in (
        (image[:0], {}, "images: got none"),
        (image.repeat(4, 3), {}, "images: got 4 channels"),
        (image.astype(np.float32), {}, "images: got float32"),
        (image[0], {}, r"images: got uint8 of shape \(8, 8, 1\)"),
        (image, {"columns": 0}, "columns is 0"),
        (image, {"columns": 1.5}, "columns is 1.5"),
        (image, {"scale": 0}, "scale is 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plots.grid(images, **options)


def test_grid_is_written_as_png(tmp_path):
    """A picture that cannot be written keeps the old one."""
    images = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    plots.save_grid(images, tmp_path / "a.png")
    for _ in range(2):
        with Image.open(tmp_path / "a.png") as opened:
            assert opened.format == "PNG"
            assert np.array_equal(np.asarray(opened), plots.grid(plots.to_uint8(images)))
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises((TypeError, ValueError)):
            plots.save_picture(np.zeros((2, 2, 7), np.uint8), tmp_path / "a.png")


def test_strips_have_a_row_a_sample_and_labels(tmp_path):
    steps = [torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0, -1.0)]
    picture = plots.strips([plots.to_uint8(batch) for batch in steps], ["a", "b", "c", "d"], "title", scale=4)
    body = plots.grid(np.zeros((12, 8, 8, 1), np.uint8), columns=4, scale=4)
    assert picture.shape[1] == body.shape[1]
    head = picture.shape[0] - body.shape[0]
    assert (picture[:head] < 100).any()  # ink
    middle = picture[head + body.shape[0] // 2, GAP + 2 :: 32 + GAP, 0]
    assert middle[:4].tolist() == [0, 127, 255, 0]
    plots.save_strips(steps, ["a", "b", "c", "d"], "title", tmp_path / "a.png", scale=4)
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(np.asarray(opened), picture)
    with pytest.raises(ValueError, match="labels: got 1 for 4 steps"):
        plots.strips([plots.to_uint8(batch) for batch in steps], ["a"], "title")


def test_names_stand_left_of_their_rows():
    """Each in the middle of its row, all left of the pictures, which are the same as without names."""
    steps = [np.full((3, 8, 8, 1), value, np.uint8) for value in (255, 200)]
    plain = plots.strips(steps, ["", ""], "", scale=8)
    for row in range(3):
        names = ["", "", ""]
        names[row] = "a cat"
        picture = plots.strips(steps, ["", ""], "", scale=8, names=names)
        margin = picture.shape[1] - plain.shape[1]
        assert margin > 4 * GAP
        assert np.array_equal(picture[:, margin:], plain)
        found = np.flatnonzero((picture[:, :margin] < 128).all(axis=2).any(axis=1))
        middle = 56 + GAP + row * (64 + GAP) + 32
        assert abs((found.min() + found.max()) / 2 - middle) < 3
        assert not (picture[:, :GAP] < 128).any()
    with pytest.raises(ValueError, match="names: got 2 for 3 samples, expected as many, or none"):
        plots.strips(steps, ["", ""], "", names=["a", "b"])


def ink_columns(picture, rows):
    """Where dark letters stand on white, of the given rows"""
    return np.flatnonzero((picture[rows] < 128).all(axis=2).any(axis=0))


def test_labels_stand_above_their_columns():
    steps = [np.full((1, 8, 8, 1), value, np.uint8) for value in (0, 127, 255)]
    pitch = 64 + GAP
    for column in range(3):
        labels = ["", "", ""]
        labels[column] = "t = 5"
        picture = plots.strips(steps, labels, "")
        found = ink_columns(picture, slice(36, 54))
        assert GAP + column * pitch <= found.min() < found.max() < GAP + (column + 1) * pitch - GAP
        assert abs((found.min() + found.max()) / 2 - (GAP + column * pitch + 32)) < 2


def test_long_title_is_not_cut():
    images = [np.zeros((1, 8, 8, 1), np.uint8)]
    short, long = (plots.strips(images, [""], "m" * letters) for letters in (3, 40))
    assert short.shape[1] == 64 + 2 * GAP
    widths = [len(ink_columns(picture, slice(0, 30))) for picture in (short, long)]
    assert widths[1] > 10 * widths[0]  # 13 times, but for gaps between letters
    assert ink_columns(long, slice(0, 30)).max() < long.shape[1] - GAP


def pairs(samples=2, steps=3):
    """x_t and x_0, each image with a value of its own"""
    values = torch.arange(steps * samples).view(steps, samples, 1, 1, 1) / 20
    return list((values - 0.9).expand(-1, -1, 1, 8, 8)), list((values + 0.1).expand(-1, -1, 1, 8, 8))


def test_trajectory_is_two_strips():
    x_t, x_0 = pairs()
    picture = plots.trajectory(x_t, x_0, ["t = 9", "t = 4", "t = 0"], scale=2)
    height = picture.shape[0] // 2
    for half, steps in zip((picture[:height], picture[height:]), (x_t, x_0), strict=True):
        images = torch.stack(steps, 1).reshape(6, 1, 8, 8)  # a row a sample
        body = plots.grid(plots.to_uint8(images), columns=3, scale=2)
        assert np.array_equal(half[-len(body) :, : body.shape[1]], body)
        assert len(ink_columns(half, slice(0, 30))) and len(ink_columns(half, slice(36, 54)))


def test_trajectory_frames():
    x_t, x_0 = pairs(samples=4)
    frames = plots.trajectory_frames(x_t, x_0, ["t = 9", "t = 4", "t = 0"], scale=8)
    assert len(frames) == 3
    assert len({frame.shape for frame in frames}) == 1
    for frame, noisy, clean in zip(frames, x_t, x_0, strict=True):
        left, right = (plots.grid(plots.to_uint8(images), scale=8) for images in (noisy, clean))
        assert np.array_equal(frame[-len(left) :, : left.shape[1]], left)
        assert np.array_equal(frame[-len(right) :, -right.shape[1] :], right)
    assert not np.array_equal(frames[0][:30], frames[1][:30])  # the label


@pytest.mark.parametrize("long", ["cat", "a name that is wider than an image"])
def test_names_in_frames_stand_below_their_images(long):
    """Of x_t and of the predicted x_0, each in the middle; the images are whole, and no two names meet."""
    x_t, x_0 = pairs(samples=4)
    names = ["dog", long, "", "hen"]
    frames = plots.trajectory_frames(x_t, x_0, ["", "", ""], scale=8, names=names)
    assert len({frame.shape for frame in frames}) == 1
    for frame, *halves in zip(frames, x_t, x_0, strict=True):
        body = frame[32:]  # without the titles
        for images, side in zip(halves, (body[:, : body.shape[1] // 2], body[:, body.shape[1] // 2 :]), strict=True):
            pixels = plots.to_uint8(images)
            # A square of an image's grey that no other thing has: each image of `pairs` has a value of its own.
            corners = [np.argwhere((side == pixels[i, 0, 0]).all(axis=2)).min(0) for i in range(4)]
            for (top, left), image, name in zip(corners, pixels, names, strict=True):
                assert (side[top : top + 64, left : left + 64] == image[0, 0]).all()
                below = side[top + 64 : top + 64 + 18, left - 2 : left + 66]
                ink = np.flatnonzero((below > 200).all(axis=2).any(axis=0))
                assert bool(len(ink)) == bool(name)
                assert not name or abs((ink.min() + ink.max()) / 2 - 33.5) < 3
            assert corners[1][1] - corners[0][1] > 64 and corners[2][0] - corners[0][0] > 64 + 18
    assert (frames[0].shape[1] > 500) == (long != "cat")
    with pytest.raises(ValueError, match="names: got 1 for 4 samples, expected as many, or none"):
        plots.trajectory_frames(x_t, x_0, ["", "", ""], names=["cat"])


def test_frames_of_one_narrow_image_are_of_one_size():
    x_t, x_0 = pairs(samples=1)
    frames = plots.trajectory_frames(x_t, x_0, ["t = 1", "t = 1000000", "t = 0"], scale=1)
    assert len({frame.shape for frame in frames}) == 1


def test_trajectory_bad_input():
    x_t, x_0 = pairs()
    for draw in (plots.trajectory, plots.trajectory_frames):
        with pytest.raises(ValueError, match="x_0: got 2 steps, x_t has 3"):
            draw(x_t, x_0[:2], ["", "", ""])
        with pytest.raises(ValueError, match="x_0: got 0 steps"):
            draw([], [], [])
        with pytest.raises(ValueError, match="labels: got 1 for 3"):
            draw(x_t, x_0, [""])
    with pytest.raises(ValueError, match=r"x_0: got shape \(2, 1, 4, 4\)"):
        plots.trajectory_frames(x_t, [images[..., :4, :4] for images in x_0], ["", "", ""], scale=2)
    with pytest.raises(ValueError, match="images: got steps of shapes"):
        plots.strips([np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 4, 4, 1), np.uint8)], ["", ""], "")


def read_gif(path):
    """Frames, their milliseconds, how often they are shown (0: without end)"""
    with Image.open(path) as opened:
        assert opened.format == "GIF"
        frames, durations = [], []
        for number in range(opened.n_frames):
            opened.seek(number)
            frames.append(np.asarray(opened.convert("RGB")))
            durations.append(opened.info["duration"])
        return frames, durations, opened.info["loop"]


def test_gif_holds_frames_and_durations(tmp_path):
    generator = np.random.default_rng(0)
    grey = [generator.integers(256, size=(20, 30, 1), dtype=np.uint8).repeat(3, 2) for _ in range(3)]
    few = [np.array([[[255, 0, 7], [3, 200, 1]]], np.uint8).repeat(20, 0), np.full((20, 2, 3), 9, np.uint8)]
    for frames, seconds, each in ((grey, 3, 1000), (grey, 0.1, 30), (few, 0.001, 20)):
        plots.save_gif(frames, tmp_path / "a.gif", seconds=seconds)
        found, durations, loop = read_gif(tmp_path / "a.gif")
        assert durations == [each] * (len(frames) - 1) + [2000]
        assert loop == 0
        assert len(found) == len(frames)
        for ours, theirs in zip(found, frames, strict=True):  # up to 256 colours: exactly
            assert np.array_equal(ours, theirs)
        content = (tmp_path / "a.gif").read_bytes()
        plots.save_gif(frames, tmp_path / "a.gif", seconds=seconds)
        assert (tmp_path / "a.gif").read_bytes() == content
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    many = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(50)), 2)  # colours: they are only near
    plots.save_gif([many], tmp_path / "a.gif")
    assert abs(read_gif(tmp_path / "a.gif")[0][0].astype(int) - many).mean() < 8
    frames = [np.full((4, 4, 3), value, np.uint8) for value in (1, 1, 1, 2, 3)]  # of which equal ones become one
    plots.save_gif(frames, tmp_path / "a.gif", seconds=1)
    found, durations, _ = read_gif(tmp_path / "a.gif")
    assert ([frame[0, 0, 0] for frame in found], durations) == ([1, 2, 3], [600, 200, 2000])


def test_gif_bad_input(tmp_path):
    frame = np.zeros((2, 2, 3), np.uint8)
    for frames, options, message in (
        ([], {}, "frames: got none"),
        ([frame, frame[:1]], {}, "frames: got shapes"),
        ([frame[..., :1]], {}, "frames: got uint8 of shape"),
        ([frame.astype(float)], {}, "frames: got float64"),
        ([frame], {"seconds": 0}, "seconds: got 0"),
        ([frame], {"seconds": float("nan")}, "seconds: got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.save_gif(frames, tmp_path / "a.gif", **options)
    assert not list(tmp_path.iterdir())
