"""Decoding: every mode comes out as it looks, every damage as a reason, no bomb is decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from convette.data import Preprocessing, load_image
from convette.data._decode import MAX_PIXELS, Frame, UnreadableImage, decode, decode_file, read_header
from convette.errors import DataError

GREY, RGB = Frame(1, 6, 5), Frame(3, 6, 5)


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(dtype=np.uint8, top=255) -> np.ndarray:
    return np.linspace(0, top, 30).reshape(6, 5).round().astype(dtype)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with one row of data: 100 bytes that would decode to gigabytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_grey_is_exact_and_stays_one_channel(kind):
    content = save(Image.fromarray(ramp()), kind)
    assert read_header(content).grey
    assert np.array_equal(decode(content, GREY), ramp()[None])
    assert np.array_equal(decode(content, RGB), np.stack([ramp()] * 3))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_rgb_is_exact(kind):
    pixels = np.random.RandomState(0).randint(0, 256, (6, 5, 3), dtype=np.uint8)
    content = save(Image.fromarray(pixels), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert not read_header(content).grey
    assert np.array_equal(decode(content, RGB), pixels.transpose(2, 0, 1))


def test_palettes_come_out_as_colours():
    pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [200, 100, 50]]] * 6, dtype=np.uint8)
    content = save(Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE, colors=8))
    assert not read_header(content).grey
    assert np.array_equal(decode(content, RGB), pixels.transpose(2, 0, 1))


def test_a_palette_of_greys_is_grey():
    content = save(
        Image.fromarray(np.stack([ramp()] * 3, axis=-1)).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    )
    assert Image.open(io.BytesIO(content)).mode == "P"
    assert read_header(content).grey
    assert np.array_equal(decode(content, GREY), ramp()[None])


def test_transparency_lies_over_white():
    pixels = np.zeros((6, 5, 4), dtype=np.uint8)
    pixels[:3, :, 3] = 255  # black and opaque above, transparent below
    out = decode(save(Image.fromarray(pixels)), RGB)
    assert (out[:, :3] == 0).all() and (out[:, 3:] == 255).all()
    grey = np.stack([ramp(), np.full((6, 5), 255, np.uint8)], axis=-1)
    content = save(Image.fromarray(grey))
    assert read_header(content).grey and np.array_equal(decode(content, GREY), ramp()[None])


def test_sixteen_bits_are_scaled_not_clipped():
    wide = ramp(np.uint16, 65535)
    for kind in ("PNG", "TIFF"):
        content = save(Image.fromarray(wide), kind)
        assert read_header(content).grey
        assert np.array_equal(decode(content, GREY)[0], (wide >> 8).astype(np.uint8))


def test_float_pixels_in_either_range():
    for values in (np.linspace(0, 1, 30), np.linspace(0, 255, 30)):
        out = decode(save(Image.fromarray(values.reshape(6, 5).astype(np.float32)), "TIFF"), GREY)
        assert out.min() == 0 and out.max() == 255
    with pytest.raises(UnreadableImage, match=r"expected 0\.\.1"):
        decode(save(Image.fromarray(np.full((6, 5), -4.0, np.float32)), "TIFF"), GREY)


def test_one_bit_images():
    out = decode(save(Image.fromarray(ramp() > 127)), GREY)
    assert set(np.unique(out)) == {0, 255}


def test_orientation_of_cameras_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    content = save(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    header = read_header(content)
    assert (header.width, header.height) == (16, 32)
    out = decode(content, Frame(3, 32, 16))
    assert out[:, :14].min() > 240 and out[:, 18:].max() < 15


def test_other_sizes_cover_the_frame_and_are_cropped_at_the_centre():
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255  # the middle square is what remains
    # As after scaling the whole image and cropping: the outermost column sees a little of what lies beyond.
    wide = decode(save(Image.fromarray(pixels)), Frame(3, 10, 10))
    assert wide[:, :, 1:-1].min() == 255 and wide.min() > 180
    tall = decode(save(Image.fromarray(pixels.transpose(1, 0, 2).copy())), Frame(1, 10, 10))
    assert tall.shape == (1, 10, 10) and tall[:, 1:-1].min() == 255


def test_large_jpegs_keep_their_content_when_scaled():
    y, x = np.mgrid[0:512, 0:512]
    pixels = np.stack([x // 2, y // 2, (x + y) // 4], axis=-1).astype(np.uint8)
    content = save(Image.fromarray(pixels), "JPEG", quality=95)
    exact = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    difference = np.abs(decode(content, Frame(3, 32, 32)).astype(int) - exact)
    assert difference.mean() < 2 and difference.max() < 12


def test_damage_is_told_by_its_reason():
    whole = save(Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8)))
    jpeg = save(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), "JPEG")
    for content, reason in [
        (b"", "empty file"),
        (b"hello, this is text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"GIF89a", "."),
        (whole[: len(whole) // 2], "truncated"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (whole[:60] + b"\xff" * 40 + whole[100:], "damaged|truncated"),
    ]:
        with pytest.raises(UnreadableImage, match=reason):
            decode(content, RGB)


@pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF", "ignore:Tag data", "ignore:Metadata Warning", "ignore:Truncated File"
)
def test_every_cut_and_many_scratches_give_pixels_or_a_reason():
    rng = np.random.RandomState(0)
    originals = [save(Image.fromarray(ramp())), save(Image.fromarray(np.stack([ramp()] * 3, -1)), "JPEG")]
    originals += [save(Image.fromarray(ramp()), kind) for kind in ("TIFF", "BMP", "GIF")]
    for content in originals:
        for _ in range(150):
            damaged = bytearray(content[: rng.randint(1, len(content) + 1)])
            damaged[rng.randint(len(damaged))] ^= 1 << rng.randint(8)
            try:
                assert decode(bytes(damaged), RGB, max_pixels=10_000).shape == (3, 6, 5)
            except UnreadableImage as error:
                assert str(error)


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (60000, 60000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_decoding_and_pil_is_left_as_it_was(width, height):
    import warnings

    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for read in (read_header, lambda content: decode(content, GREY)):
            with pytest.raises(UnreadableImage, match="bomb"):
                read(png_header(width, height))
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_guard_does_not_lean_on_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UnreadableImage, match="over the limit of 64,000,000"):
        decode(png_header(MAX_PIXELS, 2), GREY)


def test_load_image_gives_one_image_for_the_network(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(save(Image.fromarray(ramp())))
    image = load_image(path, Preprocessing(3, 6, 5, (0.5,) * 3, (0.5,) * 3))
    assert image.shape == (1, 3, 6, 5) and np.array_equal(image[0, 1].numpy(), ramp())
    for broken, reason in [("missing.png", "No such file"), (".", "directory")]:
        with pytest.raises(DataError, match=reason):
            load_image(tmp_path / broken, Preprocessing(1, 6, 5, (0.5,), (0.5,)))
    path.write_bytes(png_header(60000, 60000))
    with pytest.raises(DataError, match=r"a\.png: .*bomb"):
        load_image(path, Preprocessing(1, 6, 5, (0.5,), (0.5,)))
    with pytest.raises(UnreadableImage):
        decode_file(tmp_path / "missing.png", GREY)
