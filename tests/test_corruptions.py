"""Corruptions: closed forms, other libraries, exact tests of the noises, and no global state."""

import importlib
import json
import math
import sys
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from ebm_guard import Guard
from ebm_guard.attacks import Examples
from ebm_guard.data.images import to_input
from ebm_guard.data.sources import ArraySource, open_source
from ebm_guard.errors import DataError, EbmGuardError, EbmGuardWarning, InvalidInputError
from ebm_guard.model import Preprocessing
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.ood.metrics import auroc
from ebm_guard.predictions import Predictions
from ebm_guard.robustness import corruptions
from ebm_guard.robustness.corruptions import alexnet, builtin, extra, measure, published
from ebm_guard.robustness.corruptions.catalogue import BUILTIN, IMAGECORRUPTIONS, NAMES

FIXTURE = Path(__file__).parent / "fixtures" / "corruptions.json"
SEVERITIES = (1, 2, 3, 4, 5)
SHAPES = [(28, 28), (32, 32, 3), (48, 40, 1), (7, 5, 3), (1, 1), (224, 224, 3)]
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
FIXED = tuple(name for name in BUILTIN if name not in NOISES)
# An exact test may fail once in a million runs of a right program.
RARE = 1e-6


def global_state():
    """Return numpy's global random numbers, which nothing of ours may move."""
    return np.random.get_state()  # noqa: NPY002


@contextmanager
def global_seed(seed):
    """Seed numpy's global random numbers, as the optional package needs it."""
    state = global_state()
    np.random.seed(seed)  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


def picture(shape, *key):
    return oracles.generator("picture", shape, *key).integers(0, 256, shape, dtype=np.uint8)


def apply(name, image, severity, generator=None):
    generator = generator or oracles.generator("apply")
    return getattr(builtin, name)(image, severity, generator)


def rounded(values):
    return np.rint(np.clip(values, 0, 255))


# --- the built-in functions


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


# --- noises: exact tests on flat images, where every value has the same known distribution


def likely(hits, n, chance):
    return stats.binomtest(int(hits), int(n), chance).pvalue > RARE


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


# --- by name, on sets


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


def synthetic(height, width, channels):
    """A picture from whole numbers alone: the same on every machine."""
    rows, columns = np.mgrid[:height, :width]
    planes = [
        (rows * rows * 7 + columns * 131 + rows * columns * (3 + part) + 50 * part) % 256
        for part in range(channels)
    ]
    return np.stack(planes, axis=-1).astype(np.uint8)


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


# --- the optional package


def test_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extra, "version", missing)
    images = picture((1, 32, 32, 3))
    with pytest.raises(EbmGuardError, match=r'pip install "ebm-guard\[corruptions\]"'):
        corruptions.corrupt_images(images, [0], "imagecorruptions:fog", 1)
    with pytest.raises(EbmGuardError, match="imagecorruptions-imaug"):
        corruptions.corruption_facts(["imagecorruptions:fog"])


def test_missing_libgl_says_what_to_do(monkeypatch):
    def broken(name):
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr(extra, "version", lambda name: "1.1.5")
    monkeypatch.setattr(extra, "import_module", broken)
    with pytest.raises(EbmGuardError, match=r"libGL\.so\.1.*opencv-python-headless"):
        corruptions.corrupt_images(picture((1, 32, 32, 3)), [0], "imagecorruptions:fog", 1)


def test_package_needs_32_pixels():
    with pytest.raises(InvalidInputError, match=r"28 x 28 pixels.*built-in"):
        corruptions.corrupt_images(picture((1, 28, 28)), [0], "imagecorruptions:fog", 1)


def test_import_of_corruptions_needs_no_package():
    assert set(IMAGECORRUPTIONS) == {f"imagecorruptions:{name}" for name in extra.IMAGENET_C}
    assert len(IMAGECORRUPTIONS) == 15


