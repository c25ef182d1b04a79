"""A tiny net and sets for the callbacks, and their metrics from the definitions."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 3


def net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))


def rows(n, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator) + shift
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return TensorDataset(x, y)


def loader(n, seed, shift=0.0, batch_size=8, **settings):
    return DataLoader(rows(n, seed, shift), batch_size=batch_size, **settings)


@torch.no_grad()
def logits_of(model, dataset):
    flags = [part.training for part in model.modules()]
    model.eval()
    found = model(dataset.tensors[0]).double().numpy()
    for part, flag in zip(model.modules(), flags, strict=True):
        part.training = flag
    return found


def naive_calibration(logits, labels, bins=15):
    """Accuracy, NLL, Brier and ECE, row by row from their definitions."""
    right = nll = brier = 0.0
    gaps, n = [0.0] * bins, len(labels)
    for f, y in zip(logits, labels, strict=True):
        p = np.exp(f - f.max())
        p /= p.sum()
        k = int(f.argmax())
        right += k == y
        nll -= np.log(p[y])
        brier += sum((p[c] - (c == y)) ** 2 for c in range(len(p)))
        where = next(b for b in range(bins) if p[k] <= (b + 1) / bins or b == bins - 1)
        gaps[where] += p[k] - (k == y)
    return {
        "accuracy": right / n,
        "nll": nll / n,
        "brier": brier / n,
        "ece": sum(abs(gap) for gap in gaps) / n,
    }


def energies(logits):
    return -np.log(np.exp(logits).sum(axis=1))


def naive_separation(inside, outside):
    """AUROC by all pairs, and the share of OOD accepted where 95 % of ID is."""
    pairs = [(b > a) + 0.5 * (b == a) for a in inside for b in outside]
    cut = next(c for c in sorted(inside) if (inside <= c).mean() >= 0.95)
    return float(np.mean(pairs)), float((outside <= cut).mean())


def expected(model, inside, **outside):
    logits = logits_of(model, inside)
    found = naive_calibration(logits, inside.tensors[1].numpy())
    for name, dataset in outside.items():
        area, share = naive_separation(energies(logits), energies(logits_of(model, dataset)))
        found |= {f"auroc/{name}": area, f"fpr95/{name}": share}
    if outside:
        found["auroc"] = min(found[f"auroc/{name}"] for name in outside)
        found["fpr95"] = max(found[f"fpr95/{name}"] for name in outside)
    return {f"ebm_guard/{name}": value for name, value in found.items()}
