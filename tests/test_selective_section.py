"""The selective section of the report and its figures."""

import json

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from ebm_guard.calibration import RowStatistics, TemperatureScaling, row_statistics
from ebm_guard.data.splits import two_folds
from ebm_guard.report.figures.selective import joint_map, risk_coverage
from ebm_guard.report.figures.style import THEME
from ebm_guard.report.record import NotRun
from ebm_guard.report.selective_section import HeldOutPart, selective_section


def toy(n, classes=5, key="toy"):
    rng = oracles.generator("section", key, n)
    logits = rng.normal(size=(n, classes)) * 2
    logits[np.arange(n), rng.integers(0, classes, n)] += 4
    labels = oracles.draw_labels(logits, rng)
    energy = -torch.logsumexp(torch.from_numpy(1.5 * logits), 1).numpy()
    return 1.5 * logits, labels, energy


def held_out(logits, labels, fold):
    fit, test = fold
    calibrator = TemperatureScaling().fit(logits[fit], labels[fit])
    part = HeldOutPart(test, lambda at: calibrator.transform(logits[at]), "the other half")
    return part, row_statistics(logits[test], labels[test], transform=calibrator.transform)


def folds(logits, labels):
    first, second = two_folds(len(labels), labels, 0)
    made = [held_out(logits, labels, pair) for pair in ((first, second), (second, first))]
    rows = RowStatistics.concatenate([rows for _, rows in made])
    order = np.argsort(np.concatenate([second, first]))
    return [part for part, _ in made], rows.select(order)


def one_part(logits, labels):
    """Calibration rows of their own: one calibrator, all evaluation rows held out."""
    calibrator = TemperatureScaling().fit(*toy(500, key="calibration")[:2])
    rows = row_statistics(logits, labels, transform=calibrator.transform)
    everything = np.arange(len(labels))
    part = HeldOutPart(everything, lambda at: calibrator.transform(logits[at]), "500 rows")
    return [part], rows


@pytest.fixture(scope="module", params=["folds", "one part"])
def built(request):
    logits, labels, energy = toy(3000)
    parts, rows = (folds if request.param == "folds" else one_part)(logits, labels)
    section = selective_section(rows, labels, energy, parts)
    plain = json.loads(json.dumps(section.to_dict(), allow_nan=False))
    return request.param, parts, rows, energy, plain


def test_the_section_is_counted_from_the_rows(built):
    _, _, rows, energy, section = built
    assert section["n"] == 3000
    assert section["accuracy"]["value"] == rows.correct.mean()
    for row in section["accuracy_at"].values():
        for name, inside in (
            ("confidence", rows.confidence >= row["confidence"]["cut"]),
            ("energy", energy <= row["energy"]["cut"]),
        ):
            assert row[name]["realised"] == inside.mean() >= row["coverage"] - 1e-12
            assert row[name]["accuracy"]["value"] == pytest.approx(rows.correct[inside].mean())
    oracle = section["curves"]["oracle"]
    assert oracle["risk"][-1] == pytest.approx(1 - rows.correct.mean())
    assert oracle["risk"][0] == 0
    joint = section["joint"]
    assert np.sum(joint["right"]) == rows.correct.sum()
    assert np.sum(joint["wrong"]) == (~rows.correct).sum()
    shape = (len(joint["confidence_edges"]) - 1, len(joint["energy_edges"]) - 1)
    assert np.shape(joint["right"]) == np.shape(joint["wrong"]) == shape
    sure = (rows.confidence > 0.999).sum()
    assert np.sum(joint["right"][-1]) + np.sum(joint["wrong"][-1]) == sure


def test_certificates_belong_to_one_calibrator_each(built):
    kind, parts, rows, energy, section = built
    risks = [entry["risk"] for entry in section["certificates"] if entry["by"] == "confidence"]
    assert {0.01, 0.05} <= set(risks)
    for entry in section["certificates"]:
        assert len(entry["parts"]) == len(parts)
        for made, part in zip(entry["parts"], parts, strict=True):
            # Two parts share the 5 %, so that both certificates hold together.
            assert made["assurance"] == pytest.approx(0.975 if kind == "folds" else 0.95)
            assert made["n"] == len(part.index)
            if made["certified"]:
                inside = np.ones(len(part.index), dtype=bool)
                columns = {"confidence": rows.confidence, "energy": energy}
                for cut in made["rule"]:
                    value = columns[cut["name"]][part.index]
                    if cut["cut"] is not None:
                        high = cut["trusted"] == "high"
                        inside &= value > cut["cut"] if high else value < cut["cut"]
                assert inside.sum() == made["accepted"]
                assert (~rows.correct[part.index][inside]).sum() == made["errors"]
        if entry["coverage"] is not None:
            shares = [made["coverage"]["value"] for made in entry["parts"]]
            assert entry["coverage"] == min(shares)
    assert ("not exchangeable" in section["protocol"]) == (kind == "folds")
    assert "separate setting for sets" in section["protocol"]


