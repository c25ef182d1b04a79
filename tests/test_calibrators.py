"""Vector, Dirichlet, isotonic and automatic calibration against slow truths and their own rules."""

import json
import math
import re

import numpy as np
import oracles
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from ebm_guard import Guard, Predictions, registry
from ebm_guard.calibration.calibrators import (
    AutoCalibrator,
    DirichletCalibration,
    IsotonicCalibration,
    VectorScaling,
    base,
    crossval,
    describe_facts,
    linear,
    make_calibrator,
)
from ebm_guard.calibration.calibrators.base import rows_of
from ebm_guard.calibration.calibrators.linear import Penalty, Problem
from ebm_guard.cli import cli
from ebm_guard.errors import EbmGuardWarning, InvalidInputError, NotFittedError, TooFewRowsError
from ebm_guard.gate.storage import describe_manifest, manifest_of

NAMES = [method.name for method in registry.methods("calibrator")]
LINEAR = ("vector", "dirichlet")
FEW = settings(deadline=None, max_examples=6, derandomize=True)


def drawn(name, n=400, classes=4, temperature=2.0, bias=0.0):
    """Logits that are off by a temperature, and by a bias on the first class."""
    rng = oracles.generator("calibrators", name)
    honest = rng.normal(0, 2, size=(n, classes))
    labels = oracles.draw_labels(honest, rng)
    logits = temperature * honest
    logits[:, 0] += bias
    return logits, labels


def nll(log_p, labels):
    return -log_p[np.arange(len(labels)), labels]


@pytest.fixture(scope="module")
def fitted():
    logits, labels = drawn("fitted", n=600, bias=2.0)
    return {name: make_calibrator(name).fit(logits, labels) for name in NAMES}, logits, labels


# ---------------------------------------------------------------------------------- all of them


def test_there_are_five():
    assert NAMES == ["temperature", "vector", "dirichlet", "isotonic", "auto"]


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_facts_and_state(fitted, name):
    calibrators, logits, _ = fitted
    calibrator = calibrators[name]
    assert (calibrator.name, calibrator.status, calibrator.n) == (name, "converged", 600)
    log_p = calibrator.transform(logits)
    assert log_p.dtype == np.float64
    assert np.allclose(special.logsumexp(log_p, axis=1), 0, atol=1e-12)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        given_logits = torch.from_numpy(logits).to(dtype)
        found = calibrator.log_probabilities(given_logits)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        same = calibrator.transform(given_logits.double().numpy())
        assert np.allclose(found.double().numpy(), same, rtol=1e-4, atol=1e-4)
    facts = json.loads(json.dumps(calibrator.facts(), allow_nan=False))
    assert (facts["name"], facts["status"], facts["n"]) == (name, "converged", 600)
    assert describe_facts(facts).startswith(name)
    assert "600 rows: converged" in describe_facts(facts)
    tensors = {key: value.clone() for key, value in calibrator.state_dict().items()}
    again = type(calibrator).from_state(tensors, json.loads(json.dumps(calibrator.settings())))
    assert np.array_equal(again.transform(logits), log_p)
    assert again.facts() == calibrator.facts()
    assert again.settings() == calibrator.settings()
    assert again.keeps_prediction == calibrator.keeps_prediction


@pytest.mark.parametrize("name", NAMES)
def test_predicted_class_and_confidence(fitted, name):
    calibrators, logits, _ = fitted
    calibrator = calibrators[name]
    label, confidence = calibrator.predict(torch.from_numpy(logits))
    p = np.exp(calibrator.transform(logits))
    source = logits if calibrator.keeps_prediction else p
    assert np.array_equal(label.numpy(), source.argmax(axis=1))
    assert np.allclose(confidence.numpy(), p[np.arange(len(p)), label.numpy()], rtol=1e-12)
    assert torch.equal(calibrator.confidence(torch.from_numpy(logits)), confidence)
    if name in ("temperature", "isotonic"):
        assert calibrator.keeps_prediction
    elif name in LINEAR:
        # The bias of 2 on the first class is undone, so some rows change their class.
        assert (label.numpy() != logits.argmax(axis=1)).any()


