"""What the pages show of inpainting, denoising and morphing: words, rows and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.editing_images import gif_uri
from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ebm_guard.report.editing_images import EditPictures

    Item = Mapping[str, Any]

HEADINGS = {
    "inpainting": ("Inpainting", "Does going down the energy restore what a hole hides?"),
    "denoising": ("Denoising", "Does the energy know a clean image from a noisy one?"),
    "morphing": ("Morphing", "How far do the pixels go until the class changes?"),
}
STAGES = {
    "inpainting": {"truth": "True images", "trivial": "Smooth fill", "chains": "Chains"},
    "denoising": {
        "truth": "True images",
        "given": "Noisy",
        "trivial": "Wiener filter",
        "chains": "Chains",
    },
}
_ORDER = ("truth", "given", "trivial", "chains")
MEASURES = {"rmse": "RMSE in the hole", "psnr": "PSNR, dB"}
STATUS = {True: "good", False: "bad", None: "unclear"}
WORDS = {True: "chains nearer", False: "chains further away", None: "not shown"}


def sentences(report: Item) -> Iterator[tuple[str, str]]:
    """Yield heading and sentence of each edit that the report has."""
    for name, (heading, _) in HEADINGS.items():
        if name in report:
            yield heading, report[name]["sentence"]


def shown(edits: Mapping[str, EditPictures]) -> dict[str, dict[str, Any]]:
    """Return the pictures of a page as data URIs, by section."""
    return {
        name: {
            "strips": found.strips(),
            "names": found.names,
            "heads": found.heads,
            "gif": gif_uri(found.gif()),
            "still": found.still(),
            "moving": found.frames.shape[1],
        }
        for name, found in edits.items()
    }


def animated(text: str) -> str | None:
    """Let only embedded GIFs through: a page must never load anything.

    Example:
        >>> animated("https://example.org/a.gif") is None
        True
    """
    return text if text.startswith("data:image/gif;base64,") else None


def stages(name: str, section: Item) -> list[tuple[str, Item | None, Item, Item | None]]:
    """List the stages as (words, error, energy, share named as labelled)."""
    known = STAGES[name] | (
        {} if section["settings"].get("start") != "noise" else {"given": "Noise in the hole"}
    )
    named = section["named"] or {}
    return [
        (words, section["errors"].get(stage), section["energy"][stage], named.get(stage))
        for stage, words in sorted(known.items(), key=lambda item: _ORDER.index(item[0]))
    ]


def error(metric: Item | None, measure: str) -> str:
    """Write an error with its interval.

    Example:
        >>> error({"value": 0.25, "low": 0.2, "high": 0.3}, "rmse")
        '0.250 [0.200, 0.300]'
    """
    if metric is None:
        return fmt.NOTHING
    return _written(metric, 3 if measure == "rmse" else 2)


def energy(metric: Item) -> str:
    """Write a mean energy with its interval."""
    return _written(metric, 2)


def _written(metric: Item, digits: int) -> str:
    def one(value: float) -> str:
        return f"{value:,.{digits}f}".replace("-", "−")

    if metric["value"] is None:
        return fmt.NOTHING
    ends = "" if metric["low"] is None else f" [{one(metric['low'])}, {one(metric['high'])}]"
    return f"{one(metric['value'])}{ends}"


def row_words(section: Item, number: int) -> str:
    """Say what happened to one image."""
    row = section["rows"][number]
    trivial, chains = (
        f"{row['errors'][stage]:.{3 if section['measure'] == 'rmse' else 1}f}"
        for stage in ("trivial", "chains")
    )
    if section["measure"] == "rmse":
        return f"RMSE: fill {trivial}, chains {chains}"
    return f"PSNR: filter {trivial}, chains {chains}"


def how(name: str, section: Item) -> str:
    """Say how the chains ran, in one line."""
    settings = section["settings"]
    goes = "E(x, y), y the true class" if settings["conditional"] else "E(x), no class told"
    chains = f"Chains of {settings['num_steps']} steps ({settings['sampler']}) on {goes}"
    if name == "inpainting":
        share = fmt.percent(settings["hidden_share"])
        start = "the smooth fill" if settings["start"] == "surroundings" else "noise"
        return f"{chains}; {share} of each image hidden; they start at {start}."
    return (
        f"{chains}, and a pull to the noisy image: |x − y|² / (2 · {settings['noise_std']:g}²); "
        f"noise of standard deviation {settings['noise_std']:g} was added."
    )


def frames(section: Item) -> list[dict[str, Any]]:
    """List the frames of a morph for a table."""
    keys = ("probability_a", "probability_b", "joint_energy_a", "joint_energy_b", "energy", "moved")
    return [
        {"t": t} | {key: section[key]["median"][place] for key in keys}
        for place, t in enumerate(section["t"])
    ]