@pytest.fixture(scope="module")
def package():
    """The optional package, whose own warnings are not ours to fix."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("imagecorruptions")


@pytest.mark.parametrize("name", extra.IMAGENET_C)
def test_extra_is_repeatable_and_leaves_no_trace(package, name):
    images = np.stack([synthetic(32, 32, 3), synthetic(33, 32, 3)[1:]])
    state = global_state()
    full = f"imagecorruptions:{name}"
    one = corruptions.corrupt_images(images, [4, 9], full, 3)
    again = corruptions.corrupt_images(images[1:], [9], full, 3)
    assert np.array_equal(one[1:], again)
    after = global_state()
    assert np.array_equal(after[1], state[1])
    assert after[2:] == state[2:]
    assert not np.array_equal(one, images)


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "motion_blur", "contrast"])
def test_extra_is_the_packages_own(package, name):
    image = synthetic(48, 48, 3)
    seed = int(oracles.generator("seed").integers(2**32, dtype=np.uint64))

    class Fixed:
        def integers(self, high, dtype):
            return seed

    with global_seed(seed):
        wanted = package.corrupt(image, severity=2, corruption_name=name)
    assert np.array_equal(extra.imagecorruptions(image, name, 2, Fixed()), wanted)


def test_extra_names_are_the_packages_fifteen(package):
    assert tuple(package.get_corruption_names("common")) == extra.IMAGENET_C


@pytest.mark.parametrize("severity", SEVERITIES)
def test_extra_glass_blur_is_the_packages_with_our_numbers(package, monkeypatch, severity):
    source = sys.modules["imagecorruptions.corruptions"]
    # The plain Python function under the compiled one draws from numpy's global numbers.
    plain = source._shuffle_pixels_njit_glass_blur.py_func
    monkeypatch.setattr(source, "_shuffle_pixels_njit_glass_blur", plain)
    image = synthetic(32, 40, 3)
    seed = int(oracles.generator("glass", severity).integers(2**31))
    with global_seed(seed):
        wanted = package.corrupt(image, severity=severity, corruption_name="glass_blur", seed=seed)

    class Replay:
        """Draws the same numbers as the package, two at a time."""

        def integers(self, low, high, size):
            legacy = np.random.RandomState(seed)
            return np.array([legacy.randint(low, high, size=(2,)) for _ in range(size[0])])

    found = extra.imagecorruptions(image, "glass_blur", severity, Replay())
    # Two libraries' blurs, each cut to whole numbers.
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (found == wanted).mean() > 0.9


def test_extra_takes_grey_images(package):
    grey = synthetic(32, 32, 1)
    for image in (grey, grey[..., 0]):
        for name in ("fog", "glass_blur", "impulse_noise"):
            found = extra.imagecorruptions(image, name, 1, oracles.generator("grey"))
            assert found.shape == image.shape


@pytest.mark.parametrize("severity", SEVERITIES)
def test_extra_impulse_noise_has_imagenet_cs_share(package, severity):
    image = np.full((60, 60, 3), 77, np.uint8)
    found = extra.imagecorruptions(image, "impulse_noise", severity, oracles.generator(severity))
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    assert likely((found != 77).sum(), found.size, share)


def test_extra_version_is_in_the_facts(package):
    facts = corruptions.corruption_facts(["imagecorruptions:fog"])
    assert facts["imagecorruptions-imaug"] == importlib.metadata.version("imagecorruptions-imaug")
    assert "not CIFAR-10-C" in facts["sources"][0]


# --- published sets


def write_cifar(folder, names=("fog", "snow"), rows=50_000, dtype=np.uint8):
    """Sparse files of the right size; three images of each severity are not black."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        shape = (rows, 32, 32, 3)
        images = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        if rows == 50_000:
            for severity in SEVERITIES:
                for row in range(3):
                    images[(severity - 1) * 10_000 + row] = 100 * number + 10 * severity + row
        del images
    labels = np.arange(10_000) % 10
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return folder


def test_cifar10_c_is_read_in_its_order(tmp_path):
    found = list(corruptions.open_cifar10_c(write_cifar(tmp_path / "c"), ["snow", "fog"]))
    assert [(name, severity) for name, severity, _ in found] == [
        (name, severity) for name in ("snow", "fog") for severity in SEVERITIES
    ]
    for name, severity, source in found:
        assert len(source) == 10_000
        assert source.ids[:2] == ("0", "1")
        assert source.labels.tolist() == [row % 10 for row in range(10_000)]
        base = 100 * (name == "snow") + 10 * severity
        assert [np.asarray(source.load(row)).max() for row in range(4)] == [
            base,
            base + 1,
            base + 2,
            0,
        ]


def test_cifar10_c_by_severity(tmp_path):
    some = corruptions.open_cifar10_c(write_cifar(tmp_path / "c"), ["fog"], [5, 2])
    assert [item.severity for item in some] == [2, 5]
    assert len(some) == 2
    assert some.title == "CIFAR-10-C"


def test_cifar100_c_is_called_so(tmp_path):
    folder = write_cifar(tmp_path / "c", ["fog"])
    np.save(folder / "labels.npy", np.tile(np.arange(10_000) % 100, 5))
    assert corruptions.open_cifar10_c(folder, ["fog"]).title == "CIFAR-100-C"


