"""The page around a pipeline: a picture in, six views out. `app.py` is its command."""

try:
    import spaces  # of ZeroGPU Spaces, which wants to be imported before torch
except ImportError:
    spaces = None

import html
import importlib.util
import queue
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import PIL.Image
import torch

from pipeline import load_pictures, pad_to_square

from . import loading, options
from .checks import FORMATS
from .exports import EXPORTS
from .pictures import FOREGROUND_RATIO, cut_out, prepare, read_picture
from .preview import Preview
from .results import write_result
from .upscale import SCALE, Upscaler, join_views

MAX_FILE_SIZE = "20mb"
MAX_PIXELS = 40_000_000  # of an uploaded picture, which a small file can hold very many of
MAX_WAITING = 20  # visitors in the queue; the next one is told to come back
MAX_STEPS = 100
MAX_SEED = 2**64 - 1  # torch's
KEEP_SECONDS = 3600  # results and uploads
# Further pictures of the object: their azimuths in degrees, and what they are called
OTHERS = {"back": (180, "Back"), "left": (90, "Its left (90°)"), "right": (270, "Its right (270°)")}
REPOSITORY, PAPER = "https://huggingface.co/sudo-ai/zero123plus-v1.2", "https://arxiv.org/abs/2310.15110"
SMALL = 256  # pixels of a view's edge, below which a checkpoint is one to try things with
# A gallery scrolls what is higher than its frame. On a phone, which shows one column, Stop stays in sight
CSS = """
#seen img, #tile img { width: auto; height: 100%; margin: auto }
#views .grid-wrap { max-height: none; height: auto; overflow: visible }
#views .grid-container { grid-template-columns: repeat(auto-fit, minmax(96px, 1fr)) !important }
#bar progress { width: 100% }
@media (max-width: 800px) { #stop:not([disabled]) { position: fixed; bottom: 12px; right: 12px; z-index: 99 } }
"""
SCROLL = """() => {
    const block = window.innerWidth < 800 ? 'start' : 'nearest';  // a phone shows one column
    document.getElementById('bar').scrollIntoView({behavior: 'smooth', block});
    return [];
}"""


def user_error(message: object) -> gr.Error:
    """An error that a user caused: a message on the page, which is HTML, and no traceback in the log."""
    return gr.Error(html.escape(str(message)), print_exception=False)


class Picture(gr.Image):
    """A picture as the path of its file. gradio's own reading fails without words. A class, because gradio makes a
    component anew when an example is chosen; it writes a page.pyi for it beside this file.
    """

    is_template = True  # gradio shows it as its base

    def preprocess(self, payload: gr.data_classes.ImageData | None) -> str | None:
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


def load(checkpoint: loading.Checkpoint) -> tuple:
    """The pipeline of a checkpoint, and those of its LoRAs for few steps and for several pictures, if its folder has
    them and no LoRA is asked for.
    """
    print(checkpoint.describe(), file=sys.stderr)
    folder, loras = checkpoint.find()
    own = (folder / name / loading.LORA_FILE for name in ("student", "pictures"))
    own = (replace(checkpoint, lora=file.parent) if file.is_file() and not loras else None for file in own)
    return checkpoint.load(), *(lora and lora.load() for lora in own)


def describe(pipe) -> str:
    """What the page is, in Markdown."""
    edge = pipe.default_size[1] // 2
    small = f" This is the small checkpoint to try it with, whose views have {edge} pixels." if edge < SMALL else ""
    return (
        f"# Zero123++\nOne picture of an object in, six consistent views of it out.{small} [Paper]({PAPER}) ·"
        f" [checkpoints and their licence]({REPOSITORY})"
    )


