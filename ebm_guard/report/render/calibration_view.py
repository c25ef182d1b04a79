"""What the pages show of calibration: metric tables, captions, classes, and the other side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Mapping

# Key, name, how it is written, and what it says.
MAIN_METRICS = (
    ("ece", "ECE", "percent", "average gap between confidence and accuracy; lower is better"),
    ("smooth_ece", "Smooth ECE", "percent", "the same without bins; lower is better"),
    (
        "overconfidence",
        "Overconfidence",
        "points",
        "mean confidence minus accuracy; positive: too sure",
    ),
    ("nll", "NLL", "fixed", "penalty for probability not on the right class; lower is better"),
    (
        "brier",
        "Brier score",
        "fixed",
        "squared error of all probabilities, 0 to 2; lower is better",
    ),
    ("accuracy", "Accuracy", "percent", "share of right predictions"),
)
MORE_METRICS = (
    ("ece_adaptive", "Adaptive ECE", "percent", "ECE over bins with equally many images"),
    ("ece_l2_debiased", "Debiased L2 error", "percent", "root mean square gap, without its bias"),
    ("mce", "Largest gap (MCE)", "percent", "over bins with at least 30 images"),
    ("ece_classwise", "Classwise ECE", "percent", "mean over classes of the ECE of each"),
    ("brier_top_label", "Top-label Brier score", "small", "squared error of the confidence alone"),
    ("miscalibration", "Miscalibration", "small", "part of it that recalibration would remove"),
    (
        "discrimination",
        "Discrimination",
        "small",
        "part that confidence explains; higher is better",
    ),
    ("uncertainty", "Uncertainty", "small", "what a constant confidence would score"),
    ("aurc", "AURC", "small", "mean error rate over all coverages; lower is better"),
    ("e_aurc", "E-AURC", "small", "how much of it a perfect ranking would save"),
)


def reliability_caption(part: Mapping[str, Any]) -> str:
    """Describe a reliability diagram in numbers."""
    ece = part["ece"]
    null = (
        "" if ece["null95"] is None else f" (a perfect model: below {fmt.percent(ece['null95'])})"
    )
    return (
        f"ECE {fmt.metric(ece)}{null}, mean confidence minus accuracy "
        f"{fmt.metric(part['overconfidence'], 'points')}, n = {fmt.count(ece['n'])}, "
        f"{part['curve']['n_bins']} bins"
    )


def interval_methods(side: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Group the metrics by how their intervals were made."""
    found: dict[str, list[str]] = {}
    for key, name, _, _ in (*MAIN_METRICS, *MORE_METRICS):
        if key in side:
            found.setdefault(side[key]["method"], []).append(name)
    return list(found.items())


def classes_sentence(table: Mapping[str, Any]) -> str:
    """Say how many predicted classes are miscalibrated beyond chance."""
    side = f"{table['side']} calibration"
    if not table["flagged"]:
        return (
            f"No predicted class is miscalibrated beyond chance {side} (exact tests, Benjamini and "
            f"Hochberg at 5 % over {table['of']:,} classes)."
        )
    return (
        f"{table['flagged']:,} of {table['of']:,} predicted classes are miscalibrated beyond "
        f"chance {side}, although the average over all classes may look right (exact tests, "
        "Benjamini and Hochberg at 5 %)."
    )


def shifted_calibration(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List what happens to confidence on each side of the gate and on unknown images."""
    rows = []
    for key, name in (("accepted", "Accepted by the gate"), ("rejected", "Refused by the gate")):
        part = calibration[key]
        if part is not None:
            mean = part["accuracy"]["value"] + part["overconfidence"]["value"]
            rows.append({"name": name, "confidence": fmt.percent(mean), **part})
    for name, part in calibration["ood_confidence"].items():
        text = fmt.percent(part["before"]["value"])
        if part["after"] is not None:
            text = f"{fmt.percent(part['after']['value'])} (before: {text})"
        empty = {"accuracy": None, "overconfidence": None, "ece": None}
        rows.append({"name": name, "confidence": text, "n": part["before"]["n"], **empty})
    return rows


def selective_caption(selective: Mapping[str, Any]) -> str:
    """Describe the risk-coverage curve in numbers."""
    parts = [
        f"{fmt.percent(row['confidence']['realised'])} answered: accuracy "
        f"{fmt.metric(row['confidence']['accuracy'])}"
        for row in selective["accuracy_at"].values()
    ]
    return "; ".join([*parts, f"all answered: accuracy {fmt.metric(selective['accuracy'])}"])


def curve_rows(curve: Mapping[str, Any], points: int = 20) -> list[dict[str, Any]]:
    """List some points of a risk-coverage curve, evenly spread, the last one included."""
    last = len(curve["coverage"]) - 1
    places = sorted({round(last * step / points) for step in range(1, points + 1)})
    return [
        {
            "coverage": curve["coverage"][at],
            "risk": {
                "value": curve["risk"][at],
                "low": curve["low"][at],
                "high": curve["high"][at],
            },
        }
        for at in places
    ]


def joint_rows(joint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Count right and wrong rows by confidence, the surest first."""
    edges = joint["confidence_edges"]
    rows = [
        {
            "low": edges[at],
            "high": edges[at + 1],
            "right": sum(joint["right"][at]),
            "wrong": sum(joint["wrong"][at]),
        }
        for at in range(len(edges) - 1)
    ]
    return rows[::-1]
