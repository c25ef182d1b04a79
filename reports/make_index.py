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
ATTACKED = """
## Under attack

Made by `bash reports/robustness/command.sh`. Robust accuracy: share of the attacked images that every
attack left right, at the largest budget, an upper bound. Wrong and accepted: by an attacker who knows the
gate, and by one who does not and stops at the first flip. Seconds are of one core of that machine, with
other work beside it.

| report | n | clean | budget | attacks | robust accuracy [95 %] | wrong and accepted, known (unknown) | gradients an image | seconds |
| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: |
"""
REST = """
## Fine-tuning

Scripts, results with seeds and environment, and a page for each: [fashion_mnist](finetune/fashion_mnist/README.md)
(every objective, three seeds), [cifar10_resnet20](finetune/cifar10_resnet20/README.md) and the same with
[400 updates](finetune/cifar10_resnet20_400/README.md) (`--updates 400 --output ...`),
[mnist0to7_densenet](finetune/mnist0to7_densenet/README.md) (against a published fine-tuned net),
[energy_family](finetune/energy_family/README.md) (every objective, class loss and regulariser, three seeds),
[semi_supervised](finetune/semi_supervised/README.md) (100 and 1,000 labels).

Other folders: [ensemble](ensemble/README.md) (two CIFAR-10 networks as one energy), [demo_classifier](demo_classifier/README.md) (the embedded demo's network, by seed),
[timm_sweep](timm_sweep/README.md) (one model of every timm module), [benchmarks](benchmarks) (ratios),
[scale](scale.md) (costs, memory, many replicas), [security](security/README.md) (fuzzing, with counts),
[export](export/README.md) (exported decisions against PyTorch's).
"""


def main() -> None:
    lines = []
    for path in sorted(ROOT.rglob("report.json")):
        lines += rows(path.parent.relative_to(ROOT), json.loads(path.read_text(encoding="utf-8")))
    attacked = [
        attacked_row(path.parent.relative_to(ROOT), json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(ROOT.rglob("robustness.json"))
    ]
    text = INTRO + "\n".join(lines) + "\n" + ATTACKED + "\n".join(attacked) + "\n" + REST
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def attacked_row(folder: Path, report: dict[str, Any]) -> str:
    section = report["robustness"]
    norm, worst = section["norms"][0], section["robust_accuracy"]
    row = next(item for item in norm["epsilons"] if item["text"] == norm["reference"])
    gated = row["gated"]
    cells = [
        f"[{folder.name}]({folder}/robustness.md)",
        f"{section['n']:,}",
        f"{section['clean']['value']:.3f}",
        f"{norm['norm']} {norm['reference']}",
        ", ".join(item["label"] for item in row["attacks"]),
        f"{worst['value']:.3f} [{worst['low']:.3f}, {worst['high']:.3f}]",
        f"{1 - gated['aware']['value']:.3f} ({1 - gated['plain']['value']:.3f})",
        f"{section['cost']['gradients_per_image']:,.0f}",
        f"{section['run']['seconds']:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


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
