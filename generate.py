"""Six views of the object in each picture, from the command line.

    python generate.py examples/images/cactus.png -o out
    python generate.py photos 'more/*.jpg' -o out --batch-size 8 --resume
    python generate.py s3://bucket/photos -o s3://bucket/views --ray auto

writes for each picture `out/NAME/`: `tile.png`, `view_0.png` to `view_5.png` and `cameras.json`, camera-to-world
matrices in the OpenGL convention and intrinsics in pixels. The exit status is 0 when all is written, 2 when a picture
failed, with a line on standard error for each, and 130 after Ctrl-C.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from tqdm import tqdm

from zero123plus import checks, options

MAX_CHECKED = 16  # pictures up to which one that can be read is looked for before the model is loaded


def also(text: str) -> tuple[float, str]:
    """A `type` of argparse: AZIMUTH=PICTURE."""
    azimuth, _, picture = text.partition("=")
    try:
        return float(azimuth), options.source(picture)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 180=back.png") from None


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = options.Parser("Six consistent views of the object in each picture.")
    add = parser.add_argument
    add(
        "pictures",
        nargs="+",
        metavar="PICTURE",
        type=options.source,
        help="file, folder, pattern, or URL that fsspec knows",
    )
    add("-o", "--output", required=True, help="folder or URL to write to, one folder a picture")
    options.add_checkpoint_options(add)
    add("--dtype", choices=options.DTYPES, help=options.DTYPE_HELP)
    add("--steps", type=options.count, help="denoising steps; the checkpoint's if missing")
    add("--guidance", type=options.scale, help="guidance scale; the checkpoint's if missing")
    add(
        "--also",
        type=also,
        action="append",
        default=[],
        metavar="AZIMUTH=PICTURE",
        help="a further picture of the one object, at so many degrees around it, such as 180=back.png",
    )
    add("--seed", type=options.seed, default=0, help="seed of every picture")
    add("--batch-size", type=options.count, default=1, help="pictures at a time")
    background = parser.add_mutually_exclusive_group().add_argument
    background(
        "--keep-background",
        action="store_true",
        help="leave backgrounds as they are; else they are removed if they can be",
    )
    background(
        "--remove-background", action="store_true", help="remove backgrounds, and fail where one cannot be removed"
    )
    add(
        "--foreground-ratio", type=options.ratio, help="recentre: the object's larger side as a share of the picture's"
    )
    add("--export", choices=options.EXPORTS, action="append", default=[], help="also write the views for this program")
    add(
        "--faces",
        type=options.count,
        default=options.NUM_FACES,
        help="about how many faces the mesh of --export glb has",
    )
    add("--upscale", type=int, choices=[options.SCALE], help="make the views this many times as large, by Real-ESRGAN")
    add("--overwrite", action="store_true", help="replace results of an earlier run")
    add("--resume", action="store_true", help="leave out pictures whose results are there")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster ('auto': the one at hand), a model per worker")
    add(
        "--workers",
        type=options.count,
        default=1,
        help="workers on the Ray cluster, each with a GPU if --device is cuda",
    )
    return parser.parse_args(argv)


def say(line: object):
    """Prints a line about the run on standard error."""
    tqdm.write(f"generate.py: {line}", file=sys.stderr)


def find(o: argparse.Namespace) -> list[tuple[str, str]]:
    """The pictures that options name, with the names of their results. What is wrong is said before torch is imported.

    Raises:
        ValueError: if an option is wrong, a result would be lost, or no picture can be read.
    """
    checks.check_device(o.device)
    checks.check_packages(*(["glb"] if "glb" in o.export else []), *(["upscale"] if o.upscale else []))
    for _, path in o.also:
        checks.check_picture(path)
    found, left_out = checks.find_pictures(o.pictures)
    if o.also and len(found) > 1:
        raise ValueError(f"`--also` is of one object, but there are {len(found)} pictures: give the first one alone.")
    if left_out:
        say(f"{len(found)} pictures{checks.describe_left_out(left_out)}")
    kept = [checks.check_target(place(o.output), name, o.overwrite, o.resume) for _, name in found]
    errors = []
    for url, _ in found if not any(kept) and len(found) <= MAX_CHECKED else ():
        try:
            checks.check_picture(url)
            return found
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(" ".join(errors))
    return found


def place(output: str) -> str:
    """The folder or URL to write to, wherever the work is done."""
    return output if "://" in output else str(Path(output).absolute())


def run(found: list[tuple[str, str]], settings, batch_size: int, ray: str | None, workers: int) -> int:
    """Makes all views and returns the exit status. For the arguments see [`parse_options`] and `jobs.Settings`."""
    from zero123plus import jobs, results  # take seconds, which --help and mistakes need not wait for

    left, made_with = [], jobs.made_with(settings) if settings.resume else {}
    for job in found:
        if not checks.check_target(settings.output, job[1], settings.overwrite, settings.resume):
            left.append(job)
            continue
        made_with["picture_sha256"] = jobs.read_file(job[0])[1]
        if other := results.complete(settings.output, job[1], settings.exports, settings.faces, made_with):
            say(f"{job[1]} is kept, but was made with {other}: --overwrite makes it anew")
    if not left:
        return 0
    say(settings.checkpoint.describe())
    if ray:  # a worker that was lost may have left a result
        settings = dataclasses.replace(settings, resume=True)
    batches = [left[i : i + batch_size] for i in range(0, len(left), batch_size)]
    done = jobs.run_on_ray(batches, settings, ray, workers) if ray else jobs.run_here(batches, settings)
    failed = 0
    with tqdm(total=len(found), initial=len(found) - len(left), unit="picture", disable=len(batches) < 2) as bar:
        for batch in done:
            for result in batch:
                failed += result["error"] is not None
                if result["error"]:
                    say(result["error"])
                for file in results.files_of(settings.output, result["name"]) if not result["error"] else ():
                    bar.write(file)
            bar.update(len(batch))
    return 2 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    o = parse_options(argv)
    try:
        found = find(o)
        from zero123plus import jobs

        settings = jobs.Settings(
            output=place(o.output),
            checkpoint=options.parse_checkpoint(o, o.dtype),
            call={"num_inference_steps": o.steps, "guidance_scale": o.guidance},
            seed=o.seed,
            background="keep" if o.keep_background else "remove" if o.remove_background else "auto",
            foreground_ratio=o.foreground_ratio,
            also=tuple(o.also),
            exports=tuple(o.export),
            faces=o.faces,
            upscale=bool(o.upscale),
            overwrite=o.overwrite,
            resume=o.resume,
        )
        return run(found, settings, o.batch_size, o.ray, o.workers)
    except (ImportError, OSError, ValueError) as error:
        say(options.one_line(error))
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
