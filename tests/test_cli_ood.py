"""OOD sets and fitted scores on the command line: synthetic sets, fit data, scores on features."""

import json

import numpy as np
import pytest
from test_cli import invoke_as_it_is as invoke
from test_cli import report_of


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "report"
    invoke("report", "--data", "demo:", "--limit", 300, "--quiet", "-o", folder)
    return report_of(folder)


@pytest.mark.slow
def test_without_ood_sets_some_are_made_from_the_images(synthetic):
    assert {part["role"] for part in synthetic["ood"].values()} == {"synthetic"}
    assert len(synthetic["ood"]) == 5
    assert all(name.startswith("synthetic_") for name in synthetic["ood"])
    assert "made from your own images" in synthetic["energy"]["verdict"]["sentence"]
    for part in synthetic["data"]["ood"].values():
        assert part["spec"].startswith("synthetic:")
        assert part["n"] == 300
    hashes = {part["fingerprint"] for part in synthetic["data"]["ood"].values()}
    assert len(hashes) == 5


def test_scores_on_features_run_in_the_same_pass(synthetic):
    scores = synthetic["ood"]["synthetic_rotation"]["scores"]
    ran = {name for name, part in scores.items() if "not_run" not in part}
    assert {"energy", "vim", "mahalanobis", "knn", "fdbd", "energy_react"} <= ran
    assert synthetic["energy"]["ranking"]["of"] == len(ran)


@pytest.mark.slow
def test_no_synthetic_sets_where_they_are_not_wanted(tmp_path):
    invoke("report", "--data", "demo:", "--no-synthetic", "--limit", 80, "-q", "-o", tmp_path / "a")
    assert report_of(tmp_path / "a")["ood"] == {}
    invoke(
        "report", "--data", "demo:", "--ood", "near_x=demo:near_ood", "--limit", 80, "-q", "-o",
        tmp_path / "b",
    )  # fmt: skip
    assert set(report_of(tmp_path / "b")["ood"]) == {"near_x"}


def test_stored_rows_give_no_synthetic_sets(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(size=(200, 3)).astype(np.float32) + 3 * np.eye(3, dtype=np.float32)[labels]
    np.savez(tmp_path / "rows.npz", logits=logits, labels=labels)
    data = f"logits:{tmp_path / 'rows.npz'}"
    invoke("report", "--data", data, "--no-images", "-o", tmp_path / "out")
    assert report_of(tmp_path / "out")["ood"] == {}
    _, error = invoke("report", "--data", data, "--synthetic", "-o", tmp_path / "x", code=2)
    assert "outliers are made from images" in error


@pytest.mark.slow
def test_fit_data_and_a_gate_on_features(tmp_path):
    invoke(
        "report", "--data", "demo:", "--fit-data", "demo:calibration", "--score", "vim", "--ood",
        "near_x=demo:near_ood", "-q", "-o", tmp_path / "out",
    )  # fmt: skip
    report = report_of(tmp_path / "out")
    assert report["data"]["fit"]["n"] == 450
    assert report["gate"]["score"] == "vim"
    assert report["gate"]["n"] == 450
    assert any("450 rows of the role fit" in line for line in report["meta"]["protocol"])
    json.dumps(report, allow_nan=False)


# --- guards on features, by class, with a certified risk, chosen, renewed, compared


def fitted(tmp_path, name, *extra):
    """Fit a guard on the demo and return its path and its manifest."""
    path = tmp_path / f"{name}.safetensors"
    out, _ = invoke("fit", "--data", "demo:calibration", "-q", "--json", "-o", path, *extra)
    return path, json.loads(out)


def decisions(guard, tmp_path, spec="demo:evaluation"):
    out = tmp_path / "rows.jsonl"
    invoke("predict", guard, "--data", spec, "-q", "-o", out)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_guard_on_features_decides_images_and_stored_rows_alike(tmp_path):
    guard, manifest = fitted(tmp_path, "vim", "--score", "vim", "--fit-data", "demo:evaluation")
    assert manifest["score"]["name"] == "vim"
    images = decisions(guard, tmp_path, "demo:near_ood")
    invoke(
        "report", "--data", "demo:near_ood", "--no-synthetic", "--save-predictions",
        tmp_path / "kept", "-q", "-o", tmp_path / "r",
    )  # fmt: skip
    stored = decisions(guard, tmp_path, f"predictions:{tmp_path / 'kept' / 'evaluation'}")
    assert [row["accept"] for row in images] == [row["accept"] for row in stored]
    assert images[0]["score"] == pytest.approx(stored[0]["score"], rel=1e-6)


def test_auto_says_what_it_chose_and_on_what(tmp_path):
    guard, manifest = fitted(tmp_path, "auto", "--score", "auto", "--false-reject-rate", 0.2)
    text, _ = invoke("info", guard)
    assert manifest["score"]["name"] in text
    assert "synthetic" in json.dumps(manifest["facts"])
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "r.npz", logits=rng.normal(size=(300, 3)).astype(np.float32))
    _, error = invoke(
        "fit", "--data", f"logits:{tmp_path / 'r.npz'}", "--score", "auto", "-o", tmp_path / "x",
        code=2,
    )  # fmt: skip
    assert "outliers made from images" in error


