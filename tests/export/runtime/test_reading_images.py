"""Images of unusual kinds, as they are read, and those that are refused."""

# ruff: noqa: ARG001 - fixtures are asked for what they do: `here` is the current folder

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import COLOUR, pixels
from PIL import Image

from pathconvert.errors import CheckpointError
from pathconvert.networks.images import read_image

GREY16 = pixels(20, 30, top=65536, dtype=np.uint16)


def levels(path: str, channels: int = 3) -> np.ndarray:
    """The pixels that are read from an 8-bit file, [H, W, C] in 0…255."""
    pixels = read_image(Path(path), channels).pixels.numpy().transpose(1, 2, 0) * 255
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)
    return pixels.round().astype(int)


def test_plain_colour(here):
    assert (levels("a.png") == COLOUR).all()
    assert (levels("a.png", 1)[..., 0] == np.asarray(Image.fromarray(COLOUR).convert("L"))).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_keeps_its_range(here, suffix):
    Image.fromarray(GREY16).save(f"g.{suffix}")
    values = torch.from_numpy(GREY16.astype(np.float32) / 65535)
    for channels in (1, 3):
        picture = read_image(Path(f"g.{suffix}"), channels)
        assert picture.notes == ()
        # one rounding to float32
        assert torch.allclose(picture.pixels, values.expand(channels, -1, -1), atol=2e-7)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(here, suffix):
    smooth = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    Image.fromarray(smooth).convert("CMYK").save(
        f"c.{suffix}", **({"quality": 100} if suffix == "jpg" else {})
    )
    assert read_image(Path(f"c.{suffix}")).notes == (
        "CMYK was converted to RGB without a colour profile",
    )
    # JPEG loses a few levels
    assert abs(levels(f"c.{suffix}") - smooth).max() <= (8 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_give_their_first_frame(here, suffix):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    picture = read_image(Path(f"a.{suffix}"))
    assert "3 frames: only the first one is used" in picture.notes
    assert picture.pixels.mean((1, 2)).tolist() == [1, 0, 0]


def test_palette_transparency_bits_and_orientation(here):
    image = Image.fromarray(COLOUR)
    image.quantize(8).save("palette.png")
    assert (levels("palette.png") == np.asarray(image.quantize(8).convert("RGB"))).all()
    image.convert("RGBA").save("alpha.png")
    assert read_image(Path("alpha.png")).notes == ("transparency was dropped",)
    image.convert("1").save("bits.png")
    assert set(read_image(Path("bits.png"), 1).pixels.unique().tolist()) == {0, 1}
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save("turned.png", exif=exif)
    assert (levels("turned.png") == np.rot90(COLOUR, -1)).all()


def test_images_that_are_refused(here):
    content = (here / "a.png").read_bytes()
    (here / "cut.png").write_bytes(content[: len(content) // 2])
    (here / "flipped.png").write_bytes(content[:60] + bytes(30) + content[90:])
    (here / "empty.png").write_bytes(b"")
    (here / "text.png").write_text("no image")
    Image.new("RGB", (2000, 10)).save("long.png")
    Image.fromarray(GREY16.astype(np.int32)).save("deep.tif")
    Image.fromarray(GREY16.astype(np.float32)).save("floats.tif")
    (here / "folder").mkdir()
    for name, message in {
        "cut.png": "is not an intact image: image file is truncated",
        "flipped.png": "is not an intact image: ",
        "empty.png": "is not an intact image: ",
        "text.png": "is not an intact image: ",
        "none.png": "does not exist",
        "folder": "is a folder, not an image",
        "long.png": "is 2000 × 10 pixels: one side is more than 50 times the other",
        "deep.tif": "contains 32-bit values, whose range is not known",
        "floats.tif": "contains floating-point values, whose range is not known",
    }.items():
        with pytest.raises(CheckpointError) as refused:
            read_image(Path(name))
        assert str(refused.value).startswith(f"{name} {message}")
