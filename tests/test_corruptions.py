"""Corruptions: closed forms, other libraries, exact tests of the noises, and no global state."""

import json
import math
import zlib

import numpy as np
import oracles
import pytest
import torch
from corruption_cases import (
    FIXED,
    FIXTURE,
    NOISES,
    SEVERITIES,
    SHAPES,
    apply,
    global_state,
    likely,
    picture,
    synthetic,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from ebm_guard.errors import InvalidInputError
from ebm_guard.robustness import corruptions
from ebm_guard.robustness.corruptions import builtin
from ebm_guard.robustness.corruptions.catalogue import BUILTIN, NAMES


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_size_keeps_shape_and_type(name, shape):
    image = picture(shape)
    before = image.copy()
    for severity in SEVERITIES:
        found = apply(name, image, severity)
        assert found.dtype == np.uint8
        assert found.shape == shape
    assert np.array_equal(image, before)


@given(
    severity=st.sampled_from(SEVERITIES),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@oracles.QUICK
def test_brightness_and_contrast_are_their_formulas(severity, rows, columns, seed):
    image = oracles.generator(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    added = builtin.CONSTANTS["brightness"][severity - 1]
    left = builtin.CONSTANTS["contrast"][severity - 1]
    for row in range(rows):
        for column in range(columns):
            for channel in range(3):
                value = int(image[row, column, channel])
                mean = sum(map(int, image[..., channel].ravel())) / (rows * columns)
                # Half a grey value may be rounded either way by the last bit.
                bright = apply("brightness", image, severity)[row, column, channel]
                assert abs(bright - min(255, value + 255 * added)) <= 0.5 + 1e-9
                flat = apply("contrast", image, severity)[row, column, channel]
                assert abs(flat - (mean + left * (value - mean))) <= 0.5 + 1e-9


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (64, 40, 3), (3, 3)], ids=str)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_equals_scipy(shape, severity):
    image = picture(shape)
    deviation = builtin.CONSTANTS["gaussian_blur"][severity - 1] * min(shape[:2])
    values = image / 255
    planes = values.reshape(*shape[:2], -1)
    wanted = np.stack(
        [
            ndimage.gaussian_filter(planes[..., channel], deviation, mode="nearest", truncate=4)
            for channel in range(planes.shape[2])
        ],
        axis=-1,
    ).reshape(shape)
    assert np.abs(builtin.blurred(values, deviation) - wanted).max() < 1e-12
    found = apply("gaussian_blur", image, severity)
    assert np.abs(found - wanted * 255).max() <= 0.5 + 1e-9


def cell_means(image, cells, axis):
    """Means over equal shares of one axis, of the pixels whose centres lie inside."""
    image = np.moveaxis(image, axis, 0)
    size, found = len(image), []
    for cell in range(cells):
        low, high = cell * size / cells, (cell + 1) * size / cells
        inside = [row for row in range(size) if low < row + 0.5 <= high]
        found.append(image[inside].mean(axis=0))
    return np.moveaxis(np.array(found), 0, axis)


@pytest.mark.parametrize("shape", [(28, 28), (32, 48, 3), (224, 224)], ids=str)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_equals_means_over_cells(shape, severity):
    image = picture(shape)
    cell = 1 + builtin.CONSTANTS["pixelate"][severity - 1] * min(shape[:2])
    high, wide = (round(side / cell) for side in shape[:2])
    small = cell_means(cell_means(image.astype(float), high, 0), wide, 1)
    rows = ((np.arange(shape[0]) + 0.5) * high / shape[0]).astype(int)
    columns = ((np.arange(shape[1]) + 0.5) * wide / shape[1]).astype(int)
    wanted = small[rows][:, columns]
    # Pillow rounds after each axis.
    assert np.abs(apply("pixelate", image, severity) - wanted).max() <= 1.01
    assert high < shape[0]


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (16, 24, 1)], ids=str)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_what_pillow_stores(tmp_path, shape, severity):
    image = picture(shape)
    plain = image[..., 0] if shape[-1] == 1 else image
    quality = builtin.CONSTANTS["jpeg"][severity - 1]
    Image.fromarray(plain).save(tmp_path / "a.jpg", quality=quality)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert np.array_equal(apply("jpeg", image, severity).reshape(plain.shape), stored)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("value", [0, 40, 128, 230])
