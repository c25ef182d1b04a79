"""What the pages show, read from the report dict: verdicts, key numbers, captions, data tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt
from ebm_guard.report.render import robustness_facts, robustness_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

STATUS_WORDS = {
    "good": "Good",
    "attention": "Needs attention",
    "bad": "Problem",
    "unclear": "Unclear",
    "not_run": "Not run",
    "met": "Met",
    "failed": "Failed",
    "clear": "Clear",
    "raised": "Raised",
}
SIGNS = {
    "good": "✓",
    "met": "✓",
    "attention": "!",
    "bad": "✗",
    "failed": "✗",
    "unclear": "?",
    "not_run": "–",
    "clear": "✓",
    "raised": "!",
}
ROLES = {
    "evaluation": "evaluation (judges the model)",
    "calibration": "calibration (sets temperature and threshold)",
    "fit": "fit (statistics of the feature scores)",
    "near_ood": "near OOD",
    "far_ood": "far OOD",
    "ood": "OOD",
    "synthetic": "synthetic OOD, made from your images",
    "shifted": "your images under other conditions",
    "train": "train (what the net learns from)",
    "validation": "validation (chooses, accepts or refuses, and refits the guard)",
    "outliers": "outliers (trained on as negatives)",
    "ood_validation": "OOD validation (a part of the acceptance test)",
    "starts": "starts (where the chains begin)",
}
NOT_RUN_NAMES = {
    "groups": "Groups",
    "robustness": "Robustness",
    "finetune": "Fine-tuning",
    "comparison": "Comparison with a baseline",
}
CHANGE_NAMES = {
    "accuracy": ("Accuracy", "percent"),
    "ece": ("ECE", "percent"),
    "nll": ("NLL", "fixed"),
    "brier": ("Brier score", "fixed"),
    "auroc": ("AUROC of the gate's score", "score"),
    "fpr95": ("FPR95 (ID positive)", "percent"),
}
BETTER_WORDS = {True: "better", False: "worse", None: "no clear change"}


def not_run(section: Mapping[str, Any]) -> str | None:
    """Give the reason why a section did not run, or None."""
    reason: str | None = section.get("not_run")
    return reason


def pillars(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """List the verdict cards in their order."""
    sections: tuple[tuple[str, str, str], ...] = (
        ("calibration", "Calibration", "calibration"),
        ("ood", "Unknown images", "energy"),
        ("gate", "Gate", "gate"),
        ("selective", "Selective prediction", "selective"),
        ("robustness", "Robustness", "robustness"),
        ("finetune", "Fine-tuning", "finetune"),
    )
    cards = [_requirements_card(report["requirements"])]
    extra = (("groups", "Groups", "groups"), ("comparison", "Against the baseline", "comparison"))
    sections += tuple(item for item in extra if not_run(report[item[2]]) is None)
    for anchor, name, key in sections:
        reason = not_run(report[key])
        if reason is None:
            cards.append({"anchor": anchor, "name": name, **report[key]["verdict"]})
        else:
            own = ("calibration", "energy", "gate", "selective")
            target = anchor if key in own else "not-run"
            cards.append(_card(target, name, "not_run", "Not run", sentence(reason)))
    return cards


def not_run_sections(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the optional sections that did not run, with the reason."""
    reasons = ((name, not_run(report[key])) for key, name in NOT_RUN_NAMES.items())
    return [(name, reason) for name, reason in reasons if reason is not None]


def _card(anchor: str, name: str, status: str, headline: str, text: str) -> dict[str, str]:
    return {
        "anchor": anchor,
        "name": name,
        "status": status,
        "headline": headline,
        "sentence": text,
    }


