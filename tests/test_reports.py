"""The committed reports: valid, up to date with their views, and fit to be published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from ebm_guard.report.render import render_attack_markdown, render_markdown
from ebm_guard.report.rows import ReportRows

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in (ROOT / "reports").rglob("report.json"))
SCHEMA = json.loads((ROOT / "ebm_guard" / "report" / "schema.json").read_text(encoding="utf-8"))
ATTACKED = sorted(path.parent for path in (ROOT / "reports").rglob("robustness.json"))
ATTACK_SCHEMA = json.loads(
    (ROOT / "ebm_guard" / "report" / "attack_schema.json").read_text(encoding="utf-8")
)


def name_of(folder):
    return str(folder.relative_to(ROOT / "reports"))


def test_there_are_reports():
    assert {name_of(folder) for folder in FOLDERS} >= {
        "cifar10_resnet20",
        "imagenet_efficientnet_lite0",
        "mnist0to7_densenet/energy_ft",
        "mnist0to7_densenet/pretrained",
        "mnist_convnet/baseline",
        "mnist_convnet/tune",
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_report(folder):
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, SCHEMA)
    assert render_markdown(report) == (folder / "report.md").read_text(encoding="utf-8")
    for view in ("report.html", "rows.npz", "figures/reliability.png", "figures/roc.svg"):
        assert (folder / view).stat().st_size > 0
    assert not report["gallery"]["images"], "these data sets have no free licence"
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" not in text
    assert not re.search(r"(?<![\w$.])/(home|root|tmp|work|mnt|Users)/", text)
    rows = ReportRows.read(folder / "rows.npz")
    assert len(rows.labels) == report["data"]["evaluation"]["n"]
    script = next(
        path / "command.sh" for path in (folder, folder.parent) if (path / "command.sh").exists()
    )
    assert report["meta"]["title"].split(":")[0] in script.read_text(encoding="utf-8")


def test_lite0_says_what_is_special_about_it():
    folder = ROOT / "reports" / "imagenet_efficientnet_lite0"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "underconfident" in text
    assert report["energy"]["ranking"]["energy_rank"] == 4
    assert "is better by" in text
    assert "| vim | not run: 1 image per class" in text


def test_the_index_names_every_report():
    index = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        assert f"[{name_of(folder)}]" in index


def attacked(name):
    folder = ROOT / "reports" / "robustness" / name
    return json.loads((folder / "robustness.json").read_text(encoding="utf-8"))["robustness"]


def test_there_are_robustness_reports():
    assert {folder.name for folder in ATTACKED} >= {
        "cifar10_resnet20",
        "imagenet_efficientnet_lite0",
        "mnist_lenet5_clean",
        "mnist_lenet5_pgd_eps03",
    }


@pytest.mark.parametrize("folder", ATTACKED, ids=name_of)
def test_robustness_report(folder):
    report = json.loads((folder / "robustness.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, ATTACK_SCHEMA)
    written = (folder / "robustness.md").read_text(encoding="utf-8")
    assert render_attack_markdown(report) == written
    text = (folder / "robustness.html").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w$.])/(home|root|tmp|work|mnt|Users)/", text + json.dumps(report))
    assert report["meta"]["title"] in (folder.parent / "command.sh").read_text(encoding="utf-8")
    for figure in ("robustness_curve.png", "robustness_energy.svg"):
        assert (folder / "figures" / figure).stat().st_size > 0
    # Every number stands beside its attacks, and the gate is in the loop.
    for norm in report["robustness"]["norms"]:
        for row in norm["epsilons"]:
            assert row["worst_case"] is None or row["attacks"]
            assert row["gated"] is not None


def test_ordinary_and_robust_nets_are_told_apart():
    clean, robust = attacked("mnist_lenet5_clean"), attacked("mnist_lenet5_pgd_eps03")
    assert clean["robust_accuracy"]["value"] == 0
    # Published: 0.936 against PGD alone; the worst case over all attacks is lower.
    assert 0.85 <= robust["robust_accuracy"]["value"] <= 0.936
    for section in (clean, robust):
        assert not [flag["name"] for flag in section["flags"] if flag["status"] == "raised"]
    resnet = attacked("cifar10_resnet20")
    assert resnet["robust_accuracy"]["value"] == 0
    path = resnet["energy_path"]["median"]
    assert path["end"] < path["clean"] < path["first_flip"]


def test_the_index_names_every_robustness_report():
    index = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    for folder in ATTACKED:
        assert f"[{folder.name}](robustness/{folder.name}/robustness.md)" in index
