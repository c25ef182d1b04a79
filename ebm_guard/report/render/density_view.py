"""What the pages show of a learned density."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ebm_guard.report.render import format as fmt

if TYPE_CHECKING:
    from collections.abc import Mapping

    Item = Mapping[str, Any]

DENSITY_WORDS = {
    "offered": "Density offered",
    "not offered": "No density offered",
}
_BASES = {
    "gaussian_mixture": "Gaussians",
    "truncated_normal_mixture": "cut-off normals",
}


def density_sentence(section: Item) -> str:
    """Say what the density is, and what came of its checks."""
    where = (
        f"{fmt.count(section['dim'])} features of the last layer"
        if section["space"] == "features"
        else f"{fmt.count(section['dim'])} pixel values"
    )
    base = _BASES.get(section["base"], section["base"])
    found = f"The model is p = q exp(-E - c) on {where}, with q made of {base}. "
    if section["status"] == "offered":
        notes = "".join(f" {note[:1].upper()}{note[1:]}." for note in section["checks"]["notes"])
        return f"{found}Both checks agree with its normaliser.{notes}"
    return found + f"It is not to be used as a density: {section['reason']}."


def density_rows(section: Item) -> list[tuple[str, str, str]]:
    """List what was measured: name, figure, and what it is compared with."""
    checks = section["checks"]
    annealed = checks["annealed"]
    off, error = checks["difference"], checks["constant_standard_error"]
    ends = "" if off["low"] is None else f" [{100 * off['low']:+.1f}, {100 * off['high']:+.1f}]"
    expected = (
        f"the density itself expects {100 * checks['expected']:.1f} %: {100 * off['value']:+.1f}"
        f"{ends} points apart; 0 within {100 * checks['accuracy_tolerance']:g} of the interval "
        "passes"
    ).replace("-", "−")
    sampled = (
        f"{annealed['log_z']:.3f} nats, 95 % from {annealed['low']:.3f} to {annealed['high']:.3f}"
    )
    chains = (
        f"annealed importance sampling, {fmt.count(annealed['num_chains'])} chains, worth "
        f"{annealed['effective_chains']:.1f}; allowed beyond the interval: "
        f"{checks['nats_tolerance']:g} nats"
    )
    rows = [
        (
            "Telling held-out data from noise",
            f"right in {fmt.value(checks['accuracy'], 'percent')} of cases",
            expected,
        ),
        (
            "log Z, learned",
            f"{checks['learned']:.3f} nats",
            "refitted on training rows for the final weights"
            + ("" if error is None else f"; standard error {error:.3f} nats"),
        ),
        ("log Z, sampled", sampled, chains),
    ]
    if checks["exact"] is not None:
        exact = f"{checks['exact']:.3f} nats"
        rows.append(
            ("log Z, exact", exact, "in closed form: q and a linear head; the one that is used")
        )
    return rows


def density_bits(section: Item) -> list[tuple[str, Item]]:
    """List bits per dimension of the held-out rows, where the density may be called one."""
    if section["status"] != "offered":
        return []
    checks = section["checks"]
    names = {
        "bits": "the offered density",
        "bits_base": "q alone, without the energy",
        "bits_noise": "the density of the noise",
        "excess_base": "the offered density minus q alone, row by row",
        "excess_noise": "the offered density minus the noise, row by row",
    }
    return [(name, checks[key]) for key, name in names.items()]


def density_note(section: Item) -> str:
    """Say what bits per dimension can be compared with."""
    if section["space"] == "features":
        return (
            "Mean of -log2 p / D on the acceptance rows; lower is better. The figure hangs on the "
            "unit of the features: compare it within this table alone. Both checks can agree with "
            "a density that another model beats."
        )
    return (
        "Mean of -log2 p / D + 8 on the acceptance rows, with noise inside the cells of the bytes; "
        "lower is better, and 8 is what images drawn at random cost."
    )
