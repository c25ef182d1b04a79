"""The report's protocol: what is measured on which rows, and what is said of it."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from toys import logits_with

import ebm_guard
from ebm_guard import Guard, Predictions, build_report
from ebm_guard.calibration import TemperatureScaling, calibration_metrics, row_statistics
from ebm_guard.data import two_folds
from ebm_guard.errors import DataError, InvalidInputError, ModelOutputError
from ebm_guard.gate import Threshold
from ebm_guard.ood import Energy, make_score, ood_metrics
from ebm_guard.report import Settings

SCHEMA = json.loads((Path(ebm_guard.report.__file__).parent / "schema.json").read_text())


def built(evaluation, **settings):
    """Build a report, check it against the schema, and return it as JSON gives it back."""
    report = build_report(evaluation, **settings).to_dict()
    text = json.dumps(report, allow_nan=False)
    jsonschema.validate(json.loads(text), SCHEMA)
    return json.loads(text)


def codes(report):
    return {item["code"] for item in report["warnings"]}


# --- cross-fitting


def two_faced(seed=0, n=600):
    """Rows whose two folds need opposite temperatures and thresholds.

    The rows of one fold of seed 0 are sure and wrong half of the time, those of the other unsure
    and always right; the energies of the folds do not overlap. Fitted on all rows, or on its own
    fold, every figure is another.
    """
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    first, second = two_folds(n, labels, seed=0)
    logits = np.zeros((n, 3), dtype=np.float32)
    logits[np.arange(n), labels] = 1.0
    wrong = first[generator.random(len(first)) < 0.5]
    logits[first] *= 8
    logits[wrong] = np.roll(logits[wrong], 1, axis=1)
    logits[first] += 30
    # A few errors, so that a temperature exists.
    logits[second[::10]] = np.roll(logits[second[::10]], 1, axis=1)
    logits += generator.normal(size=(n, 1)).astype(np.float32) * 0.1
    return Predictions(logits, labels=labels), first, second


def test_no_row_is_judged_by_its_own_fit():
    part, first, second = two_faced()
    report = built(part)
    energies = Energy().of(part)
    accepted, statistics, own = np.zeros(len(part), bool), [], []
    for fit, test in ((first, second), (second, first)):
        cut = float(Threshold.fit(energies[fit]).cut)
        accepted[test] = energies[test] <= cut
        fitted, in_sample = (
            TemperatureScaling().fit(part.logits[rows], part.labels[rows]) for rows in (fit, test)
        )
        for kind, found in ((fitted, statistics), (in_sample, own)):
            found.append(
                row_statistics(part.logits[test], part.labels[test], transform=kind.transform)
            )
    expected = calibration_metrics(type(statistics[0]).concatenate(statistics), seed=0)
    after = report["calibration"]["after"]
    assert after["nll"]["value"] == pytest.approx(expected.nll.value, rel=1e-9)
    assert after["ece"]["value"] == pytest.approx(expected.ece.value, rel=1e-9)
    assert report["gate"]["coverage"]["value"] == accepted.mean()
    # Judging in sample would have shown something else, on this data something far better.
    cheating = calibration_metrics(type(own[0]).concatenate(own), seed=0)
    assert cheating.nll.value < 0.7 * expected.nll.value
    in_sample = (energies <= float(Threshold.fit(energies).cut)).mean()
    assert abs(in_sample - accepted.mean()) > 0.3
    assert "two-fold cross-fitting" in report["gate"]["protocol"]
    assert "two-fold cross-fitting" in " ".join(report["meta"]["protocol"])


def test_what_is_deployed_is_fitted_on_all_rows():
    part, *_ = two_faced()
    report = built(part, ood={"far": logits_with(90, classes=3, shift=-20.0, seed=4)})
    cut = Threshold.fit(Energy().of(part)).cut
    assert report["gate"]["threshold"] == float(cut)
    assert report["gate"]["n"] == len(part)
    temperature = float(TemperatureScaling().fit(part.logits, part.labels).temperature)
    assert report["calibration"]["after"]["calibrator"]["temperature"] == temperature
    assert report["calibration"]["after"]["calibrator"]["n"] == len(part)
    assert report["gate"]["accepted_ood"]["far"]["value"] == 0.0


def test_before_uses_all_rows():
    part = logits_with(500)
    report = built(part)
    expected = calibration_metrics(row_statistics(part.logits, part.labels), seed=0).to_dict()
    before = report["calibration"]["before"]
    for name in ("accuracy", "nll", "brier", "ece", "overconfidence"):
        assert before[name]["value"] == expected[name]["value"]
        assert before[name]["n"] == 500
    assert before["accuracy"] == report["calibration"]["after"]["accuracy"]


@pytest.mark.slow
def test_the_seed_chooses_the_folds():
    part = logits_with(400)
    one, same, other = (built(part, settings=Settings(seed=seed)) for seed in (0, 0, 1))
    assert one["calibration"]["after"] == same["calibration"]["after"]
    assert one["calibration"]["after"]["nll"] != other["calibration"]["after"]["nll"]
    assert one["calibration"]["before"]["nll"] == other["calibration"]["before"]["nll"]


# --- other ways to fit


def test_calibration_rows_fit_and_evaluation_rows_measure():
    fit, part = logits_with(400, scale=6.0, seed=1), logits_with(500, scale=3.0, seed=2)
    report = built(part, calibration=fit)
    fitted = TemperatureScaling().fit(fit.logits, fit.labels)
    rows = row_statistics(part.logits, part.labels, transform=fitted.transform)
    after = report["calibration"]["after"]
    assert after["nll"]["value"] == calibration_metrics(rows, seed=0).nll.value
    assert after["calibrator"]["temperature"] == float(fitted.temperature)
    assert after["calibrator"]["n"] == report["gate"]["n"] == 400
    cut = Threshold.fit(Energy().of(fit)).cut
    assert report["gate"]["threshold"] == float(cut)
    assert report["gate"]["coverage"]["value"] == (Energy().of(part) <= float(cut)).mean()
    assert report["data"]["calibration"]["n"] == 400
    assert "share none with them" in report["gate"]["protocol"]


@pytest.mark.slow
def test_a_given_guard_is_not_refitted():
    guard = Guard().fit(logits_with(400, scale=6.0, seed=1), score="msp", false_reject_rate=0.2)
    part = logits_with(500, seed=2)
    report = built(part, guard=guard, ood={"far": logits_with(50, seed=3, scale=0.5)})
    assert report["gate"]["threshold"] == float(guard.threshold.cut)
    assert report["gate"]["score"] == "msp"
    assert report["gate"]["false_reject_rate"] == 0.2
    assert report["meta"]["settings"]["false_reject_rate"] == 0.2
    decision = guard.decide(torch.from_numpy(part.logits))
    assert report["gate"]["coverage"]["value"] == pytest.approx(decision.accept.double().mean())
    temperature = report["calibration"]["after"]["calibrator"]["temperature"]
    assert temperature == float(guard.calibrator.temperature)
    assert "evaluated as it is" in report["gate"]["protocol"]


def test_rows_that_were_fitted_on_are_refused():
    part, other = logits_with(300, seed=1), logits_with(300, seed=2)
    guard = Guard().fit(part)
    with pytest.raises(DataError, match=r"very rows.*has not seen"):
        build_report(part, guard=guard)
    with pytest.raises(DataError, match=r"evaluation and calibration share 300 rows.*disjoint"):
        build_report(part, calibration=part)
    with pytest.raises(DataError, match="evaluation and near share 150 rows"):
        build_report(part, ood={"near": part.select(slice(150))})
    assert "shared_rows" not in codes(built(part, calibration=other))


@pytest.mark.slow
def test_a_few_duplicates_are_told():
    one, two = logits_with(300, seed=1), logits_with(300, seed=2)
    logits, labels = two.logits.copy(), two.labels.copy()
    logits[:3], labels[:3] = one.logits[:3], one.labels[:3]
    report = built(one, calibration=Predictions(logits, labels=labels))
    (message,) = [w["message"] for w in report["warnings"] if w["code"] == "shared_rows"]
    assert "share 3 identical rows" in message
    logits[:4], labels[:4] = one.logits[:4], one.labels[:4]
    with pytest.raises(DataError, match="share 4 rows"):
        build_report(one, calibration=Predictions(logits, labels=labels))


def test_sets_of_different_models_are_refused():
    part = logits_with(300)
    with pytest.raises(DataError, match=r"far has 5 classes.*evaluation has 4.*one model"):
        build_report(part, ood={"far": logits_with(99, classes=5, seed=2)})
    with pytest.raises(DataError, match=r"calibration has 3 classes"):
        build_report(part, calibration=logits_with(99, classes=3, seed=2))
    with pytest.raises((DataError, InvalidInputError), match="classes"):
        build_report(part, guard=Guard().fit(logits_with(99, classes=5, seed=2)))


@pytest.mark.parametrize("name", ["evaluation", "calibration", "fit", "a b", "a.b", "", "a/b"])
def test_names_that_an_ood_set_cannot_have(name):
    with pytest.raises(InvalidInputError, match=r"got OOD set name .*letters, digits"):
        build_report(logits_with(300), ood={name: logits_with(50, seed=2)})


@pytest.mark.parametrize("where", ["evaluation", "far", "calibration"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_stop_the_report(where, value):
    sets = {
        name: logits_with(200, seed=seed)
        for seed, name in enumerate(("evaluation", "far", "calibration"))
    }
    broken = sets[where].logits.copy()
    broken[17, 1] = value
    sets[where] = Predictions(broken, labels=sets[where].labels)
    with pytest.raises(ModelOutputError, match=rf"1 of 200 rows of {where}.*first: 17.*half"):
        build_report(sets["evaluation"], ood={"far": sets["far"]}, calibration=sets["calibration"])


# --- what cannot be measured says why


def test_unlabelled_rows():
    part = Predictions(logits_with(300).logits)
    report = built(part, ood={"far": logits_with(90, seed=2)})
    assert "no labels" in report["calibration"]["not_run"]
    assert report["gate"]["coverage"]["n"] == 300
    assert report["gate"]["accuracy_accepted"] is None
    assert set(report["ood"]["far"]["scores"]) >= {"energy", "msp", "maxlogit", "gen"}
    assert report["data"]["evaluation"]["labelled"] is False


def test_unlabelled_calibration_rows():
    report = built(logits_with(300), calibration=Predictions(logits_with(200, seed=2).logits))
    assert "calibrator" in report["calibration"]["after"]["not_run"]
    assert report["calibration"]["before"]["accuracy"]["n"] == 300
    assert report["gate"]["n"] == 200


def probabilities(n, seed):
    part = logits_with(n, seed=seed)
    logits = part.logits.astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return Predictions(logs, labels=part.labels, kind="probs"), part


@pytest.mark.slow
def test_probabilities_serve_all_but_the_energy():
    (probs, part), (far, far_part) = probabilities(400, 1), probabilities(200, 2)
    report = built(probs, ood={"far": far})
    full = built(part, ood={"far": far_part})
    for name in ("nll", "ece", "accuracy", "brier"):
        one, two = (r["calibration"]["before"][name]["value"] for r in (report, full))
        assert one == pytest.approx(two, rel=1e-6)
    assert "needs logits" in report["energy"]["not_run"]
    assert "needs logits" in report["gate"]["not_run"]
    scores = report["ood"]["far"]["scores"]
    for name in ("energy", "maxlogit"):
        assert "needs logits" in scores[name]["not_run"]
    for name in ("msp", "gen"):
        expected = full["ood"]["far"]["scores"][name]["auroc"]["value"]
        assert scores[name]["auroc"]["value"] == pytest.approx(expected, abs=1e-6)
    gate = built(probs, ood={"far": far}, settings=Settings(score="msp"))["gate"]
    assert gate["score"] == "msp"
    assert gate["coverage"]["n"] == 400


@pytest.mark.parametrize(("n", "gated"), [(60, False), (117, False), (118, True)])
def test_too_few_rows_for_a_gate(n, gated):
    # Each half must promise 95 % at assurance 95 % alone, which takes 59 rows.
    report = built(logits_with(n))
    assert ("not_run" not in report["gate"]) == gated
    assert report["calibration"]["before"]["accuracy"]["n"] == n
    if not gated:
        assert "each half" in report["gate"]["not_run"]
        assert "needs at least 59" in report["gate"]["not_run"]
    assert "small_n" in codes(report)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_very_few_rows(n):
    logits = np.eye(3, dtype=np.float32)[np.arange(n) % 3] * 4
    labels = np.arange(n) % 3
    labels[0] = 1
    report = built(Predictions(logits, labels=labels), ood={"far": logits_with(2, 3, seed=3)})
    assert report["calibration"]["before"]["accuracy"]["n"] == n
    assert "not_run" in report["gate"]


def test_one_row_is_refused_in_words():
    with pytest.raises((DataError, InvalidInputError), match="row"):
        build_report(logits_with(1))


def test_a_model_that_is_always_right_keeps_its_temperature():
    report = built(logits_with(300, accuracy=1.0))
    assert report["calibration"]["after"]["calibrator"]["status"] == "separable"
    assert report["calibration"]["after"]["calibrator"]["temperature"] == 1.0
    assert "calibration_fit" in codes(report)
    assert "no optimum" in report["calibration"]["verdict"]["sentence"]


def test_sections_of_later_versions_say_so():
    report = built(logits_with(200))
    for name in ("groups", "robustness", "finetune"):
        assert set(report[name]) == {"not_run"}
        assert report[name]["not_run"]


@pytest.mark.slow
def test_limited_and_skipped_rows_are_told():
    part = logits_with(200)
    part = Predictions(
        part.logits, labels=part.labels, notes={"limit": 200}, skipped=(("a.png", "broken"),)
    )
    report = built(part)
    assert codes(report) >= {"limited", "skipped_images"}
    assert report["data"]["evaluation"]["skipped_examples"] == [{"id": "a.png", "error": "broken"}]


# --- OOD and its ranking


def test_ood_figures_are_those_of_the_metrics():
    part, far = logits_with(300), logits_with(120, seed=2, scale=1.0)
    report = built(part, ood={"far": far})
    for name in ("energy", "msp", "maxlogit", "gen"):
        score = make_score(name)
        expected = ood_metrics(score.of(part), score.of(far), seed=0).to_dict()
        for metric, record in expected.items():
            found = report["ood"]["far"]["scores"][name][metric]
            assert found["value"] == record["value"], (name, metric)
    assert report["ood"]["far"]["role"] == "far_ood"
    assert "labels" not in report["ood"]["far"]


def ranked(id_logits, ood_logits):
    report = built(
        Predictions(id_logits.astype(np.float32)),
        ood={"far": Predictions(ood_logits.astype(np.float32))},
    )
    return report["energy"]["ranking"]


def test_energy_is_the_best():
    # The sets differ by a constant on all logits, which MSP and GEN cannot see. The top logit is
    # spread at random while the energy stays, which spoils maxlogit.
    generator = np.random.default_rng(0)

    def part(n, energy):
        logits = generator.normal(size=(n, 4)) * 2
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - energy

    ranking = ranked(part(400, -5.0), part(400, -4.5))
    assert (ranking["energy_rank"], ranking["best"], ranking["of"]) == (1, "energy", 4)
    assert ranking["scores"][0]["name"] == "energy"
    assert ranking["sentence"].startswith("Energy is 1st of 4 scores")
    assert "cannot tell" not in ranking["sentence"]


def test_energy_is_clearly_worse():
    # Sure against unsure rows, blurred by a random constant on all logits: energy sees the blur.
    generator = np.random.default_rng(0)

    def part(n, scale):
        logits = np.eye(4)[generator.integers(0, 4, n)] * scale
        logits = logits + generator.normal(size=(n, 4)) * 0.3
        return logits + generator.normal(size=(n, 1)) * 20

    ranking = ranked(part(400, 9.0), part(400, 3.0))
    assert ranking["energy_rank"] > 1
    assert ranking["best"] in ("msp", "gen")
    assert f"{ranking['best']} is better by" in ranking["sentence"]
    assert f"onsider a gate on {ranking['best']}" in ranking["sentence"]
    assert ranking["difference"]["low"] > 0
    aurocs = [row["mean_auroc"] for row in ranking["scores"]]
    assert aurocs == sorted(aurocs, reverse=True)


def test_energy_cannot_be_told_from_the_best():
    generator = np.random.default_rng(1)
    ranking = ranked(generator.normal(size=(60, 4)) * 3, generator.normal(size=(60, 4)) * 3)
    assert "which these rows cannot tell from 0" in ranking["sentence"]
    assert "onsider a gate" not in ranking["sentence"]


def test_ties_share_a_rank_and_count_half():
    # All rows equal: every score ties everywhere.
    same = np.tile(np.array([2.0, 0.0, -1.0]), (80, 1))
    report = built(
        Predictions(same.astype(np.float32), hashes=np.arange(80, dtype=np.uint64)),
        ood={
            "far": Predictions(same.astype(np.float32), hashes=np.arange(80, 160, dtype=np.uint64))
        },
    )
    ranking = report["energy"]["ranking"]
    assert [row["rank"] for row in ranking["scores"]] == [1] * 4
    assert [row["mean_auroc"] for row in ranking["scores"]] == [0.5] * 4
    assert "cannot tell from 0" in ranking["sentence"]
    energy = report["ood"]["far"]["scores"]["energy"]
    assert energy["fpr95"]["value"] == energy["fpr95_ood_positive"]["value"] == 1.0


def test_without_ood_the_verdict_says_what_is_missing():
    report = built(logits_with(200))
    assert report["energy"]["ranking"] is None
    assert report["energy"]["verdict"]["status"] == "not_run"
    assert "--ood" in report["energy"]["verdict"]["sentence"]
    assert report["ood"] == {}


# --- requirements


def test_a_metric_without_a_value_was_not_measured():
    """The unlabelled report has no accuracy of accepted rows: that is no wrong usage."""
    report = built(
        Predictions(logits_with(300).logits), requirements=["gate.accuracy_accepted>=0.5"]
    )
    (found,) = report["requirements"]
    assert found["status"] == "failed"
    assert "not measured" in found["message"]


# --- pictures


def test_gallery_picks_the_rows_to_look_at():
    part = logits_with(300)
    far = logits_with(120, seed=2)
    asked = []

    def picture(name, row):
        asked.append((name, row))

    gallery = built(part, ood={"far": far}, picture=picture)["gallery"]
    rows = row_statistics(part.logits, part.labels)
    energies, foreign = Energy().of(part), Energy().of(far)
    wrong = np.flatnonzero(~rows.correct)
    surest = wrong[np.argsort(-rows.confidence[wrong], kind="stable")][:8]
    assert [item["id"] for item in gallery["confident_errors"]] == [str(row) for row in surest]
    strange = np.argsort(-energies)[:8]
    assert [item["id"] for item in gallery["highest_energy"]] == [str(row) for row in strange]
    assert [item["energy"] for item in gallery["highest_energy"]] == energies[strange].tolist()
    lowest = np.argsort(foreign)[:8]
    assert [item["id"] for item in gallery["lowest_energy_ood"]] == [str(row) for row in lowest]
    assert {item["set"] for item in gallery["lowest_energy_ood"]} == {"far"}
    assert all(item["label"] is None for item in gallery["lowest_energy_ood"])
    assert ("far", int(lowest[0])) in asked
    assert gallery["images"] is False


def test_images_can_be_forbidden():
    def picture(name, row):
        raise AssertionError("asked for an image")

    report = built(logits_with(200), settings=Settings(images=False), picture=picture)
    assert report["gallery"]["images"] is False


def test_the_report_is_made_of_plain_json():
    report = built(
        logits_with(300),
        ood={"near_a": logits_with(90, seed=2)},
        settings=Settings(title="T", command="c", extra={"note": "n"}),
    )
    assert report["schema"] == "ebm_guard.report/2"
    assert report["meta"]["title"] == "T"
    assert report["meta"]["settings"]["note"] == "n"
    assert report["meta"]["run"]["wall_seconds"] >= 0
    assert next(iter(report)) == "schema"