def spoil(folder, what):
    if what == "short":
        write_cifar(folder, ["fog"], rows=49_999)
    elif what == "float":
        write_cifar(folder, ["fog"], rows=5, dtype=np.float32)
    elif what == "no labels":
        (folder / "labels.npy").unlink()
    elif what == "other labels":
        np.save(folder / "labels.npy", np.arange(50_000) % 9)
    elif what == "float labels":
        np.save(folder / "labels.npy", np.zeros(50_000))
    elif what == "few labels":
        np.save(folder / "labels.npy", np.zeros(10_000, np.int64))
    elif what == "objects":
        np.save(folder / "fog.npy", np.array([{}], dtype=object), allow_pickle=True)
    elif what == "damaged":
        (folder / "fog.npy").write_bytes(b"\x93NUMPY")
    elif what == "archive":
        np.savez(folder / "a.npz", images=np.zeros(3))
        (folder / "a.npz").rename(folder / "fog.npy")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", r"uint8 \(49999, 32, 32, 3\); needed uint8 \(50000, 32, 32, 3\)"),
        ("float", "is float32"),
        ("no labels", "has no labels.npy"),
        ("other labels", "does not repeat the same 10,000 labels five times"),
        ("float labels", "needed integer class numbers"),
        ("few labels", "50000 rows of data and labels of shape"),
        ("objects", "cannot read .*fog.npy"),
        ("damaged", "cannot read .*fog.npy"),
        ("archive", "is an archive of arrays"),
    ],
)
def test_wrong_cifar10_c_is_refused(tmp_path, what, message):
    folder = write_cifar(tmp_path / "c", ["fog"])
    spoil(folder, what)
    with pytest.raises(DataError, match=message):
        corruptions.open_cifar10_c(folder, ["fog"])


def test_missing_files_and_wrong_names(tmp_path):
    folder = write_cifar(tmp_path / "c", ["fog"])
    with pytest.raises(DataError, match=r"has no snow\.npy"):
        corruptions.open_cifar10_c(folder, ["fog", "snow"])
    with pytest.raises(DataError, match="is not a folder"):
        corruptions.open_cifar10_c(tmp_path / "none")
    with pytest.raises(InvalidInputError, match="did you mean 'frost'"):
        corruptions.open_cifar10_c(folder, ["frozt"])
    with pytest.raises(InvalidInputError, match="severity 6"):
        corruptions.open_cifar10_c(folder, ["fog"], [6])
    with pytest.raises(InvalidInputError, match="at least one"):
        corruptions.open_cifar10_c(folder, [])


def write_imagenet(folder, names=extra.IMAGENET_C, group=""):
    for number, name in enumerate(names):
        for severity in SEVERITIES:
            for label, wordnet in enumerate(("n01440764", "n01443537")):
                place = folder / group / name / str(severity) / wordnet
                place.mkdir(parents=True)
                value = 15 * severity + number + 80 * label
                image = Image.new("RGB", (8, 8), (value, value, value))
                image.save(place / f"ILSVRC2012_val_{label}.JPEG", quality=95)
    return folder


@pytest.mark.parametrize("group", ["", "weather"])
def test_imagenet_c_is_read_by_folders(tmp_path, group):
    found = list(
        corruptions.open_imagenet_c(
            write_imagenet(tmp_path, ["snow", "fog"], group), ["fog", "snow"]
        )
    )
    assert [(name, severity) for name, severity, _ in found] == [
        (name, severity) for name in ("fog", "snow") for severity in SEVERITIES
    ]
    for name, severity, source in found:
        assert source.labels.tolist() == [0, 1]
        assert source.classes == ("n01440764", "n01443537")
        assert source.ids[1].endswith("ILSVRC2012_val_1.JPEG")
        values = [int(np.asarray(source.load(row))[0, 0, 0]) for row in (0, 1)]
        wanted = 15 * severity + (name == "fog")
        assert values == pytest.approx([wanted, wanted + 80], abs=1)


def test_imagenet_c_is_not_cropped_again(tmp_path):
    _, _, source = next(
        iter(corruptions.open_imagenet_c(write_imagenet(tmp_path, ["fog"]), ["fog"]))
    )
    cropping = Preprocessing((0.0,) * 3, (1.0,) * 3, image_size=(8, 8), crop_pct=0.5)
    image = source.load(0).copy()
    image.putpixel((0, 0), (255, 0, 0))
    kept = to_input(image, cropping, is_array=source.is_array)
    assert np.array_equal(kept, np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255)


