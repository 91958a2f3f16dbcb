"""Makes a group of held-out objects that `evaluation.evaluate` scores, from renders.

    python -m training.render --objects heldout_meshes --output data/heldout
    python -m evaluation.heldout --renders data/heldout --train-data data/train --output evaluation/groups/mine

For each object `OUTPUT/NAME/` gets `input.webp`, further pictures at 90, 180 and 270 degrees from it
(`input_180.webp`), `views.webp` (the true tile), all RGBA, `depth.webp` and
`normals.webp` as a ControlNet sees them, and `nearest.webp` (the tile of the training sample whose input looks most
alike). `OUTPUT/mean.webp` is the mean training tile, `heldout.json` says the cameras, and `CREDITS` who made what.
Without `--train-data` there are neither nearest nor mean tiles. Objects that it has too, or variants of, are refused.
"""

import json
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import CAMERAS, Cameras, check_cameras
from training.data import CONDITIONS, INPUTS, VARIANTS, TileDataset, on_grey, picture_at, select_views, show_targets
from training.shards import index_shards, read_member, read_object
from zero123plus.files import write_file
from zero123plus.loading import read_json
from zero123plus.options import Parser, command
from zero123plus.pictures import to_tile

logger = logging.getLogger(__name__)

GROUPS = sorted(path for path in (Path(__file__).parent / "groups").glob("*") if path.is_dir())
SHOWN = ("depth", "normals")  # conditions of which a picture is kept
ALSO = (90, 180, 270)  # degrees around the object from its input, of further pictures
THUMBNAIL = 32  # pixels of the edge at which inputs are compared


def cameras_of(folder: Path) -> Cameras:
    """The cameras of a folder of held-out objects. A warning says when it does not say them and those of v1.2 are
    assumed.

    Raises:
        ValueError: if it names others than those of `pipeline.CAMERAS`.
    """
    path = folder / "heldout.json"
    preset = read_json(path).get("cameras") if path.is_file() else None
    if preset is None:
        logger.warning("%s does not say its cameras, and those of v1.2 are assumed.", folder)
        preset = "v1.2"
    check_cameras(preset, path)
    return CAMERAS[preset]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """An RGBA input of shape (I, I, 4), small and on grey: float32 of shape (3 * `THUMBNAIL`**2,)."""
    small = Image.fromarray(on_grey(image)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32).ravel()


def origins(dataset: TileDataset) -> set[str]:
    """The objects of samples, of variants those that they were made of."""
    records = (json.loads(read_member(entry, "json")) for entry in dataset.entries)
    return {record.get("of", record["object"]) for record in records}


@command
def main(argv: list[str] | None = None):
    """The command line."""
    parser = Parser("Make the held-out list from renders.")
    parser.add_argument("--renders", type=Path, required=True, help="shards of the held-out objects")
    parser.add_argument("--train-data", type=Path, help="shards that the checkpoint is trained on, to compare with")
    parser.add_argument(
        "--output", type=Path, required=True, help="new folder, or one of held-out objects, which is replaced"
    )
    options = parser.parse_args(argv)
    listing = options.output / "heldout.json"
    if options.output.exists() and any(options.output.iterdir()) and not listing.is_file():
        raise ValueError(f"`--output` {options.output} holds no held-out objects, but something else: choose another.")
    heldout = TileDataset(options.renders)
    train = TileDataset(options.train_data) if options.train_data else None
    if train and train.preset != heldout.preset:
        raise ValueError(
            f"{options.train_data} has the cameras of {train.preset}, but {options.renders} those of {heldout.preset}."
        )
    if train and (both := sorted(origins(train) & origins(heldout))):
        shown = ", ".join(both[:5]) + (", ..." if len(both) > 5 else "")
        raise ValueError(f"`--train-data` has {len(both)} objects that are to be held out: {shown}.")
    thumbnails, total, count = [], 0.0, 0
    for entry in train.entries if train else ():
        item = read_object(entry)
        for k in range(INPUTS):
            for mirror in (False, True):
                image, views = select_views(item, k, mirror)
                thumbnails.append(thumbnail(image))
                if len(thumbnails) % 5 == 1:
                    total, count = total + on_grey(to_tile(views)).astype(np.float64), count + 1
    options.output.mkdir(parents=True, exist_ok=True)
    listing.write_text(json.dumps({"cameras": heldout.preset}) + "\n")  # first, so that an interrupted run can go on
    if train:
        thumbnails = np.stack(thumbnails)
        lengths = np.square(thumbnails).sum(1)
        mean = Image.fromarray(np.round(total / count).astype(np.uint8))
        mean.save(options.output / "mean.webp", lossless=True)
    passes, credits = sum((CONDITIONS[name].passes for name in SHOWN), ()), []
    for entry in index_shards(options.renders, passes):
        item = read_object(entry)
        if item["name"] != Path(item["name"]).name or item["name"] in ("", ".."):
            raise ValueError(f"{entry['shard']} has an object named {item['name']!r}, which is no name of a folder.")
        record = json.loads(read_member(entry, "json"))
        if record.get("creator"):
            said = [record[field] for field in ("name", "creator", "licence", "source")]
            credits.append(f"{item['name']}: {said[0]} by {said[1]}; {said[2]}; {said[3]}\n")
        folder = options.output / item["name"]
        folder.mkdir(exist_ok=True)
        image, views = select_views(item, 0, False)
        Image.fromarray(image).save(folder / "input.webp", lossless=True)
        Image.fromarray(to_tile(views)).save(folder / "views.webp", lossless=True)
        for azimuth in ALSO:
            Image.fromarray(picture_at(item, 0, False, azimuth)).save(folder / f"input_{azimuth}.webp", lossless=True)
        for name in SHOWN:
            shown = to_tile(show_targets(item, CONDITIONS[name].sees, 0, False))
            Image.fromarray(shown).save(folder / f"{name}.webp", lossless=True)
        if not train:
            continue
        # |a - b|^2 less |a|^2, which is the same for all
        nearest = int(np.argmin(lengths - 2 * thumbnails @ thumbnail(image)))
        place, variant = divmod(nearest, VARIANTS)
        _, views = select_views(read_object(train.entries[place]), variant // 2, bool(variant % 2))
        Image.fromarray(on_grey(to_tile(views))).save(folder / "nearest.webp", quality=90)
    if credits:
        write_file(options.output / "CREDITS", "".join(sorted(credits)).encode())


if __name__ == "__main__":
    main()
