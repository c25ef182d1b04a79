"""New rows, the same detector: what changes, what stays, and the history in the artefact."""

import doctest
import json
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from test_guard_scores import net, rows_of, same
from toys import inputs_of, logits_with

import ebm_guard
from ebm_guard import Guard, Predictions
from ebm_guard.errors import DataError, EbmGuardWarning, InvalidInputError, TooFewRowsError


@pytest.mark.parametrize("score", ["energy", "knn", "combine"])
def test_a_new_guard_on_new_rows_with_the_same_detector(score, tmp_path):
    model = net()
    train, first, second = (rows_of(model, n, seed=n) for n in (300, 200, 250))
    settings = {} if score == "energy" else {"fit_data": train}
    guard = ebm_guard.wrap(model).fit(
        first, score=score, false_reject_rate=0.1, assurance=0.9, **settings
    )
    x = inputs_of(60, seed=9) * 2
    before = guard(x)
    again = guard.recalibrate(second)
    same(guard(x), before)
    assert again is not guard
    assert again.classifier is guard.classifier
    assert torch.equal(again(x).score, before.score)
    assert (again.threshold.n, guard.threshold.n) == (250, 200)
    assert again.threshold.false_reject_rate == 0.1
    assert again.threshold.assurance == 0.9
    assert float(again.calibrator.temperature) != float(guard.calibrator.temperature)
    # What a fresh fit on the second rows gives, with the first detector.
    fresh = ebm_guard.wrap(model).fit(
        second, score=guard.score, false_reject_rate=0.1, assurance=0.9
    )
    same(fresh(x), again(x))
    third = again.recalibrate(first, calibrator="vector")
    lineage = third.facts["lineage"]
    assert [entry["n"] for entry in lineage] == [200, 250, 200]
    assert lineage[0]["changed"] == ["score", "calibrator", "threshold"]
    assert lineage[1]["changed"] == lineage[2]["changed"] == ["calibrator", "threshold"]
    assert lineage[0]["fingerprint"] == lineage[2]["fingerprint"] != lineage[1]["fingerprint"]
    assert third.facts["fingerprint"] == lineage[2]["fingerprint"]
    assert third.facts["fit"] == guard.facts["fit"]
    assert len(guard.facts["lineage"]) == 1
    loaded = Guard.load(third.save(tmp_path / "guard.safetensors"), model)
    assert loaded.facts == json.loads(json.dumps(third.facts, allow_nan=False))
    assert loaded.summary().count("new calibrator, threshold on") == 2
    same(loaded(x), third(x))
    same(loaded.recalibrate(second, calibrator="temperature")(x), again(x))


def test_moving_one_guard_leaves_the_other():
    model = net()
    guard = ebm_guard.wrap(model).fit(rows_of(model, 300, seed=2), score="knn")
    again = guard.recalibrate(rows_of(model, 200, seed=3))
    again.to("meta")
    assert guard(inputs_of(5)).status.device.type == "cpu"


def test_the_promise_of_each_kind_is_asked_for_again():
    rows, new = logits_with(900, accuracy=0.9), logits_with(800, accuracy=0.9, seed=1)
    guard = Guard().fit(rows, per_class=True, simultaneous=True, risk=0.3)
    again = guard.recalibrate(new)
    assert again.threshold.simultaneous
    assert again.threshold.n == 400
    assert again.rule.risk == 0.3
    assert again.facts["rows"] == {"calibration": 400, "certificate": 400}
    assert again.facts["lineage"][-1]["changed"] == ["calibrator", "threshold", "rule"]
    marginal = Guard().fit(rows, threshold="marginal").recalibrate(new)
    assert marginal.threshold.method == "marginal"
    assert marginal.threshold.assurance is None


def test_what_recalibration_refuses():
    model = net()
    rows = rows_of(model, 300, seed=2)
    guard = ebm_guard.wrap(model).fit(rows_of(model, 200, seed=3), fit_data=rows, score="knn")
    with pytest.raises(DataError, match="the score was fitted or chosen on"):
        guard.recalibrate(rows)
    with pytest.raises(TooFewRowsError, match="got 30 calibration rows"):
        guard.recalibrate(rows_of(model, 30, seed=5))
    plain = Guard().fit(logits_with(200))
    with pytest.raises(InvalidInputError, match="logits of 7 classes"):
        plain.recalibrate(logits_with(200, classes=7))
    with pytest.warns(EbmGuardWarning, match="no labels"):
        bare = plain.recalibrate(Predictions(logits_with(200, seed=2).logits))
    assert bare.calibrator is None
    assert bare.facts["lineage"][-1]["changed"] == ["threshold"]


def test_a_guard_of_schema_1_can_be_loaded_and_recalibrated(tmp_path):
    """What version 0.1.0 wrote has no rule, no rows and no history."""
    from ebm_guard.gate.artifact import read_artifact, write_artifact

    guard = Guard().fit(logits_with(200))
    tensors, manifest = read_artifact(guard.save(tmp_path / "new.safetensors"))
    old = {key: value for key, value in manifest.items() if key != "rule"}
    old["schema"] = "ebm_guard.artifact/1"
    for key in ("features", "rows", "fit", "auto", "lineage"):
        del old["facts"][key]
    write_artifact(tmp_path / "old.safetensors", tensors, old)
    loaded = Guard.load(tmp_path / "old.safetensors")
    logits = torch.from_numpy(logits_with(50, seed=4).logits)
    same(loaded.decide(logits), guard.decide(logits))
    assert "guarantee" in loaded.summary()
    again = loaded.recalibrate(logits_with(300, seed=5))
    assert len(again.facts["lineage"]) == 1
    assert again.save(tmp_path / "again.safetensors").exists()


def test_the_page_on_when_the_promise_is_void_runs():
    page = Path(__file__).parents[1] / "examples" / "when_the_promise_is_void.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_recalibrating_on_accepted_rows_makes_each_cut_stricter():
    """What the page warns of: cuts fall, and the true coverage with them."""
    rng = oracles.generator("accepted only")
    coverages = {}
    for kind in ("all", "accepted"):
        guard = Guard().fit(gaussian_rows(rng, 4000))
        for _ in range(5):
            rows = gaussian_rows(rng, 4000)
            if kind == "accepted":
                rows = rows.select(np.flatnonzero(guard.decide_stored(rows).accept.numpy()))
            guard = guard.recalibrate(rows)
        decision = guard.decide_stored(gaussian_rows(rng, 20_000))
        coverages[kind] = float(decision.accept.double().mean())
    assert coverages["all"] > 0.945
    assert coverages["accepted"] < 0.85


def gaussian_rows(rng, n):
    logits = rng.normal(0, 3, size=(n, 4))
    return Predictions(logits.astype(np.float32), labels=oracles.draw_labels(logits / 1.5, rng))