def test_wrong_imagenet_c_is_refused(tmp_path):
    folder = write_imagenet(tmp_path, ["fog", "snow"])
    with pytest.raises(DataError, match="has no folder frost"):
        corruptions.open_imagenet_c(folder, ["frost"])
    (folder / "fog" / "4").rename(folder / "fog" / "four")
    with pytest.raises(DataError, match="has no folder 4"):
        corruptions.open_imagenet_c(folder, ["fog"])
    assert len(list(corruptions.open_imagenet_c(folder, ["fog"], [1, 5]))) == 2
    (folder / "snow" / "2" / "n01440764" / "ILSVRC2012_val_0.JPEG").unlink()
    with pytest.raises(DataError, match="does not hold the same images"):
        list(corruptions.open_imagenet_c(folder, ["snow"]))
    flat = tmp_path / "flat" / "fog" / "1"
    flat.mkdir(parents=True)
    Image.new("L", (8, 8)).save(flat / "a.JPEG")
    with pytest.raises(DataError, match="has no folders of classes"):
        list(corruptions.open_imagenet_c(tmp_path / "flat", ["fog"], [1]))


# --- rows, cells and tables


def toy(name, n=120, classes=4, width=3.0):
    rng = oracles.generator("toy corruption", name)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(0, 1, (n, classes))
    logits[np.arange(n), labels] += width
    return Predictions(logits.astype(np.float32), labels=labels, source=name)


@pytest.fixture(scope="module")
def gates():
    """A guard with a temperature, and one that may change the predicted class."""
    fit = toy("fit", 400)
    # Class 0 is named too often, which the vector calibrator learns to undo.
    skewed = replace(fit, logits=fit.logits + np.float32([3, 0, 0, 0]), hashes=None)
    return {
        "temperature": Guard().fit(fit, calibrator="temperature"),
        "vector": Guard().fit(skewed, calibrator="vector"),
    }


@pytest.mark.parametrize("calibrator", [None, "temperature", "vector"])
def test_cell_equals_slow_loops(gates, calibrator):
    clean, worse = toy("clean"), replace(toy("clean"), logits=toy("worse", width=1.0).logits)
    parts = None if calibrator is None else gates[calibrator]._parts()
    before, after = (measure.deployed_rows(part, parts) for part in (clean, worse))
    cell = measure.corruption_cell("fog", 3, after, before)
    if parts is None:
        log_p = oracles.log_softmax(worse.logits)
        label = worse.logits.argmax(axis=1)
    else:
        log_p = parts.calibrator.transform(worse.logits)
        label = (worse.logits if calibrator == "temperature" else log_p).argmax(axis=1)
    changed = (label != worse.logits.argmax(axis=1)).any()
    assert changed == (calibrator == "vector")
    right = label == worse.labels
    assert cell.n == 120
    assert cell.accuracy.value == pytest.approx(right.mean())
    assert cell.nll.value == pytest.approx(-log_p[np.arange(120), worse.labels].mean())
    confidence = np.exp(log_p[np.arange(120), label])
    gaps = [
        abs((confidence - right)[(confidence > low / 15) & (confidence <= (low + 1) / 15)].sum())
        for low in range(15)
    ]
    assert cell.ece.value == pytest.approx(sum(gaps) / 120, abs=1e-6)
    energies = [oracles.energy(part.logits) for part in (clean, worse)]
    assert cell.energy_auroc.value == pytest.approx(oracles.auroc(*map(list, energies)), abs=1e-6)
    if parts is None:
        assert (cell.coverage, cell.score_auroc, cell.accuracy_accepted) == (None, None, None)
        return
    accept = energies[1] <= float(parts.threshold.cut)
    assert cell.coverage.value == pytest.approx(accept.mean())
    assert cell.accuracy_accepted.value == pytest.approx(right[accept].mean())
    assert cell.accuracy_accepted.n == accept.sum()
    assert cell.score_auroc.value == cell.energy_auroc.value
    for name in ("accuracy", "nll", "energy_auroc", "coverage", "accuracy_accepted"):
        metric = getattr(cell, name)
        assert metric.low < metric.value < metric.high, name


