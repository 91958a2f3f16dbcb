"""The page around a pipeline: a picture in, six views out. `app.py` is its command."""

try:
    import spaces  # of ZeroGPU Spaces, which wants to be imported before torch
except ImportError:
    spaces = None

import queue
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import PIL.Image
import torch

from pipeline import load_pictures, pad_to_square

from . import loading, options
from .exports import EXPORTS
from .pictures import FOREGROUND_RATIO, FORMATS, prepare, read_picture
from .preview import Preview, write_turntable
from .results import write_result
from .upscale import SCALE, Upscaler, join_views

MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 40_000_000  # of an uploaded picture, which a small file can hold very many of
MAX_WAITING = 20  # visitors in the queue; the next one is told to come back
MAX_STEPS = 100
MAX_SEED = 2**64 - 1  # torch's
KEEP_SECONDS = 3600  # results and uploads
# Views may be small. A gallery shows all six
CSS = """
#seen img, #tile img, #turntable img { width: auto; height: 100%; margin: auto }
#bar progress { width: 100% }
"""
SCROLL = """() => {
    const block = window.innerWidth < 800 ? 'start' : 'nearest';  // a phone shows one column
    document.getElementById('bar').scrollIntoView({behavior: 'smooth', block});
    return [];
}"""


def user_error(message: object) -> gr.Error:
    """An error that a user caused: a message on the page, and no traceback in the log."""
    return gr.Error(str(message), print_exception=False)


def read_upload(payload: gr.data_classes.ImageData | None) -> str | None:
    """The path of an uploaded picture.

    Raises:
        gr.Error: if it cannot be opened as a picture or has more than `MAX_PIXELS`.
    """
    if payload is None:
        return None
    try:
        with PIL.Image.open(payload.path, formats=FORMATS) as picture:
            width, height = picture.size
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise user_error("This file cannot be read as a picture: upload a PNG, JPEG or WebP.") from error
    if width * height > MAX_PIXELS:
        raise user_error(
            f"The picture has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million: shrink it first."
        )
    return payload.path


def parse_seed(text: str) -> int:
    """Reads the seed's field.

    Raises:
        gr.Error: if it is no whole number that torch takes.
    """
    text = str(text).strip()
    if not (text.isascii() and text.isdecimal() and int(text) <= MAX_SEED):
        raise user_error(f"The seed is {text!r}, but must be a whole number from 0 to {MAX_SEED}: such as 0.")
    return int(text)


def on_gpu(function: Callable) -> Callable:
    """Marks a function during which a ZeroGPU Space lends a GPU; elsewhere it stays as it is. It runs in a process of
    its own there, so that what it takes and yields must be picklable, and the threads that it starts have the GPU too.
    """
    return spaces.GPU(function) if spaces else function


