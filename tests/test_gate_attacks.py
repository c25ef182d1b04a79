"""Attacks on the gate, against closed forms of linear models and a grid search over two pixels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_guard import EnergyClassifier, Predictions, Preprocessing
from ebm_guard.attacks import PGD, Examples, Query, climb, pixel_forward
from ebm_guard.attacks.engine import StepRule
from ebm_guard.attacks.geometry import Linf
from ebm_guard.attacks.rows import State
from ebm_guard.calibration.calibrators import make_calibrator
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate.class_conditional import ClassConditionalThreshold
from ebm_guard.gate.deciding import Parts, decide
from ebm_guard.gate.risk_rule import RiskRule
from ebm_guard.gate.thresholds import Threshold
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.ood import Score, as_score, make_score
from ebm_guard.predictions import LinearHead
from ebm_guard.robustness.gate_attacks import (
    AIMS,
    STRATEGIES,
    AcceptedFlip,
    ForcedRejection,
    OodAcceptance,
    ScoreDescent,
    gate_plan,
    score_has_gradient,
    standing,
    try_all,
)
from ebm_guard.robustness.gate_goals import orthogonal


def cut_at(value, spread=1.0, n=100):
    """A threshold whose cut is exactly ``value`` (rank 99 of 100)."""
    scores = np.linspace(value - 98 * spread / n, value + spread / n, n)
    scores[98] = value
    return Threshold(torch.from_numpy(scores), 99, "pac", 0.05, 0.95)


def cuts_by_class(cuts):
    """Class-conditional cuts; None is a class that is always refused."""
    seen = [number for number, cut in enumerate(cuts) if cut is not None]
    scores = np.concatenate([np.linspace(cuts[number] - 1, cuts[number], 100) for number in seen])
    group_of = torch.full((len(cuts),), -1)
    group_of[seen] = torch.arange(len(seen))
    starts = torch.arange(0, 100 * len(seen) + 1, 100)
    ranks = [100] * len(seen)
    return ClassConditionalThreshold(
        torch.from_numpy(scores), starts, group_of, ranks, 0.05, 0.95, False, False
    )


def rule_of(confidence=-math.inf, score=math.inf):
    facts = {"risk": 0.1, "assurance": 0.95, "n": 100, "score": "score"}
    return RiskRule(torch.tensor([confidence, score], dtype=torch.float64), facts)


def linear_forward(weight, bias):
    weight, bias = torch.as_tensor(weight).float(), torch.as_tensor(bias).float()
    return lambda pixels: ClassifierOutput(pixels.flatten(1) @ weight.T + bias, None)


def images(values, labels):
    pixels = torch.tensor(values).float().reshape(len(labels), 1, 1, -1)
    return Examples.of(pixels, torch.tensor(labels))


def attacked(goal, forward, examples, epsilon, steps=20, **settings):
    return climb(PGD(steps), Query(forward, goal), examples, epsilon, **settings)


positive = st.floats(0.5, 3.0)


def two_class(gain):
    """Logits (0, w.x - offset): only the second moves, so that minimal budgets are known."""
    return torch.tensor([[0.0, 0.0], list(gain)]), sum(gain) * 0.5


class TestClosedForms:
    """Logits (0, w.x + b) at x = (0.5, 0.5): a budget e moves the second by e (|w1| + |w2|)."""

    @settings(max_examples=7, deadline=None)
    @given(
        gains=st.tuples(positive, positive), want=st.floats(0.05, 0.3), by=st.sampled_from([0, 1])
    )
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_accepted_flip_needs_the_larger_of_two_budgets(self, strategy, gains, want, by):
        # Class 1 wins at w.x + b > 0 and is accepted at w.x + b >= c: with maxlogit, cut = -c.
        total = sum(gains)
        start, c = -want * total * (0.5 if by else 1), want * total * (0.5 if by else -1)
        weight, offset = two_class(gains)
        forward = linear_forward(weight, [0.0, start - offset])
        # Class 0 is accepted always where c < 0; the flip alone decides then.
        parts = Parts(make_score("maxlogit"), cut_at(-c))
        smallest = (max(0.0, c) - start) / total
        examples = images([[0.5, 0.5]], [0])
        goal = AcceptedFlip(parts, strategy)
        assert not attacked(goal, forward, examples, smallest * 0.98).success.any()
        assert attacked(goal, forward, examples, smallest * 1.02).success.all()

    @settings(max_examples=7, deadline=None)
    @given(gains=st.tuples(positive, positive), own=st.floats(0.05, 0.3))
    def test_cut_is_that_of_the_predicted_class(self, gains, own):
        # Class 0 accepts all (score 0 <= cut 5); class 1 only from w.x + b >= c on.
        total, c = sum(gains), own * sum(gains)
        weight, offset = two_class(gains)
        forward = linear_forward(weight, [0.0, -0.1 * total - offset])
        parts = Parts(make_score("maxlogit"), cuts_by_class([5.0, -c]))
        smallest = (c + 0.1 * total) / total
        examples = images([[0.5, 0.5]], [0])
        assert not attacked(AcceptedFlip(parts), forward, examples, smallest * 0.98).success.any()
        assert attacked(AcceptedFlip(parts), forward, examples, smallest * 1.02).success.all()
        # The one cut of class 0 would have been cheaper: the test would notice it.
        loose = Parts(make_score("maxlogit"), cut_at(5.0))
        assert attacked(AcceptedFlip(loose), forward, examples, 0.102).success.all()

    @settings(max_examples=7, deadline=None)
    @given(gains=st.tuples(positive, positive), low=st.floats(0.55, 0.8))
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_certified_rule_asks_for_confidence(self, strategy, gains, low):
        # p_1 = sigmoid(w.x + b) > low; the threshold itself accepts all.
        total = sum(gains)
        weight, offset = two_class(gains)
        forward = linear_forward(weight, [0.0, -0.05 * total - offset])
        parts = Parts(make_score("maxlogit"), cut_at(50.0), rule=rule_of(confidence=low))
        smallest = (math.log(low / (1 - low)) + 0.05 * total) / total
        if smallest > 0.48:
            return
        examples, goal = images([[0.5, 0.5]], [0]), AcceptedFlip(parts, strategy)
        assert not attacked(goal, forward, examples, smallest * 0.98).success.any()
        assert attacked(goal, forward, examples, smallest * 1.02).success.all()

    @settings(max_examples=7, deadline=None)
    @given(gains=st.tuples(positive, positive), far=st.floats(0.05, 0.45))
    def test_forced_rejection_and_acceptance_mirror_each_other(self, gains, far):
        # The score is -(w.x + b), far above the other logit: one line, crossed both ways.
        total = sum(gains)
        weight, offset = two_class(gains)
        for sign, goal in ((1.0, ForcedRejection), (-1.0, OodAcceptance)):
            forward = linear_forward(weight, [0.0, 10.0 + sign * far * total - offset])
            parts = Parts(make_score("maxlogit"), cut_at(-10.0))
            examples = images([[0.5, 0.5]], [1])
            assert not attacked(goal(parts), forward, examples, far * 0.98).success.any()
            assert attacked(goal(parts), forward, examples, far * 1.02).success.all()

    @settings(max_examples=7, deadline=None)
    @given(gains=st.tuples(positive, positive), low=st.floats(0.55, 0.9))
    @pytest.mark.parametrize("by", ["nearest", "confidence"])
    def test_forced_rejection_lowers_the_confidence(self, by, gains, low):
        total = sum(gains)
        weight, offset = two_class(gains)
        line = math.log(low / (1 - low))
        forward = linear_forward(weight, [0.0, line + 0.2 * total - offset])
        parts = Parts(make_score("maxlogit"), cut_at(1e3), rule=rule_of(confidence=low))
        examples, goal = images([[0.5, 0.5]], [1]), ForcedRejection(parts, by)
        assert not attacked(goal, forward, examples, 0.2 * 0.98).success.any()
        assert attacked(goal, forward, examples, 0.2 * 1.02).success.all()

    def test_rule_on_the_score_is_the_stricter_cut(self):
        # The other logit is far below: the largest one moves with the pixels everywhere.
        forward = linear_forward([[0.0, 0.0], [1.0, 1.0]], [-9.0, -1.0])
        parts = Parts(make_score("maxlogit"), cut_at(50.0), rule=rule_of(score=-0.5))
        examples = images([[0.5, 0.5]], [1])
        assert not attacked(OodAcceptance(parts), forward, examples, 0.24).success.any()
        assert attacked(OodAcceptance(parts), forward, examples, 0.26).success.all()

    @pytest.mark.parametrize("strategy", ["selective", "orthogonal", "joint"])
    def test_flips_into_a_class_that_has_a_cut(self, strategy):
        # From class 0, class 1 is near but always refused, class 2 farther and accepted.
        weight = [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]
        forward = linear_forward(weight, [0.0, -2.2, -3.0])
        parts = Parts(make_score("maxlogit"), cuts_by_class([9.0, None, 9.0]))
        examples, goal = images([[0.5, 0.5]], [0]), AcceptedFlip(parts, strategy)
        found = attacked(goal, forward, examples, 0.3)
        assert found.success.all()
        assert forward(found.pixels).logits.argmax() == 2

    def test_ood_image_leaves_a_class_that_is_always_refused(self):
        forward = linear_forward([[2.0, 0.0], [0.0, 0.0]], [-0.5, 0.0])
        parts = Parts(make_score("maxlogit"), cuts_by_class([None, 9.0]))
        examples = images([[0.5, 0.5]], [0])
        assert not attacked(OodAcceptance(parts), forward, examples, 0.24).success.any()
        assert attacked(OodAcceptance(parts), forward, examples, 0.26).success.all()
        # And the other way, by the class alone.
        back = images([[0.0, 0.5]], [1])
        assert attacked(ForcedRejection(parts), forward, back, 0.26).success.all()
        assert not attacked(ForcedRejection(parts), forward, back, 0.24).success.any()


class TestDeployedLabel:
    def calibrator(self):
        """Vector scaling that lifts class 1 above class 0 by a good deal."""
        generator = np.random.default_rng(0)
        logits = generator.normal(size=(4000, 2))
        labels = (logits[:, 1] - logits[:, 0] + 2 > generator.logistic(size=4000)).astype(int)
        return make_calibrator("vector").fit(logits, labels)

    def test_label_is_the_calibrators(self):
        calibrator = self.calibrator()
        forward = linear_forward([[0.0, 0.0], [2.0, 2.0]], [0.0, -3.0])
        line = images(np.linspace([0, 0], [1, 1], 101), [0] * 101)
        logits = forward(line.pixels).logits
        label, plain = calibrator.predict(logits)[0], logits.argmax(dim=1)
        assert (label != plain).any()  # otherwise this test shows nothing
        differ = torch.nonzero(label != plain)[:, 0]
        examples = line.select(differ)
        parts = Parts(make_score("energy"), cut_at(50.0), calibrator)
        found = attacked(AcceptedFlip(parts), forward, examples, 0.0)
        assert found.success.all()  # deployed label 1, though the logits still say 0
        same = Parts(make_score("energy"), cut_at(50.0))
        assert not attacked(AcceptedFlip(same), forward, examples, 0.0).success.any()

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_flips_at_the_calibrators_border(self, strategy):
        calibrator = self.calibrator()
        forward = linear_forward([[0.0, 0.0], [2.0, 2.0]], [0.0, -3.0])
        grid = images(np.linspace([0, 0], [1, 1], 100_001), [0] * 100_001)
        label = calibrator.predict(forward(grid.pixels).logits)[0]
        border = float(torch.nonzero(label == 1)[0, 0]) / 100_000
        parts = Parts(make_score("energy"), cut_at(50.0), calibrator)
        examples, goal = images([[0.1, 0.1]], [0]), AcceptedFlip(parts, strategy)
        distance = border - 0.1
        assert not attacked(goal, forward, examples, distance * 0.98).success.any()
        assert attacked(goal, forward, examples, distance * 1.02).success.all()

    def test_steps_of_isotonic_confidence_are_climbed_by_the_odds(self):
        generator = np.random.default_rng(0)
        logits = generator.normal(size=(500, 2)) * 3
        labels = (logits.argmax(axis=1) + (generator.random(500) < 0.2)) % 2
        calibrator = make_calibrator("isotonic").fit(logits, labels)
        parts = Parts(make_score("energy"), cut_at(50.0), calibrator, rule=rule_of(confidence=0.5))
        forward = linear_forward([[0.0, 0.0], [9.0, 9.0]], [0.0, -9.0])
        leaf = torch.rand(50, 1, 1, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        examples = Examples.of(leaf.detach(), torch.zeros(50, dtype=torch.int64))
        goal = ForcedRejection(parts, "confidence")
        _, gradient = goal.gradient(forward(leaf), leaf, examples)
        assert (gradient != 0).flatten(1).any(dim=1).all()


class Tiny(nn.Module):
    """Two pixels to three classes, bent enough that neither flip nor gate is a straight line."""

    def __init__(self, seed):
        super().__init__()
        draw = np.random.default_rng(seed)
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 3)
        with torch.no_grad():
            for part, scale in ((self.first, 4.0), (self.last, 1.5)):
                part.weight.copy_(torch.from_numpy(draw.normal(size=part.weight.shape) * scale))
                part.bias.copy_(torch.from_numpy(draw.normal(size=part.bias.shape)))
            self.first.bias.sub_(self.first.weight.sum(dim=1) / 2)

    def forward(self, pixels):
        return ClassifierOutput(self.last(torch.tanh(self.first(pixels.flatten(1)))), None)


def gates(model, draw, names=("energy", "msp")):
    """Gates of all kinds whose cuts lie in the middle of what the model gives."""
    points = torch.from_numpy(draw.random((4000, 1, 1, 2))).float()
    with torch.no_grad():
        logits = model(points).logits
    rows = Predictions(logits.numpy(), labels=logits.argmax(dim=1).numpy())
    for name in names:
        score = make_score(name)
        values = score.of(rows)
        yield Parts(score, Threshold.fit(values, false_reject_rate=0.5))
        yield Parts(
            score,
            ClassConditionalThreshold.fit(
                values, rows.logits.argmax(axis=1), 3, false_reject_rate=0.5
            ),
        )
        confidence = torch.from_numpy(rows.logits).softmax(dim=1).amax(dim=1).median()
        rule = rule_of(float(confidence), float(np.quantile(values, 0.8)))
        yield Parts(score, Threshold.fit(values, false_reject_rate=0.2), rule=rule)


def square_around(centre, epsilon, side=31):
    low, high = (centre - epsilon).clamp(min=0), (centre + epsilon).clamp(max=1)
    share = torch.linspace(0, 1, side)
    x, y = (low[i] + (high[i] - low[i]) * share for i in (0, 1))
    return torch.cartesian_prod(x, y).reshape(-1, 1, 1, 2)


class TestGridSearch:
    """On two pixels all of the ball can be searched."""

    @pytest.mark.parametrize("aim", AIMS)
    def test_finds_what_is_there_and_nothing_else(self, aim):
        epsilon, tried, missed = 0.25, 0, 0
        for seed, name in enumerate(("energy", "msp")):
            model, draw = Tiny(seed).eval(), np.random.default_rng(seed)
            for parts in gates(model, draw, (name,)):
                pixels = torch.from_numpy(draw.random((90, 1, 1, 2))).float()
                with torch.no_grad():
                    decision = decide(parts, model(pixels).logits)
                kept = ~decision.accept if aim == "ood_acceptance" else decision.accept
                if not kept.any():
                    continue
                examples = Examples.of(pixels[kept], decision.label[kept])
                plan = gate_plan(aim, parts)
                starts = [
                    try_all(plan, PGD(12), model, examples, epsilon, seed=(number,))
                    for number in range(4)
                ]
                # Sound: what is claimed is so, and is in the ball.
                for found in starts:
                    self.check_claims(aim, parts, model, examples, found, epsilon)
                success = torch.stack([start.success for start in starts]).any(dim=0)
                there = self.exists(aim, parts, model, examples, epsilon * 0.8)
                tried += int(there.sum())
                missed += int((there & ~success).sum())
        assert tried >= 30
        # PGD may end in local optima, and does not aim at the class that is easiest to be accepted.
        assert missed <= 0.1 * tried

    def reached(self, aim, parts, model, pixels, labels):
        with torch.no_grad():
            decision = decide(parts, model(pixels).logits)
        if aim == "accepted_flip":
            return decision.accept & (decision.label != labels)
        return ~decision.accept if aim == "forced_rejection" else decision.accept

    def exists(self, aim, parts, model, examples, epsilon):
        squares = [square_around(pixels[0, 0], epsilon) for pixels in examples.pixels]
        labels = examples.labels.repeat_interleave(len(squares[0]))
        found = self.reached(aim, parts, model, torch.cat(squares), labels)
        return found.reshape(len(examples), -1).any(dim=1)

    def check_claims(self, aim, parts, model, examples, found, epsilon):
        reached = self.reached(aim, parts, model, found.pixels, examples.labels)
        assert reached[found.success].all()
        assert (Linf().distance(found.pixels, examples.pixels) <= epsilon + 1e-6).all()
        assert found.pixels.min() >= 0
        assert found.pixels.max() <= 1


class Pooled(nn.Module):
    """Pixels to features >= 0 to logits, with a head that can be found."""

    def __init__(self, width=6, classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body, self.fc = nn.Linear(16, width), nn.Linear(width, classes)
        with torch.no_grad():
            for part in (self.body, self.fc):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
                part.bias.copy_(torch.randn(part.bias.shape, generator=generator) / 2)
        self.double().eval()
        with torch.no_grad():
            # All classes are to be seen.
            draws = torch.rand(1000, 16, generator=generator).double()
            self.fc.bias.sub_(self.forward(draws).median(dim=0).values)

    def forward(self, x):
        return self.fc(nn.functional.softplus(self.body(x.flatten(1))))


@pytest.fixture(scope="module")
def pooled():
    """A classifier in float64 with its features, and 300 rows to fit scores on."""
    model = Pooled()
    classifier = EnergyClassifier(model, preprocessing=Preprocessing((0.0,), (1.0,)))
    pixels = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    assert classifier.probe_head(pixels).found
    assert len(model(pixels).argmax(dim=1).unique()) == 3
    with torch.no_grad():
        output = classifier.forward(pixels, features=True)
    rows = Predictions(
        output.logits.numpy(),
        features=output.features.numpy(),
        labels=output.logits.argmax(dim=1).numpy(),
        head=LinearHead(model.fc.weight.detach().numpy(), model.fc.bias.detach().numpy()),
    )
    return classifier, pixel_forward(classifier, features=True), rows


SCORES = {
    "energy": {},
    "energy_T": {"energy_temperature": 3.0},
    "msp": {},
    "maxlogit": {},
    "gen": {},
    "energy_react": {},
    "energy_scale": {},
    "vim": {},
    "mahalanobis": {},
    "relative": {"relative": True},
    "knn": {"k": 5},
    "fdbd": {},
    "nnguide": {"k": 5},
    "kmeans_energy": {},
    "kmeans_hard": {"beta": "inf"},
    "pca_energy": {},
    "gmm_energy": {},
    "gmm_tied": {"covariance": "tied", "normalize": False},
    "combine": {},
}
NAMES = {
    "energy_T": "energy",
    "relative": "mahalanobis",
    "kmeans_hard": "kmeans_energy",
    "gmm_tied": "gmm_energy",
}


def fitted(name, rows):
    if name == "combine":
        from ebm_guard.ood import combine

        return combine("energy", "mahalanobis").fit(rows)
    score = make_score(NAMES.get(name, name), **SCORES[name])
    return score.fit(rows) if score.needs_fit else score


def parts_of(score, rows):
    return Parts(score, Threshold.fit(score.of(rows)))


class TestScoreGradients:
    @pytest.mark.parametrize("name", SCORES)
    def test_gradients_are_finite_differences(self, name, pooled):
        _, _, rows = pooled
        goal = OodAcceptance(parts_of(fitted(name, rows), rows))
        model = pooled[0].model
        pixels = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(2)).double()

        def score(x):
            # Around pixel_forward, which would pass float32 pixels on; here all is float64.
            return goal.raw_score(pooled[0].forward(x, features=True))

        assert next(model.parameters()).dtype == torch.float64
        leaf = pixels.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(leaf).sum(), leaf)
        # knn and nnguide look up neighbours in float32: their step must be above its rounding.
        step = 1e-3 if name == "nnguide" else 1e-5
        for place in range(16):
            moved = torch.zeros_like(pixels).flatten(1)
            moved[:, place] = step
            moved = moved.reshape(pixels.shape)
            with torch.no_grad():
                slope = (score(pixels + moved) - score(pixels - moved)) / (2 * step)
            found = gradient.flatten(1)[:, place]
            scale = gradient.abs().amax()
            assert torch.allclose(found, slope, rtol=1e-2, atol=2e-3 * float(scale))

    @pytest.mark.parametrize("name", SCORES)
    def test_probe_finds_them(self, name, pooled):
        _, forward, rows = pooled
        parts = parts_of(fitted(name, rows), rows)
        examples = self.examples(20)
        has, words = score_has_gradient(parts, forward, examples)
        assert has
        assert "16 of 16" in words

    def examples(self, n):
        pixels = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(3))
        return Examples.of(pixels, torch.zeros(n, dtype=torch.int64))

    @pytest.mark.parametrize("kind", ["plugin", "rounded", "nan", "detached"])
    def test_probe_names_the_way_out(self, kind, pooled):
        _, forward, rows = pooled
        score = {
            "plugin": lambda: as_score(Foreign(), "foreign"),
            "rounded": lambda: Bad(lambda logits: (logits[:, 0] * 10).round() / 10),
            "nan": lambda: Bad(lambda logits: (logits[:, 0] * 0).sqrt() - logits[:, 1].detach()),
            "detached": lambda: Bad(lambda logits: -logits.detach().amax(dim=1)),
        }[kind]()
        parts = parts_of(score, rows)
        has, words = score_has_gradient(parts, forward, self.examples(8))
        assert not has
        assert "0 of 8" in words
        assert "energy instead" in words
        assert "square" in words

    def test_probe_tells_when_the_model_hides_the_gradient(self, pooled):
        _, forward, rows = pooled
        parts = parts_of(make_score("energy"), rows)
        has, words = score_has_gradient(
            parts, lambda pixels: forward(pixels.detach()), self.examples(8)
        )
        assert not has
        assert "without gradients" in words


class Foreign:
    def predict_logits(self, logits):
        return -logits.amax(dim=1)


class Bad(Score):
    name = "bad"

    def __init__(self, how):
        super().__init__()
        self.how = how

    def score(self, logits, features=None):
        return self.how(logits)


class Greedy(StepRule):
    """A rule without gradients: random corners of the ball, the best kept by climb."""

    name, norm, num_steps, needs_gradient = "greedy", "linf", 60, False

    def begin(self, examples, epsilon, start, seed):
        self.draw = np.random.default_rng(seed)
        return State(examples.pixels)

    def step(self, state, answer, examples, epsilon, index):
        signs = torch.from_numpy(self.draw.choice([-1.0, 1.0], size=examples.pixels.shape)).float()
        return State((examples.pixels + epsilon * signs).clamp(0, 1))


class TestSurrogate:
    def parts(self, rows):
        return parts_of(as_score(Foreign(), "foreign"), rows)

    def test_values_are_the_true_score_and_gradients_the_energys(self, pooled):
        _, forward, rows = pooled
        parts = self.parts(rows)
        pixels = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(4))
        examples = Examples.of(pixels, torch.zeros(5, dtype=torch.int64))
        goal = OodAcceptance(parts, surrogate=True)
        leaf = pixels.clone().requires_grad_()
        output = forward(leaf)
        objective, gradient = goal.gradient(output, leaf, examples)
        scores = torch.sort(parts.threshold.scores).values
        low, high = np.quantile(scores.numpy(), [0.25, 0.75])
        slack = (parts.threshold.cut + output.logits.amax(dim=1)) / (high - low)
        assert torch.allclose(objective.double(), slack.detach(), atol=1e-5)
        energy = -torch.logsumexp(forward(leaf).logits, dim=1)
        (expected,) = torch.autograd.grad(-energy.sum(), leaf)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("aim", AIMS)
    def test_plan_reaches_what_the_twin_with_gradients_reaches(self, aim, pooled):
        # The foreign detector is maxlogit: the same decisions, without the gradient.
        _, forward, rows = pooled
        hidden, twin = self.parts(rows), parts_of(make_score("maxlogit"), rows)
        pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            decision = decide(twin, forward(pixels).logits)
        kept = ~decision.accept if aim == "ood_acceptance" else decision.accept
        examples = Examples.of(pixels[kept], decision.label[kept])
        known = try_all(gate_plan(aim, twin), PGD(20), forward, examples, 0.3)
        plan = gate_plan(aim, hidden, "surrogate")
        assert plan[-1].name == "true_decision"
        found = try_all(plan, PGD(20), forward, examples, 0.3, without_gradient=Greedy())
        assert known.success.any()
        assert found.success.sum() >= 0.7 * known.success.sum()
        # Judged by the foreign score itself, not by the energy.
        with torch.no_grad():
            output = forward(found.pixels)
        assert torch.equal(found.success, plan[0].goal.success(output, examples))

    def test_attempts_without_gradient_need_a_rule(self, pooled):
        _, forward, rows = pooled
        plan = gate_plan("ood_acceptance", self.parts(rows), "none")
        examples = TestScoreGradients().examples(2)
        with pytest.raises(InvalidInputError, match="square"):
            try_all(plan, PGD(2), forward, examples, 0.1)
        with pytest.raises(InvalidInputError, match="square"):
            try_all(plan, PGD(2), forward, examples, 0.1, without_gradient=PGD(2))


class TestStrategies:
    def setting(self, strategy):
        # Wrong: first pixel up. Score (energy, nearly -max): both pixels.
        forward = linear_forward([[2.0, 1.0], [3.0, 0.0]], [0.0, 0.0])
        goal = AcceptedFlip(Parts(make_score("energy"), cut_at(-3.0)), strategy)
        pixels = torch.tensor([[0.2, 0.8], [0.8, 0.2]]).reshape(2, 1, 1, 2).requires_grad_()
        examples = Examples.of(pixels.detach(), torch.zeros(2, dtype=torch.int64))
        return forward, goal, pixels, examples

    def gradients_of_conditions(self):
        forward, goal, pixels, examples = self.setting("selective")
        output = forward(pixels)
        wrong = goal.margin(output, examples.labels)
        score = goal.conditions(output)["score"]
        return [
            torch.autograd.grad(item.sum(), pixels, retain_graph=True)[0] for item in (wrong, score)
        ], (wrong.detach(), score.detach())

    def test_selective_follows_the_unmet_condition(self):
        forward, goal, pixels, examples = self.setting("selective")
        (of_wrong, of_score), (wrong, score) = self.gradients_of_conditions()
        assert (wrong > 0).tolist() == [False, True]
        assert (score < 0).all()
        _, gradient = goal.gradient(forward(pixels), pixels, examples)
        assert torch.allclose(gradient[0], of_wrong[0])
        assert torch.allclose(gradient[1], of_score[1])

    def test_orthogonal_is_the_papers_projection(self):
        forward, goal, pixels, examples = self.setting("orthogonal")
        (of_wrong, of_score), _ = self.gradients_of_conditions()
        _, gradient = goal.gradient(forward(pixels), pixels, examples)
        for row, (along, held) in enumerate([(of_wrong, of_score), (of_score, of_wrong)]):
            g, h = along[row].flatten().numpy(), held[row].flatten().numpy()
            expected = g - (g @ h) / (h @ h) * h
            assert np.allclose(gradient[row].flatten().numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize("strategy", ["selective", "orthogonal", "joint"])
    def test_objective_is_the_hinged_sum(self, strategy):
        forward, goal, pixels, examples = self.setting(strategy)
        _, (wrong, score) = self.gradients_of_conditions()
        expected = torch.minimum(wrong, wrong * 0) + torch.minimum(score, score * 0)
        asked, _ = goal.gradient(forward(pixels), pixels, examples)
        assert torch.allclose(goal.objective(forward(pixels), examples).double(), expected)
        assert torch.allclose(asked.double(), expected)

    def test_parallel_gradients_are_left_alone(self):
        g = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, 1.0]]) * 1e-30
        h = torch.tensor([[-2.0, -4.0], [0.0, 0.0], [1.0, 0.0]]) * 1e-30
        found = orthogonal(g, h)
        assert torch.allclose(found / 1e-30, torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]]))


class TestInvalidRows:
    """A NaN is refused: a success for C, never for B or D."""

    def forward(self, pixels):
        logits = torch.stack([pixels.flatten(1)[:, 0], 1 - pixels.flatten(1)[:, 0]], dim=1)
        return ClassifierOutput(torch.where(logits[:, :1] > 0.7, torch.nan, logits), None)

    def test_nan(self):
        parts = Parts(make_score("energy"), cut_at(50.0))
        examples = images([[0.9, 0.0]], [1])
        for goal, expected in (
            (AcceptedFlip(parts), False),
            (OodAcceptance(parts), False),
            (ForcedRejection(parts), True),
            (ScoreDescent(parts), False),
        ):
            answer = Query(self.forward, goal).answer(examples.pixels, examples, gradient=True)
            assert answer.success.tolist() == [expected]
            assert torch.isfinite(answer.objective).all()
            assert torch.isfinite(answer.gradient).all()
            if goal.name in ("ood_acceptance", "score_descent"):
                assert answer.objective < -1e3


class TestPlans:
    def test_names(self):
        parts = Parts(make_score("energy"), cut_at(0.0))
        assert [item.name for item in gate_plan("forced_rejection", parts)] == ["score"]
        ruled = Parts(make_score("energy"), cuts_by_class([1.0, None]), rule=rule_of(0.9))
        names = [item.name for item in gate_plan("forced_rejection", ruled)]
        smooth = Parts(make_score("maxlogit"), cut_at(0.0))
        for aim, way in (("forced_rejection", "score"), ("ood_acceptance", "conditions")):
            # Where two logits tie, the largest one has a kink that the energy has not.
            both = [(item.name, item.goal.surrogate) for item in gate_plan(aim, smooth)]
            assert both == [(way, False), ("by_energy", True)]
        assert names == ["nearest", "score", "confidence", "class"]
        assert [item.name for item in gate_plan("ood_acceptance", ruled)] == ["conditions"]
        only = gate_plan("accepted_flip", parts, "none")
        assert [(item.name, item.uses_gradient) for item in only] == [("true_decision", False)]

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda parts: gate_plan("accepted", parts), "accepted_flip"),
            (lambda parts: gate_plan("accepted_flip", parts, "energy"), "surrogate"),
            (lambda parts: AcceptedFlip(parts, "selectiv"), "did you mean 'selective'"),
            (lambda parts: ForcedRejection(parts, "confidence"), "nearest, score"),
            (lambda parts: try_all([], PGD(), None, None, 0.1), "at least one attempt"),
        ],
    )
    def test_refusals(self, call, words):
        with pytest.raises(InvalidInputError, match=words):
            call(Parts(make_score("energy"), cut_at(0.0)))

    def test_union_of_successes_and_costs_add_up(self):
        model = Tiny(0).eval()
        parts = next(gates(model, np.random.default_rng(0)))
        pixels = torch.from_numpy(np.random.default_rng(9).random((40, 1, 1, 2))).float()
        with torch.no_grad():
            decision = decide(parts, model(pixels).logits)
        examples = Examples.of(pixels, decision.label)
        plan = gate_plan("accepted_flip", parts)
        total = try_all(plan, PGD(5), model, examples, 0.12, seed=(3,))
        union = torch.zeros(40, dtype=torch.bool)
        for number, attempt in enumerate(plan):
            alone = climb(PGD(5), Query(model, attempt.goal), examples, 0.12, seed=(3, number))
            fresh = alone.success & ~union
            assert torch.equal(total.pixels[fresh], alone.pixels[fresh])
            union |= alone.success
        assert torch.equal(total.success, union)
        assert 0 < int(union.sum()) < 40
        still = ~union
        assert (total.gradients[still] == 5 * len(plan)).all()
        right, accepted = standing(parts, model, examples, batch_size=7)
        assert right.all() or not decision.accept.all()
        assert torch.equal(accepted, decision.accept)

    def test_score_descent_ends_at_the_lowest_score_of_its_way(self):
        model = Tiny(1).eval()
        parts = next(gates(model, np.random.default_rng(1)))
        pixels = torch.from_numpy(np.random.default_rng(8).random((10, 1, 1, 2))).float()
        examples, seen = Examples.of(pixels, torch.zeros(10, dtype=torch.int64)), []
        goal = ScoreDescent(parts)
        found = climb(
            PGD(15),
            Query(model, goal),
            examples,
            0.1,
            until="best",
            observe=lambda step, rows, answer: seen.append(-torch.logsumexp(answer.logits, dim=1)),
        )
        lowest = torch.stack(seen).amin(dim=0)
        with torch.no_grad():
            decision = decide(parts, model(found.pixels).logits)
        assert torch.allclose(decision.score.float(), lowest, atol=1e-6)
        assert torch.equal(found.success, decision.accept)
