"""All scores on a published CIFAR-10 net, fitted on training images: sane, and as measured."""

from pathlib import Path

import pytest

from ebm_guard import EnergyClassifier, predict
from ebm_guard.data import batches, open_source
from ebm_guard.model.loading import load_model
from ebm_guard.ood import combine, make_score, ood_metrics

pytestmark = pytest.mark.slow

NETS = Path(__file__).parents[1] / "examples" / "published_nets.py"
# AUROC against CIFAR-100 (near) and textures (far); fitted on 10,000 of the training images.
MEASURED = {
    "energy": (0.881, 0.899),
    "msp": (0.859, 0.877),
    "maxlogit": (0.881, 0.899),
    "gen": (0.883, 0.903),
    "energy_react": (0.879, 0.913),
    "energy_scale": (0.741, 0.907),
    "vim": (0.858, 0.947),
    "mahalanobis": (0.849, 0.960),
    "knn": (0.871, 0.947),
    "fdbd": (0.875, 0.942),
    "nnguide": (0.880, 0.910),
    "kmeans_energy": (0.848, 0.935),
    "pca_energy": (0.790, 0.937),
    "gmm_energy": (0.865, 0.934),
    "combine": (0.884, 0.951),
}


@pytest.fixture(scope="module")
def passes(data_dir):
    """One pass with features over each set."""
    model = load_model(
        f"{NETS}:cifar10_resnet20", checkpoint=data_dir / "cifar10_resnet20.safetensors"
    )
    classifier = EnergyClassifier(model)
    found = {}
    for name, file in {
        "fit": "cifar10_train10k",
        "test": "cifar10_test",
        "near": "cifar100_test3k",
        "far": "dtd_1200_32x32",
    }.items():
        source = open_source(f"npz:{data_dir / file}.npz")
        if name in ("near", "far"):
            source.labels = None
        rows = batches(source, classifier.preprocessing, batch_size=500)
        found[name] = predict(classifier, rows, features=True, source=file)
    return found


def test_auroc_of_all_scores(passes):
    for name, (near, far) in MEASURED.items():
        score = make_score(name)
        assert score.why_not_fit(passes["fit"]) is None
        inside = score.fit(passes["fit"]).of(passes["test"])
        for part, wanted in (("near", near), ("far", far)):
            found = ood_metrics(inside, score.of(passes[part]), draws=1).auroc.value
            assert found == pytest.approx(wanted, abs=0.002), (name, part)


def test_a_combination_beats_its_worse_half_everywhere(passes):
    score = combine("energy", "knn").fit(passes["fit"])
    for part in ("near", "far"):
        areas = [
            ood_metrics(item.of(passes["test"]), item.of(passes[part]), draws=1).auroc.value
            for item in (score, *score.scores)
        ]
        assert areas[0] > min(areas[1:])