def test_invalid_rows_are_wrong_refused_and_counted(gates):
    clean = toy("clean")
    logits = clean.logits.copy()
    logits[:7, 1] = math.nan
    logits[7, 2] = math.inf
    broken = replace(clean, logits=logits, hashes=None)
    parts = gates["temperature"]._parts()
    for gate in (None, parts):
        before, after = (measure.deployed_rows(part, gate) for part in (clean, broken))
        cell = measure.corruption_cell("fog", 1, after, before)
        assert cell.invalid == 8
        assert cell.n == 120
        assert cell.accuracy.value == pytest.approx(before.correct[8:].sum() / 120)
        assert cell.ece.n == cell.energy_auroc.n == 112
        # The other rows are the same in both.
        assert cell.energy_auroc.value == 0.5
    assert not after.accept[:8].any()
    all_broken = replace(clean, logits=np.full_like(logits, np.nan), hashes=None)
    table = corruptions.corruption_table(clean, [("fog", 1, all_broken)], parts, source="mine")
    cell = table.cells[0]
    assert cell.accuracy.value == cell.coverage.value == 0
    assert (cell.ece, cell.nll, cell.energy_auroc, cell.accuracy_accepted) == (None,) * 4
    assert (table.summary.ece, table.summary.nll, table.summary.energy_auroc) == (None,) * 3
    json.dumps(table.to_dict(), allow_nan=False)


def test_paired_auroc_equals_its_definition():
    rng = oracles.generator("paired")
    before = rng.integers(0, 6, 25).astype(float)
    after = before + rng.integers(-1, 4, 25)
    found = measure.paired_auroc(before, after)
    wins = np.array([[(a > b) + (a == b) / 2 for a in after] for b in before])
    assert found.value == pytest.approx(wins.mean())
    parts = wins.mean(axis=1) + wins.mean(axis=0)
    deviation = math.sqrt(parts.var(ddof=1) / 25)
    scale = found.value * (1 - found.value)
    centre = math.log(found.value / (1 - found.value))
    for end, sign in ((found.low, -1), (found.high, 1)):
        wanted = centre + sign * stats.norm.ppf(0.975) * deviation / scale
        assert math.log(end / (1 - end)) == pytest.approx(wanted)
    assert found.value == auroc(before, after).value


def test_paired_interval_covers_and_is_narrower_than_the_unpaired_one():
    runs, covered, narrower = 400, 0, 0
    # after = before + 1 + noise: P(after_j > before_i) for two different images.
    truth = stats.norm.cdf(1 / math.sqrt(2 + 0.25))
    rng = oracles.generator("coverage")
    for _ in range(runs):
        before = rng.normal(size=150)
        after = before + 1 + rng.normal(0, 0.5, 150)
        found, unpaired = measure.paired_auroc(before, after), auroc(before, after)
        covered += found.low <= truth <= found.high
        narrower += found.high - found.low < unpaired.high - unpaired.low
    assert stats.binomtest(covered, runs, 0.95).pvalue > 1e-4
    assert narrower == runs


def test_paired_auroc_at_its_ends():
    rows = np.arange(30.0)
    same = measure.paired_auroc(rows, rows)
    assert (same.low, same.high) == pytest.approx((0.5, 0.5))
    top = measure.paired_auroc(rows, rows + 100)
    assert (top.value, top.low, top.high) == (1.0, 0.9, 1.0)
    low = measure.paired_auroc(rows + 100, rows)
    assert (low.value, low.low, low.high) == (0.0, 0.0, 0.1)
    assert measure.paired_auroc(rows[:1], rows[:1]).low is None


@pytest.mark.parametrize("between", [0.0, 1.0], ids=["independent cells", "equal cells"])
def test_mean_share_covers(between):
    runs, covered, images, cells = 400, 0, 100, 12
    rng = oracles.generator("share", between)
    for _ in range(runs):
        own = rng.random((1, images)) < 0.7
        each = rng.random((cells, images)) < 0.7
        hits = np.where(rng.random((1, images)) < between, own, each)
        found = measure.mean_share(hits)
        assert found.value == pytest.approx(hits.mean())
        covered += found.low <= 0.7 <= found.high
    assert stats.binomtest(covered, runs, 0.95).pvalue > 1e-4
    assert found.n == images


def test_mean_share_at_its_ends():
    found = measure.mean_share(np.ones((5, 20), bool))
    assert found.value == found.high == 1
    # As many rows as images, not as cells: all cells of an image may stand or fall together.
    assert found.low == pytest.approx(20 / (20 + stats.norm.ppf(0.975) ** 2))
    assert measure.mean_share(np.array([[True], [False]])).low < 0.5


