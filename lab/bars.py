"""What the checkpoint that ships is required to reach, as data.

    python -m lab.bars

evaluates it on all groups of held-out objects as `evaluation.evaluate` does, with its ControlNets and its student,
prints every bar, and exits with 1 where one is missed. `--limit 2 --steps 1` is a quick try, which meets few of them.
"""

from dataclasses import dataclass

from evaluation import evaluate
from evaluation.evaluate import BASELINES, COPY, MATTES, ONE_STEP, OURS, STUDENT, STUDENT_STEP, controlled
from zero123plus import loading
from zero123plus.options import command

# Folders of `evaluation/groups`: names of real objects and kinds of toys that are trained, and those that are not
REAL_KNOWN, REAL_NEW, TOY_KNOWN, TOY_NEW = "real-known", "real-new", "toys-known", "toys-new"


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
    Bar(REAL_KNOWN, "tile PSNR", "it turns the object, which a copy does not", least=1.5, of=(COPY,)),
    Bar(REAL_KNOWN, "tile LPIPS", "a copy has the colours and details, but not the views", most=1.0, of=(COPY,)),
    Bar(REAL_KNOWN, "mask IoU", "outlines are what reconstruction needs first", least=0.68),
    Bar(REAL_KNOWN, "consistency", "six views of one solid", least=0.92),
    Bar(REAL_NEW, "tile PSNR", "it generalises to other names", least=0.75, of=(COPY,)),
    Bar(REAL_NEW, "tile LPIPS", "it generalises to other names", most=1.1, of=(COPY,)),
    Bar(REAL_NEW, "mask IoU", "it generalises to other names", least=0.58),
    Bar(TOY_KNOWN, "tile PSNR", "the mean tile is the best guess without the picture", least=2.0, of=BASELINES),
    Bar(TOY_KNOWN, "tile LPIPS", "a copy has the colours and details, but not the views", most=0.8, of=(COPY,)),
    Bar(TOY_KNOWN, "mask IoU", "outlines are what reconstruction needs first", least=0.80),
    Bar(TOY_KNOWN, "saturation", "a collapse to grey is a PSNR that looks good", least=0.8, most=1.2),
    Bar(TOY_KNOWN, "consistency", "six views of one solid, as the nearest training object has", least=0.95),
    Bar(TOY_KNOWN, "one step gain", "the condition decides the layout from pure noise", least=1.0),
    Bar(TOY_NEW, "tile PSNR", "it generalises to other kinds", least=0.5, of=BASELINES),
    Bar(TOY_NEW, "tile LPIPS", "it generalises to other kinds", most=1.0, of=(COPY,)),
    Bar(
        TOY_KNOWN,
        "tile LPIPS",
        "the paper's ratio: 0.177 without, 0.086 with depth",
        most=0.5,
        of=(OURS,),
        system=controlled("depth"),
    ),
    Bar(TOY_KNOWN, "mask IoU", "normals tell the object from its background", least=0.95, system=MATTES),
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


# Of the LoRA for several pictures, by system and measure: the least gain over one picture, of LPIPS the greatest, for
# real objects and for toys; and by how much one picture may differ with it and without. `lab.pictures` checks these
BACK, FOUR = "with the back", "front, left, back and right"
GAINS = (
    (BACK, "tile PSNR", 0.7, 0.9),
    (BACK, "back PSNR", 1.3, 1.8),
    (BACK, "back LPIPS", -0.03, -0.04),
    (BACK, "mask IoU", 0.03, 0.02),
    (FOUR, "tile PSNR", 1.0, 1.2),
)
SAME = (("tile PSNR", 0.05), ("tile LPIPS", 0.003))

BARS += sum((student_bars(group) for group in (REAL_KNOWN, REAL_NEW, TOY_KNOWN, TOY_NEW)), ())


def report(results: dict, bars=BARS) -> tuple[list[str], bool]:
    """Checks results against the bars of the groups that they have.

    Args:
        results: by group, its measures by system.
        bars: to check. One whose system was not measured is not met.

    Returns:
        Lines of a Markdown table, and whether all bars are met, of which there must be one.
    """
    lines = ["| group | measure | required | measured | passed | why |", "|---|---|---|---|---|---|"]
    bars = [bar for bar in bars if bar.group in results]
    passed = bool(bars)
    for bar in bars:
        table, name = results[bar.group], bar.measure if bar.system == OURS else f"{bar.measure}, {bar.system}"
        value, (least, most) = table.get(bar.system, {}).get(bar.measure), bar.bounds(table)
        value = value if all(name in table for name in bar.of) else None  # what it is compared with is missing
        met = value is not None and (least is None or value >= least) and (most is None or value <= most)
        passed &= met
        verdict = "- | not measured" if value is None else f"{value:.3f} | {'yes' if met else 'NO'}"
        lines.append(f"| {bar.group} | {name} | {bar.require(table)} | {verdict} | {bar.reason} |")
    return lines, passed


@command
def main(argv: list[str] | None = None):
    """The command line: that of `evaluation.evaluate` with what ships beside the checkpoint."""
    o = evaluate.parse_options(argv)
    o.controlnet = o.controlnet or loading.ROOT / "controlnet"
    o.normals = o.normals or loading.ROOT / "controlnet_normals"
    o.student = o.student or loading.STUDENT
    lines, passed = report(evaluate.evaluate(o))
    print("\n".join(lines))
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
