"""What a notebook shows of a report, a decision and a guard."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ebm_guard


def predictions(n=300, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    logits = np.eye(3)[labels] * 3 + generator.normal(size=(n, 3))
    return ebm_guard.Predictions(logits, labels=labels, source="<b>rows</b>")


def test_report_shows_its_verdicts_and_escapes_names():
    html = ebm_guard.build_report(predictions())._repr_html_()
    for word in ("Calibration", "Gate", "Robustness", "Not run", "report.save"):
        assert word in html
    assert "<b>rows</b>" not in html
    assert "&lt;b&gt;rows" in html


@pytest.mark.slow
def test_report_saves_itself(tmp_path):
    report = ebm_guard.build_report(predictions())
    paths = report.save(tmp_path / "out")
    assert {path.name for path in paths} >= {"report.json", "report.html", "report.md", "rows.npz"}
    assert all(path.stat().st_size for path in paths)


def test_decision_is_a_table_of_its_first_rows():
    guard = ebm_guard.Guard().fit(predictions())
    logits = torch.randn(25, 3, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = float("nan")
    decision = guard.decide(logits)
    html = decision._repr_html_()
    assert html.count("<tr>") == 21
    assert "and 5 more rows" in html
    assert "INVALID" in html
    assert "more rows" not in guard.decide(logits[:3])._repr_html_()
    assert "<table>" in guard.decide(logits[:0])._repr_html_()


def test_guard_shows_its_summary():
    fresh = ebm_guard.Guard()
    assert "not fitted" in fresh.summary()
    guard = fresh.fit(predictions())
    for word in ("threshold", "guarantee", "temperature", "300 rows"):
        assert word in guard.summary()
    html = guard._repr_html_()
    assert html.startswith("<pre>")
    assert "<b>rows</b>" not in html
