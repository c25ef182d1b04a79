"""What the pages show of robustness: tables in which no number stands without its attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import corruption_view
from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Cell = dict[str, Any]

BUDGET = "not run: budget"
NORM_WORDS = {
    "linf": "each pixel may change by up to epsilon",
    "l2": "the whole change may be epsilon long",
}
WAYS = (
    ("stop_at_flip", "Stops at the first wrong label", "as most tests of a gate do"),
    ("plain", "Runs on to the last step", "does not know of the gate"),
    ("gate_aware", "Knows the gate", "asks for wrong and accepted"),
)


def ran(section: Mapping[str, Any]) -> bool:
    """Tell whether attacks ran."""
    return "not_run" not in section


def reference(section: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Return the first norm, and its row that the verdict speaks of, or None without a whole one.

    That is the row at the reference epsilon, or the largest at which all attacks ran.
    """
    norm = section["norms"][0]
    whole = [row for row in norm["epsilons"] if row["worst_case"] is not None]
    chosen = [row for row in whole if row["text"] == norm["reference"]]
    return norm, next(iter(chosen or whole[::-1]), None)


def attack_labels(row: Mapping[str, Any]) -> str:
    """Name the attacks of a row with their budgets."""
    return ", ".join(item["label"] for item in row["attacks"])


def gate_labels(row: Mapping[str, Any]) -> str:
    """Name the attacks on the gate with their budgets."""
    return ", ".join(label.replace("_", " ") for label in row["gated"]["labels"])