@pytest.mark.parametrize("name", NAMES)
def test_export_gives_the_same_bits(fitted, name):
    calibrators, logits, _ = fitted

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calibrator = calibrators[name]

        def forward(self, x):
            return self.calibrator.log_probabilities(x)

    for dtype in (torch.float32, torch.float64):
        rows = torch.from_numpy(logits).to(dtype)
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        graph = torch.export.export(Graph(), (rows[:3],), dynamic_shapes=shapes)
        assert torch.equal(graph.module()(rows), calibrators[name].log_probabilities(rows))
        # The fit is in the graph as tensors, and not as constants of the code.
        assert set(graph.state_dict) == {
            f"calibrator.{key}" for key in calibrators[name].state_dict()
        }


@pytest.mark.parametrize("name", NAMES)
def test_a_guard_keeps_it_to_the_bit(tmp_path, name):
    logits, labels = drawn("guard", n=500, bias=2.0)
    stored = logits.astype(np.float32)
    guard = Guard().fit(Predictions(stored, labels=labels), calibrator=name)
    plain = Guard().fit(Predictions(stored, labels=labels))
    again = Guard.load(guard.save(tmp_path / "guard.safetensors"))
    rows = torch.from_numpy(drawn("fresh", bias=2.0)[0].astype(np.float32))
    rows[3, 1] = math.nan
    first, second, other = (each.decide(rows) for each in (guard, again, plain))
    for field in ("status", "label", "confidence", "energy", "score", "p_value"):
        assert torch.equal(getattr(first, field).nan_to_num(), getattr(second, field).nan_to_num())
    # Energy, score and threshold are those of the raw logits, whatever the calibrator.
    for field in ("status", "energy", "score", "p_value"):
        assert torch.equal(getattr(first, field).nan_to_num(), getattr(other, field).nan_to_num())
    finite = torch.arange(len(rows)) != 3
    label, confidence = guard.calibrator.predict(rows[finite])
    assert torch.equal(first.label[finite], label)
    assert torch.equal(first.confidence[finite], confidence)
    assert (int(first.label[3]), float(first.confidence[3])) == (-1, 0.0)
    # Each summary names the second it was made in.
    told = [re.sub(r"T\d\d:\d\d:\d\d", "", each.summary()) for each in (again, guard)]
    assert told[0] == told[1]
    assert describe_facts(guard.calibrator.facts()) in guard.summary()


def test_a_guard_takes_a_calibrator_and_names_a_wrong_one():
    logits, labels = drawn("instance", n=500)
    rows = Predictions(logits.astype(np.float32), labels=labels)
    mine = VectorScaling()
    assert Guard().fit(rows, calibrator=mine).calibrator is mine
    assert mine.status == "converged"
    with pytest.raises(InvalidInputError, match=r"did you mean .*'vector'"):
        Guard().fit(rows, calibrator="vectr")


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_fits_it(tmp_path, name):
    logits, labels = drawn("command", n=500, bias=2.0)
    np.savez(tmp_path / "rows.npz", logits=logits.astype(np.float32), labels=labels)
    output = tmp_path / "guard.safetensors"
    arguments = ["fit", "--data", f"logits:{tmp_path / 'rows.npz'}", "-o", str(output), "-q"]
    given_name = [] if name == "temperature" else ["--calibrator", name]
    result = CliRunner().invoke(cli, [*arguments, *given_name, "--json"])
    assert result.exit_code == 0, result.output
    guard = Guard.load(output)
    assert guard.calibrator.name == name
    manifest = json.loads(result.stdout)
    assert manifest["calibrator"]["facts"] == guard.calibrator.facts()
    rows = dict(describe_manifest(manifest))
    assert rows["calibrator"] == describe_facts(guard.calibrator.facts())


