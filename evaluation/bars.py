"""What the checkpoint that ships with the repository is required to reach, as data.

`python -m evaluation.evaluate --check` checks the bars and exits with 1 where one is missed. A bar is a bound on one
measure of one group of objects.
"""

from dataclasses import dataclass

OURS = "this checkpoint"
MATTES = "mattes of the true views"
BASELINES = ("copy of the input", "nearest training object", "mean training tile")
TRAINED, UNSEEN = "trained kinds, new seeds", "kinds never trained"


def controlled(condition: str) -> str:
    """The name of the system that sees the true depth or normals besides the picture."""
    return f"with the true {condition}"


@dataclass(frozen=True)
class Bar:
    """A bound on a measure.

    Args:
        group: of held-out objects.
        measure: a column of `evaluate`'s table.
        kind: how the bound follows from `bound`: "at least" that value; "above the best baseline by" that
            much; "at most a copy's times" and "at most ours times" that factor; "between" that value and `upper`.
        bound: the number.
        reason: why this is asked for.
        upper: of "between".
        system: what is measured.
    """

    group: str
    measure: str
    kind: str
    bound: float
    reason: str
    upper: float | None = None
    system: str = OURS

    def bounds(self, table: dict) -> tuple[float | None, float | None]:
        """The least and the largest value that meet the bar, None where there is no such bound.

        Args:
            table: by system, its measures.
        """
        if self.kind in ("at least", "between"):
            return self.bound, self.upper
        if self.kind == "above the best baseline by":
            return max(table[name][self.measure] for name in BASELINES) + self.bound, None
        system = OURS if self.kind == "at most ours times" else "copy of the input"
        return None, table[system][self.measure] * self.bound

    def check(self, table: dict) -> tuple[str, float, bool]:
        """Compares a group's table with the bar.

        Args:
            table: by system, its measures.

        Returns:
            The requirement in words, the measured value, and whether it is met.
        """
        value, (least, most) = table[self.system][self.measure], self.bounds(table)
        met = (least is None or value >= least) and (most is None or value <= most)
        if self.kind == "at least":
            return f">= {self.bound:g}", value, met
        if self.kind == "between":
            return f"{self.bound:g} to {self.upper:g}", value, met
        if self.kind == "above the best baseline by":
            return f">= {least:.3f} (best baseline + {self.bound:g})", value, met
        name = "ours" if self.kind == "at most ours times" else "copy"
        return f"<= {most:.3f} ({name} x {self.bound:g})", value, met


BARS = (
    Bar(
        TRAINED, "tile PSNR", "above the best baseline by", 2.0, "the mean tile is the best guess without the picture"
    ),
    Bar(TRAINED, "tile LPIPS", "at most a copy's times", 0.8, "a copy has the colours and details, but not the views"),
    Bar(TRAINED, "mask IoU", "at least", 0.80, "outlines are what reconstruction needs first"),
    Bar(TRAINED, "saturation", "between", 0.8, "a collapse to grey is a PSNR that looks good", 1.2),
    Bar(TRAINED, "consistency", "at least", 0.95, "six views of one solid, as the nearest training object has"),
    Bar(TRAINED, "one step gain", "at least", 1.0, "the condition decides the layout from pure noise"),
    Bar(UNSEEN, "tile PSNR", "above the best baseline by", 0.5, "it generalises to other kinds"),
    Bar(UNSEEN, "tile LPIPS", "at most a copy's times", 1.0, "it generalises to other kinds"),
    Bar(
        TRAINED,
        "tile LPIPS",
        "at most ours times",
        0.5,
        "the paper's ratio: 0.177 without, 0.086 with depth",
        system=controlled("depth"),
    ),
    Bar(TRAINED, "mask IoU", "at least", 0.95, "normals tell the object from its background", system=MATTES),
)


def report(results: dict, bars=BARS) -> tuple[list[str], bool]:
    """Checks results against the bars of the groups that they have.

    Args:
        results: by group, its table.
        bars: to check. One whose system was not measured is not met.

    Returns:
        Lines of a Markdown table (required, measured, passed), and whether all are met.
    """
    lines = ["| group | measure | required | measured | passed | why |", "|---|---|---|---|---|---|"]
    passed = True
    for bar in bars:
        if bar.group not in results:
            continue
        measured = bar.system in results[bar.group]
        required, value, met = bar.check(results[bar.group]) if measured else (f"{bar.kind} {bar.bound:g}", 0, False)
        passed &= met
        name = bar.measure if bar.system == OURS else f"{bar.measure}, {bar.system}"
        verdict = f"{value:.3f} | {'yes' if met else 'NO'}" if measured else "- | not measured"
        lines.append(f"| {bar.group} | {name} | {required} | {verdict} | {bar.reason} |")
    return lines, passed
