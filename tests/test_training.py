"""The recipe at toy size: data, losses, what trains, resuming."""

import io
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from accelerate.state import AcceleratorState
from conftest import assert_differ
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from torch._dynamo.utils import counters
from transformers import CLIPImageProcessor, CLIPTokenizer

from evaluation import heldout
from pipeline import Zero123PlusPipeline, preprocess
from training import checkpoints, encode, loss, publish, train
from training.data import Stream, TileDataset, TilesInMemory, collate, select_views
from training.shards import load_objects, read_object
from training.untrained import SCHEDULE
from zero123plus import loading
from zero123plus.pictures import depth_picture


def test_an_input_gets_the_targets_around_it(shards):
    """The first target of input 2 is column 2, 30 degrees further; mirrored it is column 1, 30 degrees before."""
    item = load_objects(shards)[0]
    image, views = select_views(item, 2, mirror=False)
    assert image[0, 0, 0] == 40
    assert [int(view[0, 0, 0]) // 20 for view in views] == [2, 3, 4, 5, 0, 1]
    assert [int(view[0, 0, 1]) // 100 for view in views] == [0, 1, 0, 1, 0, 1]
    _, views = select_views(item, 2, mirror=True)
    assert [int(view[0, 0, 0]) // 20 for view in views] == [1, 0, 5, 4, 3, 2]
    assert [int(view[0, 0, 1]) // 100 for view in views] == [0, 1, 0, 1, 0, 1]


def test_datasets(shards, tmp_path):
    tiles = TileDataset(shards)
    assert len(tiles) == 2 * 12 and tiles[0]["tile"].shape == (3, 48, 32) and tiles[0]["image"].shape == (3, 16, 16)
    assert len(TileDataset(tmp_path)) == len(tiles)  # a folder of such folders
    with pytest.raises(ValueError, match="has no shards"):
        TileDataset(tmp_path / "nothing")


def test_depth_picture():
    """Each picture goes from its own nearest to its own farthest point, and the background stays transparent."""
    depth, mask = np.array([[2.0, 3.0], [4.0, 9.0]]), np.array([[True, True], [True, False]])
    picture = depth_picture(depth, mask)
    assert picture[..., 0].tolist() == [[0, 128], [255, 0]] and picture[..., 3].tolist() == [[255, 255], [255, 0]]
    assert not depth_picture(depth, mask & ~mask).any()


@pytest.mark.parametrize("condition", ("depth", "normals", "rgb"))
def test_conditions(shards, condition):
    """The view with passes is at the top left of sample 0, and it is target 0 of the mirrored input 1."""
    data = TileDataset(shards, condition=condition)
    plain, mirrored = data[0], data[3]
    name = "tile" if condition == "rgb" else "control"
    control, flipped = plain[name] / 255, mirrored[name] / 255
    assert control.shape == (3, 48, 32) and torch.allclose(control[:, 0, 0], torch.tensor(127 / 255))
    inside, seen = control[:, 4:12, 4:12], flipped[:, 4:12, 4:12].flip(2)
    if condition == "depth":
        assert inside[0, 0, 0] == 0 and inside[0, 0, 7] == 1 and torch.equal(seen, inside)
    else:  # the x axis is mirrored
        assert torch.allclose(inside[:, 0, 0] * 255, torch.tensor([200.0, 127.0, 250.0]))
        assert torch.allclose(seen[:, 0, 0] * 255, torch.tensor([55.0, 127.0, 250.0]))
    if condition == "rgb":
        assert torch.equal(plain["control"], TileDataset(shards)[0]["tile"])


def test_phase_1_trains_self_attention_and_cross_attention_keys_and_values(pipe):
    block = "mid_block.attentions.0.transformer_blocks.0"
    names = {name for name in train.trainable_parameters(pipe.unet, "attention") if name.startswith("mid_block")}
    self_attention = {f"{block}.attn1.{part}" for part in ("to_q.weight", "to_k.weight", "to_v.weight")}
    self_attention |= {f"{block}.attn1.to_out.0.{part}" for part in ("weight", "bias")}
    assert names == self_attention | {f"{block}.attn2.{part}.weight" for part in ("to_k", "to_v")}
    assert len(train.trainable_parameters(pipe.unet, "unet")) == len(list(pipe.unet.parameters()))


def test_the_negative_reference_is_sampled_as_in_the_pipeline(pipe, shards):
    """Its posterior has a deviation, so that two samples of it differ by more than the noise of their step."""
    measure, seen = loss.Zero123PlusLoss(pipe, torch.device("cpu")), []
    samples = collate([TileDataset(shards)[i] for i in range(2)])
    encoded = measure.encoder(samples)
    measure.scheduler.alphas_cumprod[:] = 1.0  # no noise of a step
    model = loss.Denoiser.of(pipe)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        measure.predict(
            model, encoded, torch.zeros(2, dtype=torch.long), torch.zeros(2), torch.Generator().manual_seed(0)
        )
    mean, std = measure.encoder.negative.chunk(2, dim=1)
    assert std.min() > 0 and not torch.equal(seen[0][0], seen[0][1])
    assert ((seen[0] - mean) / std).std() == pytest.approx(1, abs=0.2)


def test_min_snr_weights():
    scheduler = DDPMScheduler(**SCHEDULE)
    steps = torch.tensor([0, 500, 999])
    snr = scheduler.alphas_cumprod[steps] / (1 - scheduler.alphas_cumprod[steps])
    expected = [min(float(value), 5.0) / (float(value) + 1) for value in snr]
    torch.testing.assert_close(loss.min_snr_weight(scheduler, steps, 5.0), torch.tensor(expected))
    assert loss.min_snr_weight(scheduler, steps, 0.0).tolist() == [1, 1, 1]


@pytest.fixture
def arguments(pipe, shards, tmp_path):
    """Builds the command line of a tiny run in the folder `name`, of `steps` steps of 4 tiles."""
    pipe.save_pretrained(tmp_path / "start")

    def build(name, steps, *more):
        given = ["--phase", "scratch", "--checkpoint", tmp_path / "start", "--data", shards]
        given += ["--output", tmp_path / name, "--batch-size", 4, "--micro-batch-size", 2, "--steps", steps]
        given += ["--report-to", "none", "--lr-scheduler", "constant", "--validation-steps", 100, *more]
        return [str(part) for part in given]

    return build


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_file_that_is_no_log_stays(arguments, pipe, tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(SystemExit, match="log.jsonl is no log of a training run"):
        train.main(arguments("run", 1))
    assert path.read_text() == "mine"


def test_training_saves_what_it_trained(arguments, pipe, tmp_path):
    schedule = ["--lr-scheduler", "cosine", "--warmup-steps", "1", "--learning-rate", "0.001"]
    train.main(arguments("run", 2, *schedule, "--ema-decay", "0.5", "--validation-steps", "2", "--in-memory"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"psnr_t999_with", "psnr_t999_without"} <= set(log[1])
    assert [record["lr"] for record in log] == pytest.approx([0.001, 0])  # of the next step: the peak, then 0
    assert Image.open(tmp_path / "run" / "validation" / "000002.webp").size == (16 + 6 * 16 + 4 + 6 * 16, 4 * 16)
    trained = Zero123PlusPipeline.from_pretrained(tmp_path / "run" / "checkpoint-2")
    tokenizers = (tmp_path / name / "tokenizer" / "tokenizer.json" for name in ("start", "run/checkpoint-2"))
    assert len({path.read_bytes() for path in tokenizers}) == 1  # the call that encodes the prompt leaves no trace
    assert trained.config.ramping_coefficients != pipe.config.ramping_coefficients
    changed = {
        name
        for name in ("unet", "vision_encoder", "vae", "text_encoder")
        for ours, before in zip(getattr(trained, name).parameters(), getattr(pipe, name).parameters())
        if not torch.equal(ours, before)
    }
    assert changed == {"unet", "vision_encoder"}


def test_a_run_in_memory_has_the_losses_of_one_that_reads(arguments, tmp_path):
    """Of training and of validation."""
    for name, more in (("memory", ["--in-memory"]), ("files", [])):
        train.main(arguments(name, 2, "--validation-steps", 2, *more))
    assert losses(tmp_path / "memory") == pytest.approx(losses(tmp_path / "files"), abs=2e-3)
    lines = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("memory", "files")]
    assert lines[0]["validation_loss"] == pytest.approx(lines[1]["validation_loss"], abs=2e-3)


def test_a_timed_rate_falls_to_zero_when_the_time_is_over(arguments, tmp_path, monkeypatch):
    """It stands still for the first half of the time, and the weights before its fall are kept. The clock goes on by
    a twentieth of a second whenever it is read.
    """
    clock = itertools.count(step=0.05)
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(time=lambda: next(clock)))
    schedule = ["--lr-scheduler", "timed", "--decay-steps", 500, "--warmup-steps", 0, "--minutes", 1, "--keep", 1]
    train.main(arguments("run", 1000, *schedule, "--learning-rate", 1e-3, "--in-memory"))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 2e-4
    first, last = loading.checkpoints_of(tmp_path / "run")
    assert rates[int(first.name[11:]) - 2] == 1e-3 and int(last.name[11:]) == len(rates)


def test_validation_tiles_use_the_trained_ramp(pipe, shards):
    model, samples = loss.Denoiser.of(pipe), collate([TileDataset(shards)[0]])
    model.ramp.data += 1
    train.validate(pipe, model, loss.Zero123PlusLoss(pipe, torch.device("cpu")), samples, None)
    assert pipe.config.ramping_coefficients == pytest.approx(model.ramp.tolist())


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(arguments, tmp_path):
    train.main(arguments("whole", 4))
    train.main(arguments("broken", 2))
    (tmp_path / "broken" / "log.jsonl").open("a").write('{"step": 3, "loss": 0}\n{"step"')  # beyond the checkpoint
    train.main(arguments("broken", 4))
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert [path.name for path in loading.checkpoints_of(tmp_path / "broken")] == ["checkpoint-2", "checkpoint-4"]


def test_a_resumed_run_has_its_own_rate_and_ema(arguments, tmp_path):
    train.main(arguments("run", 2, "--learning-rate", 1e-3, "--warmup-steps", 0, "--in-memory"))
    train.main(arguments("run", 4, "--learning-rate", 1e-4, "--warmup-steps", 0, "--in-memory", "--ema-decay", 0.5))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in log] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    state = torch.load(tmp_path / "run" / "checkpoint-4" / "state" / "ema-0.pt", weights_only=True)
    assert state["decay"] == 0.5


def test_a_run_that_continues_with_other_batches_counts_what_it_saw(arguments, tmp_path, monkeypatch):
    """Two steps of 4 tiles, then one of 2: no sample is skipped or seen again."""
    places, getitem = [], Stream.__getitem__
    monkeypatch.setattr(Stream, "__getitem__", lambda self, i: places.append(self.start + i) or getitem(self, i))
    train.main(arguments("run", 2, "--in-memory"))
    train.main(arguments("run", 3, "--in-memory", "--batch-size", 2))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["tiles"] for line in log] == [4, 8, 10]
    assert places == list(range(10))


def test_another_seed_or_number_of_processes_is_refused(arguments, tmp_path):
    train.main(arguments("run", 1, "--optimizer", "muon"))
    with pytest.raises(SystemExit, match="holds a run with seed 0, but 3 is asked for now"):
        train.main(arguments("run", 2, "--optimizer", "muon", "--seed", 3))
    record = tmp_path / "run" / "checkpoint-1" / loading.RUN_FILE
    record.write_text(record.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(SystemExit, match="holds a run with processes 2, but 1 is asked for now"):
        train.main(arguments("run", 2, "--optimizer", "muon"))


def test_a_full_disk_is_said_and_leaves_no_partial_checkpoint(arguments, tmp_path, monkeypatch):
    train.main(arguments("run", 1))

    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(SystemExit, match="checkpoint-2 cannot be written .* MiB are free there"):
        train.main(arguments("run", 2))
    assert [path.name for path in loading.checkpoints_of(tmp_path / "run")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "checkpoint.partial").exists()


def test_a_run_that_diverges_ends_and_saves_nothing(arguments, tmp_path):
    options = ["--optimizer", "adamw", "--learning-rate", 1e30, "--warmup-steps", 0, "--in-memory"]
    with pytest.raises(SystemExit, match="The loss of step 2 is nan: the training diverged"):
        train.main(arguments("run", 5, *options))
    assert loading.checkpoints_of(tmp_path / "run") == []
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(arguments, tmp_path, monkeypatch):
    """With torch.compile's graphs, forwards and backwards, but not its code for the processor, which takes minutes."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    before = counters["stats"]["unique_graphs"]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        train.main(arguments(name, 2, "--validation-steps", 1, *more))
    assert counters["stats"]["unique_graphs"] - before == 2  # writing and reading; validation compiles nothing
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-3)


@pytest.mark.parametrize("condition", (None, "depth", "normals", "rgb"))
def test_tiles_in_memory_are_those_of_the_data_set(shards, condition):
    """Every sample of every object, plain and mirrored, with what a ControlNet sees."""
    dataset = TileDataset(shards, condition=condition)
    memory, expected = TilesInMemory(dataset, "cpu"), collate([dataset[i] for i in range(len(dataset))])
    batch = memory.batch([{"index": i, "seed": i} for i in range(len(memory))])
    for name in ("image", "tile", "control") if condition else ("image", "tile"):
        assert batch[name].dtype == torch.uint8 and torch.equal(batch[name], expected[name])
    assert batch["seed"] == list(range(len(memory)))


def test_permuted_colours_are_one_permutation_a_sample(shards):
    dataset = TileDataset(shards, condition="rgb")
    plain, permuted = TilesInMemory(dataset, "cpu"), TilesInMemory(dataset, "cpu", permute_colours=True)
    samples = [{"index": 3, "seed": 5 + i} for i in range(6)]
    before, after = plain.batch(samples), permuted.batch(samples)
    assert torch.equal(before["tile"], after["tile"])  # normals are no colours
    assert all(torch.equal(before["image"][0], image) for image in before["image"])
    seen = set()
    for i in range(6):
        orders = [
            order
            for order in itertools.permutations(range(3))
            if torch.equal(before["image"][i][list(order)], after["image"][i])
            and torch.equal(before["control"][i][list(order)], after["control"][i])
        ]
        assert len(orders) == 1
        seen |= set(orders)
        assert torch.equal(permuted.batch(samples[i:])["image"], after["image"][i:])  # however a step is divided
    assert len(seen) == 6


def test_objects_that_cannot_be_read_are_not_held(shards, caplog, monkeypatch):
    dataset = TileDataset(shards)
    expected = dataset[19]["tile"]

    def read(entry):
        if entry is dataset.entries[0]:
            raise ValueError("A sample cannot be read.")
        return read_object(entry)

    monkeypatch.setattr("training.data.read_object", read)
    memory = TilesInMemory(dataset, "cpu")
    assert len(memory) == 12 and "Skipped: A sample cannot be read." in caplog.text
    torch.testing.assert_close(memory.batch([{"index": 7, "seed": 0}])["tile"][0], expected)


@pytest.mark.parametrize("resample, size", ((2, 64), (2, 20), (3, 64), (3, 20), (4, 20)))
def test_a_batch_is_preprocessed_as_pictures_are(pipe, resample, size):
    """Bilinear and bicubic up and down, box filtering down by a whole factor; but for the rounding to whole levels."""
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 6), size=(40, 40), mode="bilinear")
    pixels = (smooth * 255).round()
    pictures = [Image.fromarray(picture.permute(1, 2, 0).byte().numpy()) for picture in pixels]
    extractor = CLIPImageProcessor.from_dict(pipe.feature_extractor_vae.to_dict())
    extractor.size, extractor.crop_size = {"shortest_edge": size}, {"height": size, "width": size}
    extractor.resample = resample
    ours, expected = encode.preprocess_batch(extractor, pixels / 255), preprocess(extractor, pictures)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1.5 / 255 / 0.8)
    extractor.crop_size = {"height": size, "width": 16}
    with pytest.raises(ValueError, match="does not make a square of a square"):
        encode.preprocess_batch(extractor, pixels)


@pytest.fixture
def two_processes():
    """Runs `training.train` in two processes on the CPU."""

    def call(arguments, **environment):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
        done = subprocess.run(
            [*launch, "-m", "training.train", *arguments], env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return call


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_two_processes_have_the_losses_of_one(arguments, two_processes, tmp_path, optimizer):
    if optimizer == "muon":
        pytest.importorskip("pytorch_optimizer")
    train.main(arguments("one", 3, "--optimizer", optimizer))
    two_processes(arguments("two", 2, "--optimizer", optimizer))
    two_processes(arguments("two", 3, "--optimizer", optimizer))  # continues
    _, checkpoint = loading.checkpoints_of(tmp_path / "two")
    assert len(list((checkpoint / "state").glob("random_states_*.pkl"))) == 2  # both had written before the rename
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


# accelerate offers FSDP on accelerators only, but PyTorch's FSDP works on CPUs too
FSDP_ON_CPU = """
import sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from training import train
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
train.main(sys.argv[1:])
"""


@pytest.fixture
def fsdp(tmp_path):
    """Trains in two processes with FSDP and a wrap policy, and returns what they printed."""
    (tmp_path / "fsdp.py").write_text(FSDP_ON_CPU)

    def call(arguments, policy):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", tmp_path / "fsdp.py"]
        wrap = {"FSDP_AUTO_WRAP_POLICY": policy, "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock"}
        environment = {**os.environ, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "PYTHONPATH": ".", **wrap}
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True).stderr

    return call


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_fsdp_has_the_losses_of_one_process(arguments, fsdp, tmp_path, optimizer):
    options = ("--validation-steps", "1", "--ema-decay", "0.5", "--optimizer", optimizer)
    train.main(arguments("one", 2, *options))
    printed = fsdp(arguments("two", 2, *options), "NO_WRAP")
    assert (tmp_path / "two" / "checkpoint-2").exists(), printed
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    if optimizer == "muon":  # its iterations in bfloat16 turn rounding into differences of the weights
        return
    ours, expected = (
        Zero123PlusPipeline.from_pretrained(tmp_path / name / "checkpoint-2").unet.state_dict()
        for name in ("two", "one")
    )
    assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fsdp_by_layers_is_refused(arguments, fsdp):
    assert "needs version 2 with the model as one" in fsdp(arguments("run", 1), "TRANSFORMER_BASED_WRAP")


def test_empty_samples_are_skipped_and_counted(arguments, shards, tmp_path):
    """Older shards may hold objects that no view shows."""
    with webdataset.TarWriter(str(shards / "shard-00001.tar"), encoder=False) as writer:
        sample = {"__key__": "ghost-3", "json": json.dumps({"object": "ghost-3"}).encode()}
        for kind, rows in (("inputs", 1), ("targets", 2)):
            buffer = io.BytesIO()
            Image.new("RGBA", (96, 16 * rows)).save(buffer, "WEBP", lossless=True)
            sample[f"{kind}.webp"] = buffer.getvalue()
        writer.write(sample)
    train.main(arguments("run", 9))  # one epoch of 36 samples
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["skipped"] >= 12


def test_dry_run_counts_and_computes_nothing(arguments, pipe, tmp_path, capsys):
    train.main(arguments("run", 2, "--dry-run"))
    printed = capsys.readouterr().out
    count = sum(p.numel() for part in (pipe.unet, pipe.vision_encoder) for p in part.parameters()) + 16
    assert f"trains        {count:,} of {count:,}" in printed and "TFLOP a step" in printed and "GiB" in printed
    assert not (tmp_path / "run").exists()


def test_what_training_writes_every_command_reads(arguments, pipe, picture, run, tmp_path):
    """A run's folder is its newest checkpoint, and that of a LoRA run is the LoRA on what it was trained from."""
    train.main(arguments("whole", 1))
    train.main(arguments("lora", 1, "--lora-rank", "2", "--learning-rate", "0.1", "--ema-decay", "0"))
    whole, lora = (
        loading.Checkpoint(tmp_path / "whole", "cpu").load(),
        loading.Checkpoint(tmp_path / "lora", "cpu").load(),
    )
    assert whole.config.ramping_coefficients != pipe.config.ramping_coefficients
    half = loading.Checkpoint(tmp_path / "start", "cpu", lora=tmp_path / "lora", lora_scale=0.5).load()
    plain = run(pipe, picture)
    assert_differ(run(lora, picture), plain)
    assert (run(half, picture) - plain).abs().max() < (run(lora, picture) - plain).abs().max()
    publish.main(["--checkpoint", str(tmp_path / "lora"), "--output", str(tmp_path / "published")])
    assert_differ(run(loading.Checkpoint(tmp_path / "published", "cpu").load(), picture), plain)
    train.main([*arguments("further", 1), "--checkpoint", str(tmp_path / "lora")])  # the LoRA is merged
    with pytest.raises(SystemExit, match="holds a run with lora_rank 2, but 4 is asked for now"):
        train.main(arguments("lora", 2, "--lora-rank", "4"))


def test_training_starts_from_half_precision(arguments, pipe, tmp_path):
    """Each library loads a half-precision checkpoint in another dtype unless it is told."""
    pipe.to(torch.float16).save_pretrained(tmp_path / "start")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train.main(arguments("run", 1, "--mixed-precision", "bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_data_of_other_cameras_is_refused(arguments, pipe, shards, tmp_path):
    with webdataset.TarWriter(str(tmp_path / "other.tar")) as shard:
        for sample in webdataset.WebDataset(str(shards / "shard-00000.tar"), shardshuffle=False):
            record = {**json.loads(sample["json"]), "cameras": {"preset": "v1.1"}}
            shard.write({**sample, "json": record})
    (tmp_path / "other.tar").rename(shards / "shard-00000.tar")
    with pytest.raises(SystemExit, match="`--data` .* has the cameras of v1.1, but the checkpoint says"):
        train.main(arguments("run", 1))


@pytest.mark.slow
def test_controlnet_alone_trains_and_resumes(arguments, pipe, picture, run, tmp_path):
    for name, steps in (("whole", 2), ("broken", 1), ("broken", 2)):
        train.main([*arguments(name, steps), "--phase", "controlnet"])
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    trained = ControlNetModel.from_pretrained(tmp_path / "broken" / "checkpoint-2")
    before = run(pipe, picture)
    pipe.add_controlnet(trained)
    control = Image.new("RGB", (32, 48), "white")
    torch.testing.assert_close(run(pipe, picture, control_image=control, controlnet_conditioning_scale=0.0), before)
    assert (run(pipe, picture, control_image=control, controlnet_conditioning_scale=100.0) - before).abs().max() > 1e-4


def test_controlnet_sees_in_training_what_it_sees_in_the_pipeline(pipe, shards):
    sample = TileDataset(shards, condition="depth")[0]
    pipe.add_controlnet()
    shown = pipe.prepare_control_image(sample["control"], 1, 1, 48, 32, "cpu")[0]
    torch.testing.assert_close(shown, sample["control"] / 127.5 - 1, rtol=0, atol=1e-2)


def test_data_without_the_pass_is_refused(arguments, shards):
    with webdataset.TarWriter(str(shards / "shard-00001.tar"), encoder=False) as writer:
        writer.write({"__key__": "cup-3", "json": b"{}", "inputs.webp": b"", "targets.webp": b""})
    with pytest.raises(SystemExit, match="cup-3 of .* has no targets.depth.png"):
        train.main([*arguments("run", 1), "--phase", "controlnet"])


def test_starts_from_stable_diffusion_2(pipe, tmp_path):
    parts = ("vae", "text_encoder", "tokenizer", "unet")
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    given = {name: getattr(pipe, name) for name in parts}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**given, scheduler=scheduler, **extra).save_pretrained(tmp_path / "sd2")
    pipe.vision_encoder.save_pretrained(tmp_path / "clip")
    pipe.feature_extractor_clip.save_pretrained(tmp_path / "clip")
    ours = checkpoints.load_start(str(tmp_path / "sd2"), str(tmp_path / "clip"))
    torch.testing.assert_close(ours.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert ours.scheduler.config.beta_schedule == "linear" and ours.scheduler.config.timestep_spacing == "trailing"
    assert list(ours.feature_extractor_vae.image_std) == [0.8] * 3
    StableDiffusionPipeline(**given, scheduler=DDIMScheduler(), **extra).save_pretrained(tmp_path / "sd2-base")
    with pytest.raises(ValueError, match="predicts 'epsilon'"):
        checkpoints.load_start(str(tmp_path / "sd2-base"), str(tmp_path / "clip"))


class TestStream:
    def test_every_epoch_has_every_sample_once_in_another_order(self):
        indices = [sample["index"] for sample in Stream(Numbers(10), 0, 0, 20)]
        assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10)) and indices[:10] != indices[10:]

    def test_goes_on_anywhere(self):
        whole, rest = list(Stream(Numbers(10), 0, 0, 20)), list(Stream(Numbers(10), 0, 7, 20))
        assert rest == whole[7:] and len({sample["seed"] for sample in whole}) == 20

    def test_skips_what_cannot_be_read(self):
        samples = list(Stream(Numbers(10, broken={3}), 0, 0, 10))
        assert 3 not in [sample["index"] for sample in samples] and sum(s["skipped"] for s in samples) == 1
        with pytest.raises(ValueError, match="100 samples in a row"):
            Stream(Numbers(2, broken={0, 1}), 0, 0, 1)[0]


class Numbers:
    """A dataset of numbers, some of which cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError("broken")
        return {"index": index}


def test_a_truncated_shard_is_named_and_what_can_be_read_is_kept(shards, caplog):
    path = shards / "shard-00000.tar"
    whole = TileDataset(shards)
    cut = whole.entries[1]["members"]["targets.webp"][0] + 10  # within the second object
    path.write_bytes(path.read_bytes()[:cut])
    assert len(TileDataset(shards)) == len(whole) // 2
    assert "shard-00000.tar is damaged" in caplog.text


def test_shards_of_different_sizes_are_refused(shards, tmp_path):
    views = Image.new("RGBA", (6 * 8, 8)), Image.new("RGBA", (6 * 8, 2 * 8))
    with webdataset.TarWriter(str(shards / "shard-00001.tar")) as shard:
        sample = {"__key__": "small", "json": {"object": "small"}}
        for kind, view in zip(("inputs.webp", "targets.webp"), views):
            sample[kind] = io.BytesIO()
            view.save(sample[kind], "WEBP", lossless=True)
            sample[kind] = sample[kind].getvalue()
        shard.write(sample)
    with pytest.raises(ValueError, match="shard-00000.tar has views and cameras of .* but .*shard-00001.tar"):
        TileDataset(shards)


def others(shards, folder, **more):
    """Shards of the same views, whose objects have other names."""
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "shard-00000.tar")) as writer:
        for sample in webdataset.WebDataset(str(shards / "shard-00000.tar"), shardshuffle=False):
            writer.write({**sample, "json": {"object": f"other-{sample['__key__']}", **more}})
    return folder


def test_held_out_objects_go_into_a_folder_of_their_own(shards, tmp_path):
    arguments = ["--renders", str(shards), "--train-data", str(others(shards, tmp_path / "train")), "--output"]
    for _ in range(2):  # the second time it replaces the first
        heldout.main([*arguments, str(tmp_path / "objects")])
    names = {path.name for path in (tmp_path / "objects").iterdir()}
    assert names == {"mug-1", "car-2", "mean.webp", "heldout.json"}
    mine = tmp_path / "mine" / "mean.webp"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(SystemExit, match="holds no held-out objects"):
        heldout.main([*arguments, str(mine.parent)])
    assert [path.read_text() for path in mine.parent.iterdir()] == ["mine"]


def test_a_held_out_object_stays_in_its_folder(shards, tmp_path):
    with webdataset.TarWriter(str(shards / "shard-00001.tar")) as shard:
        for sample in webdataset.WebDataset(str(shards / "shard-00000.tar"), shardshuffle=False):
            shard.write({**sample, "json": {"object": "../outside"}})
    arguments = ["--renders", shards, "--output", tmp_path / "objects"]
    with pytest.raises(SystemExit, match="'../outside', which is no name of a folder"):
        heldout.main([str(part) for part in arguments])
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("record", ({"object": "mug-1"}, {"object": "mug-1_v1", "of": "mug-1"}))
def test_objects_that_are_trained_on_are_not_held_out(shards, tmp_path, record):
    train_data = others(shards, tmp_path / "train", **record)
    with pytest.raises(SystemExit, match="`--train-data` has 1 objects that are to be held out: mug-1"):
        heldout.main(
            ["--renders", str(shards), "--train-data", str(train_data), "--output", str(tmp_path / "objects")]
        )
    assert not (tmp_path / "objects").exists()


def test_held_out_objects_without_training_data(shards, tmp_path):
    """They are scored without the baselines of it."""
    heldout.main(["--renders", str(shards), "--output", str(tmp_path / "objects")])
    assert {path.name for path in (tmp_path / "objects").iterdir()} == {"mug-1", "car-2", "heldout.json"}
    assert {path.stem for path in (tmp_path / "objects" / "mug-1").iterdir()} == {
        *("input", "input_90", "input_180", "input_270", "views", "depth", "normals"),
    }


def test_a_full_disk_is_one_line_and_leaves_nothing(arguments, tmp_path, monkeypatch):
    """safetensors raises an error of its own."""

    def write(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(train, "write_weights", write)
    with pytest.raises(SystemExit, match="checkpoint-1 cannot be written .No space left on device.: .* Make room"):
        train.main(arguments("run", 1))
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_shards_of_all_levels_and_links_are_found_once(shards, tmp_path):
    """A shard beside folders hides none of theirs."""
    data = tmp_path / "data"
    others(shards, data)
    (data / "deep").mkdir()
    shards.rename(data / "deep" / "toys")
    (data / "link").symlink_to(data / "deep" / "toys")
    (data / "deep" / "round").symlink_to(data)
    outside = others(data / "deep" / "toys", tmp_path / "elsewhere")
    (data / "away").symlink_to(outside)
    dataset = TileDataset(data)
    assert dataset.describe() == "6 objects of 3 shards"


def test_the_trainer_says_what_it_has(arguments, capsys):
    train.main(arguments("run", 1))
    assert ": 2 objects of 1 shards" in capsys.readouterr().out


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


def test_published_tokenizer_has_its_merges(pipe, tmp_path):
    """transformers before 5 reads vocab.json and merges.txt, which must encode a text as the tokenizer does."""
    vocabulary = {**pipe.tokenizer.get_vocab(), "ca": 200, "cat</w>": 201}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    pipe.tokenizer = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=16)
    assert 201 in pipe.tokenizer("cat").input_ids
    publish.write_pipeline(pipe, tmp_path / "published")
    assert (tmp_path / "published" / "tokenizer" / "merges.txt").read_text() == "#version: 0.2\nc a\nca t</w>\n"
    assert json.loads((tmp_path / "published" / "tokenizer" / "vocab.json").read_text())["cat</w>"] == 201


def test_publishing_replaces_components_alone(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "trained")
    (tmp_path / "home" / "unet").mkdir(parents=True)
    (tmp_path / "home" / "unet" / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="unet is no component of a checkpoint"):
        publish.main(["--checkpoint", str(tmp_path / "trained"), "--output", str(tmp_path / "home")])
    assert (tmp_path / "home" / "unet" / "mine.txt").read_text() == "precious"


def test_published_controlnet(pipe, tmp_path):
    pipe.add_controlnet().save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / loading.RUN_FILE).write_text('{"cameras": "v1.1", "checkpoint": "/somewhere"}')
    publish.main(["--controlnet", str(tmp_path / "trained"), "--output", str(tmp_path / "repository")])
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["controlnet"]
    again = ControlNetModel.from_pretrained(tmp_path / "repository", subfolder="controlnet")
    record = json.loads((tmp_path / "repository" / "controlnet" / loading.RUN_FILE).read_text())
    assert record == {"cameras": "v1.1"}
    torch.testing.assert_close(again.conv_in.weight, pipe.controlnet.conv_in.weight, rtol=1e-3, atol=1e-4)


def test_the_picture_is_seen_at_its_random_size(pipe, shards):
    """In 4 x 4 pixels nothing is left of a pattern of single pixels, and one that is as large stays what it is."""
    encoder = encode.Encoder(pipe, torch.device("cpu"))
    checks = 255 * (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).to(torch.uint8)
    batch = collate([TileDataset(shards)[i] for i in range(2)]) | {"image": checks.expand(2, 3, -1, -1)}
    sizes = encoder(batch | {"image_size": [4, 16]})["clip_pixels"].std((1, 2, 3))
    assert sizes[0] < 0.5 * sizes[1]
    same = encoder(batch)["clip_pixels"][1]
    torch.testing.assert_close(encoder(batch | {"image_size": [4, 16]})["clip_pixels"][1], same)


@pytest.mark.parametrize(
    "options",
    (
        ["--lr-scheduler", "timed"],
        ["--micro-batch-size", "3"],
        ["--lora-rank", "2", "--phase", "controlnet"],
        ["--image-sizes", "64", "32"],
        ["--permute-colours"],
        ["--perceptual", "1"],
    ),
)
def test_options_that_contradict_each_other_are_refused(arguments, options, tmp_path):
    with pytest.raises(SystemExit, match=f"`{options[0] if options[0] != '--micro-batch-size' else '--batch-size'}"):
        train.main([*arguments("run", 1), *options])
    assert not (tmp_path / "run").exists()


def test_the_phase_fills_in_what_is_not_given():
    required = ["--phase", "controlnet", "--checkpoint", "c", "--data", "d", "--output", "o"]
    assert train.parse_options(required).image_sizes == (128, 512)
    given = train.parse_options([*required, "--image-sizes", "0", "0", "--learning_rate", "0.5"])
    assert given.image_sizes is None and given.learning_rate == 0.5 and given.steps == 50_000
