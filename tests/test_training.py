"""The recipe at toy size: data, losses, what trains, resuming."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image

from pipeline import Zero123PlusPipeline
from training import publish, train, train_vae
from training.data import TileDataset, ViewDataset, load_objects, select_views, to_tile
from training.mini import SCHEDULE


@pytest.fixture
def shards(tmp_path):
    """One shard of two objects in plain colours: red tells a view's azimuth column, green its elevation row."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "shard-00000.tar"), encoder=False) as writer:
        for name in ("mug-1", "car-2"):
            sample = {"__key__": name, "json": json.dumps({"object": name}).encode()}
            for kind, rows in (("inputs", 1), ("targets", 2)):
                sheet = np.full((16 * rows, 16 * 6, 4), 255, np.uint8)
                for row in range(rows):
                    for column in range(6):
                        sheet[16 * row : 16 * row + 16, 16 * column : 16 * column + 16, :2] = (20 * column, 100 * row)
                buffer = io.BytesIO()
                Image.fromarray(sheet).save(buffer, "WEBP", lossless=True)
                sample[f"{kind}.webp"] = buffer.getvalue()
            writer.write(sample)
    return folder


def test_an_input_gets_the_targets_around_it(shards):
    """From input 2 the first target is column 2, 30 degrees on; mirrored it is column 1, 30 degrees back."""
    item = load_objects(shards)[0]
    image, views = select_views(item, 2, mirror=False)
    assert image[0, 0, 0] == 40
    assert [int(view[0, 0, 0]) // 20 for view in views] == [2, 3, 4, 5, 0, 1]
    assert [int(view[0, 0, 1]) // 100 for view in views] == [0, 1, 0, 1, 0, 1]
    _, views = select_views(item, 2, mirror=True)
    assert [int(view[0, 0, 0]) // 20 for view in views] == [1, 0, 5, 4, 3, 2]
    assert [int(view[0, 0, 1]) // 100 for view in views] == [0, 1, 0, 1, 0, 1]


def test_mirroring_flips_pictures():
    item = {"inputs": np.zeros((6, 2, 2, 4), np.uint8), "targets": np.zeros((2, 6, 2, 2, 4), np.uint8)}
    item["inputs"][0, 0, 0], item["targets"][0, 5, 0, 0] = 9, 7
    image, views = select_views(item, 0, mirror=True)
    assert image[0, 1, 0] == 9 and views[0, 0, 1, 0] == 7


def test_tile_is_row_major():
    views = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((6, 2, 2, 1), np.uint8)
    assert np.array_equal(to_tile(views)[::2, ::2, 0], [[0, 1], [2, 3], [4, 5]])


def test_datasets(shards, tmp_path):
    tiles, views = TileDataset(shards), ViewDataset(shards)
    assert len(tiles) == 2 * 12 and tiles[0]["tile"].shape == (3, 48, 32) and tiles[0]["image"].size == (16, 16)
    assert len(views) == 2 * 18 * 2 and views[0]["pixels"].shape == (3, 16, 16) and views[0]["alpha"].min() == 1
    with pytest.raises(ValueError, match="has no shards"):
        TileDataset(tmp_path)


def test_initial_encoder_is_a_principal_component_analysis():
    """Its latents explain the picture as well as the leading singular vectors of all blocks of 16 x 16 pixels do."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(24, 3, 8, 8) - 0.5, size=(64, 64), mode="bicubic")
    vae, alpha = train_vae.AutoencoderKL(**train_vae.CONFIG), torch.ones(24, 1, 64, 64)
    train_vae.initialise_encoder(vae, smooth, alpha)
    blocks = torch.nn.functional.pixel_unshuffle(smooth, 16).transpose(0, 1).flatten(1).double()
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    best = blocks - left[:, :32] * values[:32] @ right[:32]
    with torch.no_grad():
        latents = vae.encode(smooth).latent_dist.mean.transpose(0, 1).flatten(1).double()
    latents = torch.cat([latents, torch.ones(1, latents.shape[1])])
    ours = blocks - torch.linalg.lstsq(latents.T, blocks.T).solution.T @ latents
    assert best.square().sum() < 0.5 * blocks.square().sum()
    assert ours.square().sum() < 1.05 * best.square().sum()


def test_initial_latents_have_the_usual_deviation():
    torch.manual_seed(0)
    vae, pixels = train_vae.AutoencoderKL(**train_vae.CONFIG), torch.rand(8, 3, 64, 64)
    train_vae.initialise_encoder(vae, pixels, torch.ones(8, 1, 64, 64))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    std = posterior.mean.std((0, 2, 3))
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(32), rtol=0, atol=1e-3)
    assert std.square().mean().sqrt() == pytest.approx(5.49, rel=0.25)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 5.49 * 0.03), rtol=1e-2, atol=0)


def test_phase_1_trains_self_attention_and_cross_attention_keys_and_values(pipe):
    block = "mid_block.attentions.0.transformer_blocks.0"
    names = {name for name in train.trainable_parameters(pipe.unet, "attention") if name.startswith("mid_block")}
    self_attention = {f"{block}.attn1.{part}" for part in ("to_q.weight", "to_k.weight", "to_v.weight")}
    self_attention |= {f"{block}.attn1.to_out.0.{part}" for part in ("weight", "bias")}
    assert names == self_attention | {f"{block}.attn2.{part}.weight" for part in ("to_k", "to_v")}
    assert len(train.trainable_parameters(pipe.unet, "unet")) == len(list(pipe.unet.parameters()))


def test_min_snr_weights():
    scheduler = DDPMScheduler(**SCHEDULE)
    steps = torch.tensor([0, 500, 999])
    snr = scheduler.alphas_cumprod[steps] / (1 - scheduler.alphas_cumprod[steps])
    expected = [min(float(value), 5.0) / (float(value) + 1) for value in snr]
    torch.testing.assert_close(train.min_snr_weight(scheduler, steps, 5.0), torch.tensor(expected))
    assert train.min_snr_weight(scheduler, steps, 0.0).tolist() == [1, 1, 1]


def test_training_saves_a_pipeline_and_resumes(pipe, shards, tmp_path):
    pipe.save_pretrained(tmp_path / "start")
    common = ["--checkpoint", tmp_path / "start", "--data", shards, "--output", tmp_path / "run", "--batch_size", "2"]
    common += ["--preset", "scratch", "--cache_latents", "--validation_steps", "2", "--ema_decay", "0.5"]
    train.main([str(part) for part in (*common, "--steps", "2")])
    train.main([str(part) for part in (*common, "--steps", "3")])
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3]
    assert {"psnr_t999_with", "psnr_t999_without"} <= set(log[1])
    trained = Zero123PlusPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert trained.config.ramping_coefficients != pipe.config.ramping_coefficients
    changed = {
        name
        for name in ("unet", "vision_encoder", "vae", "text_encoder")
        for ours, before in zip(getattr(trained, name).parameters(), getattr(pipe, name).parameters())
        if not torch.equal(ours, before)
    }
    assert changed == {"unet", "vision_encoder"}


def test_published_checkpoint_loads_by_itself_in_half_the_size(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "trained")
    (tmp_path / "repository").mkdir()
    publish.main(["--checkpoint", str(tmp_path / "trained"), "--output", str(tmp_path / "repository")])
    assert not any(path.name.startswith("tmp") for path in (tmp_path / "repository").iterdir())
    again = DiffusionPipeline.from_pretrained(tmp_path / "repository", trust_remote_code=True)
    torch.testing.assert_close(again.unet.conv_in.weight, pipe.unet.conv_in.weight, rtol=1e-3, atol=1e-4)
    assert all(module.dtype == torch.float32 for module in (again.unet, again.text_encoder, again.vision_encoder))
    sizes = [
        (tmp_path / folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        for folder in ("trained", "repository")
    ]
    assert sizes[1] < 0.6 * sizes[0]