def test_a_guard_of_the_first_version_can_be_described():
    logits, labels = drawn("first version", n=500)
    guard = Guard().fit(Predictions(logits.astype(np.float32), labels=labels))
    manifest = manifest_of(guard.state())
    del manifest["calibrator"]["facts"]
    assert dict(describe_manifest(manifest))["calibrator"] == "temperature, on 500 rows: converged"


@pytest.mark.parametrize("name", NAMES)
def test_half_and_autocast_change_nothing(fitted, name):
    calibrators, logits, labels = fitted
    calibrator = make_calibrator(name).fit(logits, labels)
    rows = torch.from_numpy(logits).float()
    before = calibrators[name].log_probabilities(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(calibrator.log_probabilities(rows), before)
    assert torch.equal(calibrator.half().log_probabilities(rows), before)


@pytest.mark.parametrize("name", NAMES)
def test_it_must_be_fitted_first(name):
    with pytest.raises(NotFittedError, match=r"fit\(logits, labels\) first"):
        make_calibrator(name).log_probabilities(torch.zeros(2, 3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_refused_with_their_number(name, bad):
    logits, labels = drawn("bad")
    logits[[1, 5, 9], [0, 3, 2]] = bad
    with pytest.raises(InvalidInputError, match=r"3 rows with NaN or infinite"):
        make_calibrator(name).fit(logits, labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [40, 999])
def test_chunks_equal_one_go(monkeypatch, fitted, name, chunk):
    calibrators, logits, labels = fitted
    monkeypatch.setattr(base, "CHUNK", chunk)
    monkeypatch.setattr(linear, "CHUNK", 0)
    parts = make_calibrator(name).fit(logits, labels)
    assert np.allclose(parts.transform(logits), calibrators[name].transform(logits), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_memory_map_is_fine(tmp_path, fitted, name):
    calibrators, logits, labels = fitted
    np.save(tmp_path / "logits.npy", logits)
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    found = make_calibrator(name).fit(mapped, labels)
    assert np.array_equal(found.transform(mapped), calibrators[name].transform(logits))


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32), classes=st.integers(2, 4), scale=st.floats(0.2, 20))
@FEW
def test_what_must_not_matter_does_not(name, seed, classes, scale):
    rng = np.random.default_rng(seed)
    n = 30 * classes + 110
    honest = rng.normal(0, 2, size=(n, classes))
    labels = oracles.draw_labels(honest, rng)
    logits = scale * honest + rng.normal(0, 0.3, classes)
    if classes > 2 and seed % 2:
        kept = labels != classes - 1
        logits, labels, n = logits[kept], labels[kept], int(kept.sum())
    fresh = scale * rng.normal(0, 2, size=(50, classes))
    plain = make_calibrator(name).fit(logits, labels)
    expected = np.exp(plain.transform(fresh))
    assert np.allclose(expected.sum(axis=1), 1, rtol=1e-12)

    def same(other_logits, other_labels, weights=None, rows=fresh, back=None):
        found = make_calibrator(name).fit(other_logits, other_labels, weights)
        p = np.exp(found.transform(rows))
        p = p if back is None else p[:, back]
        assert np.allclose(p, expected, atol=2e-4)

    shift = rng.integers(-50, 50, size=(n, 1))
    same(logits + shift, labels, rows=fresh + 13.0)
    order = rng.permutation(n)
    same(logits[order], labels[order])
    if name != "auto":  # Twice the rows halve the standard error that `auto` asks for.
        same(np.repeat(logits, 2, axis=0), np.repeat(labels, 2))
    same(logits, labels, np.full(n, 3.0))
    classes_order = rng.permutation(classes)
    moved = np.argsort(classes_order)
    same(
        logits[:, classes_order],
        moved[labels],
        rows=fresh[:, classes_order],
        back=moved,
    )


@pytest.mark.parametrize("name", NAMES)
def test_integer_weights_are_repeated_rows(name):
    logits, labels = drawn("weights", n=400, classes=3, bias=1.0)
    weights = oracles.generator("integer weights").integers(0, 4, 400)
    repeated = np.repeat(np.arange(400), weights)
    weighted = make_calibrator(name).fit(logits, labels, weights)
    expanded = make_calibrator(name).fit(logits[repeated], labels[repeated])
    assert np.allclose(
        np.exp(weighted.transform(logits)), np.exp(expanded.transform(logits)), atol=1e-5
    )
    unweighted = make_calibrator(name).fit(logits, labels)
    assert not np.allclose(
        np.exp(weighted.transform(logits)), np.exp(unweighted.transform(logits)), atol=1e-3
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels_of", "status"),
    [("argmax", "separable"), ("argmin", "worse_than_uniform")],
)
def test_without_an_optimum_the_plain_softmax_is_kept(name, labels_of, status):
    logits, _ = drawn("no optimum")
    with pytest.warns(EbmGuardWarning, match=status):
        found = make_calibrator(name).fit(logits, getattr(logits, labels_of)(axis=1))
    assert found.status == status
    assert np.allclose(found.transform(logits), special.log_softmax(logits, axis=1), atol=1e-12)
    assert status in describe_facts(found.facts())
    json.dumps(found.facts(), allow_nan=False)


@pytest.mark.parametrize("name", ["temperature", "vector", "dirichlet", "auto"])
def test_constant_logits_say_nothing(name):
    logits = np.full((100, 3), 7.0)
    with pytest.warns(EbmGuardWarning, match="worse_than_uniform"):
        found = make_calibrator(name).fit(logits, np.arange(100) % 3)
    assert np.allclose(np.exp(found.transform(logits)), 1 / 3)


def test_isotonic_of_constant_logits_is_the_accuracy():
    found = IsotonicCalibration().fit(np.full((100, 3), 7.0), np.arange(100) % 3)
    assert np.allclose(np.exp(found.transform(np.full((5, 3), 7.0)))[:, 0], 0.34)


@pytest.mark.parametrize("name", NAMES)
def test_confidence_of_exactly_one(name):
    """float32 softmax gives 1.0 in many of these rows, some of them wrong."""
    rng = oracles.generator("saturated")
    logits = rng.normal(0, 1, size=(500, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 500)
    named = np.where(rng.random(500) < 0.9, labels, rng.integers(0, 4, 500))
    logits[np.arange(500), named] += rng.choice([2.0, 40.0, 300.0], 500).astype(np.float32)
    assert (torch.softmax(torch.from_numpy(logits), 1).amax(1) == 1).sum() > 200
    found = make_calibrator(name).fit(logits, labels)
    assert found.status == "converged"
    log_p = found.transform(logits)
    assert np.isfinite(log_p).all()
    assert np.allclose(special.logsumexp(log_p, axis=1), 0, atol=1e-9)
    plain = nll(special.log_softmax(logits.astype(np.float64), axis=1), labels).mean()
    assert nll(log_p, labels).mean() < plain


@pytest.mark.parametrize("name", ["vector", "dirichlet", "isotonic"])
def test_too_few_rows_are_refused_with_the_number_needed(name):
    logits, labels = drawn("few", n=39)
    needed = 100 if name == "isotonic" else 40
    with pytest.raises(TooFewRowsError, match=rf"got 39 rows of 4 classes.*at least {needed}"):
        make_calibrator(name).fit(logits, labels)
    weights = np.ones(400)
    weights[39:] = 0
    with pytest.raises(TooFewRowsError, match="got 39 rows"):
        make_calibrator(name).fit(*drawn("few", n=400), weights)


def test_many_classes_need_many_rows_for_dirichlet():
    logits, labels = drawn("wide", n=1100, classes=101)
    with pytest.raises(TooFewRowsError, match=r"at least 204,020 \(20 for each of the 101 x 101"):
        DirichletCalibration().fit(logits, labels)
    rows = rows_of(*drawn("wide", n=1000, classes=100))
    DirichletCalibration.require(rows)


@pytest.mark.parametrize("name", LINEAR)
def test_equal_rows_cannot_be_cross_validated(name):
    logits, labels = np.tile([[2.0, 1.0, -9.0]], (60, 1)), np.ones(60, dtype=np.int64)
    with pytest.raises(TooFewRowsError, match=r"1 different rows.*at least 10"):
        make_calibrator(name).fit(logits, labels)


@pytest.mark.parametrize("name", LINEAR)
def test_another_number_of_classes_is_refused(fitted, name):
    calibrators, _, _ = fitted
    with pytest.raises(InvalidInputError, match=r"logits of 5 classes.*fitted on 4"):
        calibrators[name].log_probabilities(torch.zeros(2, 5))


# ------------------------------------------------------------------------- vector and dirichlet


def naive_objective(point, logits, labels, temperature, penalty, full, weights):
    """The formula of the docstrings, in plain numpy."""
    classes = logits.shape[1]
    square = np.diag(point[:classes]) if not full else point[: classes**2].reshape(classes, classes)
    bias = point[-classes:]
    log_p = logits / temperature
    log_p = log_p - special.logsumexp(log_p, axis=1, keepdims=True)
    mapped = log_p @ square.T + bias
    rows = special.logsumexp(mapped, axis=1) - mapped[np.arange(len(labels)), labels]
    change = square - np.eye(classes)
    diagonal = np.diag(change)
    loss = (weights * rows).sum() / weights.sum()
    loss += penalty.diagonal / 2 * (diagonal @ diagonal + bias @ bias)
    if full:
        off = change - np.diag(diagonal)
        loss += penalty.off_diagonal / 2 * (off**2).sum()
    return loss


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("strengths", [(0.1, 0.3), (0.001, 0.01)])
def test_the_fit_is_the_minimum_of_the_formula(full, weighted, strengths):
    logits, labels = drawn("oracle", n=80, classes=3, bias=2.0)
    weights = np.exp(oracles.generator("w").normal(size=80)) if weighted else np.ones(80)
    penalty = Penalty(*strengths)
    problem = Problem(rows_of(logits, labels, weights if weighted else None), 2.5, full)
    change = problem.fit(penalty).change.numpy()
    start = np.concatenate([np.eye(3).ravel() if full else np.ones(3), np.zeros(3)])
    arguments = (logits, labels, 2.5, penalty, full, weights)
    # Another method, without our gradient, from another start.
    truth = optimize.minimize(
        naive_objective, start + 0.3, arguments, method="BFGS", options={"gtol": 1e-6}
    )
    ours = (change[:, :-1] + np.eye(3)).ravel() if full else change[:, 0] + 1
    ours = np.concatenate([ours, change[:, -1]])
    assert naive_objective(ours, *arguments) == pytest.approx(truth.fun, abs=1e-9)
    assert np.allclose(ours, truth.x, atol=2e-3)
    # Not the minimum of another penalty.
    other = (logits, labels, 2.5, Penalty(3 * strengths[0], 3 * strengths[1]), full, weights)
    assert (
        naive_objective(ours, *other) > optimize.minimize(naive_objective, ours, other).fun + 1e-6
    )


@pytest.mark.parametrize("name", LINEAR)
def test_a_bias_and_a_swap_are_undone(name):
    logits, labels = drawn("bias", n=3000, bias=3.0)
    fresh, fresh_labels = drawn("bias, fresh", n=3000, bias=3.0)
    temperature = make_calibrator("temperature").fit(logits, labels)
    found = make_calibrator(name).fit(logits, labels)
    gain = nll(temperature.transform(fresh), fresh_labels) - nll(
        found.transform(fresh), fresh_labels
    )
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))
    # Nearly as good as the truth, softmax(honest).
    honest = fresh.copy()
    honest[:, 0] -= 3.0
    best = nll(special.log_softmax(honest / 2, axis=1), fresh_labels)
    assert nll(found.transform(fresh), fresh_labels).mean() < best.mean() + 0.02
    assert nll(temperature.transform(fresh), fresh_labels).mean() > best.mean() + 0.1


@pytest.mark.parametrize("name", LINEAR)
def test_a_class_without_rows_stays_finite_and_gets_rare(name):
    logits, labels = drawn("absent", n=500)
    kept = labels != 2
    found = make_calibrator(name).fit(logits[kept], labels[kept])
    log_p = found.transform(logits)
    assert np.isfinite(log_p).all()
    plain = make_calibrator("temperature").fit(logits[kept], labels[kept])
    assert np.exp(log_p[:, 2]).mean() < np.exp(plain.transform(logits)[:, 2]).mean()


@pytest.mark.parametrize("name", LINEAR)
def test_an_optimiser_that_stops_early_leaves_temperature_scaling(monkeypatch, name):
    logits, labels = drawn("early", bias=2.0)
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 1)
    with pytest.warns(EbmGuardWarning, match=r"not_converged.*Temperature scaling is kept"):
        found = make_calibrator(name).fit(logits, labels)
    plain = make_calibrator("temperature").fit(logits, labels)
    assert np.allclose(found.transform(logits), plain.transform(logits), atol=1e-12)
    assert "temperature scaling is kept" in found.facts()["note"]


