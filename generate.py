"""Six views of the object in each picture, from the command line.

    python generate.py examples/images/duck.png -o out
    python generate.py photos 'more/*.jpg' -o out --batch-size 8 --resume
    python generate.py s3://bucket/photos -o s3://bucket/views --ray auto

writes for each picture `out/NAME/`: `tile.png`, `view_0.png` to `view_5.png` and `cameras.json`, camera-to-world
matrices in the OpenGL convention and intrinsics in pixels.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.constants import HF_MODULES_CACHE
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

import export
from pipeline import load_pictures
from prepare import prepare
from preview import Preview

ROOT = Path(__file__).resolve().parent
SUFFIXES = set(PIL.Image.registered_extensions())


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Six consistent views of the object in each picture.")
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="file, folder, pattern, or URL that fsspec knows")
    add("-o", "--output", required=True, help="folder or URL to write to, one folder a picture")
    add("--checkpoint", help="folder or Hub name (default: the one in this repository)")
    add("--steps", type=int, default=28, help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, default=4.0, help="guidance scale (default: %(default)s)")
    add("--seed", type=int, default=0, help="of every picture (default: %(default)s)")
    add("--batch-size", type=int, default=1, help="pictures at a time (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on cuda, else float32")
    add("--remove-background", action="store_true", help="with rembg, where a picture has no transparency")
    add("--foreground-ratio", type=float, help="recentre: the object's larger side as a share of the picture's")
    add("--export", choices=export.FORMATS, action="append", default=[], help="also write the views for this program")
    add(
        "--preview",
        action="store_true",
        help="keep NAME.preview.png, of a batch's first picture, up to date while the views form",
    )
    add("--overwrite", action="store_true", help="replace results of an earlier run")
    add("--resume", action="store_true", help="leave out pictures whose results are there")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster ('auto': the one at hand), a model per worker")
    add("--workers", type=int, default=1, help="on the Ray cluster, each with a GPU if --device is cuda")
    return parser.parse_args(argv)


def load_pipeline(checkpoint: str | None, device: str, dtype: str | None) -> DiffusionPipeline:
    """Loads a checkpoint, this repository's by default, with this repository's pipeline and the "trailing" time steps
    that Zero123++ is used with.
    """
    dtype = getattr(torch, dtype or ("float16" if device.startswith("cuda") else "float32"))
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE, "zero123plus.lock")):  # diffusers copies pipeline.py there, not atomically
        pipe = DiffusionPipeline.from_pretrained(
            checkpoint or str(ROOT), custom_pipeline=str(ROOT), trust_remote_code=True, torch_dtype=dtype
        )
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe.to(device)


def tile_size(pipe) -> dict:
    """The size a checkpoint was trained at: the UNet's sample size where that is a tile's, else 960 x 640."""
    size = pipe.unet.config.sample_size
    if isinstance(size, int):
        return {"height": 960, "width": 640}
    return {"height": size[0] * pipe.vae_scale_factor, "width": size[1] * pipe.vae_scale_factor}


def find_pictures(given: list[str]) -> list[tuple[str, str]]:
    """The pictures that files, folders (with those below), patterns and URLs name.

    Returns:
        For each its path or URL and the name of its result's folder: in a folder its relative path, else its stem.

    Raises:
        ValueError: if one names no picture, or two results would have one name.
    """
    found = {}
    for name in given:
        fs, path = fsspec.core.url_to_fs(name)
        if fs.isdir(path):
            paths = sorted(p for p in fs.find(path) if PurePosixPath(p).suffix.lower() in SUFFIXES)
            keys = [str(PurePosixPath(p).relative_to(path).with_suffix("")) for p in paths]
        else:
            paths = sorted(fs.glob(path)) if set(name) & set("*?[") and not fs.exists(path) else [path]
            keys = [PurePosixPath(p).stem for p in paths]
        if not paths:
            raise ValueError(f"{name} has no pictures.")
        for path, key in zip(paths, keys):
            url = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
            if found.setdefault(key, url) != url:
                raise ValueError(f"{url} and {found[key]} would both be written to {key}: rename one.")
    return [(url, key) for key, url in found.items()]


class Generator:
    """Makes and writes the views of pictures. Holds the pipeline, so that each worker loads it once."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.pipe = load_pipeline(options.checkpoint, options.device, options.dtype)

    def __call__(self, jobs: list[tuple[str, str]], progress: bool = False) -> list[dict]:
        """Makes the views of one batch.

        Args:
            jobs: as [`find_pictures`] gives them.
            progress: whether to show a bar of the denoising steps.

        Returns:
            For each picture `picture`, `name` and `error`, a line or None.
        """
        results, batch = {}, []
        for url, name in jobs:
            try:
                batch.append((name, self.read(url)))
            except (OSError, ValueError) as error:
                results[name] = " ".join(str(error).split())
        try:
            if batch:
                self.generate(batch, progress)
            results |= {name: None for name, _ in batch}
        except (OSError, TypeError, ValueError) as error:
            results |= {name: " ".join(str(error).split()) for name, _ in batch}
        return [{"picture": url, "name": name, "error": results[name]} for url, name in jobs]

    def read(self, url: str) -> PIL.Image.Image:
        """Opens and prepares a picture.

        Raises:
            ValueError: if it cannot be read or prepared, naming it.
        """
        try:
            with fsspec.open(url) as file, PIL.Image.open(file) as picture:
                picture.load()
        except (OSError, ValueError) as error:
            raise ValueError(f"{url} cannot be read as a picture: {error}") from error
        try:
            picture = prepare(picture, self.options.remove_background, self.options.foreground_ratio)
        except ValueError as error:
            raise ValueError(f"{url}: {error}") from error
        return load_pictures(picture, url)[0]

    def generate(self, batch: list[tuple[str, PIL.Image.Image]], progress: bool):
        """Makes the views of named pictures and writes them."""
        pictures = [picture for _, picture in batch]
        self.pipe.set_progress_bar_config(desc=batch[0][0], disable=not progress)
        callback = None
        if self.options.preview:
            path = join(self.options.output, f"{batch[0][0]}.preview.png")
            callback = Preview(self.pipe, pictures[0], lambda step, tile: write_picture(tile, path))
        result = self.pipe(
            pictures,
            **tile_size(self.pipe),
            num_inference_steps=self.options.steps,
            guidance_scale=self.options.guidance,
            generator=[torch.Generator().manual_seed(self.options.seed) for _ in batch],
            callback_on_step_end=callback,
        )
        for (name, _), tile, views in zip(batch, result.images, result.views):
            with tempfile.TemporaryDirectory() as folder:
                write_result(Path(folder), self.pipe, tile, views, self.options.export)
                put(Path(folder), self.options.output, name)


