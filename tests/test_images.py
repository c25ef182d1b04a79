"""Odd images: Pillow and timm are the truth, and where we differ from timm it is shown."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ebm_guard import EnergyClassifier, Preprocessing, predict
from ebm_guard.data import batches, open_source
from ebm_guard.data.images import plain, read_image, thumbnail, to_input
from ebm_guard.errors import DataError

RGB = Preprocessing((0.0,) * 3, (1.0,) * 3, image_size=(16, 16), crop_pct=0.8)
GREY = Preprocessing((0.0,), (1.0,), image_size=(16, 16), crop_pct=0.8)


def noise(shape, seed=0, dtype=np.uint8):
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, top, shape).astype(dtype)


def photo(size=(40, 28), mode="RGB", seed=0):
    small = Image.fromarray(noise((5, 7, 3), seed))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def timm_input(image, mode="RGB"):
    """What timm's evaluation pipeline gives for the image as its reader converts it."""
    data = pytest.importorskip("timm.data")
    channels = 3 if mode == "RGB" else 1
    transform = data.create_transform(
        (channels, 16, 16),
        interpolation="bicubic",
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        crop_pct=0.8,
    )
    return transform(image.convert(mode)).numpy()


def one_batch(path, preprocessing=RGB):
    (batch,) = batches(open_source(str(path)), preprocessing)
    return batch


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / f"a.{ending}", exif=exif)
    with Image.open(tmp_path / f"a.{ending}") as raw:
        assert raw.getexif().get(0x0112) == orientation
        expected = np.asarray(ImageOps.exif_transpose(raw))
    upright = np.asarray(photo())
    got = open_source(str(tmp_path)).load(0)
    assert np.array_equal(np.asarray(got), expected)
    if ending in ("png", "tif"):
        # Lossless, so that the turn itself can be compared. (Pillow turns a TIFF when it loads it.)
        turns = {1: 0, 2: "flip", 3: 2, 4: "flip", 5: "flip", 6: -1, 7: "flip", 8: 1}
        turn = turns[orientation]
        if turn != "flip":
            assert np.array_equal(np.asarray(got), np.rot90(upright, turn))
    assert got.size == ((28, 40) if orientation > 4 else (40, 28))
    # Turned once, not again where the image is prepared.
    assert np.array_equal(to_input(got, RGB), timm_input(Image.fromarray(expected)))


# timm leaves the file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_timm_itself_ignores_the_orientation(tmp_path):
    data = pytest.importorskip("timm.data")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "x").mkdir()
    photo().save(tmp_path / "x" / "a.png", exif=exif)
    theirs, _ = data.create_dataset("", root=str(tmp_path))[0]
    ours = open_source(str(tmp_path)).load(0)
    assert theirs.size == (40, 28)
    assert ours.size == (28, 40)
    upright = theirs.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(ours), np.asarray(upright))


@pytest.mark.parametrize("junk", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0"])
def test_broken_exif_does_not_cost_the_image(tmp_path, junk):
    photo().save(tmp_path / "a.jpg", exif=junk, quality=95)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = read_image(tmp_path / "a.jpg")
    assert image.size == (40, 28)


# --- depth


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, ending):
    values = noise((20, 20), dtype=np.uint16)
    values[0, :4] = 0, 65535, 257, 128
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    image = open_source(str(tmp_path)).load(0)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(np.asarray(plain(image)), expected)
    assert np.array_equal(to_input(image, GREY), timm_input(Image.fromarray(expected), "L"))
    assert np.array_equal(to_input(image, RGB), timm_input(Image.fromarray(expected)))
    small = np.asarray(thumbnail(image))
    assert small.min() < 40 < 200 < small.max()


def test_sixteen_bit_pgm_and_int32(tmp_path):
    values = noise((9, 9), dtype=np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 9 9 65535\n" + values.astype(">u2").tobytes())
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(np.asarray(plain(read_image(tmp_path / "a.pgm"))), expected)
    wide = Image.fromarray(values.astype(np.int32))
    assert wide.mode == "I"
    assert np.array_equal(np.asarray(plain(wide)), expected)
    # Clipping would have been nearly all white.
    assert np.minimum(values, 255).mean() > 250
    assert 100 < expected.mean() < 160


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), ["70000", "range", "0..65535"]),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), ["-1", "range"]),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), ["mode F", "8-bit"]),
        (Image.new("LAB", (4, 4)), ["mode LAB", "8-bit"]),
    ],
)
def test_pixels_without_a_known_range_are_skipped(tmp_path, image, words):
    image.save(tmp_path / "a.tif")
    photo().save(tmp_path / "b.png")
    batch = one_batch(tmp_path)
    assert batch.ids == ("b.png",)
    ((name, error),) = batch.skipped
    assert name == "a.tif"
    for word in ("cannot read image a.tif", *words):
        assert word in error
    with pytest.raises(DataError, match=words[0]):
        to_input(image, RGB)


# --- modes


