"""Comparison of two reports: matching of rows, paired intervals, what counts as better."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from ebm_guard.calibration import row_statistics
from ebm_guard.cli import run
from ebm_guard.errors import DataError
from ebm_guard.predictions import Predictions
from ebm_guard.report import build_report
from ebm_guard.report.comparison import Baseline, comparison_section, match
from ebm_guard.report.rows import ReportRows, SetRows


def sets(scale, seed=0, n=600):
    """ID and OOD rows of one 'model'; the same hashes and labels for every scale."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, n)
    noise = generator.normal(size=(n, 4))
    foreign = generator.normal(size=(n // 2, 4))
    logits = (np.eye(4)[labels] * 2 + noise) * scale
    hashes = np.arange(n, dtype=np.uint64)
    return (
        Predictions(logits, labels=labels, hashes=hashes),
        Predictions(foreign * scale, hashes=hashes[: n // 2] + np.uint64(10_000)),
    )


def baseline_of(report):
    return Baseline(report.to_dict(), report.rows, "old")


def compared(new, old):
    report = build_report(new[0], ood={"far": new[1]}, baseline=baseline_of(old))
    return report.to_dict()["comparison"]


def test_a_report_against_itself_shows_no_difference():
    one = sets(1.0)
    found = compared(one, build_report(one[0], ood={"far": one[1]}))
    changes = [*found["before"].values(), *found["after"].values(), *found["ood"]["far"].values()]
    assert len(changes) == 4 + 3 + 2
    for change in changes:
        assert change["difference"]["value"] == pytest.approx(0, abs=1e-6)
        assert change["better"] is None
    assert found["verdict"]["status"] == "good"


@pytest.mark.slow
def test_a_sharper_model_changes_nll_and_not_accuracy():
    old, new = sets(1.0), sets(9.0)
    found = compared(new, build_report(old[0], ood={"far": old[1]}))
    before = found["before"]
    assert before["accuracy"]["difference"]["value"] == 0
    rows = []
    for part in (new[0], old[0]):
        logits = part.logits
        log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        rows.append(-log_p[np.arange(len(part)), part.labels])
    paired = stats.ttest_rel(rows[0], rows[1]).confidence_interval(0.95)
    assert before["nll"]["difference"]["low"] == pytest.approx(paired.low, rel=1e-4)
    assert before["nll"]["difference"]["high"] == pytest.approx(paired.high, rel=1e-4)
    assert before["nll"]["better"] is False
    assert found["verdict"]["status"] in ("bad", "attention")


@pytest.mark.slow
def test_ood_changes_equal_an_independent_count():
    old, new = sets(1.0), sets(1.0)
    shifted = Predictions(new[1].logits - 3.0, hashes=new[1].hashes)
    found = compared((new[0], shifted), build_report(old[0], ood={"far": old[1]}))["ood"]["far"]

    def energies(part):
        return -np.logaddexp.reduce(part.logits.astype(np.float64), axis=1)

    truth = np.r_[np.zeros(600), np.ones(300)]
    for key, part in (("baseline", old[1]), ("value", shifted)):
        score = np.r_[energies(new[0]), energies(part)]
        assert found["auroc"][key] == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
        cut = np.sort(energies(new[0]))[math.ceil(0.95 * 600) - 1]
        assert found["fpr95"][key] == pytest.approx((energies(part) <= cut).mean(), abs=2e-3)
    assert found["auroc"]["better"] is True
    assert found["fpr95"]["better"] is True


@pytest.mark.slow
def test_paired_intervals_are_narrower_than_the_difference_of_two_reports():
    old, new = sets(1.0), sets(1.05)
    first, second = build_report(old[0]), build_report(new[0])
    change = compared(new, build_report(old[0], ood={"far": old[1]}))["before"]["nll"]["difference"]
    apart = [part.calibration.before.metrics.nll for part in (first, second)]
    unpaired = math.hypot(*(metric.high - metric.low for metric in apart))
    assert change["high"] - change["low"] < unpaired / 3


@pytest.mark.slow
def test_other_rows_are_not_compared():
    one, other = sets(1.0), sets(1.0, seed=5, n=400)
    moved = Predictions(
        other[0].logits, labels=other[0].labels, hashes=other[0].hashes + np.uint64(99_999)
    )
    report = build_report(one[0], baseline=baseline_of(build_report(moved)))
    assert "saw other rows" in report.to_dict()["comparison"]["not_run"]


@pytest.mark.slow
def test_rows_without_common_content_are_matched_by_position_when_labels_agree():
    one = sets(1.0)[0]
    moved = Predictions(one.logits, labels=one.labels, hashes=one.hashes + np.uint64(99_999))
    found = build_report(one, baseline=baseline_of(build_report(moved))).to_dict()["comparison"]
    assert "matched by position" in found["note"]


@pytest.mark.slow
def test_other_foreign_images_of_the_same_number_are_no_pairs():
    one = sets(1.0)
    other = Predictions(one[1].logits, hashes=one[1].hashes + np.uint64(77_777))
    found = compared((one[0], other), build_report(one[0], ood={"far": one[1]}))
    assert "matched by content" in found["note"]
    assert found["ood"] == {}
    moved = Predictions(
        one[0].logits, labels=one[0].labels, hashes=one[0].hashes + np.uint64(99_999)
    )
    found = compared((moved, other), build_report(one[0], ood={"far": one[1]}))
    assert "matched by position" in found["note"]
    assert set(found["ood"]) == {"far"}


@given(st.lists(st.integers(0, 6), max_size=30), st.lists(st.integers(0, 6), max_size=30))
def test_matching_uses_each_row_once_and_misses_none(first, second):
    one, two = np.array(first, dtype=np.uint64), np.array(second, dtype=np.uint64)
    here, there = match(one, two)
    assert np.array_equal(one[here], two[there])
    assert len(set(here.tolist())) == len(here)
    assert len(set(there.tolist())) == len(there)
    shared = sum(min(first.count(value), second.count(value)) for value in set(first))
    assert len(here) == shared


def test_rows_survive_the_file(tmp_path):
    rows = build_report(sets(1.0)[0], ood={"far": sets(1.0)[1]}).rows
    rows.write(tmp_path / "rows.npz")
    back = ReportRows.read(tmp_path / "rows.npz")
    assert back.fingerprint() == rows.fingerprint()
    assert np.array_equal(back.labels, rows.labels)
    assert np.allclose(back.after.nll, rows.after.nll, rtol=1e-6)
    assert np.array_equal(back.before.correct, rows.before.correct)
    (tmp_path / "rows.npz").write_bytes((tmp_path / "rows.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot read the rows"):
        ReportRows.read(tmp_path / "rows.npz")


@pytest.mark.slow
def test_an_unchanged_model_shows_a_change_of_exactly_zero(tmp_path):
    """The file keeps seven digits of a row: the rows of now are rounded alike."""
    one = sets(1.3)
    build_report(one[0], ood={"far": one[1]}).save(tmp_path)
    report = build_report(one[0], ood={"far": one[1]}, baseline=Baseline.read(tmp_path))
    found = report.to_dict()["comparison"]
    for part in (found["before"], found["after"], found["ood"]["far"]):
        for change in part.values():
            difference = change["difference"]
            assert [difference[key] for key in ("value", "low", "high")] == [0, 0, 0]


def test_accuracy_after_calibration_is_compared_where_a_calibrator_changes_predictions():
    rows = build_report(sets(1.0)[0]).rows
    assert rows is not None
    moved = replace(
        rows.after, predicted=np.roll(rows.after.predicted, 1), correct=~rows.after.correct
    )
    changed = replace(rows, after=moved)
    old = Baseline({"gate": {}}, changed, "old")
    found = comparison_section(rows, old, "energy", 0).to_dict()
    accuracy = found["after"]["accuracy"]
    assert accuracy["value"] == rows.after.correct.mean()
    assert accuracy["baseline"] == pytest.approx(1 - accuracy["value"])
    assert accuracy["better"] is True
    same = comparison_section(rows, replace(old, rows=rows), "energy", 0).to_dict()
    assert "accuracy" not in same["after"]


def test_weights_count_as_repeated_rows():
    """The values of whole-number weights are those of rows that stand there as often."""
    generator = np.random.default_rng(0)
    old, new = sets(1.0)[0], sets(2.0)[0]
    weight = generator.integers(1, 4, len(old)).astype(np.float64)
    repeated = np.repeat(np.arange(len(old)), weight.astype(int))

    def rows_of(part, *, times):
        if times:
            labels, logits = part.labels[repeated], part.logits[repeated]
            hashes, found = (
                np.arange(len(repeated), dtype=np.uint64),
                row_statistics(logits, labels),
            )
        else:
            labels, hashes = part.labels, part.hashes
            found = row_statistics(part.logits, labels, sample_weight=weight)
        return ReportRows({"evaluation": SetRows(hashes, None)}, labels, found, found)

    found = {
        times: comparison_section(
            rows_of(new, times=times),
            Baseline({"gate": {}}, rows_of(old, times=times), "old"),
            "energy",
            0,
        ).to_dict()
        for times in (False, True)
    }
    for name, change in found[False]["before"].items():
        again = found[True]["before"][name]
        for key in ("baseline", "value"):
            assert change[key] == pytest.approx(again[key], rel=1e-5)
        difference = change["difference"]
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert "sample weights" in found[False]["note"]
    assert "sample weights" not in found[True]["note"]


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    base = ["report", "--data", "demo:", "--ood", "far=demo:far_ood", "-q"]
    assert run([*base, "-o", str(first)]) == 0
    assert (first / "rows.npz").exists()
    again = [*base, "-o", str(second), "--baseline", str(first / "report.json")]
    bound = ["--require", "comparison.before.accuracy.difference>=-0.01"]
    assert run([*again, *bound]) == 0
    report = json.loads((second / "report.json").read_text())
    assert report["comparison"]["n"] == 450
    assert "Comparison with a baseline" in (second / "report.html").read_text()
    assert "## Comparison with" in (second / "report.md").read_text()
    capsys.readouterr()
    (first / "rows.npz").unlink()
    assert run(again) == 0
    report = json.loads((second / "report.json").read_text())
    assert "no rows.npz" in report["comparison"]["not_run"]


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "other", "meta": {"title": "x"}}', "[]"])
def test_a_baseline_that_is_none_is_bad_data(tmp_path, capsys, text):
    (tmp_path / "old.json").write_text(text)
    args = ["report", "--data", "demo:", "-q", "-o", str(tmp_path / "out"), "--baseline"]
    assert run([*args, str(tmp_path / "old.json")]) == 3
    assert "old.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