def test_prediction_sets_are_measured_on_fresh_rows(built):
    kind, *_, section = built
    for name in ("lac", "aps"):
        report = section["conformal"][name]
        assert report["coverage"]["n"] == 3000
        assert report["n_calibration"] == (750 if kind == "folds" else 1500)
        # The mean over two or four draws of the calibration rows, at 1e-3.
        missed = round((1 - report["coverage"]["value"]) * 3000)
        draws = stats.betabinom(3000, 300, 2700)
        assert draws.cdf(missed) > 0.0005 or name == "aps"
        assert draws.sf(missed) > 0.0005


def test_the_verdict_names_what_a_manager_asks(built):
    *_, section = built
    at = section["accuracy_at"]["90"]
    sentence = section["verdict"]["sentence"]
    assert "surest 90%" in sentence
    assert f"{at['confidence']['accuracy']['value']:.1%}" in sentence
    assert "Certified" in sentence
    assert section["verdict"]["status"] in ("good", "attention")


def test_without_labels_or_logits():
    logits, labels, _ = toy(200)
    parts, rows = one_part(logits, labels)
    assert isinstance(selective_section(None, None, None, []), NotRun)
    section = selective_section(rows, labels, None, parts).to_dict()
    assert section["joint"] is None
    assert section["curves"]["energy"] is None
    assert section["accuracy_at"]["80"]["energy"] is None
    assert {entry["by"] for entry in section["certificates"]} == {"confidence"}
    assert risk_coverage(section).axes


def test_few_rows_promise_nothing_and_say_so():
    logits, labels, energy = toy(16)
    parts, rows = one_part(logits, labels)
    section = selective_section(rows, labels, energy, parts).to_dict()
    assert "not_run" in section["conformal"]
    assert section["verdict"]["status"] in ("unclear", "bad")
    assert "Nothing can be certified on 16 rows" in section["verdict"]["sentence"]
    assert all("rows are too few" in entry["parts"][0]["why"] for entry in section["certificates"])
    assert risk_coverage(section).axes
    assert joint_map(section).axes


def test_a_perfect_model():
    logits, _, energy = toy(600)
    parts, rows = one_part(logits, logits.argmax(axis=1))
    section = selective_section(rows, logits.argmax(axis=1), energy, parts).to_dict()
    assert section["verdict"]["status"] == "good"
    assert [entry["risk"] for entry in section["certificates"]][:3] == [0.01, 0.02, 0.05]
    assert risk_coverage(section).axes
    assert joint_map(section).axes


def test_confidence_that_misleads_is_bad_news():
    rng = oracles.generator("misleads")
    n = 2000
    confidence = rng.random(n)
    correct = rng.random(n) > confidence
    rows = RowStatistics(confidence, np.zeros(n, np.int64), correct, np.zeros(n), np.zeros(n))
    values = np.log(np.full((n, 2), 0.5))
    part = HeldOutPart(np.arange(n), lambda at: values[at], "other rows")
    section = selective_section(rows, np.zeros(n, np.int64), None, [part])
    assert section.verdict.status == "bad"


def test_figures_use_the_colours_that_dark_mode_replaces(built):
    *_, section = built
    for figure in (risk_coverage(section), joint_map(section)):
        (ax,) = figure.axes
        import matplotlib.colors as colours

        used = {colours.to_hex(line.get_color()) for line in ax.lines}
        used |= {colours.to_hex(text.get_color()) for text in figure.findobj(match=_is_text)}
        used |= {colours.to_hex(patch.get_facecolor()) for patch in ax.patches if patch.get_fill()}
        used |= {"#ffffff"}
        assert used <= {colour.lower() for colour in THEME} | {"#000000"}
    names = {text.get_text() for text in risk_coverage(section).axes[0].texts}
    assert {"confidence", "energy", "best possible", "certified"} <= names


def _is_text(artist):
    from matplotlib.text import Text

    return isinstance(artist, Text) and artist.get_text() != ""