def converted(mode):
    image = photo()
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise((28, 40), 1)))
    elif mode == "LA":
        image = photo(mode="L")
        image.putalpha(Image.fromarray(noise((28, 40), 1)))
    elif mode == "PA":
        image = photo().convert("P").convert("PA")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    return image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_is_as_timm_reads_it(mode):
    image = converted(mode)
    assert np.array_equal(to_input(image, RGB), timm_input(image))
    assert np.array_equal(to_input(image, GREY), timm_input(image, "L"))


def test_transparency_is_dropped_not_blended(tmp_path):
    image = photo()
    opaque = to_input(image, RGB)
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    got = to_input(open_source(str(tmp_path)).load(0), RGB)
    assert np.array_equal(got, opaque)
    blended = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    assert not np.array_equal(got, to_input(blended, RGB))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_palette_with_transparency(tmp_path, transparency):
    image = photo().quantize(64)
    image.save(tmp_path / "a.png", transparency=transparency)
    loaded = open_source(str(tmp_path)).load(0)
    assert loaded.mode == "P"
    assert "transparency" in loaded.info
    # No warning of Pillow's (warnings are errors here), and the palette's colours.
    got = to_input(loaded, RGB)
    assert np.array_equal(got, to_input(image.convert("RGB"), RGB))
    assert np.abs(to_input(loaded, GREY) - to_input(image.convert("L"), GREY)).max() < 2 / 255
    assert thumbnail(loaded).mode == "RGB"


def test_cmyk_jpeg_and_grey_jpeg(tmp_path):
    photo(mode="CMYK").save(tmp_path / "a.jpg")
    photo(mode="L").save(tmp_path / "b.jpg")
    batch = one_batch(tmp_path)
    for row, name in enumerate(("a.jpg", "b.jpg")):
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(batch.inputs[row].numpy(), timm_input(image))
    assert torch.equal(batch.inputs[1][0], batch.inputs[1][2])


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.webp", save_all=True, append_images=frames[1:], lossless=True)
    for row in one_batch(tmp_path).inputs:
        assert row.mean(dim=(1, 2)).tolist() == [1.0, 0.0, 0.0]


# --- sizes


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (2, 2), (15, 1)])
def test_tiny_images_are_enlarged(size):
    image = photo(size)
    got = to_input(image, RGB)
    assert got.shape == (3, 16, 16)
    assert np.array_equal(got, timm_input(image))
    if size == (1, 1):
        flat = np.array(image.getpixel((0, 0)), np.float32)[:, None, None] / np.float32(255)
        assert np.array_equal(got, np.broadcast_to(flat, got.shape))


def test_huge_images_are_skipped_with_their_size(tmp_path, monkeypatch):
    photo((60, 50)).save(tmp_path / "huge.png")
    photo((20, 20)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    batch = one_batch(tmp_path)
    assert batch.ids == ("small.png",)
    ((name, error),) = batch.skipped
    assert name == "huge.png"
    for word in ("3,000 pixels", "2,000", "decompression bombs", "MAX_IMAGE_PIXELS"):
        assert word in error
    with pytest.raises(DataError, match="3,000 pixels"):
        list(batches(open_source(str(tmp_path)), RGB, strict=True))


def test_a_thin_line_does_not_fill_the_memory(tmp_path):
    Image.new("RGB", (60000, 1)).save(tmp_path / "line.png")
    Image.new("RGB", (600, 1)).save(tmp_path / "thin.png")
    big = Preprocessing((0.0,) * 3, (1.0,) * 3, image_size=(224, 224))
    batch = one_batch(tmp_path, big)
    assert batch.ids == ("thin.png",)
    assert "60000 x 1 pixels" in batch.skipped[0][1]
    assert "3,010,560,000" in batch.skipped[0][1]


# --- hashes


def test_palettes_tell_images_apart(tmp_path):
    for name, colours in {"a": [0, 0, 0, 255, 0, 0], "b": [0, 0, 0, 0, 255, 0]}.items():
        image = Image.new("P", (8, 8), 1)
        image.putpalette(colours)
        image.save(tmp_path / f"{name}.png")
    hashes = one_batch(tmp_path).hashes
    assert hashes[0] != hashes[1]


def test_skipped_images_do_not_shift_the_rows(tmp_path):
    colours = {"a": 10, "c": 20, "e": 30}
    for name, value in colours.items():
        Image.new("L", (16, 16), value).save(tmp_path / f"{name}.png")
    for name in "bd":
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / f"{name}.tif")

    class Mean(torch.nn.Module):
        def forward(self, x):
            mean = x.mean(dim=(1, 2, 3))
            return torch.stack([mean, -mean], dim=1)

    classifier = EnergyClassifier(Mean().eval(), preprocessing=GREY)
    part = predict(classifier, batches(open_source(str(tmp_path)), GREY, batch_size=2))
    assert part.ids == ("a.png", "c.png", "e.png")
    assert np.allclose(part.logits[:, 0] * 255, [10, 20, 30], atol=1e-3)
    assert [name for name, _ in part.skipped] == ["b.tif", "d.tif"]
