"""Every kind of picture that is accepted, and the errors for what is not."""

import io

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from conftest import assert_same, noise_picture
from diffusers import ControlNetModel

from pipeline import load_pictures, pad_to_square
from zero123plus.pictures import read_picture

RGB = noise_picture(0, (6, 6))
ARRAY = np.array(RGB)


def same(pictures, expected):
    assert len(pictures) == len(expected)
    for ours, right in zip(pictures, expected):
        assert ours.mode == "RGB"
        np.testing.assert_allclose(np.asarray(ours).astype(int), np.asarray(right).astype(int), atol=1)


@pytest.mark.parametrize(
    "image",
    [
        RGB,
        ARRAY,
        ARRAY / 255,
        torch.from_numpy(ARRAY).permute(2, 0, 1) / 255,
        (torch.from_numpy(ARRAY).permute(2, 0, 1) / 255).half(),
        np.dstack([ARRAY, np.full((6, 6), 255, np.uint8)]),
        RGB.convert("RGBA"),
    ],
    ids=["pil", "uint8", "float", "torch", "half", "rgba-array", "rgba"],
)
def test_the_same_picture_in_every_form(image):
    same(load_pictures(image, "image"), [RGB])
    same(load_pictures([image, RGB], "image"), [RGB, RGB])


def test_batches():
    same(load_pictures(np.stack([ARRAY, ARRAY]), "image"), [RGB, RGB])
    same(load_pictures(torch.from_numpy(np.stack([ARRAY, ARRAY])).permute(0, 3, 1, 2) / 255, "image"), [RGB, RGB])


def test_modes():
    grey = RGB.convert("L")
    same(load_pictures(grey, "image"), [grey.convert("RGB")])
    same(load_pictures(grey.convert("LA"), "image"), [grey.convert("RGB")])
    same(load_pictures(PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "image"), [grey.convert("RGB")])
    same(load_pictures(PIL.Image.fromarray(np.asarray(grey).astype(np.int32) * 257), "image"), [grey.convert("RGB")])
    same(load_pictures(PIL.Image.fromarray(np.asarray(grey).astype(np.float32) / 255), "image"), [grey.convert("RGB")])
    cmyk = RGB.convert("CMYK")
    same(load_pictures(cmyk, "image"), [cmyk.convert("RGB")])


@pytest.mark.parametrize("mode", ("RGB", "RGBA", "P"))
def test_colour_profiles_are_applied(mode, tmp_path):
    """sRGB with red and blue exchanged. One that cannot be read counts as none."""
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
    red = PIL.Image.new("RGB", (6, 6), (255, 0, 0)).convert(mode)
    for kept, colour in ((profile, (0, 0, 255)), (b"no profile", (255, 0, 0)), (profile[:300], (255, 0, 0))):
        red.save(tmp_path / "red.png", icc_profile=kept)
        expected = [PIL.Image.new("RGB", (6, 6), colour)]
        same(load_pictures(PIL.Image.open(tmp_path / "red.png"), "image"), expected)
        read = read_picture(tmp_path / "red.png", "red.png")
        assert ("A" in read.getbands()) == (mode == "RGBA")
        same(load_pictures(read, "image"), expected)


@pytest.mark.parametrize(
    ("background", "said"),
    (((0, 0, 0), "has the colour [0, 0, 0]"), (None, "has many colours"), ((120, 127, 130), ""), ("cut", "")),
)
def test_a_background_gives_one_warning(pipe, run, caplog, background, said):
    pipe.warned.clear()
    image = noise_picture()
    if background == "cut":
        image.putalpha(0)
    elif background:
        image.paste(background, (0, 0, 40, 40))
    image.paste((200, 30, 30), (10, 10, 30, 30))
    for _ in range(2):
        run(pipe, image, num_inference_steps=1)
    assert caplog.text.count("The border of `image`") == bool(said) and said in caplog.text


def test_transparency_goes_on_grey():
    rgba = RGB.copy()
    rgba.putalpha(0)
    grey = PIL.Image.new("RGB", (6, 6), (127, 127, 127))
    same(load_pictures(rgba, "image"), [grey])
    palette = PIL.Image.new("P", (6, 6), 3)
    palette.info["transparency"] = 3
    same(load_pictures(palette, "image"), [grey])


def test_exif_orientation_is_honoured():
    wide, buffer = noise_picture(0, (8, 4)), io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    wide.save(buffer, "PNG", exif=exif)
    same(load_pictures(PIL.Image.open(buffer), "image"), [wide.rotate(-90, expand=True)])


