"""Loops from the equations of the class losses, and the cases that their tests share."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from ebm_guard import registry


def positive_part(value):
    return max(0.0, value)


def soft(value):
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def sigma(value):
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def free_energy(energies, beta):
    least = min(energies)
    return least - math.log(sum(math.exp(-beta * (e - least)) for e in energies)) / beta


def exponential(value):
    """exp(-v) from 0 on, and its tangent at 0 below."""
    return math.exp(-value) if value >= 0 else 1 - value


def pushed(form, value):
    """The correct energy, and the wrong one, above the centre."""
    return (positive_part(value), value) if form == "relu" else (soft(value), soft(value))


def square_square(own, bad, m=1.0, form="relu", centre=0.0):
    low, high = pushed(form, own - centre)[0], pushed(form, bad - centre)[1]
    return low**2 + positive_part(m - high) ** 2


def square_exponential(own, bad, gamma=1.0, form="relu", centre=0.0):
    low, high = pushed(form, own - centre)[0], pushed(form, bad - centre)[1]
    return low**2 + gamma * exponential(high)


PAIR = {
    "hinge": lambda own, bad, m=1.0: positive_part(m + own - bad),
    "log": lambda own, bad: soft(own - bad),
    "lvq2": lambda own, bad, cap=10.0: min(cap, positive_part(own - bad)),
    "mce": lambda own, bad: sigma(own - bad),
    "square_square": square_square,
    "square_exponential": square_exponential,
    "bromley": lambda own, bad, m=1.0, centre=0.0: (
        positive_part(own - centre) + positive_part(m - (bad - centre))
    ),
}
H = {
    "hinge": positive_part,
    "squared_hinge": lambda value: positive_part(value) ** 2,
    "log": soft,
}


def additive(energies, label, m=1.0, form="hinge"):
    return sum(H[form](m + energies[label] - bad) for k, bad in enumerate(energies) if k != label)


def nce(batch, row, label, temperature=1.0):
    values = [-energies[label] / temperature for energies in batch]
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values)) - values[row]


def naive(name, logits, labels, **given_settings):
    """The mean over the labelled rows, value by value."""
    batch = [[-value for value in row] for row in logits.tolist()]
    losses = []
    for row, (energies, label) in enumerate(zip(batch, labels.tolist(), strict=True)):
        if label == -1:
            continue
        own = energies[label]
        bad = min(e for k, e in enumerate(energies) if k != label)
        beta = given_settings.get("beta", 1.0)
        if name in PAIR:
            losses.append(PAIR[name](own, bad, **given_settings))
        elif name == "energy":
            losses.append(own)
        elif name == "perceptron":
            losses.append(own - min(energies))
        elif name == "nll":
            losses.append(own - free_energy(energies, beta))
        elif name == "mee":
            losses.append(1 - math.exp(-beta * (own - free_energy(energies, beta))))
        elif name == "additive_margin":
            losses.append(additive(energies, label, **given_settings))
        else:
            losses.append(nce(batch, row, label, **given_settings))
    return sum(losses) / len(losses) if losses else 0.0


NAMES = tuple(method.name for method in registry.methods("class_loss"))
CASES = (
    *((name, {}) for name in NAMES),
    ("nll", {"beta": 0.5}),
    ("mee", {"beta": 3.0}),
    ("hinge", {"m": 2.5}),
    ("lvq2", {"cap": 0.75}),
    ("square_square", {"m": 2.0, "centre": -1.5}),
    ("square_square", {"m": 2.0, "form": "softplus", "centre": 0.5}),
    ("square_exponential", {"gamma": 0.3, "centre": 1.0}),
    ("square_exponential", {"gamma": 2.0, "form": "softplus"}),
    ("bromley", {"m": 3.0, "centre": -2.0}),
    ("additive_margin", {"m": 2.0}),
    ("additive_margin", {"m": 0.5, "form": "squared_hinge"}),
    ("additive_margin", {"m": 0.5, "form": "log"}),
    ("info_nce", {"temperature": 0.5}),
)
every_case = pytest.mark.parametrize(("name", "given_settings"), CASES, ids=str)
every_name = pytest.mark.parametrize("name", NAMES)


@st.composite
def rows(draw, least=1):
    """Logits on a coarse grid, so that ties are common, and labels, some of them -1."""
    count, classes = draw(st.integers(least, 6)), draw(st.sampled_from([2, 3, 5]))
    coarse = st.lists(st.integers(-12, 12), min_size=classes, max_size=classes)
    logits = draw(st.lists(coarse, min_size=count, max_size=count))
    labels = draw(st.lists(st.integers(-1, classes - 1), min_size=count, max_size=count))
    return torch.tensor(logits, dtype=torch.float64) / 4, torch.tensor(labels)


def random_rows(count=8, classes=5, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    labels[1::4] = -1
    return torch.from_numpy(rng.normal(0, scale, (count, classes))), torch.from_numpy(labels)
