"""Draws what a training gave over the tiles that it saw: losses, and the measures of `evaluation.evaluate`.

    python -m evaluation.curve docs/curve.jsonl --run out/unet --before 351000
    python -m evaluation.curve docs/curve.jsonl --results out/evaluation/results.json --tiles 543000
    python -m evaluation.curve docs/curve.jsonl

`CURVE.jsonl` is the record: a line has the tiles seen in all and what was measured then. The first command adds the
losses of a run to it, which started from a checkpoint that had seen `--before` tiles; the second adds the measures of
one checkpoint, by group of held-out objects; each draws `CURVE.webp` again, the last from what is there. Dashed lines
are the bars of `evaluation.bars`. Needs the package matplotlib.
"""

import io
import json
from pathlib import Path

import numpy as np

from zero123plus.files import write_file
from zero123plus.options import Parser, command, count, number

from .bars import BARS, GROUPS, OURS

EVERY = 10_000  # tiles whose losses are averaged
PANELS = {  # title: what the training writes
    "v-loss": ("loss", "validation_loss"),
    "one step from t = 999, dB": ("psnr_t999_with", "psnr_t999_without"),
}
MEASURES = ("tile PSNR", "tile LPIPS", "mask IoU", "consistency")  # each a panel with a curve of every group
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


def result_lines(results: Path, tiles: int) -> list[dict]:
    """Lines of a checkpoint: for each group its measures, and the bounds that the bars set them.

    Args:
        results: `results.json` of `evaluation.evaluate`.
        tiles: that the checkpoint has seen.

    Raises:
        ValueError: if they are of no checkpoint.
    """
    lines = []
    for group, table in json.loads(results.read_text()).items():
        if OURS not in table:
            raise ValueError(f"`--results` {results} scores {next(iter(table))}, not a checkpoint.")
        measures = {name: round(table[OURS][name], 4) for name in MEASURES if name in table[OURS]}
        bars = [bar for bar in BARS if (bar.group, bar.system) == (group, OURS) and bar.measure in measures]
        bounds = {bar.measure: bar.bounds(table) for bar in bars}
        lines.append({"tiles": tiles, "group": group, **measures, "bounds": bounds})
    return lines


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Lines in the order of their tiles; a new line replaces an old one of the same tiles, group and measures."""
    lines = {(line["tiles"], line.get("group", ""), *sorted(line)): line for line in [*old, *new]}
    return [lines[key] for key in sorted(lines)]


def draw_curve(lines: list[dict], path: Path):
    """Draws the record as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = iter(figure.subplots(2, 3, sharex=True).flat)

    def plot(axes, name: str, label: str, lines: list[dict]) -> str:
        found = [(line["tiles"] / 1e6, line[name]) for line in lines if name in line]
        style = "-" if name == "loss" else "o-"
        return axes.plot(*np.array(found).reshape(-1, 2).T, style, markersize=4, label=label)[0].get_color()

    for title, names in PANELS.items():
        axes = next(panels)
        for name in names:
            plot(axes, name, LABELS[name], lines)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    groups = {group: [line for line in lines if line.get("group") == group] for group in GROUPS}
    groups = {group: members for group, members in groups.items() if members}
    for measure in MEASURES:
        axes = next(panels)
        for group, members in groups.items():
            colour = plot(axes, measure, group, members)
            for bound in members[-1]["bounds"].get(measure, ()):
                if bound is not None:
                    axes.axhline(bound, linestyle="--", linewidth=1, color=colour)
        axes.set_title(measure, fontsize=10)
    if groups:
        axes.legend(fontsize=7)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
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
    new += result_lines(o.results, o.tiles) if o.results else []
    if not lines and not new:
        parser.error(f"{o.record} has no lines yet: add some with `--run` or `--results`.")
    lines = merge(lines, new)
    if new:
        write_file(o.record, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    draw_curve(lines, o.record.with_suffix(".webp"))


if __name__ == "__main__":
    main()
