"""The Inception network of the Fréchet inception distance (FID), from torch-fidelity or else from pytorch-fid."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base.optional import MissingExtra

NAME = "inception"


class Inception:
    """Computes features, (batch, 2048), of images, (batch, 1 or 3, height, width) float32 in [-1, 1].

    Grey images get three equal channels. The package downloads the weights when it creates its first network.

    Attributes:
        source: the package and its version.

    Raises:
        MissingExtra: neither package is installed.
        ValueError: the weights can't be downloaded.
    """

    def __init__(self) -> None:
        for package, module, load, url in _PACKAGES:
            try:
                package_module = importlib.import_module(module)
            except ImportError:
                continue
            self.source = f"{package} {metadata.version(package)}"
            try:
                self._network, self._call = load(package_module)
            except OSError as error:
                raise ValueError(
                    f"features: {self.source} can't load its weights ({error}); without a network, put "
                    f"{getattr(package_module, url, 'their file')} into {Path(torch.hub.get_dir(), 'checkpoints')}"
                ) from error
            self._network.eval()
            return
        raise MissingExtra(
            "Inception's features need torch-fidelity: pip install torch-fidelity; or features: pixels, or "
            "module:function, whose distances are no FID"
        )

    def __call__(self, images: Tensor) -> Tensor:
        levels = ((images + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
        features: Tensor = self._call(self._network.to(images.device), levels)
        return features.flatten(1)


def _torch_fidelity(module: Any) -> tuple[Any, Any]:
    """Makes torch-fidelity's network. Returns the network, and call(network, images) -> features, for uint8 images."""
    network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    return network, lambda network, levels: network(levels)[0]


def _pytorch_fid(module: Any) -> tuple[Any, Any]:
    """Makes pytorch-fid's network. Returns the network, and call(network, images) -> features, for uint8 images."""
    network = module.InceptionV3([module.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    return network, lambda network, levels: network(levels.float() / 255)[0]


_PACKAGES = (
    ("torch-fidelity", "torch_fidelity.feature_extractor_inceptionv3", _torch_fidelity, "URL_INCEPTION_V3"),
    ("pytorch-fid", "pytorch_fid.inception", _pytorch_fid, "FID_WEIGHTS_URL"),
)
"""For each package: its name, its module, the function that makes its network, and the name of a constant in the
module. The constant is the address of the network's weights."""
