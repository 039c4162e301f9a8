"""Inception as the Fréchet and the kernel distance use it: TensorFlow's weights of 2015, ported to PyTorch.

The network of Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", as those weights want
it: average pooling leaves the border out, and the last block pools by maximum. Written for the names in the file of
pytorch-fid and torch-fidelity, whose packages need torchvision, and with that another PyTorch than the one installed.

Axes: B pictures, C channels, h w of feature maps, H W of pictures, D = 2048 features.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.evaluate.metrics.base import Pixels
from shared.evaluate.metrics.fid import Features
from shared.untrusted import foreign_library, shown, unpickling
from torch_trainer.prepare_data.model_files import device_there

_SIDE = 299
_EPSILON = 1e-3  # of batch normalisation, TensorFlow's
_FIX = "Download it again."


def load_features(weights: Path) -> Features:
    """Pictures uint8 [H,W,3] → float32 [B,D], from a file of tensors alone, which is read as such.

    Raises:
        UserError: the file cannot be read, holds something else than tensors, or lacks some of the network's.
    """
    where = shown(weights)
    with unpickling(where, "cannot be read", _FIX, "Use the file that --help names."):
        state = torch.load(weights, map_location="cpu", weights_only=True)
    network = _Network(state if isinstance(state, dict) else {})
    with foreign_library(f"{where} holds no weights of Inception v3 as pytorch-fid publishes them", _FIX):
        network(torch.zeros(1, 3, _SIDE, _SIDE))

    @torch.no_grad()
    def features(pictures: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        network.to(device_there())
        resized_BCHW = torch.from_numpy(np.stack([resized(picture) for picture in pictures])).permute(0, 3, 1, 2)
        features_BD: npt.NDArray[np.float32] = network((resized_BCHW - 128) / 128).cpu().numpy()
        return features_BD

    return features


def resized(image_HWC: Pixels) -> npt.NDArray[np.float32]:
    """float32 [299,299,3], 0 to 255: antialiased and bicubic, without rounding.

    Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation": clean-fid's way.
    """
    channels = [
        PIL.Image.fromarray(image_HWC[..., channel].astype(np.float32)).resize(
            (_SIDE, _SIDE), PIL.Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).clip(0, 255)


class _Network:
    """[B,3,299,299], -1 to 1 → [B,D]."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights, self._device = dict(weights), torch.device("cpu")

    def to(self, device: torch.device) -> None:
        if device != self._device:
            self._weights, self._device = {name: value.to(device) for name, value in self._weights.items()}, device

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        x = images_BCHW.to(self._device)
        x = self._conv(x, "Conv2d_1a_3x3", stride=2, padded=False)
        x = self._conv(x, "Conv2d_2a_3x3", padded=False)
        x = F.max_pool2d(self._conv(x, "Conv2d_2b_3x3"), 3, stride=2)
        x = self._conv(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self._conv(x, "Conv2d_4a_3x3", padded=False), 3, stride=2)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._block_35(x, name)
        x = self._reduced_to_17(x, "Mixed_6a")
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._block_17(x, name)
        x = self._reduced_to_8(x, "Mixed_7a")
        x = self._block_8(x, "Mixed_7b", _mean_pool)
        x = self._block_8(x, "Mixed_7c", _max_pool)
        return x.mean(dim=(2, 3))

    def _conv(self, x_BChw: Tensor, name: str, stride: int = 1, padded: bool = True) -> Tensor:
        """Convolution, batch normalisation, ReLU; `padded`: as large as before."""
        weights = self._weights
        kernel = weights[f"{name}.conv.weight"]
        padding = (kernel.shape[2] // 2, kernel.shape[3] // 2) if padded else 0
        mean, variance, scale, shift = (
            weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        convolved = F.conv2d(x_BChw, kernel, stride=stride, padding=padding)
        return F.relu(F.batch_norm(convolved, mean, variance, scale, shift, eps=_EPSILON))

    def _chain(self, x_BChw: Tensor, *names: str) -> Tensor:
        for name in names:
            x_BChw = self._conv(x_BChw, name)
        return x_BChw

    def _block_35(self, x: Tensor, name: str) -> Tensor:
        return torch.cat(
            [
                self._chain(x, f"{name}.branch1x1"),
                self._chain(x, *_numbered(f"{name}.branch5x5", 2)),
                self._chain(x, *_numbered(f"{name}.branch3x3dbl", 3)),
                self._chain(_mean_pool(x), f"{name}.branch_pool"),
            ],
            dim=1,
        )

    def _reduced_to_17(self, x: Tensor, name: str) -> Tensor:
        *first, last = _numbered(f"{name}.branch3x3dbl", 3)
        return torch.cat(
            [
                self._conv(x, f"{name}.branch3x3", stride=2, padded=False),
                self._conv(self._chain(x, *first), last, stride=2, padded=False),
                F.max_pool2d(x, 3, stride=2),
            ],
            dim=1,
        )

    def _block_17(self, x: Tensor, name: str) -> Tensor:
        return torch.cat(
            [
                self._chain(x, f"{name}.branch1x1"),
                self._chain(x, *_numbered(f"{name}.branch7x7", 3)),
                self._chain(x, *_numbered(f"{name}.branch7x7dbl", 5)),
                self._chain(_mean_pool(x), f"{name}.branch_pool"),
            ],
            dim=1,
        )

    def _reduced_to_8(self, x: Tensor, name: str) -> Tensor:
        first_of_two, last_of_two = _numbered(f"{name}.branch3x3", 2)
        *first, last = _numbered(f"{name}.branch7x7x3", 4)
        return torch.cat(
            [
                self._conv(self._conv(x, first_of_two), last_of_two, stride=2, padded=False),
                self._conv(self._chain(x, *first), last, stride=2, padded=False),
                F.max_pool2d(x, 3, stride=2),
            ],
            dim=1,
        )

    def _block_8(self, x: Tensor, name: str, pool: Callable[[Tensor], Tensor]) -> Tensor:
        single = self._conv(x, f"{name}.branch3x3_1")
        double = self._chain(x, *_numbered(f"{name}.branch3x3dbl", 2))
        return torch.cat(
            [
                self._conv(x, f"{name}.branch1x1"),
                self._conv(single, f"{name}.branch3x3_2a"),
                self._conv(single, f"{name}.branch3x3_2b"),
                self._conv(double, f"{name}.branch3x3dbl_3a"),
                self._conv(double, f"{name}.branch3x3dbl_3b"),
                self._conv(pool(x), f"{name}.branch_pool"),
            ],
            dim=1,
        )


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}_{number}" for number in range(1, count + 1)]


def _mean_pool(x_BChw: Tensor) -> Tensor:
    return F.avg_pool2d(x_BChw, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x_BChw: Tensor) -> Tensor:
    return F.max_pool2d(x_BChw, 3, stride=1, padding=1)
