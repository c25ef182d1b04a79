"""The exported program's formulas equal the guard's, before any exporter sees them."""

import math

import numpy as np
import pytest
import torch
from export_cases import CASES, Net, case, ensemble, fitted, inputs, labelled
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Pixels

import ebm_guard
from ebm_guard import registry
from ebm_guard.deploy.export_parity import Reference, check_parity, parity_inputs, reference
from ebm_guard.deploy.export_program import GuardProgram
from ebm_guard.deploy.export_scores import CountBelow, Cuts
from ebm_guard.deploy.exported import ExportedOutput
from ebm_guard.errors import InvalidInputError, NotFittedError, UnsupportedModelError
from ebm_guard.gate import INVALID, ClassConditionalThreshold
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.ood import SCORE_FAMILIES

values = st.integers(-20, 20).map(lambda i: i / 4)
queries = st.one_of(values, st.sampled_from([math.inf, -math.inf, math.nan, 1e300]))


def call(program, x):
    return ExportedOutput.of(program(x), program.keeps_prediction)


def same(found, decision, rtol=1e-12):
    """All that both say is equal; rows that are INVALID are compared by their status."""
    assert torch.equal(found.status, decision.status)
    assert torch.equal(found.label, decision.label)
    assert torch.equal(found.p_value, decision.p_value)
    assert torch.equal(found.logits.isnan(), decision.logits.isnan())
    valid = decision.status != INVALID
    assert torch.equal(found.logits[valid], decision.logits[valid])
    torch.testing.assert_close(found.score[valid], decision.score[valid], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(found.confidence, decision.confidence, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.energy[valid], decision.energy[valid], rtol=0, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(values, min_size=1, max_size=40), min_size=1, max_size=5), st.data())
def test_counts_equal_a_search(groups, data):
    sorted_groups = [torch.tensor(sorted(group)).double() for group in groups]
    x = torch.tensor(data.draw(st.lists(queries, min_size=1, max_size=9))).double()
    of = torch.tensor([data.draw(st.integers(0, len(groups) - 1)) for _ in x])
    count = CountBelow(sorted_groups)
    expected = [int((sorted_groups[g] < v).sum()) for v, g in zip(x, of, strict=True)]
    assert count(x, of).tolist() == expected
    alone = CountBelow(sorted_groups[:1])(x)
    finite = ~x.isnan()
    assert torch.equal(alone[finite], torch.searchsorted(sorted_groups[0], x)[finite])


@pytest.mark.parametrize("by_class", [False, True])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cuts_equal_the_threshold(by_class, data):
    """Ties with the cut and with calibration scores, a shared group, classes never seen."""
    n = data.draw(st.integers(20, 80))
    scores = np.array(data.draw(st.lists(values, min_size=n, max_size=n)))
    rates = {"false_reject_rate": 0.3, "assurance": 0.8}
    if by_class:
        predicted = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
        threshold = ClassConditionalThreshold.fit(scores, predicted, num_classes=5, **rates)
    else:
        threshold = Threshold.fit(scores, "pac", **rates)
    x = torch.tensor([*data.draw(st.lists(values, min_size=1)), *scores.tolist()]).double()
    classes = torch.tensor([data.draw(st.integers(0, 4)) for _ in x])
    accept, p_value = Cuts(threshold)(x, classes)
    assert torch.equal(accept, threshold.accept(x, classes))
    assert torch.equal(p_value, threshold.p_value(x, classes))


@pytest.mark.parametrize("name", CASES)
def test_the_program_equals_the_guard(name):
    guard = case(name)
    x = torch.cat([inputs(60), inputs(60, 5, spread=6.0), inputs(3, 6)])
    x[-3, 1], x[-2, 0], x[-1, 5] = math.nan, math.inf, -math.inf
    decision = guard(x[:-3])
    assert 0 < int(decision.accept.sum()) < len(decision)
    program = GuardProgram(guard)
    with torch.no_grad():
        found = call(program, x)
        same(call(program, x[:-3]), decision)
        for row in (0, 70):
            same(call(program, x[row : row + 1]), guard(x[row : row + 1]))
    assert (found.status[-3:] == INVALID).all()
    assert (found.probabilities[-3:] == 0).all()
    # Bad rows change nothing about the others.
    assert torch.equal(found.accept[:-3], decision.accept)


@pytest.mark.parametrize("combine", ["product", "mixture"])
def test_the_program_of_an_ensemble_equals_the_guard(combine):
    guard = fitted(ensemble(combine))
    x = torch.cat([inputs(60), inputs(60, 5, spread=6.0)])
    with torch.no_grad():
        same(call(GuardProgram(guard), x), guard(x))


def test_every_registered_score_is_a_case():
    names = {row.name for family in SCORE_FAMILIES for row in registry.methods(family)}
    assert names <= set(CASES)
    calibrators = {row.name for row in registry.methods("calibrator")}
    assert calibrators - {"temperature"} <= set(CASES)  # temperature is the default


