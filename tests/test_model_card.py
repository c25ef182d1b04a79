"""The model card: YAML that the Hub takes, figures of the report, and nobody's README destroyed."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebm_guard.errors import DataError
from ebm_guard.report.model_card import check_model_card, render_model_card, write_model_card

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; timm brings it")
EXAMPLE = json.loads(
    (Path(__file__).parent / "fixtures" / "report_example.json").read_text(encoding="utf-8")
)
# The Hub refuses a push whose dataset.type does not look like this.
HUB_ID = re.compile(r"^(?:[\w-]+/)?[\w.-]+$", re.ASCII)


@pytest.fixture
def report():
    return copy.deepcopy(EXAMPLE)


def block(card):
    """Read the YAML block as the Hub does: between the first two lines of three dashes."""
    start, text, rest = card.split("---\n", 2)
    assert start == ""
    assert rest.startswith("\n## ")
    (model,) = yaml.safe_load(text)["model-index"]
    (result,) = model["results"]
    return model["name"], result


def test_the_block_holds_the_figures(report):
    name, result = block(render_model_card(report))
    assert name == report["meta"]["model"]["name"]
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"type": "cifar10", "name": "cifar10.npz", "split": "test"}
    found = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    after = report["calibration"]["after"]
    expected = {
        "Accuracy, after temperature calibration": ("accuracy", after["accuracy"]),
        "ECE (15 bins, top label), after temperature calibration": ("ece", after["ece"]),
        "NLL, after temperature calibration": ("nll", after["nll"]),
        "Brier score (multiclass), after temperature calibration": ("brier_score", after["brier"]),
        "Coverage of the gate": ("coverage", report["gate"]["coverage"]),
    }
    for name, part in report["ood"].items():
        score = part["scores"]["energy"]
        expected[f"AUROC, energy, against {name}"] = ("roc_auc", score["auroc"])
        expected[f"FPR at 95 % of ID accepted, energy, against {name}"] = ("fpr95", score["fpr95"])
    assert set(found) == set(expected)
    for name, (kind, metric) in expected.items():
        assert found[name] == (kind, pytest.approx(metric["value"], rel=1e-5))


def test_huggingface_hub_reads_it(report, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with timm")
    write_model_card(report, tmp_path / "card.md")
    data = hub.ModelCard.load(tmp_path / "card.md").data
    assert data.model_name == report["meta"]["model"]["name"]
    assert {item.metric_type for item in data.eval_results} >= {"accuracy", "ece", "roc_auc"}


def test_the_text_says_what_the_report_says(report):
    text = render_model_card(report).split("---\n", 2)[2]
    assert report["gate"]["guarantee"] in text
    assert "| Accuracy | 87.0 % [86.0, 87.9] | 87.0 % [86.0, 87.9] |" in text
    for name in report["ood"]:
        assert f"| {name} | " in text
    assert "5,000 images of cifar10.npz" in text


def test_what_was_not_run_is_said(report):
    report.update(ood={}, gate={"not_run": "too few rows"}, calibration={"not_run": "no labels"})
    card = render_model_card(report)
    assert block(card)[1]["metrics"] == []
    for words in ("was not measured: no labels", "too few rows", "No out-of-distribution set"):
        assert words in card


def test_without_a_calibrator_the_plain_model_is_shown(report):
    report["calibration"]["after"] = {"not_run": "no labelled rows to fit a temperature on"}
    card = render_model_card(report)
    names = [metric["name"] for metric in block(card)[1]["metrics"]]
    assert "Accuracy, not calibrated" in names
    assert "| metric | before |\n" in card


def test_values_that_are_no_numbers_are_left_out(report):
    after = report["calibration"]["after"]
    after["nll"]["value"], after["ece"]["value"] = None, 1e-9
    metrics = {
        item["type"]: item["value"] for item in block(render_model_card(report))[1]["metrics"]
    }
    assert "nll" not in metrics
    assert metrics["ece"] == pytest.approx(1e-9)
    assert isinstance(metrics["ece"], float)


@pytest.mark.parametrize(
    ("spec", "kind", "name", "split"),
    [
        ("hfds/owner/beans#test", "owner/beans", "owner/beans", "test"),
        ("hfids/beans", "beans", "beans", None),
        ("torch/cifar10", "cifar10", "cifar10", None),
        ("folder:/home/me/secret project/val set/", "val-set", "val set", None),
        ("/data/imagenet", "imagenet", "imagenet", None),
        ("logits:runs/v1.2/val.npz[:100]", "val", "val.npz", None),
        ("demo:", "demo", "demo", None),
        ("npz:犬.npz", "unnamed", "犬.npz", None),
        ("", "unnamed", "", None),
    ],
)
def test_the_data_set(report, spec, kind, name, split):
    report["data"]["evaluation"]["spec"] = spec
    card = render_model_card(report)
    data = block(card)[1]["dataset"]
    assert data == {"type": kind, "name": name} | ({"split": split} if split else {})
    assert HUB_ID.match(data["type"])
    assert "secret" not in card


@given(st.text(), st.text())
def test_any_name_is_read_back(model, spec):
    meta = {**EXAMPLE["meta"], "model": {"name": model}}
    data = {"evaluation": {**EXAMPLE["data"]["evaluation"], "spec": spec}}
    name, result = block(render_model_card({**EXAMPLE, "meta": meta, "data": data}))
    assert name == model
    assert HUB_ID.match(result["dataset"]["type"])


@pytest.mark.parametrize(
    "evil", ["a: b # c\n---\n", "\x00\x1b\x85\u2028\ufeff", "😀", "\x7f'\"\\", "{{ }} %", "null"]
)
def test_hostile_names(report, evil):
    report["meta"]["model"]["name"] = evil
    assert block(render_model_card(report))[0] == evil


def test_a_lone_surrogate_is_replaced(report):
    report["meta"]["model"]["name"] = "a\udc80"
    assert block(render_model_card(report))[0] == "a\ufffd"


# --- files


def test_our_own_card_is_replaced(report, tmp_path):
    path = tmp_path / "card.md"
    write_model_card(report, path)
    report["meta"]["model"]["name"] = "another\udc80"
    write_model_card(report, path)
    assert "another" in path.read_text(encoding="utf-8")
    write_model_card(report, path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    check_model_card(path)
    assert [item.name for item in tmp_path.iterdir()] == ["card.md"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: b"# My model\n",
        lambda card: b"",
        lambda card: b"\xff\xfe\x00",
        lambda card: card + b"\nMy own words.\n",
        lambda card: b"My own words.\n" + card,
        lambda card: card.replace(b"## Cal", b"My own words.\n\n## Cal"),
        lambda card: card.replace(b"\n\n<!--", b"\n<!--"),
    ],
)
def test_a_file_of_somebody_else_is_not_touched(report, tmp_path, edit):
    path = tmp_path / "README.md"
    edited = edit(render_model_card(report).encode())
    path.write_bytes(edited)
    with pytest.raises(DataError, match="it was not touched"):
        write_model_card(report, path)
    assert path.read_bytes() == edited
