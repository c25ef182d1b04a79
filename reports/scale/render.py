"""Write the tables of reports/scale.md from reports/scale/results.json.

Run: python reports/scale/render.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "scale.md"
SIZES = (10, 100, 1000)
SCRAPE_SECONDS = 15
MB = 1e6
RULES = {
    "merged": "`merge_evidence`, at any time",
    "bonferroni": "one replica reaches R / delta",
    "mean_at_one_look": "average wealth, at one planned look",
    "mean_at_every_look": "average wealth, at every look (nothing promises it)",
    "any_alone": "any replica at its own 1 / delta (= the largest wealth)",
    "product": "product of all wealths, at any time",
}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def costs(found: dict[str, Any]) -> str:
    nets = {
        name: net
        for name, net in found["costs"].items()
        if isinstance(net, dict) and "batch" in net
    }
    scores = next(iter(nets.values()))["decision_cpu_seconds_per_million"]
    rows = [
        ["bare model", *(number(net["bare_cpu_seconds_per_million"]) for net in nets.values())],
        [
            "guard / bare, energy, same round (quartiles)",
            *(
                f"{net['guard_over_bare_ratio_median']:.3f} ({low:.3f}, {high:.3f})"
                for net in nets.values()
                for low, high in [net["guard_over_bare_ratio_quartiles"]]
            ),
        ],
    ]
    for score in scores:
        cells = [
            f"{number(net['decision_cpu_seconds_per_million'][score])} "
            f"({net['decision_share_of_bare'][score]:.2%})"
            for net in nets.values()
        ]
        rows.append([f"decision, `{score}`", *cells])
    return table(["CPU-seconds per million", *nets], rows)


def memory(found: dict[str, Any]) -> str:
    rows = []
    for name, scores in found["memory"].items():
        if not isinstance(scores, dict) or "energy" not in scores:
            continue
        for score, one in scores.items():
            rows.append(
                [
                    f"{name}, `{score}`",
                    f"{one['artefact_bytes'] / MB:.2f}",
                    f"{one['of_them_canary_inputs'] / MB:.2f}",
                    f"{one['network'] / MB:.0f}",
                    f"{one['guard_and_one_forward_pass'] / MB:.0f}",
                    f"{one['drift_monitor'] / MB:.1f}",
                ]
            )
    head = ["MB", "artefact on disk", "of it canary inputs", "network resident",
            "guard resident, one pass run", "drift monitor"]  # fmt: skip
    return table(head, rows)


def serving(found: dict[str, Any]) -> str:
    rows = []
    for name, net in found["serving"].items():
        if not isinstance(net, dict) or "serve" not in net:
            continue
        for kind, words in (("serve", name), ("serve_with_a_shadow", f"{name}, with a shadow")):
            if kind in net:
                one = net[kind]
                rows.append(
                    [
                        words,
                        f"{one['cpu_seconds_to_start']:.1f}",
                        f"{one['resident_at_start'] / MB:.0f}",
                        f"{one['resident_after_64_requests'] / MB:.0f}",
                        f"{one['resident_after_all_requests'] / MB:.0f}",
                        f"{one['requests']:,}",
                        number(one["cpu_seconds_per_million_requests"]),
                        f"{one['metrics_bytes']:,}",
                        f"{one['cpu_ms_per_scrape']:.1f}",
                    ]
                )
    head = ["one replica of `serve`", "CPU-s to start", "RSS at start, MB", "after 64 requests",
            "after all", "requests", "CPU-s per million requests", "/metrics bytes",
            "CPU-ms a scrape"]  # fmt: skip
    return table(head, rows)


def predict(found: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{net['predict']['cpu_seconds_of_a_run_without_images']:.1f}",
            number(net["predict"]["cpu_seconds_per_million_images"]),
        ]
        for name, net in found["serving"].items()
        if isinstance(net, dict) and "predict" in net
    ]
    head = ["`ebm-guard predict`", "CPU-s of an empty run", "CPU-s per million images"]
    return table(head, rows)


def replicas(found: dict[str, Any]) -> str:
    one = found["serving"]["cifar10_resnet20"]["serve"]
    merge, size = found["merging"], one["metrics_bytes"]
    memory_of = found["memory"]["imagenet_efficientnet_lite0"]
    quiet = {run["replicas"]: run for run in found["simulation"]["quiet"] if not run["mirrored"]}
    rows = [
        ["series in Prometheus", *(f"{one['metrics_series'] * n:,}" for n in SIZES)],
        [
            f"kB a second of scrapes, every {SCRAPE_SECONDS} s",
            *(number(size * n / SCRAPE_SECONDS / 1000) for n in SIZES),
        ],
        [
            "CPU-s to merge all pages once",
            *(number(merge[f"{n} replicas"]["pages_cpu_seconds"]) for n in SIZES),
        ],
        [
            "CPU-s to merge all saved monitors once",
            *(number(merge[f"{n} replicas"]["saved_monitors_cpu_seconds"]) for n in SIZES),
        ],
        ["resident memory of all, GB", *(
            number(one["resident_after_all_requests"] * n / 1e9) for n in SIZES
        )],
        ["roll-out, ImageNet `energy`, GB", *(
            number(memory_of["energy"]["artefact_bytes"] * n / 1e9) for n in SIZES
        )],
        ["roll-out, ImageNet `knn`, GB", *(
            number(memory_of["knn"]["artefact_bytes"] * n / 1e9) for n in SIZES
        )],
        [
            "a false alarm of some replica alone, simulated",
            *(
                f"{quiet[n]['rules']['any_alone']['alarms'] / quiet[n]['runs']:.1%}"
                for n in SIZES
            ),
        ],
        ["the same, bound min(1, R delta)", *(f"{min(1, n * 0.05):.0%}" for n in SIZES)],
        [
            "a false alarm of the merged evidence, simulated",
            *(f"{quiet[n]['rules']['merged']['alarms'] / quiet[n]['runs']:.1%}" for n in SIZES),
        ],
    ]  # fmt: skip
    return table(["cifar10_resnet20 under `serve`", *(f"{n:,} replicas" for n in SIZES)], rows)


def levels(found: dict[str, Any]) -> str:
    runs = found["simulation"]["quiet"]
    rows = []
    for rule, words in RULES.items():
        cells = []
        for run in runs:
            test = run["rules"][rule]
            kept = "" if test["keeps_level"] else ", **fails**"
            cells.append(f"{test['alarms']} of {run['runs']}{kept}")
        rows.append([words, *cells])
    head = [f"{run['replicas']:,}{', mirrored' if run['mirrored'] else ''}" for run in runs]
    return table(["quiet fleets that alarm", *head], rows)


def power(found: dict[str, Any]) -> str:
    names = {
        "merged": "`merge_evidence`",
        "bonferroni": "one at R / delta",
        "the_drifting_replica_alone": "a drifting replica alone at 1 / delta",
        "one_monitor_of_all_traffic": "one monitor of all traffic",
    }
    rows = []
    for run in found["simulation"]["drifting"]:
        delays, shares = (
            run["median_scores_of_a_replica_to_the_alarm"], run["share_of_runs_with_an_alarm"]
        )  # fmt: skip
        cells = [
            "none" if delays[key] is None else f"{delays[key]:g} ({shares[key]:.0%})"
            for key in names
        ]
        rows.append([f"{run['shift_in_sd']:g} SD in {run['drifting_replicas']}", *cells])
    return table(["shift", *names.values()], rows)


def skew(found: dict[str, Any]) -> str:
    rows = [
        [
            name.replace("_", " "),
            one["decisions_that_differ"],
            f"{one['largest_score_difference']:.2g}",
        ]
        for name, one in found["skew"].items()
        if isinstance(one, dict) and "reject_rate" in one
    ]
    return table(["another way to run", "decisions that differ", "largest score difference"], rows)


TABLES = {
    function.__name__: function
    for function in (costs, memory, serving, predict, replicas, levels, power, skew)
}


def rendered(page: str, found: dict[str, Any]) -> str:
    """Return the page with its tables made anew."""
    for name, make in TABLES.items():
        block = f"<!-- {name} -->\n{make(found)}\n<!-- end -->"
        page = re.sub(rf"<!-- {name} -->\n.*?<!-- end -->", lambda _: block, page, flags=re.DOTALL)  # noqa: B023
    return page


def main() -> None:
    found = json.loads((HERE / "results.json").read_text())
    PAGE.write_text(rendered(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
