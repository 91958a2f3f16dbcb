"""The page: a picture in, six views out, in the browser. Runs here, and as it is as a Space of the Hub.

pip install -r requirements-app.txt
python app.py
python app.py --checkpoint sudo-ai/zero123plus-v1.2 --port 8080
"""

try:
    import spaces  # of ZeroGPU Spaces, which wants to be imported before torch
except ImportError:
    spaces = None

import argparse
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import PIL.Image
import torch

from pipeline import load_pictures
from zero123plus import loading, options
from zero123plus.exports import EXPORTS
from zero123plus.pictures import FORMATS, prepare, read_picture
from zero123plus.preview import Preview, write_turntable
from zero123plus.results import write_result
from zero123plus.upscale import SCALE, Upscaler, join_views

MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 40_000_000  # of an uploaded picture, which a small file can hold very many of
MAX_WAITING = 20  # visitors in the queue; the next one is told to come back
MAX_STEPS = 100
MAX_SEED = 2**64 - 1  # torch's
KEEP_SECONDS = 3600  # results and uploads
CSS = "#tile img, #turntable img { width: auto; height: 100%; margin: auto }"  # the mini's views are small


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
        raise gr.Error("This file cannot be read as a picture: upload a PNG, JPEG or WebP.") from error
    if width * height > MAX_PIXELS:
        raise gr.Error(
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
        raise gr.Error(f"The seed is {text!r}, but must be a whole number from 0 to {MAX_SEED}: such as 0.")
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


def build(pipe) -> gr.Blocks:
    """The page around a pipeline."""
    pipe.set_progress_bar_config(disable=True)

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
        remove_background=False,
        centre=False,
        foreground_ratio=0.85,
        steps=pipe.config.default_num_inference_steps,
        guidance_scale=pipe.config.default_guidance_scale,
        seed="0",
        upscale=False,
        progress=gr.Progress(),
    ):
        """Six views of the object in a picture. Yields tile, views, turntable, mesh and archive: first the tile alone,
        while it forms, then all.
        """
        if picture is None:
            raise gr.Error("There is no picture yet: upload one, or choose an example.")
        seed = parse_seed(seed)
        try:
            ratio = foreground_ratio if centre else None
            picture = prepare(read_picture(picture, "The picture"), remove_background, ratio)
            picture = load_pictures(picture, "picture")[0]
            for kind, value in denoise(picture, steps, guidance_scale, seed):
                if kind == "shown":
                    progress((value[0], steps), unit="steps")
                    yield value[1], None, None, None, None
            tile, views = value
            if upscale:
                upscaler = Upscaler(pipe.device.type)
                views = [upscaler(view) for view in progress.tqdm(views, desc="Enlarging", unit="views")]
                tile = join_views(views)
            with tempfile.TemporaryDirectory() as folder:  # the page keeps copies of its own
                result = Path(folder, "views")
                result.mkdir()
                picture.save(result / "input.png")
                write_result(result, pipe, tile, views, EXPORTS)
                write_turntable(views, result / "turntable.webp")
                archive = shutil.make_archive(str(result), "zip", folder, "views")
                mesh = result / "glb" / "mesh.glb"
                yield tile, views, str(result / "turntable.webp"), str(mesh) if mesh.exists() else None, archive
        except (MemoryError, OSError, ValueError, torch.OutOfMemoryError) as error:
            raise gr.Error(options.one_line(error)) from error

    with gr.Blocks(title="Zero123++", delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown("# Zero123++\nOne picture of an object in, six consistent views of it out.")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], elem_id="picture")
                picture.preprocess = read_upload  # gradio's own fails without words
                with gr.Row():
                    cut = gr.Checkbox(label="Remove the background", elem_id="cut")
                    centre = gr.Checkbox(label="Centre the object")
                ratio = gr.Slider(0.5, 1, 0.85, label="Object's share of the picture, when centred")
                steps = gr.Slider(
                    1, MAX_STEPS, pipe.config.default_num_inference_steps, step=1, label="Steps", elem_id="steps"
                )
                guidance = gr.Slider(1, 10, pipe.config.default_guidance_scale, label="Guidance")
                # A browser's numbers are exact up to 2**53 only, and seeds are larger
                seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                upscale = gr.Checkbox(label=f"Enlarge the views {SCALE} times (slow on a CPU)", elem_id="upscale")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
                gr.Examples(
                    [[str(path)] for path in sorted((loading.ROOT / "examples" / "images").glob("*.png"))], [picture]
                )
            with gr.Column():
                tile = gr.Image(label="Tile", interactive=False, format="png", height=480, elem_id="tile")
                turntable = gr.Image(label="Turntable", interactive=False, height=320, elem_id="turntable")
            with gr.Column():
                views = gr.Gallery(label="Views", columns=2, interactive=False, format="png", elem_id="views")
                mesh = gr.Model3D(label="Mesh: a quick look", interactive=False, height=320, elem_id="mesh")
                mesh_file = gr.File(label="mesh", visible=False)
                archive = gr.DownloadButton("Download all, with cameras", elem_id="archive")
        done = button.click(
            generate,
            [picture, cut, centre, ratio, steps, guidance, seed, upscale],
            [tile, views, turntable, mesh_file, archive],
            concurrency_limit=1,
            api_name="generate",
        )
        # gradio draws a mesh that an event returns, but not the first one that a generator yields
        done.success(lambda path: path, mesh_file, mesh, api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = options.Parser("The page: six views of a picture.")
    add = parser.add_argument
    options.add_checkpoint_options(add)
    add("--dtype", choices=loading.DTYPES, help=options.DTYPE_HELP)
    add("--host", help="address to listen on; this machine alone if missing")
    add("--port", type=options.number(int, 1, 65535), help="the first free one from 7860 if missing")
    return parser.parse_args(argv)


def launch(page: gr.Blocks, **options):
    """Opens the page, with its limits; `options` are those of `gr.Blocks.launch`."""
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")  # the usual one asks another host for fonts
    return page.launch(max_file_size=MAX_FILE_SIZE, theme=theme, css=CSS, **options)


@options.command
def main(argv: list[str] | None = None):
    """The command line."""
    o = parse_options(argv)
    launch(build(options.load_from_options(o, o.dtype)), server_name=o.host, server_port=o.port)


if __name__ == "__main__":
    main()