@pytest.mark.slow
def test_a_cut_for_each_class_and_a_certified_risk(tmp_path):
    options = ("--per-class", "--simultaneous", "--false-reject-rate", 0.2, "--risk", 0.1)
    guard, manifest = fitted(tmp_path, "classes", *options)
    assert manifest["rule"]["risk"] == 0.1
    assert manifest["threshold"]["cut"] is None
    rows = decisions(guard, tmp_path)
    assert 0 < sum(row["accept"] for row in rows) < len(rows)
    invoke("report", "--guard", guard, "--data", "demo:", "-q", "-o", tmp_path / "r")
    gate = report_of(tmp_path / "r")["gate"]
    assert gate["threshold"] is None
    assert gate["rule"]
    assert gate["coverage"]["value"] == pytest.approx(np.mean([row["accept"] for row in rows]))
    assert "not promised" in gate["verdict"]["sentence"]


def test_recalibrate_keeps_the_history_and_shadow_compares(tmp_path):
    guard, _ = fitted(tmp_path, "old")
    new = tmp_path / "new.safetensors"
    out, _ = invoke("recalibrate", guard, "--data", "demo:evaluation", "-q", "--json", "-o", new)
    lineage = json.loads(out)["facts"]["lineage"]
    assert len(lineage) == 2
    found = json.loads(invoke("shadow", guard, new, "--data", "demo:near_ood", "-q", "--json")[0])
    pairs = [decisions(path, tmp_path, "demo:near_ood") for path in (guard, new)]
    old_only = sum(a["accept"] and not b["accept"] for a, b in zip(*pairs, strict=True))
    new_only = sum(b["accept"] and not a["accept"] for a, b in zip(*pairs, strict=True))
    assert (found["only_old"], found["only_new"]) == (old_only, new_only)
    text, _ = invoke("shadow", guard, new, "--data", "demo:near_ood", "-q")
    assert found["sentence"] in text


def test_names_of_other_sets_are_refused(tmp_path):
    for name in ("evaluation", "fit"):
        _, error = invoke(
            "report", "--data", "demo:", "--ood", f"{name}=demo:near_ood", "-o", tmp_path / "x",
            code=2,
        )  # fmt: skip
        assert "names of other sets" in error
    _, error = invoke(
        "report", "--data", "demo:", "--limit", 60, "--ood", "synthetic_rotation=demo:near_ood",
        "--synthetic", "-q", "-o", tmp_path / "x", code=2,
    )  # fmt: skip
    assert "--synthetic" in error
    assert not (tmp_path / "x").exists()