def test_the_penalty_is_the_best_of_the_grid_by_held_out_nll():
    logits, labels = drawn("grid", n=300, classes=3, bias=1.0)
    found = VectorScaling().fit(logits, labels)
    rows = rows_of(logits, labels)
    folds = crossval.row_hashes(rows, float(found.temperature)) % crossval.FOLDS
    held_out = {}
    for strength in crossval.VECTOR_GRID:
        total = 0.0
        for fold in range(crossval.FOLDS):
            test = folds == fold
            fit = make_calibrator("temperature").fit(logits[~test], labels[~test])
            t = float(fit.temperature)
            problem = Problem(rows_of(logits[~test], labels[~test]), t, full=False)
            change = problem.fit(Penalty(strength)).change.numpy()
            log_p = special.log_softmax(logits[test] / t, axis=1) * (1 + change[:, 0])
            total += nll(special.log_softmax(log_p + change[:, 1], axis=1), labels[test]).sum()
        held_out[strength] = total
    assert found.penalty.diagonal == min(held_out, key=held_out.get)


def honesty(monkeypatch, hashes):
    """Mean of (cross-validated - true) gain of vector scaling over temperature, and its error."""
    if hashes is not None:
        monkeypatch.setattr(crossval, "row_hashes", hashes)
    gaps = []
    for draw in range(12):
        logits, labels = drawn(("honest", draw), n=500, classes=25)
        rows = rows_of(logits, labels)
        folds = crossval.CrossValidation(rows, 2.0)
        problems = [
            tuple(Problem(part, fold.temperature, False) for part in (fold.train, fold.test))
            for fold in folds._folds
        ]
        start = torch.zeros(25, 2, dtype=torch.float64)
        penalty = Penalty(0.001)
        found = folds._held_out(problems, penalty, [start] * len(problems))
        gain = folds.mean(found.row_nll - folds.temperature_nll)
        fresh = Problem(rows_of(*drawn(("honest, fresh", draw), n=5000, classes=25)), 2.0, False)
        fit = Problem(rows, 2.0, False).fit(penalty).change
        gaps.append(gain - (fresh.row_nll(fit) - fresh.row_nll(start)).mean())
    return np.mean(gaps), np.std(gaps, ddof=1) / math.sqrt(len(gaps))