def join(output: str, name: str) -> str:
    """Path or URL of `name` in `output`."""
    return f"{output.rstrip('/')}/{name}"


def is_done(output: str, name: str) -> bool:
    """Whether a result is there and whole: `cameras.json` is its last file."""
    fs, path = fsspec.core.url_to_fs(join(output, name))
    return fs.exists(f"{path}/cameras.json")


def find_done(output: str, jobs: list[tuple[str, str]], resume: bool) -> set[str]:
    """The names of results that are there and are to be kept.

    Raises:
        ValueError: if there are any and `resume` is false, or a local folder of the name is no result.
    """
    done = set()
    for _, name in jobs:
        fs, path = fsspec.core.url_to_fs(join(output, name))
        if resume and is_done(output, name):
            done.add(name)
        elif resume and not isinstance(fs, LocalFileSystem):
            pass  # begun and not finished, or not there: elsewhere a folder does not appear whole
        elif fs.exists(path):
            raise ValueError(
                f"{path} exists: choose another --output, --overwrite it, or --resume where it is a result."
            )
    return done


def write_picture(picture: PIL.Image.Image, url: str):
    """Writes a PNG beside its place and puts it there."""
    fs, path = fsspec.core.url_to_fs(url)
    fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
    with fs.open(f"{path}.partial", "wb") as file:
        picture.save(file, "PNG")
    fs.mv(f"{path}.partial", path)


