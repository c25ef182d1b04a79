"""What the pages show of fine-tuning: both nets side by side, losses as plainly as gains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Item = Mapping[str, Any]

OUTCOME_WORDS = {"accepted": "Accepted", "start returned": "Start returned"}
# (name, kind of its values, kind of a difference)
METRICS = {
    "accuracy": ("Accuracy", "percent"),
    "nll": ("NLL", "small"),
    "ece": ("ECE, 15 bins", "percent"),
    "brier": ("Brier score", "small"),
}
ROLES = {
    "unseen": ("never seen", "Nothing was trained, chosen or accepted on these images."),
    "validation": ("in the acceptance test", "Sets that the acceptance test looked at."),
    "guard_kind": (
        "kinds that chose the checkpoint",
        (
            "Made from the evaluation images. Images of these kinds, made from validation rows, "
            "chose the checkpoint and were a part of the acceptance test."
        ),
    ),
    "trained_on": (
        "trained on",
        "Negatives of these kinds, or this very set, were trained on: a gain here proves nothing.",
    ),
}
# (panel, title, what it shows)
PANELS = (
    (
        "energy",
        "Energies",
        (
            "Mean energy of the data and of the negatives; the gap between them is what an energy "
            "term widens."
        ),
    ),
    ("auroc", "Unknown images", "The diamond is the state that was chosen."),
    (
        "accuracy",
        "Accuracy",
        "A cross marks a state that was not eligible: it lost more than is allowed.",
    ),
    ("loss", "Loss", "Its parts are weighted as they are summed."),
)
BETTER_WORDS = {True: "better", False: "worse", None: "no clear change"}
BETTER_STATUS = {True: "good", False: "bad", None: "not_run"}
FLAGGED = "raised: the robust accuracy may be too good to be true"


def ran(section: Item) -> bool:
    """Tell whether a section has numbers."""
    return "not_run" not in section


def difference(metric: Item | None, kind: str) -> str:
    """Write a difference with its sign: shares in points, all else with the digits of its kind.

    Example:
        >>> difference({"value": -0.0123}, "percent"), difference({"value": 0.0123}, "score")
        ('−1.23 points', '+0.012')
    """
    if metric is None or metric["value"] is None:
        return fmt.NOTHING
    if kind == "percent":
        return fmt.points(metric["value"]) if metric["value"] else "0 points"
    return _signed(metric["value"], kind)


def difference_interval(metric: Item | None, kind: str) -> str:
    """Write the interval of a difference in brackets.

    Example:
        >>> difference_interval({"value": 0.01, "low": -0.002, "high": 0.022}, "score")
        '[−0.002, +0.022]'
    """
    if metric is None or metric.get("low") is None or metric.get("high") is None:
        return ""
    if kind == "percent":
        return fmt.interval({**metric}, "points")
    return f"[{_signed(metric['low'], kind)}, {_signed(metric['high'], kind)}]"


def whole_difference(item: Item, kind: str) -> str:
    """Write a difference with its interval and what it means."""
    found = item["difference"]
    text = f"{difference(found, kind)} {difference_interval(found, kind)}".rstrip()
    return f"{text}, {BETTER_WORDS[item['better']]}"


def key_changes(report: Item) -> Iterator[tuple[str, Item, str]]:
    """List the comparisons that a summary needs: name, comparison, kind."""
    comparison = report["comparison"]
    if ran(comparison):
        yield "Accuracy", comparison["before"]["accuracy"], "percent"
        if comparison["after"]:
            yield "NLL after temperature", comparison["after"]["nll"], "small"
            yield "ECE after temperature", comparison["after"]["ece"], "percent"
        else:
            yield "NLL", comparison["before"]["nll"], "small"
            yield "ECE", comparison["before"]["ece"], "percent"
    means = {
        f"Mean AUROC of the energy: {name}": item
        for name, item in report["ood_means"].items()
        if name != ROLES["trained_on"][0]
    }
    shown = {
        f"AUROC of the energy on {name}": found["auroc"]
        for name, found in report["ood"].items()
        if found["role"] == "unseen"
    }
    # One set that was never seen says more than any mean of others; of several, their mean does.
    alone = list(shown.items())[:1] if len(shown) == 1 else []
    for name, item in [*alone, *means.items()][:2]:
        yield name, item, "score"
    if ran(report["robustness"]):
        norm, row = reference(report["robustness"])
        if row is not None:
            attacks = ", ".join(row["attacks"])
            at = f"{norm['norm']} {row['text']}"
            yield f"Robust accuracy at {at} ({attacks})", row["worst_case"], "percent"


def reference(section: Item) -> tuple[Item, Item | None]:
    """Return the first norm with its reference budget, or the largest one that was compared."""
    norm = section["norms"][0]
    whole = [row for row in norm["rows"] if row["worst_case"] is not None]
    chosen = [row for row in whole if row["text"] == norm["reference"]]
    return norm, next(iter(chosen or whole[::-1]), None)


def changed(report: Item, *, better: bool) -> list[tuple[str, Item, str]]:
    """List everything whose interval says better, or worse; what was trained on is left out."""
    return [entry for entry in _all_changes(report) if entry[1]["better"] is better]


def unclear(report: Item) -> int:
    """Count the figures that the rows at hand cannot tell apart."""
    return sum(entry[1]["better"] is None for entry in _all_changes(report))


def _all_changes(report: Item) -> Iterator[tuple[str, Item, str]]:
    comparison = report["comparison"]
    if ran(comparison):
        for side, suffix in (("before", ""), ("after", " after temperature")):
            for key, item in comparison[side].items():
                name, kind = METRICS[key]
                yield name + suffix, item, kind
    for name, found in report["ood"].items():
        if found["role"] != "trained_on":
            yield f"AUROC on {name}", found["auroc"], "score"
            yield f"FPR95 on {name}", found["fpr95"], "percent"
    robustness = report["robustness"]
    if ran(robustness):
        for norm in robustness["norms"]:
            for row in norm["rows"]:
                if row["worst_case"] is not None:
                    at = f"{norm['norm']} {row['text']}"
                    yield f"Robust accuracy at {at}", row["worst_case"], "percent"
        if robustness["corrupted"] is not None:
            yield "Accuracy on corrupted images", robustness["corrupted"]["accuracy"], "percent"


def ood_groups(report: Item) -> list[tuple[str, str, dict[str, Any]]]:
    """Group the OOD sets by what training knew of them: heading, note, sets by name."""
    groups = []
    for role, (heading, note) in ROLES.items():
        sets = {name: item for name, item in report["ood"].items() if item["role"] == role}
        if sets:
            groups.append((heading, note, sets))
    return groups


def test_kind(test: Item) -> str:
    """Say how the figures of an acceptance test are written."""
    for part, kind in (("acc", "percent"), ("nll", "small"), ("auroc", "score")):
        if part in test["name"]:
            return kind
    return "number"


def amount(value: float | None, kind: str, *, signed: bool = False) -> str:
    """Write one number of an acceptance test."""
    if value is None:
        return "–"
    if not signed:
        return fmt.KINDS[kind](value)
    return difference({"value": value}, kind)


def tests_sentence(acceptance: Item) -> str:
    """Say how many acceptance tests passed, on how many rows."""
    tests = acceptance["tests"]
    passed = sum(test["passed"] for test in tests)
    return (
        f"{passed} of {len(tests)} tests passed, on {fmt.count(acceptance['n'])} rows that were "
        "used for nothing else. Every test must pass, or the start is returned."
    )


def temperature_sentence(temperature: Item) -> str:
    """Say which temperatures were fitted, or why one was not."""
    if temperature["note"]:
        note: str = temperature["note"]
        return note
    start, candidate = (
        fmt.number(temperature[side], significant=3) for side in ("start", "candidate")
    )
    return (
        f"T = {start} for the start and T = {candidate} for the candidate, each fitted on the "
        "selection rows."
    )


def training_sentence(training: Item) -> str:
    """Describe the course of a run in words."""
    said = [f"{fmt.count(training['made'])} updates were made"]
    rollbacks = max(training["updates"]["attempt"], default=0)
    if rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks} times"
        said[0] += (
            f"; training was rolled back {times}: a dotted line in the figures, and what was "
            "undone is thin"
        )
    first, last = (_ends(training["updates"], key) for key in ("energy_data", "energy_negatives"))
    if first and last:
        said.append(
            f"The mean energy of the data went from {fmt.energy(first[0])} to "
            f"{fmt.energy(first[1])}, that of the negatives from {fmt.energy(last[0])} to "
            f"{fmt.energy(last[1])}"
        )
    evaluations = [row for row in training["evaluations"] if row["mean_auroc"] is not None]
    chosen = [row for row in evaluations if row["best"]]
    if chosen:
        best = chosen[-1]
        said.append(
            f"The state chosen is that of update {best['update']}: mean AUROC "
            f"{fmt.score(best['mean_auroc'])} and accuracy {fmt.percent(best['accuracy'])} on the "
            "selection rows"
        )
    return ". ".join(said) + "."


def _ends(columns: Item, key: str) -> tuple[float, float] | None:
    """Return the means of the first and of the last tenth of a column."""
    known = [value for value in columns[key] if value is not None]
    few = max(1, len(known) // 10)
    return (sum(known[:few]) / few, sum(known[-few:]) / few) if known else None


def limits(report: Item) -> list[str]:
    """Say what the numbers of this report do not promise."""
    said = [
        (
            "Every number describes images like the ones measured. Another camera, season or "
            "country needs its own measurement."
        ),
        (
            "Each interval covers the luck of drawing these images, by itself; of many intervals "
            "some will miss. Training again with another seed gives another net."
        ),
        (
            "The acceptance test bounds what accuracy and NLL may lose on rows like the acceptance "
            "rows. It promises nothing for single classes or groups."
        ),
        (
            "The energy of a fine-tuned classifier is a score that sorts images, trained on the "
            "negatives named here. Other unknown images may gain nothing, or lose."
        ),
    ]
    comparison = report["comparison"]
    if ran(comparison) and not comparison["own"]:
        said.append(
            "The figures are of the acceptance rows themselves, as no --data was given: where the "
            "candidate was accepted, they are a little too good."
        )
    if not ran(report["robustness"]):
        said.append("No deliberate attack was tried.")
    else:
        said.append(
            "A robust accuracy is an upper bound, not a certificate: it holds against the attacks "
            "named here with their budgets, without the gate, and a stronger attack may find more."
        )
    return said


def run_sentence(section: Item) -> str:
    """Say what run the section of a main report is of."""
    which = (
        "The candidate was accepted: it is the model of this report"
        if section["status"] == "accepted"
        else "The candidate was refused: the model of this report is the one that was given"
    )
    return (
        f"Objective {section['objective']}, {fmt.count(section['updates'])} updates, seed "
        f"{section['seed']}. {which}, as its weights show. The figures below were measured by "
        "that run."
    )


def section_means(section: Item) -> list[tuple[str, str, Item]]:
    """List the mean AUROCs of the section of a main report: name, note, comparison."""
    names = {
        "never_seen": ("Never seen", "nothing was trained, chosen or accepted on them"),
        "trained_on": ("Trained on", "a gain here proves nothing"),
    }
    found = []
    for key, (name, note) in names.items():
        item = section["mean_auroc"][key]
        if item is not None:
            sets = f"{item['sets']} set{'' if item['sets'] == 1 else 's'}"
            found.append((name, f"{sets}; {note}", item))
    return found


def no_loss(section: Item) -> str:
    """Say that nothing is worse, or that nothing was compared."""
    if not ran(section["acceptance"]):
        return "There was no candidate to compare."
    return "No figure is clearly worse."


def data_sets(report: Item) -> list[tuple[str, Item]]:
    """List the data sets with their names."""
    return list(report["data"].items())


def _signed(value: float, kind: str) -> str:
    text = f"{value:+.{4 if kind == 'small' else 3}f}"
    # A sign before rounded zeros tells on which side of 0 the end of an interval lies.
    return text.replace("-", "−") if value else text[1:]