def test_cross_validation_tells_the_truth_and_folds_matched_by_difficulty_do_not(monkeypatch):
    # Folds train on 4/5 of the rows, so they overfit a little more than the final fit: above 0 is
    # allowed, flattery is not.
    gap, error = honesty(monkeypatch, None)
    assert gap > -3 * error

    def matched(rows, temperature):
        """Deal the rows out by class and NLL, so that all folds are alike."""
        labels = rows.of_use(rows.labels)
        values = Problem(rows, temperature, False)
        order = np.lexsort((values.row_nll(values.start()), labels))
        numbers = np.empty(len(rows), dtype=np.uint64)
        numbers[order] = np.arange(len(rows), dtype=np.uint64)
        return numbers

    gap, error = honesty(monkeypatch, matched)
    assert gap < -3 * error


def test_equal_rows_are_on_the_same_side():
    logits, labels = drawn("equal", n=100)
    rows = rows_of(np.tile(logits, (3, 1)), np.tile(labels, 3))
    folds = crossval.row_hashes(rows, 2.0).reshape(3, 100)
    assert (folds == folds[0]).all()
    assert np.unique(folds[0] % crossval.FOLDS).size == crossval.FOLDS


# -------------------------------------------------------------------------------------- isotonic


def pool_adjacent_violators(order, right):
    """The isotonic means by the definition: max over starts of min over ends of block means."""
    values = right[order].astype(float)
    n = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    found = np.empty(n)
    for i in range(n):
        best = -math.inf
        for start in range(i + 1):
            ends = np.arange(i, n)
            best = max(best, ((sums[ends + 1] - sums[start]) / (ends + 1 - start)).min())
        found[i] = best
    return found


