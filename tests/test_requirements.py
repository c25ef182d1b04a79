"""Requirements: how bounds and limits on regressions are read and judged, and the exit code."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebm_guard import Predictions, build_report
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.report.bounds import parse_bound
from ebm_guard.report.comparison import Baseline
from ebm_guard.report.record import Requirement
from ebm_guard.report.regression import MaxRegression, parse_regression
from ebm_guard.report.requirements import (
    holds,
    judge,
    outcome,
    parse_requirement,
    read_requirements,
)


def metric(value, low=None, high=None, null95=None):
    return {
        "value": value,
        "low": low,
        "high": high,
        "level": 0.95,
        "method": "none: one row" if low is None else "",
        "n": 900,
        "null95": null95,
    }


def judged(text, report):
    (found,) = judge([parse_requirement(text)], report)
    return found


REPORT = {
    "calibration": {
        "before": {"ece": metric(0.08, 0.07, 0.09)},
        "after": {
            "ece": metric(0.03, 0.02, 0.05, null95=0.025),
            "accuracy": metric(0.9),
            "smooth_ece": metric(0.02, 0.01, 0.03),
            "e_aurc": metric(0.001, 0.0005, 0.002),
        },
    },
    "gate": {"score": "msp", "coverage": metric(0.96, 0.94, 0.98), "accuracy_rejected": None},
    "ood": {
        "a": {
            "scores": {
                "msp": {"auroc": metric(0.9, 0.88, 0.92), "fpr95": metric(0.3, 0.2, 0.4)},
                "energy": {"auroc": metric(0.5, 0.4, 0.6)},
            }
        },
        "b": {
            "scores": {
                "msp": {"auroc": metric(0.8, 0.78, 0.82), "fpr95": metric(0.2, 0.1, 0.3)},
                "energy": {"auroc": metric(0.99, 0.98, 1.0)},
            }
        },
    },
    "selective": {
        "accuracy_at": {"0.8": metric(0.99, 0.98, 1.0), "0.95": metric(0.95, 0.94, 0.96)}
    },
    "groups": {
        "groups": [
            {"name": "night", "accuracy": metric(0.7, 0.6, 0.8)},
            {"name": "dr. no", "accuracy": metric(0.9, 0.85, 0.95)},
        ]
    },
    "robustness": {"not_run": "not part of this version"},
    "comparison": {"not_run": "no --baseline was given"},
}


# --- bounds


@pytest.mark.parametrize(
    ("bound", "status", "path"),
    [
        ("ece<=0.06", "met", "calibration.after.ece"),
        ("ece<=0.05", "met", "calibration.after.ece"),
        ("ece<0.05", "unclear", "calibration.after.ece"),
        ("ece<=0.04", "unclear", "calibration.after.ece"),
        ("ece<=0.025", "unclear", "calibration.after.ece"),
        ("ece<=0.02", "unclear", "calibration.after.ece"),
        ("ece<0.02", "failed", "calibration.after.ece"),
        ("ece<=0.01", "failed", "calibration.after.ece"),
        ("ece>=0.02", "met", "calibration.after.ece"),
        ("ece>0.02", "unclear", "calibration.after.ece"),
        # Without an interval the value alone counts.
        ("accuracy>=0.9", "met", "calibration.after.accuracy"),
        ("accuracy>0.9", "failed", "calibration.after.accuracy"),
        ("smooth_ece<=0.03", "met", "calibration.after.smooth_ece"),
        ("e_aurc<=0.001", "unclear", "calibration.after.e_aurc"),
        ("coverage>=0.95", "unclear", "gate.coverage"),
        ("gate.coverage>=0.94", "met", "gate.coverage"),
        # The worst set of the gate's score.
        ("auroc>=0.75", "met", "ood.b.scores.msp.auroc"),
        ("auroc>=0.85", "failed", "ood.b.scores.msp.auroc"),
        ("fpr95<=0.45", "met", "ood.a.scores.msp.fpr95"),
        ("fpr95<=0.1", "failed", "ood.a.scores.msp.fpr95"),
        ("ood.a.scores.energy.auroc>=0.5", "unclear", "ood.a.scores.energy.auroc"),
        ("  ece   <=   6e-2 ", "met", "calibration.after.ece"),
        # One number in place of the interval: never unclear.
        ("ece<=0.03@value", "met", "calibration.after.ece"),
        ("ece<0.03@value", "failed", "calibration.after.ece"),
        ("ece<=0.05@upper", "met", "calibration.after.ece"),
        ("ece<=0.049@upper", "failed", "calibration.after.ece"),
        ("ece <= 0.02 @ lower", "met", "calibration.after.ece"),
        ("ece<=0.019@lower", "failed", "calibration.after.ece"),
        ("auroc>=0.78@lower", "met", "ood.b.scores.msp.auroc"),
        ("auroc>=0.79@lower", "failed", "ood.b.scores.msp.auroc"),
        ("accuracy>=0.9@value", "met", "calibration.after.accuracy"),
        # Keys with dots, and the items of lists by name.
        ("selective.accuracy_at.0.95>=0.94", "met", "selective.accuracy_at.0.95"),
        ("groups.groups.night.accuracy>=0.85", "failed", "groups.groups.night.accuracy"),
    ],
)
def test_judging(bound, status, path):
    found = judged(bound, REPORT)
    assert (found.status, found.path, found.text) == (status, path, bound.strip())
    assert f"{found.value:.4g}" in found.message


def test_a_metric_that_was_not_run_fails():
    found = judged("robustness.pgd>=0.5", REPORT)
    assert (found.status, found.value, found.path) == ("failed", None, "robustness.pgd")
    assert "not part of this version" in found.message
    assert "no rows" in judged("gate.accuracy_rejected>=0.5", REPORT).message
    for text in ("auroc>=0.5", "fpr95_ood_positive<=0.5@upper"):
        found = judged(text, {**REPORT, "ood": {}})
        assert found.status == "failed"
        assert "no OOD set" in found.message


numbers = st.floats(0, 1, allow_nan=False)
operators = st.sampled_from(["<=", "<", ">=", ">"])


@given(st.lists(numbers, min_size=3, max_size=3), operators, numbers)
def test_the_verdict_equals_its_definition(ends, operator, bound):
    low, value, high = sorted(ends)
    report = {**REPORT, "calibration": {"after": {"ece": metric(value, low, high)}}}
    compare = {
        "<=": lambda number: number <= bound,
        "<": lambda number: number < bound,
        ">=": lambda number: number >= bound,
        ">": lambda number: number > bound,
    }[operator]
    text = f"ece{operator}{bound!r}"
    # The ends of an interval decide for all its points.
    expected = {(True, True): "met", (False, False): "failed"}.get(
        (compare(low), compare(high)), "unclear"
    )
    assert judged(text, report).status == expected
    for end, number in (("value", value), ("lower", low), ("upper", high)):
        met = "met" if compare(number) else "failed"
        assert judged(f"{text}@{end}", report).status == met


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("ece<=0.01", True),
        ("ece<0.0249@upper", True),
        ("ece<=0.025", False),
        ("ece<=0.04", False),
        ("ece>=0.01", False),
        ("calibration.before.ece<=0.01", False),
    ],
)
def test_a_bound_below_the_null_level_warns(text, warned):
    message = judged(text, REPORT).message
    assert ("even a perfect model would show up to 0.025 on 900 rows" in message) is warned


@pytest.mark.parametrize(
    "text",
    [
        *["ece", "ece<=", "<=0.1", "ece==0.1", "ece<=x", "ece<=nan", "ece<=inf", "", "a b<=1"],
        *["ece<=@value", "ece<=0.1@upper@lower", "ece@upper<=0.1"],
    ],
)
def test_what_is_no_requirement(text):
    with pytest.raises(InvalidInputError, match=r"got requirement .*METRIC OPERATOR NUMBER"):
        parse_requirement(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [("ece<=0.1@uper", "did you mean 'upper'"), ("ece<=0.1@", "value, upper or lower")],
)
def test_what_is_no_end(text, words):
    with pytest.raises(InvalidInputError, match="behind @ needed") as caught:
        parse_bound(text)
    assert words in str(caught.value)


@pytest.mark.parametrize("end", ["upper", "lower"])
def test_an_end_that_a_metric_lacks_is_refused(end):
    with pytest.raises(InvalidInputError, match=f"calibration.after.accuracy has no {end} end"):
        judged(f"accuracy>=0.5@{end}", REPORT)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("calibration.aftr.ece<=1", "did you mean 'after'"),
        ("ood.c.scores.msp.auroc>=1", "ood has no 'c'"),
        ("gate<=1", "not a metric with a value"),
        ("gate.score<=1", "not a metric"),
        ("calibration.after.ece.value<=1", "not"),
        ("groups.groups.day.accuracy<=1", "it has night, dr. no"),
        ("selective.accuracy_at.0.9>=1", "selective.accuracy_at has no '0'"),
    ],
)
def test_paths_that_no_report_has(text, words):
    with pytest.raises(InvalidInputError, match=r"got requirement") as caught:
        judged(text, REPORT)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("nothing<=1", "the report has no 'nothing'"), ("acuracy>=1", "did you mean 'accuracy'")],
)
def test_a_path_of_no_section_is_refused_before_the_work(text, words):
    with pytest.raises(InvalidInputError, match=r"got requirement") as caught:
        parse_requirement(text)
    assert words in str(caught.value)


# --- limits on regressions


def change(baseline, value, low, high):
    return {"baseline": baseline, "value": value, "difference": metric(value - baseline, low, high)}


COMPARED = {
    **REPORT,
    "comparison": {
        "before": {
            "accuracy": change(0.90, 0.89, -0.02, 0.0),
            "ece": change(0.05, 0.09, 0.03, 0.05),
        },
        "after": {"ece": change(0.02, 0.03, 0.005, 0.015)},
        "ood": {
            "a": {"auroc": change(0.9, 0.88, -0.03, -0.01), "fpr95": change(0.2, 0.1, -0.2, 0.0)},
            "b": {"auroc": change(0.8, 0.79, -0.012, -0.008), "fpr95": change(0.3, 0.3, -0.1, 0.1)},
        },
    },
}


@pytest.mark.parametrize(
    ("limit", "status", "path"),
    [
        ("ece=0.015", "met", "after.ece"),
        ("ece=0.014", "unclear", "after.ece"),
        ("ece=0.004", "failed", "after.ece"),
        ("after.ece=0.02", "met", "after.ece"),
        ("before.ece=0.02", "failed", "before.ece"),
        # Larger is better: a regression is a fall.
        ("accuracy=0.02", "met", "before.accuracy"),
        ("accuracy=0.01", "unclear", "before.accuracy"),
        ("before.accuracy=0.03", "met", "before.accuracy"),
        # Of several sets the one that fares worst.
        ("auroc=0.03", "met", "ood.a.auroc"),
        ("auroc=0.009", "failed", "ood.a.auroc"),
        ("auroc=0.011", "unclear", "ood.a.auroc"),
        ("ood.b.auroc=0.011", "unclear", "ood.b.auroc"),
        ("ood.b.auroc=0.012", "met", "ood.b.auroc"),
        ("fpr95=0", "unclear", "ood.b.fpr95"),
        ("ood.a.fpr95=0", "met", "ood.a.fpr95"),
    ],
)
def test_regressions(limit, status, path):
    found = judged(f"max-regression {limit}", COMPARED)
    assert (found.status, found.path) == (status, f"comparison.{path}.difference")
    assert found.text == f"max-regression {limit}"
    node = COMPARED["comparison"]
    for key in path.split("."):
        node = node[key]
    # The record holds the change in the metric's own sign, and the bound on it.
    assert (found.value, found.low) == (node["difference"]["value"], node["difference"]["low"])
    amount = float(limit.partition("=")[2])
    falls = path.endswith(("accuracy", "auroc"))
    assert (found.operator, found.bound) == ((">=", -amount) if falls else ("<=", amount))
    assert f"from {node['baseline']:.4g} to {node['value']:.4g}" in found.message


def test_a_failed_set_beats_a_larger_change_that_is_unclear():
    """Set a changed more, but only for set b is it certain."""
    report = {
        **REPORT,
        "comparison": {
            "before": {},
            "after": {},
            "ood": {
                "a": {"auroc": change(0.9, 0.8, -0.25, 0.05)},
                "b": {"auroc": change(0.9, 0.85, -0.06, -0.04)},
            },
        },
    }
    found = judged("max-regression auroc=0.01", report)
    assert (found.status, found.path) == ("failed", "comparison.ood.b.auroc.difference")


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("nll=0.1", "no labels"),
        ("after.accuracy=0.1", "change no prediction"),
        ("ood.c.auroc=0.1", None),
    ],
)
def test_what_was_not_compared(limit, words):
    if words is None:
        with pytest.raises(InvalidInputError, match="no OOD set 'c'"):
            judged(f"max-regression {limit}", COMPARED)
        return
    found = judged(f"max-regression {limit}", COMPARED)
    assert (found.status, found.value) == ("failed", None)
    assert words in found.message


def test_without_pairs_a_regression_fails_with_the_reason():
    found = judged("max-regression ece=1", REPORT)
    assert found.status == "failed"
    assert "no --baseline was given" in found.message
    apart = {**COMPARED, "comparison": {**COMPARED["comparison"], "ood": {}}}
    for limit in ("auroc=1", "ood.a.fpr95=1"):
        found = judged(f"max-regression {limit}", apart)
        assert found.status == "failed"
        assert "rows in common" in found.message


@pytest.mark.parametrize(
    "text", ["ece", "ece=", "=0.1", "ece=x", "ece=-0.1", "ece=nan", "ece=inf", "ece<=0.1", ""]
)
def test_what_is_no_limit(text):
    with pytest.raises(InvalidInputError, match=r"got --max-regression .*METRIC=AMOUNT"):
        parse_regression(text)


@pytest.mark.parametrize(
    "text", ["ecc=1", "after.auroc=1", "before.=1", "ood.a=1", "ood.a.ece=1", "calibration.ece=1"]
)
def test_metrics_that_are_not_compared(text):
    with pytest.raises(InvalidInputError, match="is not compared with a baseline"):
        parse_regression(text)


def predictions(generator, noise, n=500):
    labels = np.arange(n) % 3
    logits = 3 * np.eye(3)[labels] + noise * generator.normal(size=(n, 3))
    return Predictions(logits, labels=labels, hashes=np.arange(n, dtype=np.uint64))


@pytest.mark.slow
def test_from_rows_to_verdict(tmp_path):
    """The same rows through files: no change meets a limit of zero, a worse model fails it."""
    good = predictions(np.random.default_rng(0), 1.0)
    bad = predictions(np.random.default_rng(0), 3.0)
    build_report(good).save(tmp_path)
    old = Baseline.read(tmp_path)
    limits = [f"max-regression {name}=0" for name in ("accuracy", "nll", "brier", "ece")]
    same = build_report(good, baseline=old, requirements=limits)
    assert [item.status for item in same.requirements] == ["met"] * 4
    worse = build_report(bad, baseline=old, requirements=limits)
    assert [item.status for item in worse.requirements[:3]] == ["failed"] * 3
    json.dumps(worse.to_dict(), allow_nan=False)


# --- files of requirements


def test_a_file_of_requirements(tmp_path):
    path = tmp_path / "bounds.toml"
    path.write_text(
        """
        [requirements]
        ece = "<= 0.05 @upper"
        ood.far.scores.energy.auroc = ">=0.9"
        "gate.coverage" = [">=0.93", "<=0.98"]

        [max-regression]
        accuracy = 0.01
        ood.far.auroc = 1
        """
    )
    texts = read_requirements(path)
    assert texts == [
        "ece<= 0.05 @upper",
        "ood.far.scores.energy.auroc>=0.9",
        "gate.coverage>=0.93",
        "gate.coverage<=0.98",
        "max-regression accuracy=0.01",
        "max-regression ood.far.auroc=1",
    ]
    assert sum(isinstance(parse_requirement(text), MaxRegression) for text in texts) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ece = '<=1'",
        "[other]\nece = '<=1'",
        "[requirements]\nece = 0.05",
        "[requirements]\nece = true",
        "[max-regression]\nece = '0.05'",
        "[max-regression]\nece = true",
        "requirements = 3",
    ],
)
def test_a_file_of_something_else(tmp_path, text):
    path = tmp_path / "bounds.toml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"bounds.toml has .*needed"):
        read_requirements(path)


@pytest.mark.parametrize("content", [b"[requirements", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "bounds.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read the requirements"):
        read_requirements(path)


# --- the verdict


def of(*statuses):
    return [
        Requirement(f"r{number}", "", "<=", 1.0, 1.0, 1.0, 1.0, status, "")
        for number, status in enumerate(statuses)
    ]


@pytest.mark.parametrize(
    ("statuses", "allow_unclear", "code", "words"),
    [
        ([], False, 0, ""),
        (["met"], False, 0, "1 requirement passed"),
        (["met", "met"], True, 0, "2 requirements passed"),
        (["met", "unclear"], False, 1, "1 of 2 requirements not met: r1 (unclear)"),
        (["met", "unclear"], True, 0, "2 requirements passed, 1 of them unclear"),
        (["failed", "met"], False, 1, "1 of 2 requirements not met: r0 (failed)"),
        (["failed", "unclear"], True, 1, "1 of 2 requirements not met: r0 (failed)"),
        (["failed", "unclear"], False, 1, "r0 (failed); r1 (unclear)"),
    ],
)
def test_outcome(statuses, allow_unclear, code, words):
    found = outcome(of(*statuses), allow_unclear=allow_unclear)
    assert found.code == code
    assert words in found.line
    assert bool(found.line) is bool(statuses)
    assert "\n" not in found.line


@given(st.lists(st.sampled_from(["met", "failed", "unclear"]), max_size=6), st.booleans())
def test_each_requirement_can_flip_the_exit_code(statuses, allow_unclear):
    found = outcome(of(*statuses), allow_unclear=allow_unclear)
    missed = [status for status in statuses if not holds(status, allow_unclear=allow_unclear)]
    assert found.code == bool(missed)
    assert all(
        (f"r{number} (" in found.line) == (not holds(status, allow_unclear=allow_unclear))
        for number, status in enumerate(statuses)
    )
    assert outcome(of(*statuses, "failed"), allow_unclear=allow_unclear).code == 1
