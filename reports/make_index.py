"""Write reports/README.md from the report.json files beside it: python reports/make_index.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
INTRO = """# Reports on real networks

Each folder holds `report.json` (the source), its views `report.html`, `report.md` and `figures/`, and
`rows.npz` for comparisons. The command that made it is in the folder's, or its parent's, `command.sh`;
seed, settings and environment are in `report.json`. This table is written by
`python reports/make_index.py`. Wall time and peak memory are those of the machine that made the report
(two shared cores), data loading and forward passes included.

| report | n | accuracy | ECE before -> after | T | OOD set | AUROC energy (msp) | FPR95 energy | wall | memory |
| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |
"""
REST = """
Other folders: [demo_classifier](demo_classifier/README.md) (the embedded demo's network, by seed),
[timm_sweep](timm_sweep/README.md) (one model of every timm module), [benchmarks](benchmarks) (ratios).
"""


def main() -> None:
    lines = []
    for path in sorted(ROOT.rglob("report.json")):
        lines += rows(path.parent.relative_to(ROOT), json.loads(path.read_text(encoding="utf-8")))
    (ROOT / "README.md").write_text(INTRO + "\n".join(lines) + "\n" + REST, encoding="utf-8")


def rows(folder: Path, report: dict[str, Any]) -> list[str]:
    before, after = report["calibration"]["before"], report["calibration"]["after"]
    run = report["meta"]["run"]
    first = [
        f"[{folder}]({folder}/report.md)",
        f"{report['data']['evaluation']['n']:,}",
        f"{before['accuracy']['value']:.4f}",
        f"{before['ece']['value']:.4f} -> {after['ece']['value']:.4f}",
        f"{after['calibrator']['temperature']:.3f}",
    ]
    last = [f"{run['wall_seconds']:.0f} s", f"{run['peak_memory_mb']:.0f} MB"]
    lines = []
    for name, part in report["ood"].items():
        energy, msp = part["scores"]["energy"], part["scores"]["msp"]
        middle = [
            f"{name} ({part['n']:,})",
            f"{energy['auroc']['value']:.4f} ({msp['auroc']['value']:.4f})",
            f"{energy['fpr95']['value']:.4f}",
        ]
        head, tail = (first, last) if not lines else ([""] * len(first), [""] * len(last))
        lines.append("| " + " | ".join([*head, *middle, *tail]) + " |")
    return lines


if __name__ == "__main__":
    main()