def _requirements_card(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Sum up the requirements in one card."""
    name = "Requirements"
    if not rows:
        text = "No requirement was set. Set some with --require, for example --require 'ece<=0.05'."
        return _card("requirements", name, "not_run", "Not set", text)
    parts = {
        status: [row["text"] for row in rows if row["status"] == status]
        for status in ("failed", "unclear", "met")
    }
    said = [f"{word}: {', '.join(parts[key])}" for key, word in _SAID.items() if parts[key]]
    status = "bad" if parts["failed"] else "unclear" if parts["unclear"] else "good"
    headline = f"{len(parts['met'])} of {len(rows)} met"
    return _card("requirements", name, status, headline, ". ".join(said) + ".")


_SAID = {"failed": "Failed", "unclear": "Too close to call", "met": "Met"}


def changes(comparison: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """List the compared metrics by heading, in the order of the page."""
    blocks = [
        ("Before calibration", comparison["before"]),
        ("After calibration", comparison["after"]),
        *comparison["ood"].items(),
    ]
    return [(heading, list(block.values())) for heading, block in blocks if block]


def tally(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Count the cards of each status, the worst first."""
    statuses = [card["status"] for card in pillars(report)]
    order = ("bad", "attention", "unclear", "good", "not_run")
    return [(status, statuses.count(status)) for status in order if status in statuses]


def sentence(text: str) -> str:
    """Make a reason a sentence: capital first, full stop last."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def key_numbers(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List the numbers that a summary needs, as (name, value with interval, n)."""
    return [
        (name, fmt.metric(entry, kind), fmt.count(entry["n"]))
        for name, entry, kind in _key_metrics(report)
        if entry is not None
    ]


def _key_metrics(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
    calibration, gate, ood = report["calibration"], report["gate"], report["ood"]
    if not_run(calibration) is None:
        yield "Accuracy", calibration["before"]["accuracy"], "percent"
        yield "ECE before calibration", calibration["before"]["ece"], "percent"
        if not_run(calibration["after"]) is None:
            yield "ECE after calibration", calibration["after"]["ece"], "percent"
    shown = gate.get("score", "energy")
    for name, entry in _summed_up(ood, shown).items():
        metrics = entry["scores"].get(shown, {})
        yield f"AUROC of {shown} on {name}", metrics.get("auroc"), "score"
        yield f"{name} accepted at 95 % of ID (FPR95)", metrics.get("fpr95"), "percent"
    if not_run(gate) is None:
        yield "Gate: ID images accepted", gate["coverage"], "percent"
        yield "Gate: accuracy of accepted", gate["accuracy_accepted"], "percent"
        for name in _summed_up(ood, shown):
            yield f"Gate: {name} accepted", gate["accepted_ood"].get(name), "percent"
    if not_run(report["robustness"]) is None:
        yield from robustness_view.key_metrics(report["robustness"])


def _summed_up(ood: Mapping[str, Any], score: str) -> dict[str, Any]:
    """Leave out all synthetic sets but the hardest one: a summary has no room for each kind."""
    hardest = min(
        (name for name, entry in ood.items() if entry["role"] == "synthetic"),
        key=lambda name: (ood[name]["scores"].get(score, {}).get("auroc") or _WORST)["value"],
        default=None,
    )
    return {
        name: entry
        for name, entry in ood.items()
        if entry["role"] != "synthetic" or name == hardest
    }


_WORST = {"value": 2.0}


def energy_caption(energy: Mapping[str, Any]) -> str:
    """Describe the energy histogram in numbers."""
    sets = "; ".join(
        f"{'your images' if name == 'evaluation' else name}: median {fmt.energy(entry['median'])}, "
        f"90 % between {fmt.energy(entry['q05'])} and {fmt.energy(entry['q95'])}"
        for name, entry in energy["sets"].items()
    )
    threshold = energy["threshold"]
    gate = "" if threshold is None else f" Accepted up to {fmt.energy(threshold)}."
    return f"Energy of {sets}.{gate}"


def score_names(ood: Mapping[str, Any]) -> list[str]:
    """List every score that any OOD set names, in order."""
    return list(dict.fromkeys(score for entry in ood.values() for score in entry["scores"]))


def ordered_scores(report: Mapping[str, Any], entry: Mapping[str, Any]) -> list[str]:
    """List the scores of an OOD set, best ranked first, those that did not run last."""
    ranking = report["energy"].get("ranking") or {"scores": []}
    place = {row["name"]: row["rank"] for row in ranking["scores"]}

    def key(score: str) -> tuple[bool, float, float]:
        metrics = entry["scores"][score]
        if "not_run" in metrics or metrics["auroc"]["value"] is None:
            return True, 0.0, 0.0
        return False, place.get(score, len(place) + 1), -metrics["auroc"]["value"]

    return sorted(entry["scores"], key=key)


def histogram_rows(histogram: Mapping[str, Any]) -> list[tuple[float, float, list[int]]]:
    """List the bins of the energy histogram: low, high, the count of each set."""
    edges, counts = histogram["edges"], list(histogram["counts"].values())
    return [
        (edges[index], edges[index + 1], [row[index] for row in counts])
        for index in range(len(edges) - 1)
    ]


def roc_rows(entry: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """List for each score the share of OOD caught at some shares of ID refused."""
    return [
        (score, [_caught(curve, refused) for refused in ROC_POINTS])
        for score, curve in entry["roc"].items()
    ]


def position(ood: Mapping[str, Any], name: str) -> int:
    """Give the number of an OOD set: the name of its ROC panel ends with it."""
    return list(ood).index(name)


ROC_POINTS = (0.01, 0.05, 0.1, 0.2, 0.5)


def _caught(curve: Mapping[str, Sequence[float]], refused: float) -> float:
    """Read a ROC curve without interpolating: the best point that refuses no more."""
    pairs = zip(curve["fpr"], curve["tpr"], strict=True)
    return max((tpr for fpr, tpr in pairs if fpr <= refused + 1e-12), default=0.0)


def data_sets(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """List the data sets of the report with their names."""
    data = report["data"]
    named = [(name, data[name]) for name in ("evaluation", "calibration", "fit") if data[name]]
    return [*named, *data["ood"].items()]


def plain(value: object) -> str:
    """Write a setting as text: yes and no, short numbers, lists without brackets."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return fmt.number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} = {plain(item)}" for key, item in value.items())
    return str(value)


def picture(text: str | None) -> str | None:
    """Let only embedded pictures through: a page must never load anything."""
    return text if text is not None and text.startswith("data:image/png;base64,") else None


def limits(report: Mapping[str, Any]) -> list[str]:
    """Say what the numbers of this report do not promise."""
    said = [
        (
            "Every number describes images like the ones measured. Another camera, season or "
            "country needs its own measurement."
        ),
        (
            "Intervals cover the luck of drawing these images, each number by itself. They cover "
            "neither wrong labels nor a change of the data, and of many intervals some will miss."
        ),
    ]
    if not_run(report["calibration"]) is None:
        said.append(
            "Calibration holds on average over many images with the same confidence, not for each "
            "class, each group or each image."
        )
        said.append(
            "A wrong label counts as an error of the model: if 2 % of the labels are wrong, a "
            "perfect model looks up to 2 points overconfident, and a calibrator fitted on these "
            "labels makes it underconfident by as much."
        )
    if not_run(report["energy"]) is None:
        said.append(
            "The energy of an ordinarily trained classifier is a score that sorts images. "
            "It is not a probability of the image."
        )
    if report["ood"]:
        names = ", ".join(report["ood"])
        said.append(
            f"Detection of unknown images was measured on {names} only. Other unknown images may "
            "be accepted more often."
        )
    else:
        said.append("No unknown images were given, so this report cannot say how many get through.")
    if not_run(report["gate"]) is None:
        said.append(
            "The gate's guarantee limits how many images like yours are refused. It promises "
            "neither that unknown images are refused nor that accepted predictions are right."
        )
    if not_run(report["robustness"]) is not None:
        said.append("No deliberate attack and no image corruption was tried.")
    else:
        said += robustness_facts.limits(report["robustness"])
    if not_run(report["finetune"]) is None:
        said.append(
            "What is said of fine-tuning was measured by that run, on the rows it was given. "
            "Nothing of it was measured again here."
        )
    return said
