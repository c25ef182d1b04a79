"""The optional package of ImageNet-C's types: repeatable, its own numbers, taught errors."""

import importlib
import sys

import numpy as np
import oracles
import pytest
from corruption_cases import (
    SEVERITIES,
    global_seed,
    global_state,
    likely,
    picture,
    synthetic,
)

from ebm_guard.errors import EbmGuardError, InvalidInputError
from ebm_guard.robustness import corruptions
from ebm_guard.robustness.corruptions import extra
from ebm_guard.robustness.corruptions.catalogue import IMAGECORRUPTIONS


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
