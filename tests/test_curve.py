"""The curve of a training: its record, and the picture of it."""

import json

import pytest
from PIL import Image

from evaluation import bars, curve


@pytest.fixture
def run(tmp_path):
    """A run of 30,000 tiles with losses 0, 1, 2 ... and one validation."""
    records = [{"step": i + 1, "tiles": 2500 * (i + 1), "loss": float(i)} for i in range(12)]
    records[7] |= {"validation_loss": 0.4, "psnr_t999_with": 19.0, "psnr_t999_without": 17.5}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return tmp_path / "run"


@pytest.fixture
def results(tmp_path):
    table = {name: {"tile PSNR": value} for name, value in zip(bars.BASELINES, (15.0, 16.0, 14.0))}
    table[bars.OURS] = {"tile PSNR": 17.25, "view SSIM": 0.5}
    (tmp_path / "results.json").write_text(json.dumps({bars.TRAINED: table}))
    return tmp_path / "results.json"


def test_losses_are_averaged_and_counted_from_the_start(run):
    assert curve.run_lines(run / "log.jsonl", 100_000) == [
        {"tiles": 110_000, "loss": 1.5},
        {"tiles": 120_000, "loss": 5.5},
        {"tiles": 130_000, "loss": 9.5},
        {"tiles": 120_000, "validation_loss": 0.4, "psnr_t999_with": 19.0, "psnr_t999_without": 17.5},
    ]


def test_measures_come_with_their_bars(results):
    """Two above the best baseline; measures that no panel shows are left out."""
    line = {"tiles": 7, "group": bars.TRAINED, "tile PSNR": 17.25, "bounds": {"tile PSNR": (18.0, None)}}
    assert curve.result_lines(results, 7) == [line]


def test_results_of_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({bars.NEW: {"predictions": {"tile PSNR": 17.0}}}))
    with pytest.raises(ValueError, match="scores predictions, not a checkpoint"):
        curve.result_lines(tmp_path / "results.json", 7)


def test_groups_have_lines_of_their_own(results):
    """Neither replaces the other, and each is replaced by what is measured anew."""
    line = curve.result_lines(results, 7)[0]
    other = {**line, "group": bars.NEW}
    again = {**line, "tile PSNR": 18.0}
    assert curve.merge([line, other], [again]) == [other, again]


def test_the_record_grows_and_is_drawn(run, results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    record = tmp_path / "curve.jsonl"
    for _ in range(2):  # what is added twice is there once
        curve.main([str(record), "--run", str(run)])
        curve.main([str(record), "--results", str(results), "--tiles", "40000"])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["tiles"] for line in lines] == [10_000, 20_000, 20_000, 30_000, 40_000]
    before = Image.open(tmp_path / "curve.webp").convert("RGB").tobytes()
    (tmp_path / "curve.webp").unlink()
    curve.main([str(record)])
    assert Image.open(tmp_path / "curve.webp").convert("RGB").tobytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["curve.jsonl", "--results", "results.json"], "go together"),
        (["curve.jsonl"], "has no lines yet"),
        (["curve.csv"], "ends in .jsonl"),
    ],
)
def test_wrong_calls_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        curve.main(arguments)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