def write_result(folder: Path, pipe, tile: PIL.Image.Image, views: list[PIL.Image.Image], exports: list[str]):
    """Writes a picture's files into an empty folder."""
    tile.save(folder / "tile.png")
    poses = pipe.camera_poses()
    height, width = views[0].height, views[0].width
    intrinsics = pipe.camera_intrinsics(height, width)
    frames = []
    for i, view in enumerate(views):
        view.save(folder / f"view_{i}.png")
        frames.append({"file": f"view_{i}.png", "camera_to_world": poses[i].tolist()})
    for form in exports:
        export.write(form, folder / form, views, poses, intrinsics)
    cameras = {
        "convention": "OpenGL: +X right, +Y up, looking along -Z; world +Z up, input view at azimuth 0 on +X",
        "height": height,
        "width": width,
        "intrinsics": intrinsics.tolist(),
        "frames": frames,
    }
    (folder / "cameras.json").write_text(json.dumps(cameras, indent=2))


def put(folder: Path, output: str, name: str):
    """Puts a written folder in its place, whole: locally by a rename, elsewhere with `cameras.json` last."""
    fs, target = fsspec.core.url_to_fs(join(output, name))
    if isinstance(fs, LocalFileSystem):
        fresh = Path(f"{target}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(folder, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    else:
        if fs.exists(target):
            fs.rm(target, recursive=True)
        paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.name == "cameras.json")
        for path in paths:
            fs.put_file(str(path), f"{target}/{path.relative_to(folder).as_posix()}")
    preview = f"{target}.preview.png"
    if fs.exists(preview):
        fs.rm(preview)


def run_here(batches: list[list], options: argparse.Namespace) -> Iterator[list[dict]]:
    """Yields the results of each batch."""
    generator = Generator(options)
    for batch in batches:
        yield generator(batch, progress=len(batches) == 1)


class RayGenerator(Generator):
    """[`Generator`] as Ray Data calls it: rows of plain text in and out."""

    def __call__(self, row: dict) -> dict:
        jobs = json.loads(row["jobs"])
        # A worker that was lost may have done some of them
        left = jobs if self.options.overwrite else [job for job in jobs if not is_done(self.options.output, job[1])]
        done = [{"picture": url, "name": name, "error": None} for url, name in jobs if [url, name] not in left]
        return {"results": json.dumps(done + super().__call__(left))}


def run_on_ray(batches: list[list], options: argparse.Namespace) -> Iterator[list[dict]]:
    """The same on a Ray cluster; a batch whose worker is lost is done by another."""
    import ray

    environment = {"working_dir": str(ROOT), "excludes": [".git", "out", "data"]}
    ray.init(address=options.ray, log_to_driver=False, runtime_env=environment)
    rows = ray.data.from_items([{"jobs": json.dumps(batch)} for batch in batches], override_num_blocks=len(batches))
    done = rows.map(
        RayGenerator,
        fn_constructor_args=(options,),
        concurrency=options.workers,
        num_gpus=1 if options.device.startswith("cuda") else None,
    )
    for row in done.iter_rows():
        yield json.loads(row["results"])
    ray.shutdown()


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is written, 2 with a line on standard error for each picture that failed."""
    options = parse_options(argv)
    try:
        if options.steps < 1 or options.batch_size < 1:
            raise ValueError(
                f"--steps is {options.steps} and --batch-size {options.batch_size}: both must be 1 or more."
            )
        jobs = find_pictures(options.pictures)
        if options.ray and "://" not in options.output:
            options.output = str(Path(options.output).absolute())
        there = set() if options.overwrite else find_done(options.output, jobs, options.resume)
    except (OSError, ValueError) as error:
        print(f"generate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    left = [job for job in jobs if job[1] not in there]
    if not left:
        return 0
    batches = [left[i : i + options.batch_size] for i in range(0, len(left), options.batch_size)]
    failed = 0
    with tqdm(total=len(jobs), initial=len(there), unit="picture", disable=len(batches) < 2) as bar:
        try:
            for results in run_on_ray(batches, options) if options.ray else run_here(batches, options):
                for result in results:
                    failed += result["error"] is not None
                    if result["error"]:
                        bar.write(f"generate.py: {result['error']}", file=sys.stderr)
                    else:
                        bar.write(join(options.output, f"{result['name']}/tile.png"))
                bar.update(len(results))
        except (OSError, ValueError) as error:  # the checkpoint
            print(f"generate.py: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 2 if failed else 0


if __name__ == "__main__":
    import generate  # workers find classes by their module's name, which is not __main__

    sys.exit(generate.main())
