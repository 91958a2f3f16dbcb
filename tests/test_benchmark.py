"""The benchmark: sizes, counts and the table, at a size that takes no time."""

import json

import pytest
import torch
from conftest import noise_picture, seeded, size_of
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation import benchmark
from training.untrained import FULL, Size, attention_levels, build, clip_layers, vae_levels

TINY = size_of()
# As deep as the public checkpoints, and narrow: what it costs is what the host does
DEEP = Size(
    tile=(192, 128),
    picture=64,
    width=32,
    unet={"block_out_channels": (32,) * 4, "attention_head_dim": [1] * 4, **attention_levels("CCCD", "UCCC")},
    vae=vae_levels((32,) * 4, layers=2, groups=32),
    text=clip_layers(1, 1, max_position_embeddings=77),
    vision=clip_layers(1, 1, hidden_size=32, intermediate_size=32, image_size=28, patch_size=14),
)
# Operators that make a view or an empty tensor launch nothing
VIEWS = {
    *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "split", "chunk"),
    *("split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unbind", "unflatten", "unfold"),
    *("empty", "empty_like", "empty_strided", "new_empty", "lift", "lift_fresh", "_reshape_alias", "set_", "resize_"),
}


class CountLaunches(TorchDispatchMode):
    """Counts operators that would launch a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket.__name__ not in VIEWS
        return operator(*args, **(kwargs or {}))


def test_a_step_launches_few_kernels():
    """One tile on a GPU waits for the host. The published pipeline launches 1,543 operators a step."""
    pipe = build(DEEP)
    pipe.set_progress_bar_config(disable=True)
    with CountLaunches() as launches:
        pipe(noise_picture(), num_inference_steps=28, generator=seeded(), output_type="latent")
    assert launches.count / 28 <= 830


def test_full_size_is_that_of_the_public_checkpoints():
    """The numbers of parameters are those of sudo-ai/zero123plus-v1.2."""
    pipe = build(FULL, "meta", torch.float16)
    parts = (pipe.unet, pipe.text_encoder, pipe.vision_encoder, pipe.vae)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [865_910_724, 340_387_840, 632_076_800, 83_653_863]


def test_table_and_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    output = tmp_path / "results.json"
    benchmark.main(["--device", "cpu", "--batches", "2", "--repeats", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert sum(row[part] for part in benchmark.PARTS) == pytest.approx(1)
    assert row["difference"] < 1e-3 and row["time to baseline's"] > 0
    assert "time to baseline's" in capsys.readouterr().out


def test_a_baseline_like_the_published_file(tmp_path, monkeypatch):
    """It imports torchvision, pads to the tokenizer's length and makes one tile a call."""
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    (tmp_path / "pipeline.py").write_text(
        "from torchvision import transforms\n\nfrom evaluation import plain\n\n\n"
        "class Published(plain.PlainZero123Plus):\n"
        "    depth = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])\n\n"
        "    def encode_prompt(self, text):\n        assert self.tokenizer.model_max_length == 16\n"
        "        return super().encode_prompt(text)\n\n"
        "    def __call__(self, *args, num_images_per_prompt, **kwargs):\n"
        "        if num_images_per_prompt > 1:\n            raise RuntimeError('sizes do not fit')\n"
        "        return super().__call__(*args, **kwargs)\n"
    )
    paths = ["--baseline", str(tmp_path / "pipeline.py"), "--output", str(tmp_path / "results.json")]
    benchmark.main(["--device", "cpu", "--batches", "2", "--repeats", "1", "--steps", "2", *paths])
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["difference"] < 1e-5 and row["time to baseline's"] > 0
