"""Two classifiers of the same classes as one energy-based model, with one gate around both.

Takes the embedded demo (digits 0 to 7) and needs no data: its convolutional network, and a linear
classifier that is trained here in a second.

    python examples/ensemble.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ebm_guard
from ebm_guard import EnergyClassifier, EnergyEnsemble, Preprocessing
from ebm_guard.composition import class_energy
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.inference import lowest_energy_labels
from ebm_guard.ood.metrics import auroc

STEPS = 100


def images(role: str) -> tuple[Tensor, Tensor]:
    """Return [0, 1] pixels (N, 1, 8, 8) and labels (N,) of a role of the demo."""
    part = load_demo(role)
    labels = torch.zeros(len(part.images)) if part.labels is None else torch.as_tensor(part.labels)
    return (torch.from_numpy(part.images).float() / 255)[:, None], labels.long()


def linear_member(pixels: Tensor, labels: Tensor) -> EnergyClassifier:
    """Train a linear classifier; it takes plain pixels, so its mean is 0 and its std 1."""
    layer = nn.Linear(pixels[0].numel(), int(labels.max()) + 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(nn.Flatten(), layer)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return EnergyClassifier(model.eval(), preprocessing=Preprocessing((0.0,), (1.0,)))


def main() -> None:
    members = [EnergyClassifier(demo_classifier()), linear_member(*images("train"))]
    held_out, labels = images("calibration")
    known, truth = images("evaluation")
    strange, _ = images("near_ood")
    # Half of the held-out rows for the energies' units, the others for the gate's threshold.
    ensembles = {
        combine: EnergyEnsemble(members, combine=combine).fit([held_out[::2]])
        for combine in ("product", "mixture")
    }
    with torch.no_grad():
        for name, model in (("network", members[0]), ("linear", members[1])):
            report(name, model(model.pixels(known)), model(model.pixels(strange)), truth)
        for name, ensemble in ensembles.items():
            report(name, ensemble(known), ensemble(strange), truth)
    guard = ebm_guard.wrap(ensembles["product"]).fit([(held_out[1::2], labels[1::2])])
    print(guard.summary())
    logits = guard(known).logits
    print("Lowest-energy labels of the first image:", lowest_energy_labels(logits, 3).labels[0])
    doubtful = class_energy(logits, any_of=[1, 7]).argsort()[:3]
    print("Most like a 1 or a 7:", truth[doubtful].tolist())


def report(name: str, logits: Tensor, strange: Tensor, truth: Tensor) -> None:
    """Print accuracy, and the AUROC of the energy against digits that no member knows."""
    right = (logits.argmax(dim=1) == truth).double().mean()
    energies = [-torch.logsumexp(part.double(), dim=1).numpy() for part in (logits, strange)]
    area = auroc(*energies).value
    print(f"{name:8} accuracy {right:.3f}, energy AUROC on digits 8 and 9 {area:.3f}")


if __name__ == "__main__":
    main()