def test_isotonic_equals_the_definition_and_scikit_learn_on_the_confidence():
    from sklearn.isotonic import IsotonicRegression

    logits, labels = drawn("isotonic", n=150)
    found = IsotonicCalibration().fit(logits, labels)
    confidence = special.softmax(logits, axis=1).max(axis=1)
    right = logits.argmax(axis=1) == labels
    assert len(np.unique(confidence)) == len(confidence)
    ours = found.predict(torch.from_numpy(logits))[1].numpy()
    order = np.argsort(confidence)
    truth = np.clip(pool_adjacent_violators(order, right), 1e-6, 1 - 1e-6)
    assert np.allclose(ours[order], truth, atol=1e-12)
    theirs = IsotonicRegression(y_min=1e-6, y_max=1 - 1e-6).fit(confidence, right)
    assert np.allclose(ours, theirs.predict(confidence), atol=1e-9)


def test_isotonic_moves_only_the_confidence():
    logits, labels = drawn("isotonic rest", n=300, temperature=8.0)
    found = IsotonicCalibration().fit(logits, labels)
    fresh = drawn("isotonic fresh", n=300, temperature=8.0)[0]
    log_p, top = found.transform(fresh), fresh.argmax(axis=1)
    others = fresh.copy()
    others[np.arange(len(fresh)), top] = -np.inf
    proportion = special.log_softmax(others, axis=1)
    for row, of_row, share, label in zip(log_p, fresh, proportion, top, strict=True):
        rest = np.delete(row, label)
        assert np.allclose(
            rest - math.log1p(-math.exp(row[label])), np.delete(share, label), atol=1e-9
        )
        assert np.allclose(np.diff(rest), np.diff(np.delete(of_row, label)), atol=1e-9)
    assert np.array_equal(found.predict(torch.from_numpy(fresh))[0].numpy(), top)
    confidence = found.predict(torch.from_numpy(fresh))[1].numpy()
    order = np.argsort(-oracles.log_odds(fresh))
    assert (np.diff(confidence[order]) >= 0).all()
    assert confidence.min() >= 1e-6
    assert confidence.max() <= 1 - 1e-6