def test_gaussian_noise_has_its_distribution(severity, value):
    image = np.full((60, 60, 3), value, np.uint8)
    found = apply("gaussian_noise", image, severity, oracles.generator(severity, value)).ravel()
    scale = 255 * builtin.CONSTANTS["gaussian_noise"][severity - 1]
    for cut in (value - 1.5 * scale, value - 0.5 * scale, value, value + scale):
        whole = math.floor(cut)
        if 0 <= whole < 255:
            below = stats.norm.cdf((whole + 0.5 - value) / scale)
            assert likely((found <= whole).sum(), found.size, below)
    assert likely((found == 255).sum(), found.size, stats.norm.sf((254.5 - value) / scale))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("value", [20, 128, 230])
def test_shot_noise_counts_photons(severity, value):
    image = np.full((60, 60, 3), value, np.uint8)
    found = apply("shot_noise", image, severity, oracles.generator(severity, value)).ravel()
    photons = builtin.CONSTANTS["shot_noise"][severity - 1]
    counts = stats.poisson(photons * value / 255)
    for share in (0.1, 0.5, 0.9):
        most = int(counts.ppf(share))
        shown = round(255 * most / photons)
        if shown < 255:
            assert likely((found <= shown).sum(), found.size, counts.cdf(most))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share(severity):
    image = np.full((60, 60, 3), 77, np.uint8)
    found = apply("impulse_noise", image, severity, oracles.generator(severity)).ravel()
    share = builtin.CONSTANTS["impulse_noise"][severity - 1]
    white, black = int((found == 255).sum()), int((found == 0).sum())
    assert likely(white + black, found.size, share)
    assert likely(white, white + black, 0.5)
    assert white + black + int((found == 77).sum()) == found.size


@pytest.mark.parametrize("name", BUILTIN)
def test_order_batch_and_choice_do_not_matter(name):
    images = picture((12, 16, 16, 3))
    ids = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
    together = corruptions.corrupt_images(images, ids, name, 4, seed=5)
    order = oracles.generator("order").permutation(12)[:7]
    some = corruptions.corrupt_images(images[order], [ids[row] for row in order], name, 4, seed=5)
    assert np.array_equal(some, together[order])


@pytest.mark.parametrize("name", NOISES)
def test_random_numbers_hang_on_seed_id_name_and_severity(name):
    # The same picture everywhere, so only the random numbers can differ.
    images = np.repeat(picture((1, 16, 16)), 2, axis=0)

    def noise(ids=(1, 2), **change):
        settings = {"name": name, "severity": 3, "seed": 0, **change}
        return corruptions.corrupt_images(images, ids, **settings)

    one, other = noise()
    assert not np.array_equal(one, other)
    assert not np.array_equal(noise(seed=1)[0], one)
    assert np.array_equal(noise(ids=(2, 1))[1], one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Both draw a uniform number for each value: with equal ones they would hit the same.
        (("impulse_noise", 5), ("imagecorruptions:impulse_noise", 5)),
        (("impulse_noise", 5), ("impulse_noise", 4)),
    ],
)
def test_different_corruptions_draw_different_numbers(one, other):
    images = np.full((1, 64, 64, 3), 128, np.uint8)
    hit, also = (corruptions.corrupt_images(images, [0], *key) != 128 for key in (one, other))
    share = also.mean()
    assert 0.05 < share < 0.35
    assert likely((hit & also).sum(), hit.sum(), share)