def test_summary_equals_slow_loops(gates):
    clean = toy("clean")
    made = {
        (name, severity): replace(
            clean, logits=toy((name, severity), width=3 - severity / 2).logits
        )
        for name in ("snow", "fog")
        for severity in (1, 5)
    }
    rows = [(*key, replace(part, hashes=None)) for key, part in made.items()]
    table = corruptions.corruption_table(
        clean, rows, gates["temperature"]._parts(), source="mine", facts={"seed": 0}
    )
    summary = table.summary
    assert table.names == ("snow", "fog")
    assert table.severities == (1, 5)
    assert (table.probabilities, table.score, table.n) == ("temperature", "energy", 120)
    assert table.forwards == 120 * 5
    for name in ("accuracy", "ece", "nll", "energy_auroc", "score_auroc", "coverage"):
        cells = [getattr(cell, name).value for cell in table.cells]
        assert getattr(summary, name).value == pytest.approx(np.mean(cells)), name
    for severity, metric in summary.accuracy_by_severity.items():
        cells = [table.cell(name, severity).accuracy.value for name in table.names]
        assert metric.value == pytest.approx(np.mean(cells))
    for name, metric in summary.accuracy_by_name.items():
        cells = [table.cell(name, severity).accuracy.value for severity in (1, 5)]
        assert metric.value == pytest.approx(np.mean(cells))
    assert table.cell(*summary.worst).accuracy.value == min(
        cell.accuracy.value for cell in table.cells
    )
    assert summary.mce is None
    assert "ImageNet-C's own files" in summary.mce_note
    assert table.clean.energy_auroc is None
    assert table.clean.coverage.value > 0.8
    json.dumps(table.to_dict(), allow_nan=False)
    with pytest.raises(KeyError, match="hail at severity 1"):
        table.cell("hail", 1)


def test_probabilities_are_named(gates):
    clean = toy("clean")
    plain = corruptions.corruption_table(clean, [("fog", 1, clean)], source="mine")
    assert (plain.probabilities, plain.score) == ("softmax", None)
    assert plain.cells[0].energy_auroc.value == 0.5
    vector = corruptions.corruption_table(
        clean, [("fog", 1, clean)], gates["vector"]._parts(), source="mine"
    )
    assert vector.probabilities == "vector"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((119, 4)), "labels": np.zeros(119, int)}, "got 119 rows, and 120"),
        ({"labels": np.zeros(120, int)}, "labels differ from those of the clean rows"),
        ({"ids": tuple(f"x{row}" for row in range(120))}, "the ids are not those"),
        ({"labels": None}, "has no labels"),
    ],
)
def test_other_images_are_refused(change, message):
    clean = replace(toy("clean"), ids=tuple(map(str, range(120))))
    other = replace(clean, **({"ids": None, "hashes": None} | change))
    with pytest.raises(DataError, match=message):
        corruptions.corruption_table(clean, [("fog", 1, other)], source="mine")


def test_nothing_to_measure_is_refused():
    with pytest.raises(InvalidInputError, match="no corrupted images"):
        corruptions.corruption_table(toy("clean"), [], source="mine")
    with pytest.raises(InvalidInputError, match="needed logits"):
        measure.deployed_rows(replace(toy("clean"), kind="probs"))


# --- mCE


def thousand(name, rows=24):
    rng = oracles.generator("thousand", name)
    labels = np.arange(rows) * 7
    logits = rng.normal(size=(rows, 1000)).astype(np.float32)
    logits[rng.random(rows) < 0.6, :] *= 0.1
    logits[np.arange(rows), labels] += 3
    return Predictions(logits, labels=labels)


def test_mce_is_relative_to_alexnet():
    clean = thousand("clean")
    made = {(name, s): thousand((name, s)) for name in extra.IMAGENET_C for s in SEVERITIES}
    table = corruptions.corruption_table(
        clean, ((*key, part) for key, part in made.items()), source="ImageNet-C"
    )
    total = 0.0
    for name, error in alexnet.ALEXNET_ERRORS.items():
        errors = [1 - table.cell(name, severity).accuracy.value for severity in SEVERITIES]
        total += sum(errors) / (5 * error)
    assert table.summary.mce.value == pytest.approx(total / 15)
    assert table.summary.mce.low < table.summary.mce.value < table.summary.mce.high
    assert table.summary.mce.n == 24
    assert "AlexNet" in table.summary.mce_note


