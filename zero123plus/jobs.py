"""Views of many pictures: in batches, here or on a Ray cluster. A picture that fails does not stop the others."""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import fsspec
import PIL.Image
import torch
from tqdm import tqdm

from pipeline import load_pictures

from . import results
from .checks import is_done
from .files import ray_environment
from .loading import Checkpoint, find_lora
from .options import NUM_FACES, one_line
from .pictures import prepare, read_picture
from .upscale import Upscaler, join_views

Job = tuple[str, str]  # a picture's path or URL, and the name of its result


@dataclass
class Settings:
    """What is made of each picture, as the options of generate.py say. `call` are arguments of the pipeline, and
    `also` azimuths and paths of further pictures of the object.
    """

    output: str
    checkpoint: Checkpoint
    call: dict
    seed: int = 0
    background: str = "auto"
    foreground_ratio: float | None = None
    also: tuple[tuple[float, str], ...] = ()
    exports: tuple[str, ...] = ()
    faces: int = NUM_FACES
    upscale: bool = False
    overwrite: bool = False
    resume: bool = False


def made_with(settings: Settings) -> dict:
    """The settings that `cameras.json` records. Arguments that the call leaves out have the checkpoint's values."""
    checkpoint, call = settings.checkpoint, settings.call
    defaults, (folder, loras) = checkpoint.defaults(), checkpoint.find()
    return {
        "checkpoint": checkpoint.name and str(checkpoint.name),
        "lora": checkpoint.lora and str(checkpoint.lora),
        "folders": [str(path) for path in (folder, *(find_lora(lora)[0] for lora in loras))],
        "lora_scale": checkpoint.lora_scale,
        "seed": settings.seed,
        **{name: defaults[name] if call.get(name) is None else call[name] for name in defaults},
        "background": settings.background,
        "foreground_ratio": settings.foreground_ratio,
        "also": [[azimuth, path, read_file(path)[1]] for azimuth, path in settings.also],
        "upscale": settings.upscale,
    }


def read_file(url: str) -> tuple[bytes, str]:
    """The content of a picture's file, and its SHA-256. Raises ValueError if it cannot be read."""
    try:
        with fsspec.open(url) as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"{url} cannot be read: {one_line(error)}") from error
    return data, hashlib.sha256(data).hexdigest()


class Generator:
    """Makes and writes the views of pictures. It holds the pipeline, so that each worker loads it once."""

    def __init__(self, settings: Settings):
        self.settings, self.made_with = settings, made_with(settings)
        self.pipe = settings.checkpoint.load()
        self.pipe.warned.add("background")  # `prepare` warns of it
        self.upscaler = Upscaler(self.pipe.device.type) if settings.upscale else None

    def __call__(self, jobs: list[Job], progress: bool = False) -> list[dict]:
        """Makes the views of one batch of [`checks.find_pictures`]. Returns for each picture `picture`, `name` and
        `error`, a line or None.
        """
        errors, batch = {}, []
        for url, name in jobs:
            try:
                batch.append((name, *self.read(url)))
            except (ImportError, OSError, ValueError) as error:
                errors[name] = one_line(error)
        errors |= self.try_batch(batch, progress)
        return [{"picture": url, "name": name, "error": errors.get(name)} for url, name in jobs]

    def try_batch(self, batch: list[tuple[str, PIL.Image.Image, str]], progress: bool) -> dict[str, str]:
        """Makes the views of named pictures; one at a time where all at once fail or do not fit the memory. Returns
        the error of each that failed.
        """
        if not batch:
            return {}
        try:
            return self.generate(batch, progress)
        except (MemoryError, OSError, TypeError, ValueError, torch.OutOfMemoryError) as error:
            if len(batch) == 1:
                memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
                reason = f"out of memory ({one_line(error)})" if memory else one_line(error)
                return {batch[0][0]: f"{batch[0][0]}: {reason}"}
        errors = {}
        for item in batch:
            errors |= self.try_batch([item], progress)
        return errors

    def read(self, url: str) -> tuple[PIL.Image.Image, str]:
        """Opens and prepares a picture, and returns it with its file's SHA-256.

        Raises:
            ImportError, OSError, ValueError: if it cannot be read or prepared.
        """
        data, sha256 = read_file(url)
        picture = read_picture(io.BytesIO(data), url)
        try:
            picture = prepare(picture, self.settings.background, self.settings.foreground_ratio)
        except ValueError as error:
            raise ValueError(f"{url}: {error}") from error
        return load_pictures(picture, url)[0], sha256

    def generate(self, batch: list[tuple[str, PIL.Image.Image, str]], progress: bool) -> dict[str, str]:
        """Makes the views of named pictures and writes them. Returns the error of each that could not be written."""
        settings, pictures = self.settings, [picture for _, picture, _ in batch]
        self.pipe.set_progress_bar_config(desc=batch[0][0], disable=not progress)
        seeds = [torch.Generator().manual_seed(settings.seed) for _ in batch]
        azimuths = None
        if settings.also:
            pictures = [[picture, *(self.read(path)[0] for _, path in settings.also)] for picture in pictures]
            azimuths = [0, *(azimuth for azimuth, _ in settings.also)]
        made = self.pipe(pictures, **settings.call, image_azimuths=azimuths, generator=seeds)
        errors = {}
        for (name, _, sha256), tile, views in zip(batch, made.images, made.views):
            try:
                if self.upscaler:
                    views = [self.upscaler(view) for view in tqdm(views, name, unit="view", disable=not progress)]
                    tile = join_views(views)
                options = {"exports": settings.exports, "name": name, "faces": settings.faces}
                options |= self.made_with | {"picture_sha256": sha256}
                write = partial(results.write_result, pipe=self.pipe, tile=tile, views=views, **options)
                results.put_result(write, settings.output, name, settings.overwrite, settings.resume)
            except (MemoryError, OSError, ValueError) as error:
                errors[name] = f"{name}: {one_line(error)}"
        return errors


class RayGenerator(Generator):
    """[`Generator`] as Ray Data calls it, with rows of plain text in and out."""

    def __call__(self, row: dict) -> dict:
        jobs = json.loads(row["jobs"])
        # A worker that was lost may have done some of them
        left = [job for job in jobs if self.settings.overwrite or not is_done(self.settings.output, job[1])]
        done = [{"picture": url, "name": name, "error": None} for url, name in jobs if [url, name] not in left]
        return {"results": json.dumps(done + super().__call__(left))}


def run_here(batches: list[list[Job]], settings: Settings) -> Iterator[list[dict]]:
    """Yields the results of each batch."""
    generator = Generator(settings)
    for batch in batches:
        yield generator(batch, progress=len(batches) == 1)


def run_on_ray(batches: list[list[Job]], settings: Settings, address: str, workers: int) -> Iterator[list[dict]]:
    """Yields the results of each batch from a Ray cluster; a batch whose worker is lost is done by another."""
    import ray

    ray.init(address=address, log_to_driver=False, runtime_env=ray_environment())
    rows = ray.data.from_items([{"jobs": json.dumps(batch)} for batch in batches], override_num_blocks=len(batches))
    done = rows.map(
        RayGenerator,
        fn_constructor_args=(settings,),
        concurrency=workers,
        num_gpus=1 if str(settings.checkpoint.device).startswith("cuda") else None,
    )
    for row in done.iter_rows():
        yield json.loads(row["results"])
    ray.shutdown()