def test_isotonic_keeps_the_class_even_where_another_gets_more():
    rng = oracles.generator("isotonic class")
    logits = np.zeros((400, 2))
    logits[:, 0] = rng.uniform(0.1, 5, 400)
    labels = (rng.random(400) < 0.7).astype(np.int64)
    found = IsotonicCalibration().fit(logits, labels)
    label, confidence = found.predict(torch.from_numpy(logits))
    p = np.exp(found.transform(logits))
    assert (label == 0).all()
    assert (p[:, 1] > p[:, 0]).any()
    assert np.allclose(confidence.numpy(), p[:, 0], rtol=1e-12)


# ------------------------------------------------------------------------------------------ auto


def test_auto_stays_with_temperature_where_nothing_is_wrong_but_the_temperature():
    kept = 0
    for draw in range(10):
        found = AutoCalibrator().fit(*drawn(("null", draw), n=400, classes=3))
        kept += found.chosen.name == "temperature"
        facts = found.facts()
        assert facts["chosen"] == found.chosen.name
        if found.chosen.name == "temperature":
            assert "neither vector nor dirichlet lowers" in facts["note"]
            assert found.keeps_prediction
    # "More than one standard error" happens by chance in at most 16 % per candidate.
    assert kept >= 6


def test_auto_takes_what_is_better_and_shows_the_table():
    logits, labels = drawn("auto", n=800, bias=3.0)
    found = AutoCalibrator().fit(logits, labels)
    assert found.chosen.name in LINEAR
    assert not found.keeps_prediction
    same = make_calibrator(found.chosen.name).fit(logits, labels)
    assert np.array_equal(found.transform(logits), same.transform(logits))
    table = {row["name"]: row for row in found.facts()["candidates"]}
    assert list(table) == ["temperature", "vector", "dirichlet"]
    assert (table["temperature"]["difference"], table["temperature"]["standard_error"]) == (0, 0)
    for name in LINEAR:
        row = table[name]
        assert row["nll"] - table["temperature"]["nll"] == pytest.approx(row["difference"])
        assert -row["difference"] > row["standard_error"] > 0
    assert found.chosen.name == min(LINEAR, key=lambda name: table[name]["nll"])
    assert f"{found.chosen.name.capitalize()}: its cross-validated NLL" in found.facts()["note"]
    assert f"auto -> {found.chosen.name}, T = " in describe_facts(found.facts())


