"""What the pages show of corruptions: a sentence, a table, and where the set comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Mapping

COLUMNS = (
    ("accuracy", "Accuracy", "percent"),
    ("ece", "ECE", "percent"),
    ("nll", "NLL", "fixed"),
    ("energy_auroc", "Energy AUROC", "score"),
    ("coverage", "Accepted by the gate", "percent"),
    ("accuracy_accepted", "Accuracy of accepted", "percent"),
)
# The panels of the heat map, in order, and what their tint says.
PANELS = {
    "accuracy": "Accuracy",
    "ece": "Calibration error (ECE)",
    "coverage": "Accepted by the gate",
}
PANEL_WORDS = {
    "accuracy": "The stronger the orange, the more of the clean accuracy is lost.",
    "ece": "The stronger the orange, the less the confidence can be trusted.",
    "coverage": "The stronger the blue, the more is refused.",
}


def tables(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the tables of a robustness section: the built-in set, and published ones."""
    built_in = section["corruptions"]
    return [*([] if built_in is None else [built_in]), *section["published"]]


def columns(table: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List the columns that a table of corruptions has numbers for."""
    cells = [table["clean"], *table["cells"]]
    return [item for item in COLUMNS if any(cell[item[0]] is not None for cell in cells)]


def rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the clean images, the mean, and every corruption by severity."""
    mean = {"accuracy_accepted": None, **table["summary"], "n": table["n"]}
    named = [("clean", "", table["clean"]), ("mean of all cells", "", mean)]
    named += [(words(cell["name"]), str(cell["severity"]), cell) for cell in table["cells"]]
    return [
        {
            "name": name,
            "severity": severity,
            "metrics": {key: cell[key] for key, *_ in COLUMNS},
            "mark": name == "mean of all cells",
        }
        for name, severity, cell in named
    ]


def sentence(table: Mapping[str, Any]) -> str:
    """Sum the corruptions up in words, their source named."""
    summary, clean, worst = table["summary"], table["clean"], table["summary"]["worst"]
    severities = ", ".join(str(item) for item in table["severities"])
    many = "severities" if len(table["severities"]) > 1 else "severity"
    lowest = next(
        cell["accuracy"]
        for cell in table["cells"]
        if (cell["name"], cell["severity"]) == (worst["name"], worst["severity"])
    )
    parts = [
        (
            f"{table['source'][:1].upper()}{table['source'][1:]}: {len(table['names'])} types at "
            f"{many} {severities}, {fmt.count(table['n'])} images each. Accuracy "
            f"{fmt.metric(summary['accuracy'])} on average, {fmt.metric(clean['accuracy'])} on the "
            f"same images clean; worst: {words(worst['name'])} at severity {worst['severity']}, "
            f"{fmt.metric(lowest)}."
        )
    ]
    if summary["ece"] is not None and clean["ece"] is not None:
        parts.append(
            f"ECE {fmt.metric(summary['ece'])} on average ({fmt.metric(clean['ece'])} clean)."
        )
    if summary["coverage"] is not None and clean["coverage"] is not None:
        parts.append(
            f"The gate accepts {fmt.metric(summary['coverage'])} on average "
            f"({fmt.metric(clean['coverage'])} clean)."
        )
    if summary["mce"] is not None:
        parts.append(f"mCE {fmt.metric(summary['mce'])} (relative to AlexNet's errors).")
    return " ".join(parts)


def words(name: str) -> str:
    """Write the name of a corruption as words."""
    return name.replace("_", " ")
