"""A small net, data and guards that the tests of the export share."""

import warnings

import torch
from torch import nn

import ebm_guard
from ebm_guard.model import EnergyEnsemble
from ebm_guard.ood import combine, make_score

CLASSES = 4


class Net(nn.Module):
    """Classify (B, 6) with a hidden layer of features >= 0, and dropout that eval turns off."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.drop = nn.Linear(6, 12), nn.Dropout(0.5)
        self.fc = nn.Linear(12, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.eval()

    def forward(self, x):
        return self.fc(self.drop(self.first(x).relu()))


def inputs(n, seed=1, spread=1.0):
    return spread * torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def labelled(model, n=1000, seed=2):
    """Batches that the model gets right but for a fifth, as class 0 or the next one."""
    x = inputs(n, seed)
    with torch.no_grad():
        labels = model(x).argmax(dim=1)
    wrong = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < 0.2
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    return list(zip(x.split(400), labels.split(400), strict=True))


def fitted(model=None, n=1000, **settings):
    model = Net() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ebm_guard.errors.EbmGuardWarning)
        return ebm_guard.wrap(model).fit(labelled(model, n), **settings)


def ensemble(combine):
    """Two nets of other sizes and offsets; the second is another ensemble for a mixture."""
    one, other = Net(), Net()
    with torch.no_grad():
        other.first.weight.add_(0.1)
        other.fc.weight.mul_(-0.7)
    if combine == "mixture":
        other = EnergyEnsemble([other, Net()]).fit([inputs(300, 8)])
    settings = {"weights": [0.5, 2.0], "temperatures": [1.5, 0.8]}
    return EnergyEnsemble([one, other], combine=combine, **settings).fit([inputs(300)])


SCORES = {
    name: {"score": name}
    for name in (
        "energy",
        "msp",
        "maxlogit",
        "gen",
        "energy_react",
        "energy_scale",
        "vim",
        "mahalanobis",
        "knn",
        "fdbd",
        "nnguide",
        "kmeans_energy",
        "pca_energy",
        "gmm_energy",
    )
}
GATES = {
    "vector": {"calibrator": "vector"},
    "dirichlet": {"calibrator": "dirichlet"},
    "isotonic": {"calibrator": "isotonic"},
    "auto": {"calibrator": "auto"},
    "per class": {"per_class": True},
    "risk": {"risk": 0.3},
    "isotonic, risk, per class": {"calibrator": "isotonic", "risk": 0.3, "per_class": True},
    "vector, risk": {"calibrator": "vector", "risk": 0.3},
}


def made_scores():
    """Settings that need a score object, made anew: a fit changes it."""
    return {
        "relative": {"score": make_score("mahalanobis", relative=True)},
        "tied": {"score": make_score("gmm_energy", covariance="tied")},
        "nearest centre": {"score": make_score("kmeans_energy", beta="inf")},
        "hot": {"score": make_score("energy", energy_temperature=300.0)},
        "combine": {"score": combine("energy", "knn", "mahalanobis")},
    }


MADE = tuple(made_scores())
CASES = (*SCORES, *GATES, *MADE)


def case(name):
    return fitted(**(SCORES | GATES | made_scores())[name])