def test_auto_says_why_something_was_refused():
    found = AutoCalibrator().fit(*drawn("auto wide", n=1200, classes=110))
    table = {row["name"]: row for row in found.facts()["candidates"]}
    assert table["vector"]["refused"] is None
    assert "at least 242,000" in table["dirichlet"]["refused"]
    few = AutoCalibrator().fit(*drawn("auto few", n=25))
    assert few.chosen.name == "temperature"
    assert [row["nll"] for row in few.facts()["candidates"]] == [None] * 3
    assert few.facts()["note"] == "Temperature, since nothing else could be fitted on these rows."
    with pytest.warns(EbmGuardWarning, match="separable"):
        none = AutoCalibrator().fit(np.eye(3)[np.arange(90) % 3], np.arange(90) % 3)
    assert "temperature is separable" in none.facts()["candidates"][1]["refused"]
    equal = AutoCalibrator().fit(np.tile([[2.0, 1.0, -9.0]], (60, 1)), np.ones(60, dtype=np.int64))
    assert "1 different rows" in equal.facts()["candidates"][1]["refused"]


def test_standard_error_of_the_difference_with_weights():
    rng = oracles.generator("paired")
    base_nll, other = rng.random(200), rng.random(200)
    weights = rng.integers(1, 4, 200)
    weights = weights / weights.mean()
    from ebm_guard.calibration.calibrators.auto import _compared

    row = _compared("vector", other, base_nll, weights)
    difference = other - base_nll
    mean = (weights * difference).sum() / weights.sum()
    assert row.difference == pytest.approx(mean)
    error = math.sqrt((weights**2 * (difference - mean) ** 2).sum()) / weights.sum()
    assert row.standard_error == pytest.approx(error)
    equal = _compared("vector", other, base_nll, None)
    assert equal.standard_error == pytest.approx(difference.std() / math.sqrt(200))
