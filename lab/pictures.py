"""What the shipped LoRA for several pictures must reach, beside the same checkpoint with one picture.

    python -m lab.pictures --draw lab/pictures.webp

evaluates real objects of both groups and toys of trained kinds with the input alone, with the back too, and with back,
left and right, prints every bar with the gain's standard error over objects, and exits with 1 where one is missed.
`--draw` draws six objects, evenly spread: input, back, views with one picture, with two, and true views.
"""

import numpy as np
from PIL import Image

from evaluation import evaluate, metrics
from evaluation.evaluate import Sampling, generate, read_on_grey, score_systems
from evaluation.heldout import GROUPS, cameras_of
from pipeline import split_views
from zero123plus import loading
from zero123plus.options import Parser, command, count

from .bars import BACK, FOUR, GAINS, SAME

BASE, ONE = "one picture, without the LoRA", "one picture"
ALSO = {BASE: (), ONE: (), BACK: (180,), FOUR: (90, 180, 270)}


def rows_of(scores: dict, objects: list) -> tuple[list[str], bool]:
    """Lines of a table, one for each bar of a group, and whether all are met."""
    lines, passed = [], True
    real = objects[0].parent.name.startswith("real")

    def gains(system: str, other: str, measure: str) -> tuple[float, float]:
        found = np.array([scores[system, path][measure] - scores[other, path][measure] for path in objects])
        return found.mean(), found.std(ddof=1) / len(found) ** 0.5

    name = f"{'real, both groups' if real else 'toys, trained kinds'} ({len(objects)})"
    for system, measure, for_real, for_toys in GAINS:
        (gain, error), bound = gains(system, ONE, measure), for_real if real else for_toys
        met = (gain >= bound if bound > 0 else gain <= bound) and abs(gain) > 2 * error
        lines.append(
            f"| {name} | {system} | {measure} | {bound:+.2f} | {gain:+.3f} ± {error:.3f} | {'yes' if met else 'no'} |"
        )
        passed &= met
    for measure, bound in SAME:
        gain, error = gains(ONE, BASE, measure)
        met = "yes" if abs(gain) <= bound else "no"
        lines.append(f"| {name} | {ONE} | {measure} | within {bound} | {gain:+.4f} ± {error:.4f} | {met} |")
        passed &= abs(gain) <= bound
    return lines, passed


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Evaluate the shipped LoRA for several pictures.")
    parser.add_argument("--lora", default=str(loading.ROOT / "pictures"), help="folder or run of the LoRA")
    parser.add_argument("--limit", type=count, help="only N objects of each group")
    parser.add_argument("--draw", help="file of a picture to draw")
    o = parser.parse_args(argv)
    groups = evaluate.find_objects([path for path in GROUPS if path.name != "toys-new"], None, o.limit)
    objects = {"real": groups["real-known"] + groups["real-new"], "toys": groups["toys-known"]}
    everything, tiles = objects["real"] + objects["toys"], {}
    base = loading.Checkpoint(None, "cpu", "float32").load()
    several = loading.Checkpoint(None, "cpu", "float32", lora=o.lora).load()
    for system, also in ALSO.items():
        pipe = base if system == BASE else several
        pipe.set_progress_bar_config(disable=True)
        tiles[system] = generate(pipe, everything, (384, 256), Sampling(batch_size=8, also=also))
    truths = np.stack([read_on_grey(path / "views.webp") for path in everything])
    scores = score_systems(tiles | {"true views": truths[None]}, everything, cameras_of(GROUPS[0]))
    for system in ALSO:
        for i, path in enumerate(everything):
            views, true_views = (split_views(tile[None])[0] for tile in (tiles[system][0, i], truths[i]))
            scores[system, path]["back LPIPS"] = metrics.lpips(views[evaluate.BACK], true_views[evaluate.BACK])
    print("| group | system | measure | required gain | gain | met |\n|---|---|---|---|---|---|")
    found = [rows_of(scores, members) for members in objects.values()]
    print("\n".join(line for lines, _ in found for line in lines))
    for system in ALSO:
        for name, members in objects.items():
            means = {m: np.mean([scores[system, path][m] for path in members]) for m in scores[system, members[0]]}
            print(name, system, {measure: round(float(mean), 3) for measure, mean in means.items()})
    if o.draw:
        rows = []
        for i in range(len(everything) // 12, len(everything), len(everything) // 6):
            inputs = [read_on_grey(everything[i] / f"{name}.webp", (128, 128)) for name in ("input", "input_180")]
            parts = [split_views(tile[None])[0] for tile in (tiles[ONE][0, i], tiles[BACK][0, i], truths[i])]
            gap = np.ones((128, 8, 3))
            rows.append(np.concatenate([*inputs, gap, *parts[0], gap, *parts[1], gap, *parts[2]], axis=1))
        Image.fromarray(np.round(255 * np.concatenate(rows)).astype(np.uint8)).save(o.draw, quality=88)
    if not all(passed for _, passed in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
