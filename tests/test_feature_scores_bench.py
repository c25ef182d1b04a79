"""Feature scores against pytorch-ood on the same features, and right where it is wrong.

`pip install pytorch-ood` (the `bench` extra) runs these.
"""

import warnings
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from scipy import stats
from test_feature_scores import clusters, tensors
from torch import nn

from ebm_guard.ood import Mahalanobis, as_score, make_score

# What that library deprecates or imports is not ours to judge.
pytestmark = pytest.mark.filterwarnings("ignore")


def detectors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "pytorch_ood.detector", reason="pytorch-ood is not installed: see the `bench` extra"
        )


def linear(head):
    layer = nn.Linear(head.weight.shape[1], head.weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        layer.bias.copy_(torch.from_numpy(head.bias))
    return layer


def theirs(name, fit, rows):
    """Scores of pytorch-ood's detector, fitted on the same features."""
    library = detectors()
    layer = linear(fit.head)
    features, labels = torch.from_numpy(fit.features), torch.from_numpy(fit.labels)
    maps = {"energy_react": library.ReAct, "energy_scale": library.SCALE}
    if name in maps:
        if name == "energy_react":
            detector = maps[name](None, lambda z: layer(z.flatten(1)), percentile=0.9)
            detector.fit_feature_maps(features[:, :, None, None], labels)
        else:
            detector = maps[name](None, lambda z: layer(z.flatten(1)), percentile=0.85)
        values = torch.from_numpy(rows.features)[:, :, None, None]
        return detector.predict_feature_maps(values).detach().numpy()
    made = {
        "vim": lambda: library.ViM(None, fit.features.shape[1] // 2, layer.weight, layer.bias),
        "mahalanobis": lambda: library.Mahalanobis(None),
        "relative": lambda: library.RMD(None),
        "knn": lambda: library.KNN(None, k=50),
        "fdbd": lambda: library.fDBD(None, layer),
        "nnguide": lambda: library.NNGuide(None, layer),
    }[name]()
    made.fit_features(features, labels)
    return made.predict_features(torch.from_numpy(rows.features)).detach().numpy()


def ours(name, fit):
    if name in ("mahalanobis", "relative"):
        # Theirs adds 1e-6 I to the sum of outer products, not to their mean.
        features = fit.features.astype(np.float64)
        means = np.stack([features[fit.labels == c].mean(axis=0) for c in range(4)])
        trace = ((features - means[fit.labels]) ** 2).sum() / len(fit)
        ridge = 1e-6 / len(fit) / (trace / features.shape[1])
        return Mahalanobis(normalize=False, relative=name == "relative", shrinkage=ridge).fit(fit)
    return make_score(name).fit(fit)


@pytest.mark.parametrize(
    "name",
    ["energy_react", "energy_scale", "vim", "mahalanobis", "relative", "knn", "fdbd", "nnguide"],
)
def test_rows_are_ordered_as_by_pytorch_ood(name):
    fit = clusters("bench fit", n=2000, width=24)
    rows = clusters("bench rows", n=1000, width=24, spread=2)
    found, other = ours(name, fit).of(rows), theirs(name, fit, rows)
    assert stats.spearmanr(found, other).statistic >= 0.9999


def test_mahalanobis_with_fewer_rows_than_features_is_wrong_there():
    """When this fails, the library has been repaired: then say so in the docs."""
    fit = clusters("small", n=300, width=512)
    inside = clusters("inside", n=300, width=512)
    rng = oracles.generator("outside")
    features = rng.permuted(inside.features, axis=1)
    outside = replace(inside, features=features, hashes=None)
    score = Mahalanobis(normalize=False).fit(fit)
    right = oracles.auroc(score.of(inside).tolist(), score.of(outside).tolist())
    wrong_in, wrong_out = (theirs("mahalanobis", fit, part) for part in (inside, outside))
    assert right > 0.999
    assert (score.of(inside) >= 0).all()
    assert (wrong_in < 0).any() or oracles.auroc(wrong_in.tolist(), wrong_out.tolist()) < 0.9


def test_their_detectors_plug_in():
    library = detectors()
    fit, rows = clusters("bench fit", n=400), clusters("bench rows", n=50)
    knn = as_score(library.KNN(None, k=10)).fit(fit)
    assert knn.name == "knn"
    assert np.allclose(knn.of(rows), make_score("knn", k=10).fit(fit).of(rows), atol=1e-4)
    energy = as_score(library.EnergyBased(None), "theirs")
    assert not energy.needs_fit
    assert np.allclose(energy.fit(fit).of(rows), make_score("energy").of(rows), rtol=1e-5)
    assert torch.isfinite(knn(*tensors(rows))).all()