def in_steps(work: Callable[[Callable], object]) -> Iterator[tuple[str, object]]:
    """Runs `work(show)` in a thread and yields ("shown", arguments) of each call of `show`, then ("done", result).

    Whoever stops listening ends the work at its next call of `show`.
    """
    news, closed = queue.SimpleQueue(), threading.Event()

    def show(*shown):
        if closed.is_set():
            raise InterruptedError
        news.put(("shown", shown))

    def run():
        try:
            news.put(("done", work(show)))
        except Exception as error:  # raised again where it is listened to
            news.put(("failed", error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while True:
            kind, value = news.get()
            if kind == "failed":
                raise value
            yield kind, value
            if kind == "done":
                return
    finally:
        closed.set()
        thread.join()


def bar(done: int, total: int, unit: str = "steps") -> str:
    """A progress bar in HTML. gradio's own disappears at every result that is shown before the last."""
    return f"{done} of {total} {unit}<br><progress value={done} max={total}></progress>"


def build(pipe) -> gr.Blocks:
    """The page around a pipeline."""
    pipe.set_progress_bar_config(disable=True)
    pipe.warned.add("background")  # `see` warns of it

    def check(picture):
        """Reads an uploaded picture to its end."""
        try:
            read_picture(picture, "The file")
        except ValueError as error:
            raise user_error(options.one_line(error)) from error

    def see(picture, remove_background=True, centre=False, foreground_ratio=FOREGROUND_RATIO):
        """What the model sees of a picture, RGB; None of none."""
        if picture is None:
            return None
        background, ratio = "auto" if remove_background else "keep", foreground_ratio if centre else None
        try:
            prepared = prepare(read_picture(picture, "The picture"), background, ratio, warn=gr.Warning)
            return pad_to_square(load_pictures(prepared, "picture")[0])
        except (MemoryError, OSError, ValueError) as error:
            raise user_error(options.one_line(error)) from error

    @on_gpu
    def denoise(picture, steps, guidance_scale, seed):
        """Yields ("shown", (step, tile)) while the tile forms, then ("done", (tile, views))."""

        def work(show):
            result = pipe(
                picture,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=Preview(pipe, picture, show),
            )
            return result.images[0], result.views[0]

        yield from in_steps(work)

    def generate(
        picture,
        remove_background=True,
        centre=False,
        foreground_ratio=FOREGROUND_RATIO,
        steps=pipe.config.default_num_inference_steps,
        guidance_scale=pipe.config.default_guidance_scale,
        seed="0",
        upscale=False,
    ):
        """Six views of the object in a picture. Yields tile, views, turntable, mesh, archive and progress: first the
        tile and the progress alone, while it forms, then all.
        """
        if picture is None:
            raise user_error("There is no picture yet: upload one, or choose an example.")
        seed = parse_seed(seed)
        picture = see(picture, remove_background, centre, foreground_ratio)
        try:
            yield None, None, None, None, None, bar(0, steps)
            for kind, value in denoise(picture, steps, guidance_scale, seed):
                if kind == "shown":
                    yield value[1], None, None, None, None, bar(value[0], steps)
            tile, views = value
            if upscale:
                upscaler, small = Upscaler(pipe.device.type), tile
                for i, view in enumerate(views):
                    yield small, None, None, None, None, bar(i, len(views), "enlarged views")
                    views[i] = upscaler(view)
                tile = join_views(views)
            with tempfile.TemporaryDirectory() as folder:  # the page keeps copies of its own
                result = Path(folder, "views")
                result.mkdir()
                picture.save(result / "input.png")
                write_result(result, pipe, tile, views, EXPORTS)
                write_turntable(views, result / "turntable.webp")
                archive = shutil.make_archive(str(result), "zip", folder, "views")
                mesh = result / "glb" / "mesh.glb"
                mesh = str(mesh) if mesh.exists() else None
                yield tile, views, str(result / "turntable.webp"), mesh, archive, bar(steps, steps)
        except (MemoryError, OSError, ValueError, torch.OutOfMemoryError) as error:
            raise user_error(options.one_line(error)) from error

    with gr.Blocks(title="Zero123++", delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown("# Zero123++\nOne picture of an object in, six consistent views of it out.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], elem_id="picture")
                picture.preprocess = read_upload  # gradio's own fails without words
                with gr.Row():
                    cut = gr.Checkbox(True, label="Remove the background, if there is one", elem_id="cut")
                    centre = gr.Checkbox(label="Centre the object")
                ratio = gr.Slider(0.5, 1, FOREGROUND_RATIO, label="Object's share of the picture, when centred")
                steps = gr.Slider(
                    1, MAX_STEPS, pipe.config.default_num_inference_steps, step=1, label="Steps", elem_id="steps"
                )
                guidance = gr.Slider(1, 10, pipe.config.default_guidance_scale, label="Guidance")
                # A browser's numbers are exact up to 2**53 only, and seeds are larger
                with gr.Row():
                    seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                    dice = gr.Button("Random seed", elem_id="dice")
                upscale = gr.Checkbox(label=f"Enlarge the views {SCALE} times (slow on a CPU)", elem_id="upscale")
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", interactive=False, elem_id="stop")
                gr.Examples(
                    [[str(path)] for path in sorted((loading.ROOT / "examples" / "images").glob("*.png"))], [picture]
                )
            with gr.Column():
                seen = gr.Image(
                    label="What the model sees", interactive=False, format="png", height=200, elem_id="seen"
                )
                progress = gr.HTML(elem_id="bar")
                tile = gr.Image(label="Tile", interactive=False, format="png", height=480, elem_id="tile")
                turntable = gr.Image(label="Turntable", interactive=False, height=320, elem_id="turntable")
            with gr.Column():
                views = gr.Gallery(
                    label="Views", columns=2, height="auto", interactive=False, format="png", elem_id="views"
                )
                mesh = gr.Model3D(label="Mesh: a quick look", interactive=False, height=320, elem_id="mesh")
                mesh_file = gr.File(label="mesh", visible=False)
                archive = gr.DownloadButton("Download all, with cameras", interactive=False, elem_id="archive")

        def buttons(runs: bool, archived: bool = False):
            """The buttons while views are made, or not."""
            return gr.Button(interactive=not runs), gr.Button(interactive=runs), gr.Button(interactive=archived)

        private = {"api_visibility": "private"}
        controls = [button, stop, archive]
        looked = gr.on(
            [picture.change, cut.change, centre.change, ratio.release],
            see,
            [picture, cut, centre, ratio],
            seen,
            show_progress_on=seen,
            **private,
        )
        looked.failure(lambda: None, None, seen, **private)
        picture.upload(check, picture, None, **private).failure(lambda: None, None, picture, **private)
        dice.click(lambda: str(random.randrange(2**32)), None, seed, **private)
        started = button.click(lambda: buttons(True), None, controls, js=SCROLL, queue=False, **private)
        made = started.then(
            generate,
            [picture, cut, centre, ratio, steps, guidance, seed, upscale],
            [tile, views, turntable, mesh_file, archive, progress],
            concurrency_limit=1,
            show_progress="hidden",
            api_name="generate",
        )
        made.success(lambda: buttons(False, True), None, controls, **private)
        made.failure(lambda: (*buttons(False), ""), None, [*controls, progress], **private)
        # gradio draws a mesh that an event returns, but not the first one that a generator yields
        made.success(lambda path: path, mesh_file, mesh, **private)
        stop.click(lambda: (*buttons(False), ""), None, [*controls, progress], cancels=made, queue=False, **private)
    return page.queue(max_size=MAX_WAITING)


def launch(page: gr.Blocks, **options):
    """Opens the page, with its limits; `options` are those of `gr.Blocks.launch`."""
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")  # the usual one asks another host for fonts
    return page.launch(max_file_size=MAX_FILE_SIZE, theme=theme, css=CSS, **options)
