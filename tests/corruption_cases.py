"""What the tests of corruptions share: images, published layouts, numpy's global numbers."""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import oracles
from PIL import Image
from scipy import stats

from ebm_guard.robustness.corruptions import builtin, extra
from ebm_guard.robustness.corruptions.catalogue import BUILTIN

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


def likely(hits, n, chance):
    return stats.binomtest(int(hits), int(n), chance).pvalue > RARE


def synthetic(height, width, channels):
    """A picture from whole numbers alone: the same on every machine."""
    rows, columns = np.mgrid[:height, :width]
    planes = [
        (rows * rows * 7 + columns * 131 + rows * columns * (3 + part) + 50 * part) % 256
        for part in range(channels)
    ]
    return np.stack(planes, axis=-1).astype(np.uint8)


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