def test_pixels_outside_the_unit_interval_are_invalid():
    model = Pixels()
    x = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    guard = ebm_guard.wrap(model)
    with torch.no_grad():
        labels = model(guard.classifier.pixels(x)).argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 3
    guard.fit([(guard.classifier.pixels(x), labels)])
    program = GuardProgram(guard, pixels=True)
    with torch.no_grad():
        same(call(program, x), guard.pixels(x))
        bad = x[:4].clone()
        bad[0, 0, 0, 0], bad[1, 2, 7, 7], bad[2, 1, 3, 3] = -0.01, 1.01, math.nan
        found = call(program, bad)
    assert found.status.tolist()[:3] == [INVALID] * 3
    assert found.status[3] == guard.pixels(x[3:4]).status[0]


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(NotFittedError, match="holds no model"):
        GuardProgram(ebm_guard.Guard())
    with pytest.raises(NotFittedError, match="not fitted"):
        GuardProgram(ebm_guard.wrap(Net()))
    model = Net()

    def plain(x):
        return model(x)

    guard = ebm_guard.wrap(plain).fit(labelled(model, 400))
    with pytest.raises(UnsupportedModelError, match="function"):
        GuardProgram(guard)
    with pytest.raises(InvalidInputError, match="normalisation is not known"):
        GuardProgram(fitted(), pixels=True)

    class Detector:
        def predict_logits(self, logits):
            return -logits.amax(dim=1)

        def predict(self, x):
            return x

    guard = fitted()
    guard.score = ebm_guard.ood.as_score(Detector())
    with pytest.raises(InvalidInputError, match="another library"):
        GuardProgram(guard)


# --- the comparison finds what is wrong


def outputs(guard, x):
    program = GuardProgram(guard)
    return lambda rows: call(program, rows)


def changed(run, change):
    def broken(rows):
        found = run(rows)
        parts = {
            name: getattr(found, name).clone()
            for name in ("logits", "probabilities", "energy", "score", "p_value", "accept")
        }
        change(parts)
        return ExportedOutput(**parts, keeps_prediction=found.keeps_prediction)

    return broken


def flip(parts):
    parts["accept"] = ~parts["accept"]


def accept_all(parts):
    parts["accept"][:] = True


def shift(name, by):
    def change(parts):
        parts[name] += by

    return change


def never_zero(parts):
    parts["p_value"][parts["p_value"] == 0] = 0.5


def half(parts):
    parts["logits"] = parts["logits"].half()


@pytest.mark.parametrize("settings_", [{}, {"per_class": True}, {"risk": 0.3}])
def test_parity_finds_what_is_wrong(settings_):
    guard = fitted(**settings_)
    x = parity_inputs(guard.canary.inputs, pixels=False)
    assert x.shape == (256, 6)
    assert torch.equal(x[:8], guard.canary.inputs)
    wanted = reference(guard, x, pixels=False)
    run = outputs(guard, x)
    facts = check_parity(guard, wanted, run)
    assert facts["rows"] == 256
    assert facts["decisions_that_differ"] == 0
    assert 0 < facts["accepted"] < 256
    for change, words in (
        (flip, "decisions differ"),
        (accept_all, "decisions differ"),
        (shift("logits", 0.1), "logits differ"),
        (shift("energy", 0.1), "energy differ"),
        (shift("score", 0.1), "score differ"),
        (shift("probabilities", 0.01), "probabilities differ"),
        (shift("p_value", 0.02), "p-values"),
        (never_zero, "NaN or infinite inputs"),
        (half, "float16"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            check_parity(guard, wanted, changed(run, change))


def test_a_row_at_the_cut_may_fall_either_way_and_is_counted():
    guard = fitted()
    x = parity_inputs(guard.canary.inputs, pixels=False)
    decision = guard(x)
    row = int((decision.score - decision.cut).abs().argmin())
    # Put that row's score exactly on the cut: a program that rounds otherwise may refuse it.
    cut = guard.threshold.cut.clone()
    guard.threshold.cut.copy_(decision.score[row])
    wanted = reference(guard, x, pixels=False)
    assert bool(wanted.decision.accept[row])

    def refuse(parts):
        parts["accept"] &= parts["score"] != decision.score[row]

    facts = check_parity(guard, wanted, changed(outputs(guard, x), refuse))
    assert facts["decisions_that_differ"] == 1 <= facts["near_the_cut"]
    guard.threshold.cut.copy_(cut)


def test_rows_that_are_all_invalid_prove_nothing():
    guard = fitted()
    x = torch.full((256, 6), math.nan)
    wanted = Reference(x, guard(x), 1e-4)
    with pytest.raises(UnsupportedModelError, match="every row"):
        check_parity(guard, wanted, outputs(guard, x))