def complement(metric: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Turn the share of images that withstand into the share that does not.

    Example:
        >>> complement({"value": 0.25, "low": 0.125, "high": 0.5})
        {'value': 0.75, 'low': 0.5, 'high': 0.875}
    """
    if metric is None:
        return None
    ends = {"value": metric["value"], "low": metric["high"], "high": metric["low"]}
    turned = {name: None if value is None else 1 - value for name, value in ends.items()}
    return {**metric, **turned}


def key_metrics(section: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
    """List the numbers that a summary needs, each named with its attack and budget."""
    norm, row = reference(section)
    if row is not None:
        at = f"{norm['norm']} {row['text']}"
        yield f"Robust accuracy at {at} ({attack_labels(row)})", row["worst_case"], "percent"
        if row["gated"] is not None and row["gated"]["aware"] is not None:
            name = f"Wrong and accepted at {at}, gate known ({gate_labels(row)})"
            yield name, complement(row["gated"]["aware"]), "percent"
    found = section.get("purification")
    if found is not None and found["worst_case"] is not None:
        label = found["modes"][0]["label"]
        name = f"Robust accuracy with purification at {found['norm']} {found['text']} ({label})"
        yield name, found["worst_case"], "percent"
    for table in corruption_view.tables(section):
        name = f"Accuracy on corrupted images ({table['source']})"
        yield name, table["summary"]["accuracy"], "percent"


def norm_table(section: Mapping[str, Any], norm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the rows of the attacks without the gate, the images as they are first."""
    attacks = norm["epsilons"][0]["attacks"]
    rows = [
        {
            "text": "0",
            "note": "no attack",
            "attacks": [cell(None, "–") for _ in attacks],
            "worst": cell(section["clean"]),
            "success": cell(None, "–"),
            "rounded": cell(None, "–"),
            "mark": False,
        }
    ]
    for row in norm["epsilons"]:
        missing = _why(row)
        rows.append(
            {
                "text": row["text"],
                "note": _note(section, norm, row),
                "attacks": [
                    cell(item["robust_accuracy"], item["reason"]) for item in row["attacks"]
                ],
                "worst": cell(row["worst_case"], missing),
                "success": cell(row["success_rate"], missing or "none was right"),
                "rounded": cell(row["rounded"], missing),
                "mark": _marked(section, norm, row),
            }
        )
    return rows


def gate_table(section: Mapping[str, Any], norm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the rows of the attacks with the gate in the loop; empty without a gate."""
    if section["clean_gated"] is None:
        return []
    forced = has_forced(norm)
    empty = cell(None, "–")
    rows = [
        {
            "text": "0",
            "note": "no attack",
            "known": cell(complement(section["clean_gated"])),
            "unknown": cell(complement(section["clean_gated"])),
            "success": empty,
            "rejected": empty,
            "forced": empty,
            "mark": False,
        }
    ]
    for row in norm["epsilons"]:
        gated = row["gated"]
        missing = gated["reason"] or _why(row)
        rows.append(
            {
                "text": row["text"],
                "note": _note(section, norm, row),
                "known": cell(complement(gated["aware"]), missing),
                "unknown": cell(complement(gated["plain"]), missing),
                "success": cell(gated["success_rate"], missing or "none was right and accepted"),
                "rejected": cell(gated["rejected"], missing or "none was fooled"),
                "forced": cell(gated["forced_rejection"], BUDGET if forced else ""),
                "mark": _marked(section, norm, row),
            }
        )
    return rows


def _note(section: Mapping[str, Any], norm: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Say what an epsilon is special for, or ''."""
    first, chosen = reference(section)
    if norm is first and row is chosen:
        return "the verdict's budget"
    return "reference" if row["text"] == norm["reference"] else ""


def _marked(section: Mapping[str, Any], norm: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Tell whether a row stands out: the verdict's, and of other norms the reference."""
    first, chosen = reference(section)
    if norm is first and chosen is not None:
        return row is chosen
    return bool(row["text"] == norm["reference"])


def right_at_first(norm: Mapping[str, Any]) -> str:
    """Say of how many images the success rates of a norm are."""
    known = [row["success_rate"]["n"] for row in norm["epsilons"] if row["success_rate"]]
    return f"of the {fmt.count(known[0])} images right at first" if known else "of none"


def ood_rows(section: Mapping[str, Any], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the epsilons of an OOD set, those that the budget cut with the words for it."""
    done = {row["text"]: row for row in found["rows"]}
    texts = dict.fromkeys([*done, *(row["text"] for row in section["norms"][0]["epsilons"])])
    return [
        {
            "text": text,
            **{
                name: cell(done[text][name] if text in done else None, BUDGET)
                for name in ("accepted", "auroc", "fpr95")
            },
        }
        for text in texts
    ]


def has_forced(norm: Mapping[str, Any]) -> bool:
    """Tell whether a rejection was forced at any epsilon."""
    gated = [row["gated"] for row in norm["epsilons"] if row["gated"] is not None]
    return any(item["forced_rejection"] is not None for item in gated)


def cell(metric: Mapping[str, Any] | None, words: str = "") -> Cell:
    """Return a metric, or the words that stand in its place."""
    return {"metric": metric, "words": "" if metric is not None else words or "not run"}


def _why(row: Mapping[str, Any]) -> str:
    """Say why a row has no worst case, or ''."""
    if row["worst_case"] is not None:
        return ""
    return next((item["reason"] for item in row["attacks"] if item["reason"]), "not run")


def curve_rows(section: Mapping[str, Any], norm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List what the curve shows: images that withstand, at each epsilon."""
    clean = {"none": section["clean"], "unknown": section["clean_gated"]}
    rows = [{"text": "0", **clean, "known": section["clean_gated"]}]
    for row in norm["epsilons"]:
        gated = row["gated"] or {"plain": None, "aware": None}
        rows.append(
            {
                "text": row["text"],
                "none": row["worst_case"],
                "unknown": gated["plain"],
                "known": gated["aware"],
            }
        )
    return rows


def curve_caption(section: Mapping[str, Any], norm: Mapping[str, Any]) -> str:
    """Describe the curve of a norm in words, attacks and budgets named."""
    clean = f"Without attack {fmt.metric(section['clean'])} of the images are right."
    whole = [row for row in norm["epsilons"] if row["worst_case"] is not None]
    if not whole:
        return f"{clean} No epsilon got all attacks within the time budget."
    chosen = [row for row in whole if row["text"] == norm["reference"]]
    row = (chosen or whole[-1:])[0]
    said = [
        clean,
        (
            f"At {norm['norm']} {row['text']} the attacks ({attack_labels(row)}) leave "
            f"{fmt.metric(row['worst_case'])}."
        ),
    ]
    gated = row["gated"]
    if gated is not None and gated["aware"] is not None:
        aware, clause = fmt.metric(gated["aware"]), ""
        if gated["plain"] is not None:
            clause = f"; against one unaware of it, {fmt.metric(gated['plain'])}"
        said.append(
            "With the gate, an image withstands as long as it is not both wrong and accepted: "
            f"against an attacker who knows the gate ({gate_labels(row)}) {aware} do{clause}."
        )
    return " ".join(said)


def distance(value: float | None) -> str:
    """Write a distance in pixel units and in grey values of 255.

    Example:
        >>> distance(8 / 255)
        '0.0314 (8/255)'
    """
    if value is None:
        return "beyond what was found"
    return f"{fmt.number(value, significant=3)} ({fmt.number(255 * value, significant=3)}/255)"


def minimal_sentence(norm: Mapping[str, Any]) -> str:
    """Say how far the nearest wrong image is."""
    found = norm["minimal"]
    low, _, _, _, high = found["quantiles"]
    start = (
        f"Smallest change that fools, {norm['norm']} ({found['label']}, {fmt.count(found['n'])} "
        "images, those wrong from the start at distance 0)"
    )
    if found["median"] is None:
        some = f"found for {fmt.count(found['found'])} of {fmt.count(found['n'])} images"
        return f"{start}: {some}, too few for a median."
    return (
        f"{start}: median {distance(found['median'])}, 90 % of the images between "
        f"{distance(low)} and {distance(high)}."
    )


def energy_caption(path: Mapping[str, Any], *, gated: bool) -> str:
    """Describe the energy along the attack in numbers."""
    median = path["median"]
    at_flip = (
        f" At the first wrong label it is {fmt.energy(median['first_flip'])}: on the border "
        "between two classes."
        if median["first_flip"] is not None
        else ""
    )
    which = "right and accepted" if gated else "right"
    ending = ""
    if median["end"] is not None and median["clean"] is not None:
        word = "more" if median["end"] < median["clean"] else "less"
        ending = f": it looks {word} familiar than the images were"
    return (
        f"Energy of the {fmt.count(path['n'])} images that were {which} at first, along "
        f"PGD-{path['num_steps']} on cross-entropy at linf {path['text']}: the median starts at "
        f"{fmt.energy(median['clean'])}.{at_flip} The attack that runs on ends at "
        f"{fmt.energy(median['end'])}{ending}. Lower energy looks more familiar, higher more "
        "foreign."
    )


def quantile_rows(path: Mapping[str, Any]) -> list[tuple[int, Sequence[float | None]]]:
    """List the steps with the quantiles of the energy."""
    return list(enumerate(path["quantiles"]))


def moments(path: Mapping[str, Any]) -> list[tuple[str, int, Any, Any, Any]]:
    """List the three moments: name, images, lowest, median and highest energy."""
    names = {"clean": "As it is", "first_flip": "At the first wrong label", "end": "At the end"}
    rows = []
    for key, name in names.items():
        values = [value for value in path["energy"][key] if value is not None]
        low, high = (min(values), max(values)) if values else (None, None)
        rows.append((name, len(values), low, path["median"][key], high))
    return rows