def build(pipe, student=None, several=None) -> gr.Blocks:
    """The page around a pipeline, and around its student of few steps and the one that takes several pictures of an
    object, if it has them.
    """
    default_steps, default_guidance = pipe.config.default_num_inference_steps, pipe.config.default_guidance_scale
    for one in filter(None, (pipe, student, several)):
        one.set_progress_bar_config(disable=True)
        one.warned.add("background")  # `see` warns of it

    def see(
        picture, remove_background=True, centre=False, foreground_ratio=FOREGROUND_RATIO, warn=lambda message: None
    ):
        """What the model sees of a picture, RGB; None of none."""
        if picture is None:
            return None
        background, ratio = "auto" if remove_background else "keep", foreground_ratio if centre else None
        try:
            prepared = prepare(read_picture(picture, "The picture"), background, ratio, warn=warn)
            return pad_to_square(load_pictures(prepared, "picture")[0])
        except (MemoryError, OSError, ValueError) as error:
            raise user_error(options.one_line(error)) from error

    def look(*given):
        """[`see`], which says what is doubtful once, and not again when views are made."""
        return see(*given, warn=lambda message: gr.Warning(html.escape(message)))

    @on_gpu
    def denoise(picture, steps, guidance_scale, seed, fast=False, more=None):
        """Yields ("shown", (step, tile)) while the tile forms, then ("done", (tile, views)). `more` are further
        pictures of the object by their azimuths.
        """
        model = student if fast else several if more else pipe

        def work(show):
            result = model(
                [[picture, *more.values()]] if more else picture,
                image_azimuths=[0, *more] if more else None,
                num_inference_steps=None if fast else steps,
                guidance_scale=None if fast else guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=Preview(model, picture, show),
            )
            return result.images[0], result.views[0]

        yield from in_steps(work)

    def shown(views, transparent):
        """Views as the page shows them."""
        return [cut_out(view) for view in views or ()] if transparent else views

    def generate(
        picture,
        remove_background=True,
        centre=False,
        foreground_ratio=FOREGROUND_RATIO,
        steps=default_steps,
        guidance_scale=default_guidance,
        seed="0",
        upscale=False,
        transparent=False,
        faces=options.NUM_FACES,
        fast=False,
        back=None,
        left=None,
        right=None,
    ):
        """Six views of the object in a picture. Yields tile, views, mesh, archive, progress and the views as they were
        made: first the tile and the progress alone, while it forms, then all.
        """
        seed = begin(picture, seed)
        picture, *others = (
            see(one, remove_background, centre, foreground_ratio) for one in (picture, back, left, right)
        )
        more = {azimuth: one for (azimuth, _), one in zip(OTHERS.values(), others) if one is not None}
        if more and (fast or not several):
            raise user_error("Several pictures need a checkpoint with a LoRA for them, and not the fast student.")
        steps = student.config.default_num_inference_steps if fast else steps
        try:
            yield None, None, None, None, bar(0, steps), None
            for kind, value in denoise(picture, steps, guidance_scale, seed, fast, more):
                if kind == "shown":
                    yield value[1], None, None, None, bar(value[0], steps), None
            tile, views = value
            if upscale:
                upscaler, small = Upscaler(pipe.device.type), tile
                for i, view in enumerate(views):
                    yield small, None, None, None, bar(i, len(views), "enlarged views"), None
                    views[i] = upscaler(view)
                tile = join_views(views)
            yield tile, shown(views, transparent), None, None, "making the mesh", views
            with tempfile.TemporaryDirectory() as folder:  # the page keeps copies of its own
                result = Path(folder, "views")
                result.mkdir()
                picture.save(result / "input.png")
                write_result(result, pipe, tile, views, EXPORTS, faces=faces)
                archive = shutil.make_archive(str(result), "zip", folder, "views")
                mesh = result / "glb" / "mesh.glb"
                mesh = str(mesh) if mesh.exists() else None
                yield tile, shown(views, transparent), mesh, archive, bar(steps, steps), views
        except (MemoryError, OSError, ValueError, torch.OutOfMemoryError) as error:
            raise user_error(options.one_line(error)) from error

    def begin(picture, seed) -> int:
        """Checks what a run needs before it waits in the queue, and returns the seed."""
        if picture is None:
            raise user_error("There is no picture yet: upload one, or choose an example.")
        return parse_seed(seed)

    with gr.Blocks(title="Zero123++", delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(describe(pipe))
        plain, image = gr.State(), {"interactive": False, "format": "png", "buttons": ["download", "fullscreen"]}
        with gr.Row():
            with gr.Column():
                picture = Picture(label="Picture", sources=["upload", "clipboard"], height=260, elem_id="picture")
                with gr.Row():
                    button = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", interactive=False, elem_id="stop")
                paths = sorted((loading.ROOT / "examples" / "images").glob("*.png"))
                examples = gr.Examples([[str(path)] for path in paths], [picture], elem_id="examples")
                with gr.Accordion("More pictures", open=False, visible=bool(several), elem_id="more"):
                    gr.Markdown("Of the same object, so that its other sides are not guessed.")
                    with gr.Row():
                        others = [
                            Picture(label=label, sources=["upload", "clipboard"], height=140, elem_id=name)
                            for name, (_, label) in OTHERS.items()
                        ]
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    fast = gr.Checkbox(
                        label="Fast: the student's few steps, without guidance", visible=bool(student), elem_id="fast"
                    )
                    cut = gr.Checkbox(True, label="Remove the background, if there is one", elem_id="cut")
                    centre = gr.Checkbox(label="Centre the object")
                    ratio = gr.Slider(0.5, 1, FOREGROUND_RATIO, label="Object's share of the picture, when centred")
                    more = "More steps take longer and add detail."
                    steps = gr.Slider(1, MAX_STEPS, default_steps, step=1, label="Steps", info=more, elem_id="steps")
                    larger = "A larger scale follows the picture more closely, and too large a one burns colours."
                    guidance = gr.Slider(1, 10, default_guidance, label="Guidance", info=larger)
                    with gr.Row():
                        dice = gr.Checkbox(True, label="Random seed", elem_id="dice")
                        # A browser's numbers are exact up to 2**53 only, and seeds are larger
                        seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                    upscale = gr.Checkbox(label=f"Enlarge the views {SCALE} times (slow on a CPU)", elem_id="upscale")
                    faces = gr.Slider(1000, 100_000, options.NUM_FACES, step=1000, label="Faces of the mesh, about")
            with gr.Column():
                progress = gr.HTML(elem_id="bar")
                tile = gr.Image(label="Tile", height=400, elem_id="tile", **image)
                seen = gr.Image(label="What the model sees", height=200, elem_id="seen", **image)
            with gr.Column():
                views = gr.Gallery(label="Views", columns=3, height="auto", elem_id="views", **image)
                clear = gr.Checkbox(label="Views without their background", elem_id="clear")
                mesh = gr.Model3D(label="Mesh: a quick look", interactive=False, height=320, elem_id="mesh")
                with gr.Row():
                    mesh_file = gr.DownloadButton("Download the mesh", interactive=False, elem_id="mesh_file")
                    archive = gr.DownloadButton("Download all, with cameras", interactive=False, elem_id="archive")

        private = {"api_visibility": "private"}
        controls, results = [button, stop, archive, mesh_file], [tile, views, mesh_file, archive, progress, plain]

        def buttons(runs: bool, mesh: str | None = None, archive: str | None = None):
            """The buttons while views are made, or not, and of what there is to download."""
            downloads = gr.DownloadButton(interactive=bool(archive)), gr.DownloadButton(interactive=bool(mesh))
            return gr.Button(interactive=not runs), gr.Button(interactive=runs), *downloads

        def start(picture, dice, seed):
            """Refuses what cannot be made before it waits, and draws the seed."""
            seed = str(random.randrange(2**32)) if dice else seed
            begin(picture, seed)
            return *buttons(True), seed, None

        def empty():
            """The page without results."""
            return *buttons(False), *[None] * len(results), None

        events, given = [picture.change, cut.change, centre.change, ratio.release], [picture, cut, centre, ratio]
        looked = gr.on(events, look, given, seen, show_progress_on=seen, concurrency_limit=4, **private)
        looked.failure(lambda: (None, None), None, [picture, seen], **private)
        runs = []
        for event in (button.click, examples.load_input_event.then):
            at_once = {"concurrency_limit": None, "show_progress": "hidden"}  # gradio says no errors of queue=False
            started = event(start, [picture, dice, seed], [*controls, seed, mesh], **at_once, **private)
            started.success(None, None, None, js=SCROLL, queue=False, **private)
            made = started.success(
                generate,
                [*given, steps, guidance, seed, upscale, clear, faces, fast, *others],
                results,
                concurrency_limit=1,
                concurrency_id="generate",
                show_progress="hidden",
                api_name="generate",
                api_visibility="private" if runs else "public",
            )
            made.success(lambda *made: buttons(False, *made), [mesh_file, archive], controls, **private)
            made.failure(empty, None, [*controls, *results, mesh], **private)
            # gradio draws a mesh that an event returns, but not the first one that a generator yields
            made.success(lambda path: path, mesh_file, mesh, **private)
            runs.append(made)
        clear.change(shown, [plain, clear], views, show_progress="hidden", **private)
        stop.click(empty, None, [*controls, *results, mesh], cancels=runs, queue=False, **private)
    return page.queue(max_size=MAX_WAITING)


def launch(page: gr.Blocks, **options):
    """Opens the page, with its limits; `options` are those of `gr.Blocks.launch`. The first photograph needs rembg,
    whose import compiles for a minute, during which nobody should wait.
    """
    if importlib.util.find_spec("rembg"):
        threading.Thread(target=importlib.import_module, args=["rembg"], daemon=True).start()
    theme = gr.themes.Default(font="sans-serif", font_mono="monospace")  # the usual one asks another host for fonts
    return page.launch(max_file_size=MAX_FILE_SIZE, theme=theme, css=CSS, quiet=True, **options)
