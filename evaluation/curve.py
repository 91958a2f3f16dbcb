"""Draws what a training gave over the tiles that it saw: losses, and the measures of `evaluation.evaluate`.

    python -m evaluation.curve docs/curve.jsonl --run out/unet --before 351000
    python -m evaluation.curve docs/curve.jsonl --results out/evaluation/results.json --tiles 543000
    python -m evaluation.curve docs/curve.jsonl

`CURVE.jsonl` is the record: a line has the tiles seen in all and what was measured then. The first command adds the
losses of a run to it, which started from a checkpoint that had seen `--before` tiles; the second adds the measures of
one checkpoint; each draws `CURVE.webp` again, the last from what is there. Dashed lines are the bars of
`evaluation.bars`. Needs the package matplotlib.
"""

import io
import json
from pathlib import Path

import numpy as np

from zero123plus.files import write_file
from zero123plus.options import Parser, command, count, number

from .bars import BARS, OURS, TRAINED

EVERY = 10_000  # tiles whose losses are averaged
PANELS = (
    ("v-loss", ("loss", "validation_loss")),
    ("one step from t = 999, dB", ("psnr_t999_with", "psnr_t999_without")),
    ("tile PSNR, dB", ("tile PSNR",)),
    ("tile LPIPS", ("tile LPIPS",)),
    ("mask IoU, consistency", ("mask IoU", "consistency")),
    ("saturation", ("saturation",)),
)
LABELS = {
    "loss": f"training, means of {EVERY:,} tiles",
    "validation_loss": "held out",
    "psnr_t999_with": "with the picture",
    "psnr_t999_without": "without",
}


def run_lines(log: Path, before: int) -> list[dict]:
    """Lines of a run's `log.jsonl`: the mean loss of every `EVERY` tiles, and each measure of its validation.

    Args:
        log: the file.
        before: tiles that its start had seen.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    tiles = np.array([record["tiles"] for record in records])
    losses = np.array([record["loss"] for record in records])
    lines = []
    for end in range(EVERY, tiles[-1] + 1, EVERY):
        inside = (tiles > end - EVERY) & (tiles <= end)
        if inside.any():
            lines.append({"tiles": before + end, "loss": round(float(losses[inside].mean()), 4)})
    names = ("validation_loss", "psnr_t999_with", "psnr_t999_without")
    return lines + [
        {"tiles": before + record["tiles"], **{name: record[name] for name in names}}
        for record in records
        if names[0] in record
    ]


def result_line(results: Path, tiles: int) -> dict:
    """The line of a checkpoint: its measures of the trained kinds, and the bounds that the bars set them.

    Args:
        results: `results.json` of `evaluation.evaluate`.
        tiles: that the checkpoint has seen.

    Raises:
        ValueError: if it has no trained kinds.
    """
    found = json.loads(results.read_text())
    if TRAINED not in found:
        raise ValueError(f"`--results` {results} has the groups {', '.join(found)}, but not {TRAINED}.")
    table = found[TRAINED]
    bars = {bar.measure: bar for bar in BARS if bar.group == TRAINED and bar.system == OURS}
    measures = [name for _, names in PANELS for name in names if name in table[OURS]]
    bounds = {name: bars[name].bounds(table) for name in measures if name in bars}
    return {"tiles": tiles, **{name: round(table[OURS][name], 4) for name in measures}, "bounds": bounds}


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Lines in the order of their tiles; a new line replaces an old one of the same tiles and measures."""
    lines = {(line["tiles"], *sorted(line)): line for line in [*old, *new]}
    return [lines[key] for key in sorted(lines)]


def draw_curve(lines: list[dict], path: Path):
    """Draws the record as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS):
        for name in names:
            found = [(line["tiles"] / 1e6, line[name]) for line in lines if name in line]
            style = "-" if name == "loss" else "o-"
            (curve,) = axes.plot(*np.array(found).reshape(-1, 2).T, style, markersize=4, label=LABELS.get(name, name))
            last = next((line["bounds"][name] for line in reversed(lines) if name in line.get("bounds", {})), ())
            for bound in last:
                if bound is not None:
                    axes.axhline(bound, linestyle="--", linewidth=1, color=curve.get_color())
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    figure.supxlabel("million tiles seen", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90, format=path.suffix[1:])
    write_file(path, picture.getvalue())


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Draw the curve of a training.")
    add = parser.add_argument
    add("record", type=Path, metavar="CURVE.jsonl", help="the record, which is made if there is none")
    add("--run", type=Path, help="folder of a run of training.train, whose losses are added")
    add("--before", type=number(int, 0), default=0, help="tiles that its start had seen")
    add("--results", type=Path, help="results.json of evaluation.evaluate, whose measures are added")
    add("--tiles", type=count, help="that its checkpoint had seen")
    o = parser.parse_args(argv)
    if bool(o.results) != bool(o.tiles):
        parser.error("`--results` and `--tiles` go together: measures belong to a number of tiles.")
    if o.record.suffix != ".jsonl":
        parser.error(f"{o.record} is no name of a record: it ends in .jsonl, and the picture beside it in .webp.")
    lines = [json.loads(line) for line in o.record.read_text().splitlines()] if o.record.exists() else []
    new = run_lines(o.run / "log.jsonl", o.before) if o.run else []
    new += [result_line(o.results, o.tiles)] if o.results else []
    if not lines and not new:
        parser.error(f"{o.record} has no lines yet: add some with `--run` or `--results`.")
    lines = merge(lines, new)
    if new:
        write_file(o.record, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    draw_curve(lines, o.record.with_suffix(".webp"))


if __name__ == "__main__":
    main()
