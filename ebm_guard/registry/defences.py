"""Changes of inference that are meant to make a classifier robust; all are attacked as such."""

from __future__ import annotations

from ebm_guard.registry.method import Method

METHODS = (
    Method(
        "purification",
        "defence",
        "ebm_guard.robustness.purify:Purifier",
        "Grathwohl et al., Your Classifier is Secretly an Energy Based Model, ICLR 2020, on "
        "robustness; Hill et al., Stochastic Security, ICLR 2021",
        "x <- x - clip(a dE/dx) + n xi, k times; then softmax f(x)",
        ("images", "logits", "gradient"),
        "kept in [0, 1] and, on request, near the image; judged by the worst of three gradients "
        "(identity, unrolled, transfer) with EOT, and by the majority of fresh draws",
    ),
)
