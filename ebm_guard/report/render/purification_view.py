"""What the pages show of a purified classifier under attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt
from ebm_guard.report.render.robustness_view import BUDGET, cell

if TYPE_CHECKING:
    from collections.abc import Mapping

MODE_WORDS = {
    "identity": "the gradient at the refined image (BPDA)",
    "unrolled": "the gradient through all steps of the sampler",
    "transfer": "the gradient of the bare classifier",
}
WARNING = (
    "Robustness that purification seemed to give was broken by adaptive attacks before (Athalye et "
    "al. 2018; Croce et al. 2022): read it as an upper bound that a better attack will lower. The "
    "gate is not asked here."
)


def result(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what the attacks of the purified classifier found, or None."""
    found: Mapping[str, Any] | None = section.get("purification")
    return found


def sentence(found: Mapping[str, Any]) -> str:
    """Say in numbers what purification costs and keeps."""
    at = f"{found['norm']} {found['text']}"
    said = [
        (
            f"Each image takes {found['settings']['num_steps']} SGLD steps down its energy before "
            f"it is classified. Without attack {fmt.metric(found['clean'])} of "
            f"{fmt.count(found['n'])} images are right; without purification "
            f"{fmt.metric(found['bare_clean'])}."
        )
    ]
    if found["worst_case"] is None:
        said.append(f"At {at} not all three gradients were run, so no robust accuracy is given.")
    else:
        each = ", ".join(
            f"{mode['name']} {fmt.metric(mode['robust_accuracy'])}" for mode in found["modes"]
        )
        said.append(
            f"At {at} the worst of three gradients leaves {fmt.metric(found['worst_case'])} "
            f"({each})."
        )
    if found["bare"] is not None:
        said.append(
            f"The bare classifier keeps {fmt.metric(found['bare'])} of the same images against "
            "the attacks above, which take more steps than those on the purified one."
        )
    return " ".join(said)


def rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the classifier bare and purified, without attack and under each gradient."""
    listed: list[dict[str, Any]] = [
        {"name": "Bare, no attack", "note": "", "right": cell(found["bare_clean"])},
        {
            "name": "Bare, all attacks above",
            "note": "",
            "right": cell(found["bare"], BUDGET),
        },
        {"name": "Purified, no attack", "note": "", "right": cell(found["clean"])},
    ]
    for mode in found["modes"]:
        right = cell(mode["robust_accuracy"], mode["reason"])
        name = f"Purified, {mode['name']}"
        note = f"{MODE_WORDS[mode['name']]}; {mode['label']}"
        listed.append({"name": name, "note": note, "right": right, "cost": mode})
    worst = cell(found["worst_case"], "not all three were run")
    note = "share that no gradient fools"
    listed.append({"name": "Purified, worst case", "note": note, "right": worst, "mark": True})
    return [{"cost": None, "mark": False, **row} for row in listed]


def facts(found: Mapping[str, Any]) -> str:
    """Say how the purified classifier works and was judged."""
    settings = found["settings"]
    limits = {"clip": "a step changes a pixel by at most", "radius": "in all by at most"}
    bounds = [
        f"{words} {fmt.number(settings[name])}"
        for name, words in limits.items()
        if settings[name] is not None
    ]
    return "; ".join(
        [
            (
                f"SGLD, {settings['num_steps']} steps of {fmt.number(settings['step_size'])}, "
                f"noise {fmt.number(settings['noise_std'])}, at the start "
                f"{fmt.number(settings['start_noise_std'])}"
            ),
            *bounds,
            (
                f"passes of a prediction per image: {fmt.count(found['gradients_per_image'])} with "
                f"a gradient, {fmt.count(found['forwards_per_image'])} without; chains averaged: "
                f"{fmt.count(settings['num_chains'])}"
            ),
            (
                f"attacked by the margin; gradients a step: {fmt.count(found['eot_samples'])}; "
                "predictions that a verdict is the majority of: "
                f"{fmt.count(found['success_draws'])}"
            ),
        ]
    )
