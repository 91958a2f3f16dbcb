"""What the checkpoint that ships with the repository is required to reach, as data.

`python -m evaluation.evaluate --check` checks the bars and exits with 1 where one is missed.
"""

from collections import Counter
from dataclasses import dataclass

OURS, COPY, MATTES = "this checkpoint", "copy of the input", "mattes of the true views"
STUDENT, STUDENT_STEP, ONE_STEP = "its student", "its student, 1 step", "this checkpoint, 1 step"
BASELINES = (COPY, "nearest training object", "mean training tile")
# Groups of held-out objects, in the order of the tables
SISTERS, NEW = "real objects, names trained", "real objects, names never trained"
TRAINED, UNSEEN, OTHERS = "trained kinds, new seeds", "kinds never trained", "other objects"
GROUPS = SISTERS, NEW, TRAINED, UNSEEN, OTHERS


def controlled(condition: str) -> str:
    """The name of the system that sees the true depth or normals besides the picture."""
    return f"with the true {condition}"


@dataclass(frozen=True)
class Bar:
    """Bounds on one measure of one group of objects.

    Args:
        group: of held-out objects.
        measure: a column of `evaluate`'s table.
        reason: why this is asked for.
        least, most: the bounds; None where there is no such bound.
        of: systems to whose best value the bounds are added (PSNR, in dB) or by which they are multiplied (others).
        system: what is measured.
        added: whether the bounds are added, whatever the measure.
    """

    group: str
    measure: str
    reason: str
    least: float | None = None
    most: float | None = None
    of: tuple[str, ...] = ()
    system: str = OURS
    added: bool = False

    @property
    def relation(self) -> str:
        """How the bounds relate to what they are bounds to: "+" or "x"."""
        return "+" if self.added or "PSNR" in self.measure else "x"

    def bounds(self, table: dict) -> tuple[float | None, float | None]:
        """The least and the largest value that meet the bar, given the group's measures by system."""
        if not self.of or not all(self.measure in table.get(name, {}) for name in self.of):
            return self.least, self.most
        base = max(table[name][self.measure] for name in self.of)
        bounds = (self.least, self.most)
        return tuple(b if b is None else base + b if self.relation == "+" else base * b for b in bounds)

    def require(self, table: dict) -> str:
        """The requirement in words."""
        signs = [(sign, b, given) for sign, b, given in zip((">=", "<="), self.bounds(table), (self.least, self.most))]
        name = "best baseline" if len(self.of) > 1 else (*self.of, "")[0]
        return ", ".join(
            f"{sign} {bound:.4g}" + (f" ({name} {self.relation} {given:g})".replace("+ -", "- ") if name else "")
            for sign, bound, given in signs
            if bound is not None
        )


BARS = (
    Bar(SISTERS, "tile PSNR", "it turns the object, which a copy does not", least=1.5, of=(COPY,)),
    Bar(SISTERS, "tile LPIPS", "a copy has the colours and details, but not the views", most=1.0, of=(COPY,)),
    Bar(SISTERS, "mask IoU", "outlines are what reconstruction needs first", least=0.68),
    Bar(SISTERS, "consistency", "six views of one solid", least=0.92),
    Bar(NEW, "tile PSNR", "it generalises to other names", least=0.75, of=(COPY,)),
    Bar(NEW, "tile LPIPS", "it generalises to other names", most=1.1, of=(COPY,)),
    Bar(NEW, "mask IoU", "it generalises to other names", least=0.58),
    Bar(TRAINED, "tile PSNR", "the mean tile is the best guess without the picture", least=2.0, of=BASELINES),
    Bar(TRAINED, "tile LPIPS", "a copy has the colours and details, but not the views", most=0.8, of=(COPY,)),
    Bar(TRAINED, "mask IoU", "outlines are what reconstruction needs first", least=0.80),
    Bar(TRAINED, "saturation", "a collapse to grey is a PSNR that looks good", least=0.8, most=1.2),
    Bar(TRAINED, "consistency", "six views of one solid, as the nearest training object has", least=0.95),
    Bar(TRAINED, "one step gain", "the condition decides the layout from pure noise", least=1.0),
    Bar(UNSEEN, "tile PSNR", "it generalises to other kinds", least=0.5, of=BASELINES),
    Bar(UNSEEN, "tile LPIPS", "it generalises to other kinds", most=1.0, of=(COPY,)),
    Bar(
        TRAINED,
        "tile LPIPS",
        "the paper's ratio: 0.177 without, 0.086 with depth",
        most=0.5,
        of=(OURS,),
        system=controlled("depth"),
    ),
    Bar(TRAINED, "mask IoU", "normals tell the object from its background", least=0.95, system=MATTES),
)


def student_bars(group: str) -> tuple[Bar, ...]:
    """The bars of a student in one group: against the checkpoint that it learned from, at that one's own steps and
    guidance scale.
    """
    student = {"group": group, "of": (OURS,), "system": STUDENT}
    look = "two steps without guidance look like all"
    return (
        Bar(measure="tile LPIPS", reason=look, most=0.015, added=True, **student),
        Bar(measure="mask IoU", reason="the outlines stay", least=-0.02, added=True, **student),
        Bar(measure="consistency", reason="six views of one solid", least=-0.01, added=True, **student),
        Bar(measure="saturation", reason="regression to a mean is grey", least=0.9, **student),
        Bar(measure="diversity", reason="seeds still differ", least=0.8, **student),
        Bar(measure="denoising", reason="what a student is for", most=0.2, **student),
        Bar(group, "tile LPIPS", "the path's end in one step", most=1.0, of=(ONE_STEP,), system=STUDENT_STEP),
    )


BARS += sum((student_bars(group) for group in GROUPS[:4]), ())


def report(results: dict, bars=BARS) -> tuple[list[str], bool]:
    """Checks results against the bars of the groups that they have.

    Args:
        results: by group, its measures by system.
        bars: to check. One whose system was not measured is not met; such a system has one line.

    Returns:
        Lines of a Markdown table, and whether all bars are met, of which there must be one.
    """
    lines = ["| group | measure | required | measured | passed | why |", "|---|---|---|---|---|---|"]
    bars = [bar for bar in bars if bar.group in results]
    missing = Counter(bar.system for bar in bars if not any(bar.system in table for table in results.values()))
    passed = bool(bars) and not missing
    if not bars:
        lines.append(f"| {', '.join(results)} | - | no bar has such a group | - | NO | nothing was checked |")
    for bar in (bar for bar in bars if bar.system not in missing):
        table, name = results[bar.group], bar.measure if bar.system == OURS else f"{bar.measure}, {bar.system}"
        value, (least, most) = table.get(bar.system, {}).get(bar.measure), bar.bounds(table)
        value = value if all(name in table for name in bar.of) else None  # what it is compared with is missing
        met = value is not None and (least is None or value >= least) and (most is None or value <= most)
        passed &= met
        verdict = "- | not measured" if value is None else f"{value:.3f} | {'yes' if met else 'NO'}"
        lines.append(f"| {bar.group} | {name} | {bar.require(table)} | {verdict} | {bar.reason} |")
    for system, count in missing.items():
        lines.append(f"| - | bars of {system}, {count} in all | - | - | not measured | - |")
    return lines, passed
