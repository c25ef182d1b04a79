"""Corruptions of real images: severities rise, and what they do to a published net and its gate."""

import numpy as np
import oracles
import pytest
import torch

from ebm_guard import EnergyClassifier, Guard, predict
from ebm_guard.attacks import Examples, pixel_forward, untouched
from ebm_guard.data import batches, open_source
from ebm_guard.data.images import to_input
from ebm_guard.model import Preprocessing
from ebm_guard.model.loading import load_model
from ebm_guard.robustness import corruptions
from ebm_guard.robustness.corruptions import BUILTIN, IMAGECORRUPTIONS

SEVERITIES = (1, 2, 3, 4, 5)
NET = "examples/published_nets.py:cifar10_resnet20"
SETS = ("mnist 28", "cifar 32", "imagenet 224")


def as_pixels(source, rows, size=None):
    """Pixels as a model gets them: resized to 256 and cropped where a size is asked for."""
    settings = {} if size is None else {"image_size": (size, size), "crop_pct": 0.875}
    channels = len(source.load(0).getbands())
    way = Preprocessing((0.0,) * channels, (1.0,) * channels, **settings)
    images = [to_input(source.load(row), way, is_array=size is None) for row in rows]
    return torch.from_numpy(np.stack(images))


@pytest.fixture(scope="module")
def cifar(data_dir):
    """The complete test set of CIFAR-10."""
    return open_source(f"npz:{data_dir}/cifar10_test.npz")


@pytest.fixture(scope="module")
def pictures(data_dir, cifar):
    """Some images of each kind of set, in [0, 1]."""
    kept = {
        "mnist 28": as_pixels(open_source(f"npz:{data_dir}/mnist.npz#test[:60]"), range(60)),
        "cifar 32": as_pixels(cifar, range(60)),
    }
    photographs = open_source(f"folder:{data_dir}/imagenet_sample")
    kept["imagenet 224"] = as_pixels(photographs, range(0, len(photographs), 125), 224)
    return kept


def distances(pixels, name):
    ids = range(len(pixels))
    return [
        (corruptions.corrupt_pixels(pixels, ids, name, severity) - pixels)
        .double()
        .square()
        .mean(dim=(1, 2, 3))
        .sqrt()
        for severity in SEVERITIES
    ]


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", BUILTIN)
def test_each_severity_is_further_from_the_clean_image(pictures, kind, name):
    found = torch.stack(distances(pictures[kind], name))
    assert found[0].mean() > 0
    assert (found.mean(dim=1).diff() > 0).all()
    # Not on average alone: nearly every image is worse at 5 than at 1.
    assert (found[4] > found[0]).double().mean() >= 0.95


@pytest.fixture(scope="module")
def net(data_dir):
    checkpoint = data_dir / "cifar10_resnet20.safetensors"
    return EnergyClassifier(load_model(NET, checkpoint=checkpoint))


@pytest.fixture(scope="module")
def test_images(cifar):
    labels = torch.from_numpy(cifar.labels[:5000].copy())
    return Examples.of(as_pixels(cifar, range(5000)), labels)


@pytest.fixture(scope="module")
def guard(net, cifar):
    """A gate that keeps 95 % of clean images, fitted on rows that no test here looks at."""
    rows = cifar.subset(np.arange(5000, 6000))
    return Guard().fit(predict(net, batches(rows, net.preprocessing)))


def evaluate(net, images, guard, names, **settings):
    with untouched(net.model):
        return corruptions.evaluate_corruptions(
            pixel_forward(net), images, names, parts=guard._parts(), **settings
        )


def test_the_gate_notices_a_strong_loss_of_contrast_and_not_a_faint_one(net, test_images, guard):
    table = evaluate(net, test_images, guard, ["contrast"], severities=(1, 5), limit=60)
    faint, strong = table.cells
    assert table.n == 60
    assert faint.accuracy.value >= strong.accuracy.high
    assert faint.energy_auroc.value < 0.65
    assert strong.energy_auroc.low > 0.8
    assert faint.coverage.value > 0.85
    assert strong.coverage.value < 0.6
    # With the energy as the gate's score, both columns are the same figure.
    assert strong.score_auroc.value == pytest.approx(strong.energy_auroc.value, abs=1e-6)


def test_clean_rows_are_the_plain_forward_pass(net, test_images, cifar):
    some = test_images.select(slice(0, 50))
    with untouched(net.model):
        found = corruptions.predict_corrupted(pixel_forward(net), some)
    plain = predict(net, batches(cifar.subset(np.arange(50)), net.preprocessing))
    assert np.allclose(found.logits, plain.logits, atol=1e-4)
    assert np.array_equal(found.labels, plain.labels)


@pytest.mark.slow
def test_figures_of_resnet20_on_the_built_in_set(net, test_images, guard):
    table = evaluate(net, test_images, guard, BUILTIN)
    assert (table.n, table.forwards) == (200, 5000)
    assert table.probabilities == "temperature"
    assert table.clean.accuracy.value == pytest.approx(0.92, abs=0.006)
    # Other versions of Pillow and numpy move single images.
    summary = table.summary
    assert summary.accuracy.value == pytest.approx(0.580, abs=0.02)
    assert summary.energy_auroc.value == pytest.approx(0.755, abs=0.02)
    assert summary.coverage.value == pytest.approx(0.824, abs=0.03)
    by_severity = [summary.accuracy_by_severity[severity].value for severity in (1, 3, 5)]
    assert by_severity == pytest.approx([0.812, 0.581, 0.347], abs=0.03)
    # The gate does not stop noise: nearly everything is accepted, and nearly all of it is wrong.
    noise = table.cell("gaussian_noise", 5)
    assert noise.coverage.low > 0.7
    assert noise.accuracy_accepted.high < 0.3
    # A gate's promise is for clean images; it keeps it there.
    assert table.clean.coverage.value > 0.9


@pytest.mark.slow
def test_figures_of_resnet20_with_the_optional_package(net, test_images, guard):
    pytest.importorskip("imagecorruptions")
    names = ["imagecorruptions:fog", "imagecorruptions:glass_blur", "imagecorruptions:snow"]
    table = evaluate(net, test_images, guard, names)
    assert "not CIFAR-10-C" in table.source
    found = [table.cell(name, 1).accuracy.value for name in names]
    assert found == pytest.approx([0.695, 0.345, 0.820], abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cifar 32", "imagenet 224"])
@pytest.mark.parametrize("name", IMAGECORRUPTIONS)
def test_extra_corrupts_real_images_ever_more(pictures, kind, name):
    pytest.importorskip("imagecorruptions")
    found = torch.stack(distances(pictures[kind][:8], name)).mean(dim=1)
    # Its constants are not all in the order of pixel distance; the ends are.
    assert found[4] > found[0] > 0
    assert torch.isfinite(found).all()


def test_the_choice_of_rows_does_not_change_an_image(test_images):
    rng = oracles.generator("choice")
    rows = torch.from_numpy(np.sort(rng.choice(5000, 20, replace=False)))
    some, first = test_images.select(rows), test_images.select(slice(0, int(rows[3]) + 1))
    alone = corruptions.corrupt_pixels(some.pixels, some.ids, "shot_noise", 4)
    among = corruptions.corrupt_pixels(first.pixels, first.ids, "shot_noise", 4)
    assert torch.equal(alone[3], among[-1])