def test_alexnet_has_an_mce_of_one():
    assert tuple(alexnet.ALEXNET_ERRORS) == extra.IMAGENET_C
    # In percent, noise, blur, weather, digital.
    percent = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6]
    percent += [71.8, 60.7]
    assert [100 * error for error in alexnet.ALEXNET_ERRORS.values()] == pytest.approx(
        percent, abs=0.06
    )
    n = 10_000
    wrong = {
        (name, severity): np.arange(n) < round(error * n)
        for name, error in alexnet.ALEXNET_ERRORS.items()
        for severity in (1,)
    }
    wrong = {(name, s): wrong[name, 1] for name in extra.IMAGENET_C for s in SEVERITIES}
    assert alexnet.mean_corruption_error(wrong).value == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": "built-in set, not ImageNet-C"}, "own files alone"),
        ({"title": "CIFAR-10-C"}, "own files alone"),
        ({"names": extra.IMAGENET_C[1:]}, "all fifteen types"),
        ({"severities": (1, 2, 3, 5)}, "all five severities"),
        ({"num_classes": 100}, "100 classes"),
    ],
)
def test_no_mce_where_the_table_does_not_apply(change, message):
    whole = {
        "title": "ImageNet-C",
        "names": extra.IMAGENET_C,
        "severities": SEVERITIES,
        "num_classes": 1000,
    }
    assert alexnet.why_no_mce(**whole) == ""
    assert message in alexnet.why_no_mce(**(whole | change))
    with pytest.raises(InvalidInputError, match="all fifteen"):
        alexnet.mean_corruption_error({("fog", 1): np.ones(3, bool)})


# --- evaluation


@given(
    n=st.integers(1, 400),
    classes=st.integers(1, 12),
    limit=st.integers(1, 300),
    seed=st.integers(0, 50),
)
@oracles.QUICK
def test_chosen_rows_are_stratified(n, classes, limit, seed):
    labels = oracles.generator("rows", n, classes).integers(0, classes, n)
    rows = corruptions.choose_rows(labels, limit, seed)
    assert len(rows) == len(set(rows.tolist())) == min(n, limit)
    assert np.array_equal(rows, np.sort(rows))
    assert np.array_equal(rows, corruptions.choose_rows(labels, limit, seed))
    for label in range(classes):
        share = (labels == label).sum() * len(rows) / n
        assert abs((labels[rows] == label).sum() - share) < 1 + 1e-9


def test_every_row_is_chosen_equally_often():
    labels = np.repeat([0, 1, 2], [5, 11, 24])
    counts = np.zeros(40, int)
    for seed in range(600):
        counts[corruptions.choose_rows(labels, 10, seed)] += 1
    assert all(likely(count, 600, 0.25) for count in counts)
    # A class of 5 rows has a share of 5 * 10 / 40: one row, and in a quarter of cases two.
    extra_rows = sum(
        int((labels[corruptions.choose_rows(labels, 10, seed)] == 0).sum() - 1)
        for seed in range(600)
    )
    assert likely(extra_rows, 600, 0.25)


def forward(pixels):
    """Name the brighter half: left is class 0, right is class 1."""
    half = pixels.shape[3] // 2
    left, right = (part.mean(dim=(1, 2, 3)) for part in pixels.split(half, dim=3))
    logits = torch.stack([left - right, right - left, -torch.ones_like(left)], dim=1) * 10
    return ClassifierOutput(logits, pixels.flatten(1)[:, :6])


def examples(n=40, key="halves"):
    rng = oracles.generator(key)
    labels = torch.from_numpy(rng.integers(0, 2, n))
    pixels = torch.from_numpy(rng.integers(60, 130, (n, 1, 12, 12))).float()
    for row, label in enumerate(labels.tolist()):
        pixels[row, :, :, 6 * label : 6 * label + 6] += 70
    return Examples.of(pixels / 255, labels, torch.arange(n) + 100)


def test_plan_counts_forwards():
    calls = []

    def counted(pixels):
        calls.append(len(pixels))
        return forward(pixels)

    names = ["jpeg", "contrast"]
    plan = corruptions.plan_corruptions(40, names, (5, 1, 1), limit=15)
    table = corruptions.evaluate_corruptions(counted, examples(), names, (5, 1), limit=15)
    assert plan.severities == (1, 5)
    assert plan.forwards == sum(calls) == table.forwards == 15 * 5
    assert plan.to_dict()["forwards"] == 75
    assert corruptions.plan_corruptions(1000).forwards == 200 * (8 * 3 + 1)
    for change in ({"names": []}, {"severities": []}, {"limit": 0}, {"available": 0}):
        with pytest.raises(InvalidInputError, match="at least one"):
            corruptions.plan_corruptions(**({"available": 10} | change))
    with pytest.raises(InvalidInputError, match="severity 7"):
        corruptions.plan_corruptions(10, severities=(7,))