def test_padding_keeps_the_whole_object():
    padded = pad_to_square(noise_picture(0, (8, 4)))
    assert padded.size == (8, 8)
    assert np.array_equal(np.asarray(padded)[2:6], np.asarray(noise_picture(0, (8, 4))))
    assert (np.asarray(padded)[:2] == 127).all()


def broken_file():
    buffer = io.BytesIO()
    noise_picture(0, (64, 64)).save(buffer, "PNG")
    return PIL.Image.open(io.BytesIO(buffer.getvalue()[:2000]))


@pytest.mark.parametrize(
    "image, error, words",
    [
        (None, TypeError, "`image` is a NoneType"),
        ("cat.png", TypeError, "`image` is a str"),
        ([], ValueError, "`image` is an empty list"),
        (PIL.Image.new("RGB", (0, 5)), ValueError, "no pixels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, r"shape \(0, 4, 4, 3\)"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "int64"),
        (np.full((4, 4, 3), 1.5), ValueError, "from 1.5 to 1.5"),
        (np.full((4, 4, 3), np.nan), ValueError, "NaN"),
        (torch.full((3, 4, 4), -1.0), ValueError, "from -1 to -1"),
        (torch.zeros(5, 4, 4), ValueError, r"shape \(4, 4, 5\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), ValueError, "int32"),
        (broken_file(), ValueError, "cannot be read"),
        (PIL.Image.fromarray(np.full((4, 4), 3.0, np.float32)), ValueError, "mode 'F'"),
    ],
)
def test_bad_pictures(image, error, words):
    with pytest.raises(error, match=words):
        load_pictures(image, "image")


@pytest.mark.parametrize(
    "options",
    [
        {"height": 100},
        {"height": 48.0},
        {"width": 8},
        {"num_inference_steps": 0},
        {"num_images_per_prompt": 0},
        {"num_images_per_prompt": None},
        {"output_type": "jpg"},
        {"prompt": ["a", "b"]},
        {"prompt": 3},
        {"negative_prompt": ["a", "b"]},
        {"prompt_embeds": torch.zeros(1, 4, 128)},
        {"prompt_embeds": torch.zeros(1, 16, 128), "prompt": "a"},
        {"negative_prompt_embeds": torch.zeros(1, 16, 128), "negative_prompt": "a"},
        {"generator": [torch.Generator()] * 2},
        {"generator": 7},
        {"latents": torch.zeros(1, 4, 4, 4)},
        {"control_image": RGB},
        {"control_image": RGB, "depth_image": RGB},
        {"control_guidance_start": 1.0},
        {"guidance_start": 0.5, "guidance_end": 0.5},
        {"guidance_end": None},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "4"},
        {"guidance_scale": [4, 4]},
        {"guidance_rescale": 1.5},
        {"eta": float("nan")},
        {"controlnet_conditioning_scale": [1, 1]},
        {"callback_on_step_end_tensor_inputs": ["noise"]},
    ],
)
def test_bad_arguments(pipe, picture, run, options):
    """The error names the first of them."""
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(options))}`"):
        run(pipe, picture, **options)


def test_control_tiles_that_do_not_fit(pipe, picture, run):
    pipe.add_controlnet()
    with pytest.raises(ValueError, match="`control_image`"):
        run(pipe, picture)
    with pytest.raises(ValueError, match="shrinks `control_image` by 4, but the VAE by 8"):
        narrow = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
        run(type(pipe)(**{**pipe.components, "controlnet": narrow}), picture, control_image=RGB)
    with pytest.raises(ValueError, match="has 2 tiles for 1"):
        run(pipe, picture, control_image=[noise_picture(0, (32, 48))] * 2)


def test_bad_configurations(pipe):
    with pytest.raises(ValueError, match="`ramping_coefficients` has 3 values"):
        type(pipe)(**pipe.components, ramping_coefficients=[0, 1, 2])
    with pytest.raises(ValueError, match="`cameras`.*'v3'"):
        type(pipe)(**pipe.components, cameras="v3")


def test_whole_numbers_of_numpy_are_whole_numbers(pipe, picture, run):
    options = {"num_inference_steps": np.int64(2), "height": np.int32(48), "width": np.int32(32)}
    assert_same(run(pipe, picture, **options), run(pipe, picture, num_inference_steps=2))
    with pytest.raises(ValueError, match="`num_inference_steps` is True"):
        run(pipe, picture, num_inference_steps=True)


def test_a_list_of_one_prompt_is_that_prompt(pipe, picture, run):
    assert_same(run(pipe, picture, prompt=["a mug"]), run(pipe, picture, prompt="a mug"))