@pytest.mark.parametrize("name", BUILTIN)
def test_global_random_numbers_are_untouched(name):
    numpy_state, torch_state = global_state()[1].copy(), torch.get_rng_state()
    corruptions.corrupt_images(picture((2, 8, 8)), [0, 1], name, 5)
    assert np.array_equal(global_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_images(dtype, channels):
    images = picture((4, 12, 12, channels))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255).to(dtype)
    found = corruptions.corrupt_pixels(pixels, torch.arange(4), "jpeg", 2)
    assert found.dtype == dtype
    assert found.shape == pixels.shape
    if dtype != torch.bfloat16:
        wanted = corruptions.corrupt_images(images, range(4), "jpeg", 2)
        assert np.array_equal((found * 255).round().permute(0, 2, 3, 1).numpy(), wanted)
        # Rounded to 8 bits first: less than half a grey value changes nothing.
        moved = (pixels + 0.4 / 255).clamp(0, 1)
        assert torch.equal(corruptions.corrupt_pixels(moved, range(4), "jpeg", 2), found)


def test_pixels_of_8_bits_survive_the_way_there_and_back():
    pixels = (torch.arange(256).float() / 255).reshape(1, 1, 16, 16)
    black = torch.zeros_like(pixels)
    assert torch.equal(corruptions.corrupt_pixels(black, [0], "shot_noise", 5), black)
    # Where a corruption changes nothing, the model's input stays the same to the bit.
    flat = torch.full((1, 1, 16, 16), 77.0) / 255
    assert torch.equal(corruptions.corrupt_pixels(flat, [0], "contrast", 5), flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 4, 4))}, "got float64 images of shape .* needed uint8"),
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, "1 or 3 channels"),
        ({"images": np.zeros((4, 4), np.uint8)}, r"needed uint8 \(N, H, W\)"),
        ({"ids": [1]}, "got 2 images and 1 ids"),
        ({"ids": [1, -2]}, "negative"),
        ({"seed": -1}, "negative"),
        ({"name": "gausian_noise"}, "did you mean 'gaussian_noise'"),
        ({"name": "fog"}, "imagecorruptions:NAME"),
        ({"severity": 0}, "severity 0; needed one of 1, 2, 3, 4, 5"),
        ({"severity": 6}, "severity 6"),
        ({"severity": True}, "severity True"),
    ],
)
def test_wrong_input_is_refused(change, message):
    images = np.zeros((2, 4, 4), np.uint8)
    settings = {"images": images, "ids": [0, 1], "name": "jpeg", "severity": 1} | change
    with pytest.raises(InvalidInputError, match=message):
        corruptions.corrupt_images(**settings)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.full((1, 1, 2, 2), 1.5), "undo the normalisation"),
        (torch.full((1, 1, 2, 2), math.nan), r"needed \[0, 1\]"),
        (torch.zeros(1, 2, 2), r"shape \(1, 2, 2\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), "corrupt_images"),
        (np.zeros((1, 1, 2, 2)), "floating tensor"),
    ],
)
def test_wrong_pixels_are_refused(pixels, message):
    with pytest.raises(InvalidInputError, match=message):
        corruptions.corrupt_pixels(pixels, [0], "jpeg", 1)


def test_every_name_has_a_set_and_facts():
    for name in NAMES:
        assert ("not ImageNet-C" in corruptions.get_corruption(name).source) == (name in BUILTIN)
    facts = corruptions.corruption_facts(BUILTIN)
    assert set(facts["constants"]) == set(BUILTIN)
    assert facts["sources"] == ["built-in set, not ImageNet-C"]
    assert facts["pillow"]
    assert facts["libjpeg"]
    assert "libjpeg" not in corruptions.corruption_facts(["contrast"])
    json.dumps(facts, allow_nan=False)
    assert all(len(values) == 5 for values in builtin.CONSTANTS.values())


def checksums():
    return {
        f"{name} {severity} {height}x{width}x{channels}": zlib.crc32(
            apply(name, synthetic(height, width, channels), severity).tobytes()
        )
        for name in FIXED
        # Other versions of libjpeg may give other bytes.
        if name != "jpeg"
        for severity in SEVERITIES
        for height, width, channels in ((28, 28, 1), (32, 32, 3), (224, 224, 3))
    }


def test_pixels_are_those_of_the_first_release():
    # After a wanted change: json.dump(checksums(), ...), and say so in the changelog.
    assert checksums() == json.loads(FIXTURE.read_text())
