"""Times `training.train` beside the bare model.

    python -m evaluation.training_speed --data data/train --batches 8

The bare step is forward, backward and optimizer of the same model on a batch that stays in memory. The trainer reads,
encodes, draws noise, clips gradients, averages weights and writes its log besides. Both run in one process, by turns.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from pipeline import scale_latents
from training import train
from training.checkpoints import load_start
from training.data import TileDataset
from training.encode import sample_moments
from training.loss import Zero123PlusLoss
from training.optimizers import build_optimizer
from zero123plus.loading import ROOT, choose_device, cpu_has_bfloat16
from zero123plus.options import Parser, command, count

from .benchmark import report


class BareStep:
    """Forward, backward and optimizer step of what the options of a run train.

    Args:
        options: of [`training.train.parse_options`].
        samples: a batch of a `TileDataset`.
    """

    def __init__(self, options, samples: list[dict]):
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision)
        device = self.accelerator.device
        pipe = load_start(options.checkpoint)
        pipe.vae.to(device), pipe.text_encoder.to(device)
        model = train.build_model(options, pipe)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = build_optimizer(options.optimizer, named, options.learning_rate, 1)
        self.model, self.optimizer = self.accelerator.prepare(model.train(), optimizer)
        encoder = Zero123PlusLoss(pipe, device).encoder
        encoded = encoder(samples)
        generators = [torch.Generator().manual_seed(i) for i in range(len(samples))]
        self.tile = scale_latents(sample_moments(encoded["tile"], generators) * pipe.vae.config.scaling_factor)
        reference = sample_moments(encoded["reference"], generators)
        timesteps, ones = torch.arange(len(samples), device=device), torch.ones(len(samples), device=device)
        self.arguments = (self.tile, reference, timesteps, encoder.prompt_embeds, encoded["clip_pixels"], ones)

    def __call__(self):
        """Does one step."""
        loss = (self.model(*self.arguments).float() - self.tile).square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.tile.is_cuda:
            torch.cuda.synchronize()


def training_rates(checkpoint: str, data: Path, batch_size: int, precision: str, steps: int, rounds: int) -> dict:
    """Tiles a second of the trainer, of the bare step, and their ratio.

    Args:
        checkpoint: to train, in phase "scratch".
        data: folder of shards, of which the first is used.
        batch_size: tiles a step.
        precision: of `--mixed-precision`.
        steps: timed in each round.
        rounds: turns of trainer and bare step; the medians of all steps are compared.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "data").mkdir()
        shard = min(data.glob("shard-*.tar"))
        (folder / "data" / shard.name).symlink_to(shard.resolve())
        dataset = TileDataset(folder / "data")

        def options(stop: int):
            given = {"checkpoint": checkpoint, "data": folder / "data", "output": folder / "run", "steps": stop}
            given |= {"batch_size": batch_size, "micro_batch_size": batch_size, "mixed_precision": precision}
            given |= {"phase": "scratch", "report_to": "none", "save_minutes": 1e6, "decay_steps": 0, "keep": 1}
            pairs = [part for name, value in given.items() for part in (f"--{name}", str(value))]
            return train.parse_options([*pairs, "--in-memory"])

        bare = BareStep(options(1), [dataset[i % len(dataset)] for i in range(batch_size)])
        bare()
        times, speeds = [], []
        for i in range(rounds):
            stop = (steps + 1) * (i + 1)
            train.train(options(stop))
            log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
            speeds += [line["tiles_per_second"] for line in log[-steps:]]
            for _ in range(steps):
                start = time.perf_counter()
                bare()
                times.append(time.perf_counter() - start)
    trainer, alone = statistics.median(speeds), batch_size / statistics.median(times)
    return {"trainer, tiles/s": trainer, "bare step, tiles/s": alone, "trainer to bare step": trainer / alone}


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Time the trainer beside the bare model.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of shards")
    add("--checkpoint", default=str(ROOT), help="what is trained")
    add("--batches", nargs="+", type=count, default=[32], help="tiles a step")
    add("--steps", type=count, default=8, help="timed steps of a round")
    add("--repeats", type=count, default=3, help="rounds")
    add("--output", type=Path, default=Path("out/training_speed.json"), help="file of the results, which is replaced")
    o = parser.parse_args(argv)
    device = choose_device()
    precision = "bf16" if device != "cpu" or cpu_has_bfloat16() else "no"
    rows = [
        {"batch": batch, "precision": precision}
        | training_rates(o.checkpoint, o.data, batch, precision, o.steps, o.repeats)
        for batch in o.batches
    ]
    report(rows, device, o.output)


if __name__ == "__main__":
    main()
