"""Hand-made outcomes of a fine-tuning, for the tests of its report."""

import copy
from types import SimpleNamespace

import numpy as np
import torch

from ebm_guard.intervals import Metric, proportion
from ebm_guard.model import EnergyClassifier, Preprocessing
from ebm_guard.predictions import Predictions
from ebm_guard.report.finetune_report import Sides, finetune_report
from ebm_guard.report.paired import Pair
from ebm_guard.training.temperatures import Temperatures

EVIL = "<script>alert('x')</script> `a` $b$ [/red] _c_ | 犬"
N, C = 80, 3
TESTS = [
    ("accuracy", 0.95, 0.94, -0.01, -0.03, -0.01, False),
    ("nll", 0.2, 0.21, 0.01, 0.015, 0.02, True),
    ("auroc", 0.8, 0.9, 0.1, 0.08, 0.0, True),
]


def rows(logits, labels=None, source="npz:x"):
    return Predictions(np.asarray(logits, np.float64), labels=labels, source=source)


def pair(seed, *, n=N, gain=0.0, labels=True, shift=0.0):
    """Two nets on the same rows: the candidate is the start, sharper and moved by a constant."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, C, n)
    start = rng.normal(0, 1, (n, C)) + 2 * np.eye(C)[truth]
    candidate = start + gain * np.eye(C)[truth] + shift + rng.normal(0, 0.3, (n, C))
    known = truth if labels else None
    return Pair(rows(start, known), rows(candidate, known))


def energy(logits):
    return -np.log(np.exp(logits).sum(axis=1))


def history(rollback=True):
    lines = [evaluation(0, 0.9)]
    numbers = [*range(8), *range(4, 8)] if rollback else range(12)
    for place, update in enumerate(numbers):
        lines.append(
            {
                "kind": "update", "update": update, "loss": 1.0 / (1 + place),
                "parts": {"cross_entropy": 0.5, "margin": 0.25}, "gradient_norm": 1.0,
                "gap": 2.0, "energy_data": -5.0, "energy_negatives": float(update),
                "saturation": None, "learning_rate": 1e-3, "seconds": 0.1,
            }
        )  # fmt: skip
        if rollback and place == 7:
            lines.append({"kind": "event", "update": 7, "text": "back to update 4: " + EVIL})
        if update % 4 == 3:
            lines.append(evaluation(update + 1, 0.9 + 0.001 * place, best=True))
    return tuple(lines)


def evaluation(update, auroc, *, best=False):
    return {
        "kind": "evaluation", "update": update, "accuracy": 0.9, "nll": 0.3, "ece": 0.02,
        "temperature": 1.1, "auroc": {"rotation": auroc, "paste": auroc - 0.1},
        "mean_auroc": auroc - 0.05, "energy_mean": -5.0, "eligible": best, "best": best,
    }  # fmt: skip


def net(seed=0):
    """Make a linear net with weights of its own."""
    found = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, C)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in found.parameters():
            part.copy_(torch.randn(part.shape, generator=generator))
    return found


def result(status="accepted", *, acceptance=True, rollback=True, temperatures=None):
    tests = [
        dict(
            zip(
                ("name", "start", "candidate", "difference", "bound", "limit", "passed"),
                test,
                strict=True,
            )
        )
        | {"what": f"{test[0]} holds", "n": 40, "method": "by hand"}
        for test in TESTS
    ]
    found = {
        "passed": status == "accepted",
        "n": 40,
        "tests": tests,
        "auroc": {
            "paste": {
                "start": 0.8,
                "candidate": 0.9,
                "difference": Metric(0.1, 0.0, 0.2, 80, "paired DeLong").to_dict(),
                "role": "guard",
            }
        },
        "temperature": (temperatures or Temperatures(1.5, 0.7)).to_dict(),
    }
    return SimpleNamespace(
        status=status,
        reason="the candidate passed all tests",
        story=("First it trained.", f"Then {EVIL}."),
        acceptance=SimpleNamespace(to_dict=lambda: copy.deepcopy(found)) if acceptance else None,
        history=history(rollback),
        settings={
            "objective": {"objective": "margin", "weight": 0.1},
            "updates": 12,
            "scope": EVIL,
        },
        seconds=3.5,
        interrupted=False,
        start=net(0),
        model=net(1 if status == "accepted" else 0),
        candidate=net(1) if acceptance else None,
        density=None,
    )


def sides(**changes):
    ood = {
        "street": ("unseen", pair(11, labels=False, shift=-1.0)),
        "given": ("validation", pair(12, labels=False, shift=2.0)),
        "synthetic_rotation": ("guard_kind", pair(13, labels=False, shift=-2.0)),
        "synthetic_blend": ("trained_on", pair(14, labels=False, shift=3.0)),
    }
    found = {"evaluation": pair(1, gain=0.5), "note": "80 images of --data", "own": True}
    return Sides(**{**found, "ood": ood, **changes})


def robustness(seed, lost=0, *, cut=False):
    """What an evaluation of robustness looks like, as far as it is compared."""
    n = 40
    rng = np.random.default_rng(seed)
    attacks = [SimpleNamespace(label="PGD-20", reason="not run: budget" if cut else "")]

    def budget(text, left):
        whole = not (cut and text == "0.2")
        return SimpleNamespace(
            epsilon=float(text), text=text, attacks=attacks,
            worst_case=proportion(max(0, left - lost), n) if whole else None,
            standing=tuple(row < max(0, left - lost) for row in range(n)) if whole else (),
        )  # fmt: skip

    lines = tuple(budget(text, left) for text, left in (("0.1", 30), ("0.2", 12)))
    norm = SimpleNamespace(
        norm="linf",
        reference="0.2",
        epsilons=lines,
        at=lambda text: next(line for line in lines if line.text == text),
    )
    table = {"source": EVIL, "summary": {"accuracy": proportion(36 - lost, n).to_dict()}}
    return SimpleNamespace(
        preset="quick", n=n, label_source="true labels", clean=proportion(38, n), norms=(norm,),
        corruptions=table, flags=({"name": "flat_curve", "status": "raised"},),
        cost={"gradients": int(rng.integers(100, 200))},
        left_out=({"name": EVIL, "reason": "not a part"},),
        right=tuple(row < 38 for row in range(n)),
    )  # fmt: skip


def report(found=None, both="default", **more):
    both = sides() if both == "default" else both
    preprocessing = Preprocessing((0.5,), (0.5,), image_size=(2, 2))
    content = finetune_report(
        found or result(),
        both,
        EnergyClassifier(net(0), preprocessing=preprocessing),
        {},
        known=pair(1).start,
        command=f"ebm-guard finetune {EVIL}",
        **more,
    )
    return content.to_dict()
