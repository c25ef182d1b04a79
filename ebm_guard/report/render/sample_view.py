"""What the pages show of samples: pictures class by class, and words for the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Item = Mapping[str, Any]

LIMITS = (
    (
        "An image that looks real does not prove that the energy is a density, and one that does "
        "not look real is no fault of the classifier: it was trained to tell classes apart."
    ),
    (
        "Chains of a few hundred steps show where the energy goes down from their start. They do "
        "not show all that the net finds familiar."
    ),
    "Do not train or test on these images as if they were real ones.",
)
EDIT_LIMIT = (
    "Inpainting and denoising are measured against a fill and a filter that any image program has, "
    "on these images and with these chains. Other holes, noise or chains may turn out otherwise, "
    "and methods that were trained for the task are far better than all of them."
)
TRACES = {
    "energy": ("Energy", "Of each chain, step by step."),
    "gradient_norm": ("Gradient", "Its length over the whole image, at each step."),
    "saturation": ("Saturation", "Share of all values that lie on the edge of [0, 1]."),
    "acceptance": ("Acceptance", "Share of the chains whose proposal was accepted."),
}


def limits(report: Item) -> list[str]:
    """Say what the images of this page do not promise."""
    edited = "inpainting" in report or "denoising" in report
    return [*LIMITS, EDIT_LIMIT] if edited else list(LIMITS)


def rows(report: Item, pictures: Sequence[str]) -> list[tuple[Item, list[dict[str, Any]]]]:
    """List the classes with their samples, each with its picture."""
    found, at = [], 0
    for row in report["classes"]:
        samples = []
        for number, energy in enumerate(row["energies"]):
            samples.append(
                {
                    "picture": pictures[at + number],
                    "energy": energy,
                    "agrees": row["agrees"][number],
                    "predicted": row["predicted"][number],
                }
            )
        at += len(samples)
        found.append((row, samples))
    return found


def trace_words(report: Item, name: str) -> tuple[str, str]:
    """Return the heading and the words of a trace."""
    heading, words = TRACES[name]
    if name == "energy" and report["meta"]["settings"].get("conditional"):
        return heading, f"{words} E(x, y), y the class that was asked for."
    return heading, words


def reference_sentence(report: Item) -> str:
    """Say where the energies of real images lie."""
    known = report["reference"]
    if known is None:
        return ""
    low, _, middle, _, high = known["quantiles"]
    return (
        f"Your {fmt.count(known['n'])} images: median {fmt.energy(middle)}, 90 % between "
        f"{fmt.energy(low)} and {fmt.energy(high)}"
    )


def middle(values: Sequence[float]) -> float:
    """Return the median.

    Example:
        >>> middle([3.0, 1.0, 2.0, 10.0])
        2.5
    """
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
