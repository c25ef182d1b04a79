"""Masking flags, on models that mask their gradients on purpose, and on honest ones."""

from fractions import Fraction
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ebm_guard.attacks import FGSM, PGD, Examples, Misclassify, Query, climb, untouched
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.robustness.masking import (
    NAMES,
    Count,
    CurvePoint,
    MaskingEvidence,
    StepsGain,
    exceeds,
    forward_problem,
    large_epsilon_accuracy,
    masking_flags,
    more_steps_gain,
    output_problem,
    probe_model,
    random_forward,
    zero_gradient_count,
)

N = 64


class Toy(nn.Module):
    """A bent classifier of 4x4 grey images into three classes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 3)
        with torch.no_grad():
            for part in (self.first, self.last):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) / 2)
                part.bias.zero_()
            self.first.bias.sub_(self.first.weight.sum(dim=1) / 2)

    def forward(self, pixels):
        return self.last(torch.tanh(self.first(pixels.flatten(1))))


@pytest.fixture(scope="module")
def toy():
    model = Toy().eval()
    with untouched(model):
        yield model


def function(model):
    return lambda pixels: ClassifierOutput(model(pixels), None)


def examples_of(model):
    pixels = torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Examples.of(pixels, model(pixels).argmax(dim=1))


def own_gradients(model, how):
    """A forward pass that follows the gradient of the largest logit, as purifiers do."""

    def forward(pixels):
        with torch.enable_grad():
            leaf = pixels.detach().clone().requires_grad_()
            top = model(leaf).amax(dim=1).sum()
            if how == "grad":
                (found,) = torch.autograd.grad(top, leaf)
            else:
                top.backward()
                found = leaf.grad
        return ClassifierOutput(model(pixels + 0.01 * found), None)

    return forward


MASKED = {
    "quantised": lambda model: function(lambda x: model((x * 7).round() / 7)),
    "saturated": lambda model: function(lambda x: model(x) * 1000),
    "noisy": lambda model: function(lambda x: model(x + 0.05 * torch.randn_like(x))),
    "softmax": lambda model: function(lambda x: model(x).softmax(dim=1)),
    "log_softmax": lambda model: function(lambda x: model(x).log_softmax(dim=1)),
    "detached": lambda model: function(lambda x: model(x.detach())),
    "numpy": lambda model: function(lambda x: torch.from_numpy(model(x).detach().numpy())),
    "grad": lambda model: own_gradients(model, "grad"),
    "backward": lambda model: own_gradients(model, "backward"),
}
RAISED = {
    "quantised": {"zero_gradients"},
    "saturated": {"zero_gradients"},
    "noisy": {"random_forward"},
    "softmax": {"not_logits"},
    "log_softmax": {"not_logits"},
    "detached": {"hidden_gradient"},
    "numpy": {"hidden_gradient"},
    "grad": {"hidden_gradient"},
    "backward": {"hidden_gradient"},
}


def raised(evidence):
    return {flag.name for flag in masking_flags(evidence) if flag.status == "raised"}


class TestProbes:
    @pytest.mark.parametrize("kind", MASKED)
    def test_masked_models_raise_their_flag_alone(self, kind, toy):
        assert raised(probe_model(MASKED[kind](toy), examples_of(toy))) == RAISED[kind]

    def test_honest_model_raises_nothing(self, toy):
        flags = masking_flags(probe_model(function(toy), examples_of(toy)))
        seen = {flag.name: flag.status for flag in flags}
        measured = {"zero_gradients", "random_forward", "not_logits", "hidden_gradient"}
        assert {name for name, status in seen.items() if status == "clear"} == measured
        assert {name for name, status in seen.items() if status == "not_run"} == (
            set(NAMES) - measured
        )

    def test_margin_is_the_way_out_of_saturated_logits(self, toy):
        forward, examples = MASKED["saturated"](toy), examples_of(toy)
        assert zero_gradient_count(forward, examples, "ce").count > N / 2
        assert zero_gradient_count(forward, examples, "margin").count == 0
        flag = {item.name: item for item in masking_flags(probe_model(forward, examples))}
        assert "margin does not" in flag["zero_gradients"].sentence
        # And it does more than not being zero: it attacks as well as on the honest net.
        plain = climb(PGD(10), Query(function(toy), Misclassify("margin")), examples, 0.1)
        margin = climb(PGD(10), Query(forward, Misclassify("margin")), examples, 0.1)
        blind = climb(PGD(10, random_start=False), Query(forward, Misclassify("ce")), examples, 0.1)
        assert torch.equal(plain.success, margin.success)
        assert blind.success.sum() < margin.success.sum()

    def test_gradients_that_are_not_finite_count_as_zero(self, toy):
        # The square root of 0 has an infinite slope, and 0 times it is NaN.
        forward = function(lambda x: toy(x) + (x * 0).sqrt().sum(dim=(1, 2, 3))[:, None])
        assert zero_gradient_count(forward, examples_of(toy)).count == N

    def test_no_gradient_at_all_is_refused_by_the_counter(self, toy):
        with pytest.raises(InvalidInputError, match="square"):
            zero_gradient_count(MASKED["numpy"](toy), examples_of(toy))

    def test_parameters_with_gradients_do_not_hide_a_detached_input(self):
        # Outside `untouched` the logits require a gradient: that of the weights.
        model = Toy()
        assert "detaches" in forward_problem(MASKED["detached"](model), examples_of(model))
        assert forward_problem(function(model), examples_of(model)) == ""
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_model_that_fails_with_gradients_is_named(self, toy):
        def forward(pixels):
            if pixels.requires_grad:
                raise RuntimeError("a view of a leaf Variable\nand more")
            return ClassifierOutput(toy(pixels), None)

        words = forward_problem(forward, examples_of(toy))
        assert "a view of a leaf" in words
        assert "\n" not in words

    def test_rounding_of_kernels_is_not_randomness(self, toy):
        draw = torch.Generator().manual_seed(0)

        def shaken(size):
            def forward(pixels):
                logits = toy(pixels)
                noise = torch.rand(logits.shape, generator=draw) * size * logits.abs().amax()
                return ClassifierOutput(logits + noise, None)

            return forward

        assert not random_forward(shaken(1e-6), examples_of(toy))
        assert random_forward(shaken(1e-2), examples_of(toy))

    def test_randomness_that_only_turns_logits_nan_is_seen(self, toy):
        calls = []

        def forward(pixels):
            calls.append(1)
            logits = toy(pixels).clone()
            logits[0, 0] = torch.nan if len(calls) % 2 else logits[0, 0]
            return ClassifierOutput(logits, None)

        assert random_forward(forward, examples_of(toy))
        assert output_problem(function(toy), examples_of(toy)) == ""


class TestAttackEvidence:
    def test_large_epsilon_takes_an_honest_model_to_zero(self, toy):
        points = large_epsilon_accuracy(function(toy), examples_of(toy), (0.5, 0.1, 0.25))
        assert [point.epsilon for point in points] == [0.1, 0.25, 0.5]
        assert all(point.n == N for point in points)
        standing = [point.standing for point in points]
        assert standing == sorted(standing, reverse=True)
        assert standing[-1] == 0
        assert not raised(MaskingEvidence(large_epsilon=points))

    def test_large_epsilon_and_square_catch_a_quantised_input(self, toy):
        forward, examples = MASKED["quantised"](toy), examples_of(toy)
        # Cells are 1/7 wide, so that random starts alone move images at large budgets.
        points = large_epsilon_accuracy(forward, examples, (16 / 255, 32 / 255))
        assert points[-1].standing > N / 4
        assert "large_epsilon" in raised(MaskingEvidence(large_epsilon=points))
        honest = climb(PGD(20), Query(function(toy), Misclassify("margin")), examples, 0.125)
        assert honest.success.sum() > N - points[-1].standing

    def test_images_wrong_from_the_start_are_left_out(self, toy):
        examples = examples_of(toy)
        labels = examples.labels.clone()
        labels[:10] = (labels[:10] + 1) % 3
        wrong = Examples.of(examples.pixels, labels)
        assert large_epsilon_accuracy(function(toy), wrong, (0.01,))[0].n == N - 10
        assert more_steps_gain(function(toy), wrong, 0.01, num_steps=2).n == N - 10
        none = Examples.of(examples.pixels, (examples.labels + 1) % 3)
        assert more_steps_gain(function(toy), none, 0.1) == StepsGain(20, 0, 0)
        assert large_epsilon_accuracy(function(toy), none, (0.1,)) == (CurvePoint(0.1, 0, 0),)

    def test_more_steps_counts_what_the_second_run_adds(self, toy):
        examples, forward = examples_of(toy), function(toy)
        found = more_steps_gain(forward, examples, 0.06, num_steps=3)
        query = Query(forward, Misclassify("margin"))
        short = climb(PGD(3), query, examples, 0.06).success
        long = climb(PGD(6), query, examples, 0.06).success
        assert found == StepsGain(3, int((long & ~short).sum()), N)

    def test_fgsm_beats_pgd_where_steps_are_led_astray(self, toy):
        # Near the image the gradient points away from the border; half a budget on, it is right.
        def forward(pixels):
            change = (pixels - clean).flatten(1)
            far = change.abs().amax(dim=1, keepdim=True) > 0.1
            logits = toy(pixels)
            trap = torch.where(far, 0.0, -60 * change.square().sum(dim=1, keepdim=True))
            return ClassifierOutput(logits - nn.functional.one_hot(labels, 3) * trap, None)

        examples = examples_of(toy)
        clean, labels = examples.pixels, examples.labels
        query = Query(forward, Misclassify("margin"), batch_size=N)
        one = climb(FGSM(), query, examples, 0.2, until="last").success
        many = climb(PGD(20, random_start=False), query, examples, 0.2, until="last").success
        only = int((one & ~many).sum())
        assert only > 5
        assert raised(MaskingEvidence(fgsm_only=Count(only, N))) == {"fgsm_beats_pgd"}


def tail(count, n, share):
    """P(Binomial(n, share) >= count) in whole numbers."""
    p = Fraction(share).limit_denominator(1000)
    return sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))


class TestCounts:
    @given(count=st.integers(0, 12), n=st.integers(12, 120))
    def test_exceeds_is_the_exact_binomial_test(self, count, n):
        assert exceeds(count, n) == (count > 0 and tail(count, n, 0.01) <= Fraction(1, 20))

    @pytest.mark.parametrize(
        ("name", "evidence"),
        [
            ("square_wins", lambda k: MaskingEvidence(square_only=Count(k, 50))),
            ("fgsm_beats_pgd", lambda k: MaskingEvidence(fgsm_only=Count(k, 50))),
            ("zero_gradients", lambda k: MaskingEvidence(zero_gradients={"ce": Count(k, 50)})),
            ("more_steps_gain", lambda k: MaskingEvidence(more_steps=StepsGain(20, k, 50))),
            ("large_epsilon", lambda k: MaskingEvidence(large_epsilon=(CurvePoint(0.5, k, 50),))),
        ],
    )
    def test_one_image_of_fifty_raises_nothing(self, name, evidence):
        assert [name in raised(evidence(k)) for k in (0, 1, 2, 3, 50)] == [0, 0, 0, 1, 1]

    @pytest.mark.parametrize(
        ("standing", "expected"),
        [
            ([100, 100, 100, 100], False),  # a small budget on a robust net: nothing falls yet
            ([0, 0, 0, 0], False),  # all fooled at once: nothing left to fall
            ([97, 96, 95, 93], False),  # an adversarially trained net within its budget
            ([80, 55, 20, 2], False),  # an ordinary curve
            ([45, 44, 44, 44], False),  # flat, but 45 images left are too few to tell from 5 %
            ([80, 80, 80, 80], True),
            ([99, 70, 70, 70], False),  # too few budgets after the fall: 2 times larger only
        ],
    )
    def test_flat_curve(self, standing, expected):
        points = [
            CurvePoint(epsilon, left, 100)
            for epsilon, left in zip((1 / 255, 4 / 255, 8 / 255, 8.1 / 255), standing, strict=True)
        ]
        assert ("flat_curve" in raised(MaskingEvidence(curve=points))) == expected

    def test_flat_curve_asks_for_a_range_of_budgets(self):
        points = (CurvePoint(1 / 255, 80, 100), CurvePoint(2 / 255, 80, 100))
        flags = {flag.name: flag for flag in masking_flags(MaskingEvidence(curve=points))}
        assert flags["flat_curve"].status == "not_run"

    def test_large_epsilon_is_judged_at_the_largest(self):
        points = (CurvePoint(0.5, 0, 50), CurvePoint(0.25, 20, 50))
        assert not raised(MaskingEvidence(large_epsilon=points))


class TestWords:
    def test_every_flag_speaks(self):
        full = MaskingEvidence(
            square_only=Count(9, 50),
            fgsm_only=Count(9, 50),
            large_epsilon=(CurvePoint(0.25, 9, 50),),
            curve=(CurvePoint(0.01, 80, 100), CurvePoint(0.1, 80, 100)),
            zero_gradients={"ce": Count(9, 50)},
            random_forward=True,
            output_problem="the model returns probabilities",
            forward_problem="no gradient reaches the pixels",
            more_steps=StepsGain(100, 9, 50),
        )
        flags = masking_flags(full)
        assert [flag.name for flag in flags] == list(NAMES)
        for flag in flags:
            assert flag.status == "raised"
            assert flag.sentence
            assert flag.advice
            assert flag.to_dict() == {
                "name": flag.name,
                "status": "raised",
                "sentence": flag.sentence,
                "advice": flag.advice,
            }

    def test_nothing_measured_is_not_clear(self):
        flags = masking_flags(MaskingEvidence())
        assert {flag.status for flag in flags} == {"not_run"}
        assert len(flags) == len(NAMES)
        assert all(flag.advice for flag in flags)

    def test_no_images_is_not_run(self):
        evidence = MaskingEvidence(square_only=Count(0, 0), more_steps=StepsGain(20, 0, 0))
        assert {flag.status for flag in masking_flags(evidence)} == {"not_run"}