def test_table_does_not_depend_on_the_batch_or_the_order():
    whole = corruptions.evaluate_corruptions(forward, examples(), NOISES, limit=None)
    small = corruptions.evaluate_corruptions(forward, examples(), NOISES, limit=None, batch_size=3)
    order = torch.from_numpy(oracles.generator("order").permutation(40))
    shuffled = corruptions.evaluate_corruptions(
        forward, examples().select(order), NOISES, limit=None
    )
    assert whole.to_dict() == small.to_dict()
    for cell, other in zip(whole.cells, shuffled.cells, strict=True):
        assert cell.accuracy == other.accuracy
        assert cell.energy_auroc.value == pytest.approx(other.energy_auroc.value)
    assert whole.clean.accuracy.value == 1
    assert whole.source == "built-in set, not ImageNet-C"
    again = corruptions.evaluate_corruptions(forward, examples(), NOISES, limit=None, seed=1)
    assert again.to_dict() != whole.to_dict()


def test_all_cells_are_of_the_same_chosen_images():
    seen = []

    def watching(pixels):
        seen.append(pixels)
        return forward(pixels)

    # A black image stays black under shot noise, so the images can be told.
    given_ones = examples()
    dark = given_ones.pixels.clone()
    dark[::2] = 0
    dark = Examples(dark, given_ones.labels, given_ones.ids)
    corruptions.evaluate_corruptions(watching, dark, ["shot_noise"], limit=12)
    blacks = {tuple((part.flatten(1).amax(dim=1) == 0).tolist()) for part in seen}
    assert len(seen) == 4
    assert len(blacks) == 1
    assert 0 < sum(next(iter(blacks))) < 12


def test_evaluation_with_a_gate_on_features():
    chosen = examples()
    fit, bank = (
        corruptions.predict_corrupted(forward, examples(80, key)) for key in ("fit", "bank")
    )
    assert fit.ids[0] == "100"
    assert fit.features.shape == (80, 6)
    unlabelled = replace(fit, labels=None)
    with pytest.warns(EbmGuardWarning, match="no labels"):
        guard = Guard().fit(unlabelled, score="knn", false_reject_rate=0.2, fit_data=bank)
    table = corruptions.evaluate_corruptions(
        forward, chosen, ["brightness"], parts=guard._parts(), progress=True
    )
    assert (table.score, table.probabilities) == ("knn", "softmax")
    last, after = table.cells[-1], corruptions.predict_corrupted(forward, chosen, "brightness", 5)
    assert last.score_auroc.value != last.energy_auroc.value
    assert last.coverage.value == guard.decide_stored(after).accept.double().mean()


def test_half_precision_logits_become_floats():
    def half(pixels):
        return ClassifierOutput(forward(pixels).logits.bfloat16(), None)

    assert corruptions.predict_corrupted(half, examples()).logits.dtype == np.float32


def darkness(source):
    """Predict by the red value of the first pixel, which the fake sets are marked with."""
    values = np.array([np.asarray(source.load(row))[0, 0, 0] for row in range(len(source))])
    logits = np.zeros((len(values), 10), np.float32)
    logits[np.arange(len(values)), values // 10 % 10] = 5
    return Predictions(logits, labels=source.labels, ids=source.ids)


def test_evaluation_of_a_published_set(tmp_path):
    some = corruptions.open_cifar10_c(write_cifar(tmp_path / "c"), ["fog", "snow"], (1, 2))
    numbers = np.arange(3, dtype=np.int64)
    images = np.zeros((3, 32, 32, 3), np.uint8)
    images += (10 * numbers[:, None, None, None]).astype(np.uint8)
    clean = ArraySource("clean", images, numbers, numbers, None)
    table = corruptions.evaluate_published(some, darkness, clean)
    assert table.source == "CIFAR-10-C"
    assert table.n == 3
    assert table.clean.accuracy.value == 1
    # The images at severity s say class s, and their labels are 0, 1, 2.
    assert [cell.accuracy.value for cell in table.cells] == [1 / 3] * 4
    assert table.summary.mce is None
    limited = corruptions.evaluate_published(some, darkness, clean, limit=2)
    assert limited.n == 2
    with pytest.raises(DataError, match="has no labels"):
        corruptions.evaluate_published(some, darkness, clean.without_labels())
    foreign = ArraySource("other", images[:1], numbers[:1] + 20_000, numbers[:1], None)
    with pytest.raises(DataError, match="has no image '20000'"):
        corruptions.evaluate_published(some, darkness, foreign)


def test_evaluation_of_folders_of_the_same_names(tmp_path):
    folder = write_imagenet(tmp_path / "c", ["fog"])
    clean = open_source(f"folder:{folder / 'fog' / '1'}")
    table = corruptions.evaluate_published(
        published.open_imagenet_c(folder, ["fog"], [1, 5]), darkness, clean
    )
    assert table.n == 2
    assert table.cells[0].accuracy == table.clean.accuracy
    assert "1,000" in table.summary.mce_note
