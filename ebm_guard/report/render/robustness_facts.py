"""What the pages say of an evaluation of robustness: flags, limits, what was left out, settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import corruption_view, purification_view
from ebm_guard.report.render import format as fmt
from ebm_guard.report.render.robustness_view import has_forced

if TYPE_CHECKING:
    from collections.abc import Mapping

UPPER_BOUND = (
    "A robust accuracy is an upper bound, not a certificate: it holds against the attacks named "
    "here with their budgets, and a stronger attack may find more."
)
FLAG_NAMES = {
    "square_wins": "An attack without gradients finds more",
    "fgsm_beats_pgd": "One step finds more than many",
    "large_epsilon": "Still right at a huge budget",
    "flat_curve": "A larger budget does not help",
    "zero_gradients": "Gradients are zero",
    "random_forward": "The model answers at random",
    "not_logits": "The outputs are not logits",
    "hidden_gradient": "Gradients do not pass",
    "more_steps_gain": "More steps still gain",
}


def limits(section: Mapping[str, Any]) -> list[str]:
    """Say what attacks that ran do not promise."""
    norms = " and ".join(item["norm"] for item in section["norms"])
    said = [
        UPPER_BOUND,
        (
            f"The attacks change the pixels of a digital image within {norms}. Printed or filmed "
            "patterns, other changes (rotation, patches, colour) and poisoned training data are "
            "not covered."
        ),
    ]
    sources = [table["source"] for table in corruption_view.tables(section)]
    if sources:
        said.append(
            f"Corruptions measured: {'; '.join(sources)}. Other weather, cameras and compression "
            "need their own measurement."
        )
    return said


def raised(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List the flags that are raised."""
    return [flag for flag in section["flags"] if flag["status"] == "raised"]


def flags_sentence(section: Mapping[str, Any]) -> str:
    """Say how many checks found something."""
    statuses = [flag["status"] for flag in section["flags"]]
    counts = {name: statuses.count(name) for name in ("raised", "clear", "not_run")}
    if counts["raised"]:
        start = f"{counts['raised']} of {len(statuses)} checks raised a flag: the attacks may be"
        start += " blinded, and the robust accuracy too good to be true."
    else:
        start = f"No flag was raised by the {counts['clear']} checks that ran."
    skipped = counts["not_run"]
    return start + (f" {skipped} did not run." if skipped else "")


def left_out(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what was not run, and why: what the budget cut, and what was never asked for."""
    said = [(item["name"], item["reason"]) for item in section["left_out"]]
    gate = section["gate"]
    if "not_run" in gate:
        said.insert(0, ("The gate in the loop", gate["not_run"]))
    norms = section["norms"]
    absent = [
        ("Smallest change that fools", "FMN", any(item["minimal"] for item in norms)),
        ("Energy along the attack", "energy along", section["energy_path"] is not None),
        ("Corruptions", "corruption", bool(corruption_view.tables(section))),
        ("pyautoattack on the images left", "pyautoattack", section["reference"] is not None),
    ]
    if "not_run" not in gate:
        forced = any(has_forced(item) for item in norms)
        absent += [
            ("Forced rejection of right images", "force a rejection", forced),
            ("Unknown images made accepted", "make ", bool(section["ood"])),
        ]
    for name, start, there in absent:
        if not there and not any(start in item["name"] for item in section["left_out"]):
            said.append((name, f"not a part of this run (preset {section['preset']})"))
    return said


def facts(section: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List how the evaluation was made, as (name, words)."""
    settings, cost, run = section["settings"], section["cost"], section["run"]
    budget = settings["time_budget"]
    fewer = "; fewer than the preset, for the time budget" if settings["images_cut"] else ""
    rows = [
        (
            "Images",
            (
                f"{fmt.count(section['n'])} of {fmt.count(section['of'])}, drawn at random (seed "
                f"{settings['seed']}), {section['label_source']}"
                f"{fewer}"
            ),
        ),
        ("Preset", section["preset"]),
        (
            "Cost",
            (
                f"{fmt.count(cost['gradients'])} gradients "
                f"({fmt.number(cost['gradients_per_image'])} per image) and "
                f"{fmt.count(cost['forwards'])} further forward passes "
                f"({fmt.number(cost['forwards_per_image'])} per image), "
                f"{fmt.number(run['seconds'], significant=3)} s"
            ),
        ),
        ("Time budget", "none" if budget is None else f"{fmt.number(budget)} s"),
        ("Batch size", fmt.count(settings["batch_size"])),
        ("Versions", ", ".join(f"{name} {text}" for name, text in settings["versions"].items())),
    ]
    if settings["random_inference"]:
        rows.append(
            (
                "Random model",
                (
                    f"gradients averaged over {settings['eot_samples']} passes; an image counts as "
                    f"fooled where most of {settings['success_draws']} fresh passes are wrong"
                ),
            )
        )
    found = purification_view.result(section)
    if found is not None:
        rows.append(("Purification", purification_view.facts(found)))
    outside = sum(max(row["outside"] for row in norm["epsilons"]) for norm in section["norms"])
    if outside:
        text = f"{fmt.count(outside)} results outside the budget, counted as not fooled"
        rows.append(("Refused results", text))
    return rows
