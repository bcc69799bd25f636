"""A small residual network that is trained to classify a folder of images: its features compare samples with images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ddpm_ext.base.files import atomic_path
from ddpm_ext.training.data import FolderImages

WIDTHS, EPOCHS, BATCH, PADDING = (32, 64, 128), 8, 128, 4


class Block(nn.Module):
    """Two convolutions beside a shortcut; `stride` 2 halves height and width."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


class Classifier(nn.Module):
    """units: the means over the pixels of the last block, (batch, 128)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        stages = [Block(WIDTHS[max(0, i - 1)], width, 1 + (i > 0)) for i, width in enumerate(WIDTHS)]
        first = (nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        self.units = nn.Sequential(*first, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.scores = nn.Linear(WIDTHS[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores(self.units(images))


def batch_of(images: FolderImages, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """The images of these numbers, each mirrored or not, and shifted by up to four pixels."""
    side = images.shape[1]
    padded = nn.functional.pad(images.batch(numbers), (PADDING,) * 4)
    shifts = torch.randint(0, 2 * PADDING + 1, (len(numbers), 2), generator=generator).tolist()
    mirrored = torch.rand(len(numbers), generator=generator) < 0.5
    shifted = torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in zip(padded, shifts, strict=True)])
    return torch.where(mirrored[:, None, None, None], shifted.flip(-1), shifted)


def train_classifier(images: FolderImages, path: Path) -> Classifier:
    """A trained classifier. Its weights are written to a file, from which a later call takes them."""
    labels, generator = images.labels(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Classifier(len(labels.names))
    if path.exists():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval().requires_grad_(False)
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, EPOCHS * steps)
    for epoch in range(EPOCHS):
        order, right = torch.randperm(len(images), generator=generator), 0
        for numbers in order[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                scores = network(batch_of(images, numbers, generator)).float()
            nn.functional.cross_entropy(scores, labels.numbers[numbers], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
            right += int((scores.argmax(1) == labels.numbers[numbers]).sum())
        print(f"classifier, epoch {epoch + 1} of {EPOCHS}: {right / steps / BATCH:.1%} right in training", flush=True)
    with atomic_path(path) as beside:
        torch.save(network.state_dict(), beside)
    return network.eval().requires_grad_(False)


def accuracy(network: Classifier, images: FolderImages) -> float:
    """The share of the images that are classified right."""
    numbers = images.labels().numbers
    parts = (network(images.batch(part)).argmax(1) == numbers[part] for part in torch.arange(len(images)).split(500))
    return torch.cat(list(parts)).double().mean().item()
