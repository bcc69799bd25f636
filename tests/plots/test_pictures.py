"""plots.pictures: conversion to uint8, grids, strips, trajectories, GIFs."""

import numpy as np
import pytest
import torch
from support.refused import refused

from ddpm_ext import plots
from ddpm_ext.plots.pictures import _GAP as GAP
from ddpm_ext.plots.pictures import _GAP_COLOUR as BETWEEN

Image = pytest.importorskip("PIL.Image")


def test_to_uint8_is_guided_diffusions():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 9.0]).view(1, 2, 2, 2)
    expected = ((values + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    found = plots.to_uint8(values)
    assert found.dtype == np.uint8 and np.array_equal(found, expected.numpy())
    assert np.array_equal(plots.to_uint8(values.numpy()), found)
    assert plots.to_uint8(torch.full((1, 1, 1, 1), torch.nan)).item() == 0
    assert plots.to_uint8(torch.ones(2, 3, 4, 5, dtype=torch.bfloat16, requires_grad=True)).shape == (2, 4, 5, 3)
    for bad in (torch.zeros(1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.int64)):
        refused(ValueError, "images: got", plots.to_uint8, bad)


def test_grid_places_rows_and_enlarges():
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


def test_grid_is_written_as_png(tmp_path):
    images = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    plots.save_grid(images, tmp_path / "a.png")
    with pytest.raises((TypeError, ValueError)):
        plots.save_picture(np.zeros((2, 2, 7), np.uint8), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.format == "PNG" and np.array_equal(np.asarray(opened), plots.grid(plots.to_uint8(images)))
    assert len(list(tmp_path.iterdir())) == 1


def test_strips_have_a_row_a_sample_and_labels(tmp_path):
    steps = [torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0, 1.0, -1.0)]
    picture = plots.strips([plots.to_uint8(batch) for batch in steps], ["a", "b", "c", "d"], "title", scale=4)
    body = plots.grid(np.zeros((12, 8, 8, 1), np.uint8), columns=4, scale=4)
    assert picture.shape[1] == body.shape[1]
    head = picture.shape[0] - body.shape[0]
    assert (picture[:head] < 100).any()  # ink
    assert picture[head + body.shape[0] // 2, GAP + 2 :: 32 + GAP, 0][:4].tolist() == [0, 127, 255, 0]
    plots.save_strips(steps, ["a", "b", "c", "d"], "title", tmp_path / "a.png", scale=4)
    with Image.open(tmp_path / "a.png") as opened:
        assert np.array_equal(np.asarray(opened), picture)


def ink_columns(picture, rows):
    """Where dark letters stand on white, of the given rows"""
    return np.flatnonzero((picture[rows] < 128).all(axis=2).any(axis=0))


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
    assert len(frames) == 3 and len({frame.shape for frame in frames}) == 1
    for frame, noisy, clean in zip(frames, x_t, x_0, strict=True):
        left, right = (plots.grid(plots.to_uint8(images), scale=8) for images in (noisy, clean))
        assert np.array_equal(frame[-len(left) :, : left.shape[1]], left)
        assert np.array_equal(frame[-len(right) :, -right.shape[1] :], right)
    assert not np.array_equal(frames[0][:30], frames[1][:30])  # the label
    narrow = plots.trajectory_frames(*pairs(samples=1), ["t = 1", "t = 1000000", "t = 0"], scale=1)
    assert len({frame.shape for frame in narrow}) == 1


def test_names_stand_left_of_rows_and_in_frames():
    """Each in the middle of its row; the pictures are the same as without names."""
    steps = [np.full((3, 8, 8, 1), value, np.uint8) for value in (255, 200)]
    plain = plots.strips(steps, ["", ""], "", scale=8)
    for row in range(3):
        picture = plots.strips(steps, ["", ""], "", scale=8, names=["a cat" if i == row else "" for i in range(3)])
        margin = picture.shape[1] - plain.shape[1]
        assert margin > 4 * GAP and np.array_equal(picture[:, margin:], plain)
        found = np.flatnonzero((picture[:, :margin] < 128).all(axis=2).any(axis=1))
        assert abs((found.min() + found.max()) / 2 - (56 + GAP + row * (64 + GAP) + 32)) < 3
    frames = [plots.trajectory_frames(*pairs(), [""] * 3, scale=8, names=names) for names in (["a", "a"], ["a", "cat"])]
    assert not np.array_equal(frames[0][0], frames[1][0]) and frames[0][0].shape == frames[1][0].shape


def test_gif_holds_frames_and_durations(tmp_path):
    """Up to 256 colours exactly, other pictures nearly; equal frames become one, which is shown as long."""
    generator, path = np.random.default_rng(0), tmp_path / "a.gif"
    grey = [generator.integers(256, size=(20, 30, 1), dtype=np.uint8).repeat(3, 2) for _ in range(3)]
    few = [np.array([[[255, 0, 7], [3, 200, 1]]], np.uint8).repeat(20, 0), np.full((20, 2, 3), 9, np.uint8)]
    equal = [np.full((4, 4, 3), value, np.uint8) for value in (1, 1, 1, 2, 3)]
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    many = [np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(50)), 2)]
    for frames, seconds, expected, durations, near in (
        (grey, 3, grey, [1000, 1000, 2000], 0),
        (few, 0.001, few, [20, 2000], 0),
        (equal, 1, equal[2:], [600, 200, 2000], 0),
        (many, 1, many, [2000], 8),
    ):
        plots.save_gif(frames, path, seconds=seconds)
        with Image.open(path) as opened:
            assert (opened.format, opened.n_frames) == ("GIF", len(expected)) and opened.info.get("loop", 0) == 0
            for number, wanted in enumerate(expected):
                opened.seek(number)
                assert abs(np.asarray(opened.convert("RGB")).astype(int) - wanted).mean() <= near
                assert opened.info["duration"] == durations[number]


IMAGE, FRAME = np.zeros((1, 8, 8, 1), np.uint8), np.zeros((2, 2, 3), np.uint8)
X_T, X_0 = pairs()
BAD = [
    (plots.grid, (IMAGE[:0],), {}, "images: got none"),
    (plots.grid, (IMAGE.repeat(4, 3),), {}, "images: got 4 channels"),
    (plots.grid, (IMAGE.astype(np.float32),), {}, "images: got float32"),
    (plots.grid, (IMAGE,), {"columns": 0}, "columns is 0"),
    (plots.strips, ([IMAGE, IMAGE[:, :4, :4]], ["", ""], ""), {}, "images: got steps of shapes"),
    (plots.strips, ([IMAGE, IMAGE], ["a"], ""), {}, "labels: got 1 for 2 steps"),
    (plots.strips, ([IMAGE], [""], ""), {"names": ["a", "b"]}, "names: got 2 for 1 samples, expected as many, or none"),
    (plots.trajectory, (X_T, X_0[:2], ["", "", ""]), {}, "x_0: got 2 steps, x_t has 3"),
    (plots.trajectory_frames, ([], [], []), {}, "x_0: got 0 steps"),
    (plots.trajectory_frames, (X_T, X_0, [""]), {}, "labels: got 1 for 3"),
    (plots.trajectory_frames, (X_T, X_0, ["", "", ""]), {"names": ["cat"]}, "names: got 1 for 2 samples, expected as"),
    (plots.trajectory_frames, (X_T, [x[..., :4, :4] for x in X_0], [""] * 3), {"scale": 2}, r"x_0: got shape \(2, 1,"),
    (plots.save_gif, ([], "a.gif"), {}, "frames: got none"),
    (plots.save_gif, ([FRAME, FRAME[:1]], "a.gif"), {}, "frames: got shapes"),
    (plots.save_gif, ([FRAME[..., :1]], "a.gif"), {}, "frames: got uint8 of shape"),
    (plots.save_gif, ([FRAME], "a.gif"), {"seconds": 0}, "seconds: got 0"),
]


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for draw, arguments, options, message in BAD:
        refused((TypeError, ValueError), message, draw, *arguments, **options)
    assert not list(tmp_path.iterdir())
