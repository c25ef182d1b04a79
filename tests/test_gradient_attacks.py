"""FGSM, PGD and APGD, their losses and balls, against loops from the papers and other libraries."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from attack_cases import EPSILON, case, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ebm_guard.attacks import (
    APGD,
    FGSM,
    PGD,
    Examples,
    Misclassify,
    Query,
    TargetedMisclassify,
    climb,
)
from ebm_guard.attacks.apgd import checkpoints
from ebm_guard.attacks.engine import image_generators
from ebm_guard.attacks.geometry import NORMS, TOLERANCE, ball_of
from ebm_guard.attacks.goals import cross_entropy, dlr, margin, targeted_dlr, wrong
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput

SIZES = {"linf": 1, "l2": 12}


def naive_loss(loss, row, label, target=None):
    """One row's loss in plain Python, as the papers write it."""
    row = [float(value) for value in row]
    ordered = sorted(row, reverse=True)
    rest = max(value for number, value in enumerate(row) if number != label)
    if loss == "ce":
        return (
            math.log(sum(math.exp(value - ordered[0]) for value in row)) + ordered[0] - row[label]
        )
    if loss == "margin" or (loss == "dlr" and len(row) < 3):
        return rest - row[label]
    if loss == "dlr":
        return (rest - row[label]) / (ordered[0] - ordered[2] + 1e-12)
    difference = row[target] - row[label]
    if len(row) < 4:
        return difference
    return difference / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)


@given(st.integers(2, 6), st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_losses_are_those_of_the_papers(classes, seed, scale):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(7, classes)) * scale)
    labels = torch.from_numpy(rng.integers(0, classes, 7))
    targets = (labels + torch.from_numpy(rng.integers(1, classes, 7))) % classes
    found = {
        "ce": cross_entropy(logits, labels),
        "margin": margin(logits, labels),
        "dlr": dlr(logits, labels),
        "targeted": targeted_dlr(logits, labels, targets),
    }
    for loss, values in found.items():
        for row in range(7):
            expected = naive_loss(loss, logits[row], int(labels[row]), int(targets[row]))
            assert float(values[row]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    fooled = wrong(logits, labels)
    assert torch.equal(found["margin"] > 0, fooled)
    # Scaling all logits leaves the ratios as they are; it does not leave the margin.
    if classes > 3:
        torch.testing.assert_close(dlr(3 * logits, labels), found["dlr"])
        torch.testing.assert_close(targeted_dlr(3 * logits, labels, targets), found["targeted"])
        assert not torch.allclose(margin(3 * logits, labels), found["margin"])


def test_a_row_of_nan_names_no_class():
    logits = torch.tensor([[2.0, 1.0], [math.nan, 0.0], [0.0, math.nan]])
    assert wrong(logits, torch.tensor([0, 0, 1])).tolist() == [False, True, True]


def logits_as_pixels(pixels):
    return ClassifierOutput(pixels.flatten(1), None)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_targets_are_the_wrong_classes_of_the_clean_image_by_rank(rank):
    pixels = torch.rand(150, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(150) % 4
    prepared = TargetedMisclassify(rank).prepare(logits_as_pixels, Examples.of(pixels, labels))
    for row, values in enumerate(pixels.flatten(1).tolist()):
        others = [number for number in range(4) if number != labels[row]]
        expected = sorted(others, key=lambda number: -values[number])[rank - 1]
        assert prepared.targets[row] == expected


def test_goals_out_of_range_are_refused():
    examples = Examples.of(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    with pytest.raises(InvalidInputError, match="there are 3 wrong ones"):
        TargetedMisclassify(4).prepare(logits_as_pixels, examples)
    with pytest.raises(InvalidInputError, match="rank 0"):
        TargetedMisclassify(0)
    with pytest.raises(InvalidInputError, match="known are ce, margin, dlr"):
        Misclassify("cross")
    with pytest.raises(InvalidInputError, match=r"through climb"):
        TargetedMisclassify().objective(logits_as_pixels(examples.pixels), examples)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("goal", [Misclassify("dlr"), TargetedMisclassify(1)])
def test_few_classes_are_attacked_by_their_margins(classes, goal):
    def forward(pixels):
        return ClassifierOutput(pixels.flatten(1)[:, :classes], None)

    pixels = torch.full((1, 1, 2, 2), 0.4)
    pixels[0, 0, 0, 0] = 0.6
    examples = Examples.of(pixels, torch.tensor([0]))
    for epsilon, fooled in ((0.09, False), (0.11, True)):
        outcome = climb(APGD(20), Query(forward, goal), examples, epsilon)
        assert outcome.success.item() == fooled
        assert outcome.objective.item() == pytest.approx(2 * epsilon - 0.2, abs=0.25)


images = arrays(np.float32, (2, 1, 3, 3), elements=st.floats(0, 1, width=32))
changes = arrays(np.float32, (2, 1, 3, 3), elements=st.floats(-1e3, 1e3, width=32))
radii = st.floats(0, 20) | st.floats(1e-9, 1e-2)


def assert_in_ball_and_box(found, centre, epsilon, norm):
    change = (found.double() - centre.double()).flatten(1)
    length = change.abs().amax(dim=1) if norm == "linf" else change.norm(dim=1)
    assert float(length.max()) <= epsilon + TOLERANCE
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@given(images, changes, radii, st.sampled_from(NORMS))
@settings(max_examples=150, deadline=None)
def test_projections_end_in_the_ball_and_in_the_box(image, change, epsilon, norm):
    ball, centre = ball_of(norm), torch.from_numpy(image)
    found = ball.project(centre + torch.from_numpy(change), centre, epsilon)
    assert_in_ball_and_box(found, centre, epsilon, norm)
    # What is inside stays where it is, up to rounding.
    torch.testing.assert_close(ball.project(found, centre, epsilon), found, atol=2e-7, rtol=2e-6)
    drawn = ball.random(centre, epsilon, image_generators(torch.arange(2), (0,)))
    assert_in_ball_and_box(drawn, centre, epsilon, norm)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 0.25, 3.0, 30.0])
@pytest.mark.parametrize("grey", [0.3, 0.7, 0.9])
def test_rounding_of_many_equal_pixels_does_not_leave_the_ball(epsilon, grey):
    centre = torch.full((1, 3, 224, 224), grey)
    for far in (1.0, -1.0):
        found = ball_of("l2").project(centre + far, centre, epsilon)
        assert_in_ball_and_box(found, centre, epsilon, "l2")
        length = (found.double() - centre.double()).norm().item()
        assert float(ball_of("l2").distance(found, centre)) == pytest.approx(length, abs=1e-6)


def test_the_formula_in_float32_alone_leaves_the_ball():
    centre = torch.full((1, 3, 224, 224), 0.7)
    change = torch.full_like(centre, -1.0)
    naive = centre + change * (0.25 / float(change.double().norm()))
    assert float((naive.double() - centre.double()).norm()) > 0.25 + TOLERANCE


@given(changes, st.floats(1e-30, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_steepest_step_has_norm_one_and_climbs_most(change, scale):
    gradient = torch.from_numpy(change) * scale
    moving = (gradient != 0).flatten(1).any(dim=1)
    for norm, dual in (("linf", 1), ("l2", 2)):
        step = ball_of(norm).steepest(gradient)
        zero = torch.zeros_like(step)
        assert ball_of(norm).distance(step, zero)[moving].sub(1).abs().lt(1e-5).all()
        assert (step[~moving] == 0).all()
        rise = (step.double() * gradient.double()).flatten(1).sum(dim=1)
        most = torch.linalg.vector_norm(gradient.double().flatten(1), ord=dual, dim=1)
        torch.testing.assert_close(rise, most, rtol=1e-4, atol=1e-30)


def test_random_starts_fill_the_ball():
    """Shares of draws within half the radius: 2^-d for the ball; a uniform share of each pixel."""
    centre = torch.full((4000, 1, 1, 2), 0.5)
    generators = image_generators(torch.arange(4000), (0,))
    flat = ball_of("l2").random(centre, 0.4, generators)
    inner = int((ball_of("l2").distance(flat, centre) < 0.2).sum())
    box = ball_of("linf").random(centre - 0.4, 0.3, generators).flatten()
    from scipy import stats

    assert stats.binomtest(inner, 4000, 0.25).pvalue > 1e-6
    # 0.1 +- 0.3 within the box is [0, 0.4].
    assert stats.kstest(box.numpy() / 0.4, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_falls_where_the_margin_meets_the_dual_norm(norm):
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def forward(pixels):
        first = pixels.flatten(1) @ weight
        return ClassifierOutput(torch.stack([first, torch.zeros_like(first)], dim=1), None)

    pixels = torch.tensor([0.5, 0.4, 0.3, 0.2]).reshape(1, 1, 2, 2)
    limit = float(forward(pixels).logits[0, 0] / (weight.abs().sum(), weight.norm())[norm == "l2"])
    examples = Examples.of(pixels, torch.tensor([0]))
    for rule in (FGSM(norm), PGD(40, 0.5, norm), APGD(100, norm)):
        for factor in (0.98, 1.02):
            outcome = climb(rule, Query(forward, Misclassify()), examples, limit * factor)
            assert outcome.success.item() == (factor > 1)


def test_checkpoints_are_those_of_the_paper():
    for num_steps in (100, 200, 1000):
        p = [Fraction(0), Fraction(22, 100)]
        while p[-1] < 1:
            p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
        expected = [math.ceil(share * num_steps) for share in p[1:] if share < 1]
        assert list(checkpoints(num_steps)) == expected
    for num_steps in (1, 2, 7, 30):
        found = checkpoints(num_steps)
        assert all(0 < at < num_steps for at in found)
        assert sum(found.values()) == max(found, default=0)


def naive_apgd(forward, examples, row, epsilon, norm, num_steps, start):
    """Algorithm 1 for one image: all iterates and the objectives there."""
    ball, centre = ball_of(norm), examples.pixels[row : row + 1]

    def ask(x):
        leaf = x.clone().requires_grad_()
        loss = margin(forward(leaf).logits, examples.labels[row : row + 1])
        return loss.item(), torch.autograd.grad(loss.sum(), leaf)[0]

    def move(x, slope, size, share, previous):
        aim = ball.project(x + size * ball.steepest(slope), centre, epsilon)
        return ball.project(x + share * (aim - x) + (1 - share) * (x - previous), centre, epsilon)

    x, (value, slope), size = start, ask(start), 2 * epsilon
    best, values, iterates = (value, x, slope), [value], [x]
    sizes_at, best_at, begin = [size], [value], 0
    previous, x = x, move(x, slope, size, 1.0, x)
    for k in range(1, num_steps + 1):
        value, slope = ask(x)
        values.append(value)
        iterates.append(x)
        if value > best[0]:
            best = (value, x, slope)
        if k in checkpoints(num_steps):
            raised = sum(values[i + 1] > values[i] for i in range(begin, k))
            few = raised < 0.75 * (k - begin)
            still = len(sizes_at) > 0 and sizes_at[-1] == size and best_at[-1] == best[0]
            sizes_at.append(size)
            best_at.append(best[0])
            begin = k
            if few or still:
                size, (_, x, slope) = size / 2, best
        previous, x = x, move(x, slope, size, 0.75, previous)
    return torch.cat(iterates), values


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_is_algorithm_1_for_each_image(norm):
    forward, examples = case(n=12)
    epsilon, num_steps = EPSILON * SIZES[norm], 40
    start = ball_of(norm).random(examples.pixels, epsilon, image_generators(examples.ids, (4,)))
    answers = []

    class Watched(APGD):
        def step(self, state, answer, rows, radius, index):
            self.last = super().step(state, answer, rows, radius, index)
            return self.last

    rule = Watched(num_steps, norm)
    climb(
        rule,
        Query(forward, Misclassify("margin"), batch_size=1),
        examples,
        epsilon,
        start=start,
        until="last",
        observe=lambda step, rows, answer: answers.append(answer.objective),
    )
    values = torch.stack(answers)
    for row in range(12):
        first = start[row : row + 1]
        iterates, expected = naive_apgd(forward, examples, row, epsilon, norm, num_steps, first)
        assert_in_ball_and_box(iterates, examples.pixels[row : row + 1], epsilon, norm)
        torch.testing.assert_close(values[:, row], torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert rule.last.step_size.unique().numel() > 1, "no image differed in its step size"
    assert (rule.last.step_size < 2 * epsilon).any()


@pytest.mark.parametrize("rule", [PGD(30), APGD(30), APGD(30, "l2")], ids=lambda rule: rule.name)
def test_survivors_move_as_if_nobody_had_been_dropped(rule):
    forward, examples = case()
    epsilon = EPSILON * SIZES[rule.norm] / 2
    query = Query(forward, Misclassify("margin"))
    best = climb(rule, query, examples, epsilon, until="best")
    found = climb(rule, query, examples, epsilon)
    stands = ~found.success
    assert 0 < stands.sum() < 64
    torch.testing.assert_close(
        found.objective[stands], best.objective[stands], atol=1e-3, rtol=1e-3
    )
    assert (best.success >= found.success).all()


@pytest.mark.parametrize("rule", [APGD(20), APGD(20, "l2"), PGD(20)], ids=lambda rule: rule.name)
def test_a_carried_start_is_never_lost(rule):
    """The engine judges the start too: a larger budget cannot end below a smaller one."""
    forward, examples = case()
    query, small = Query(forward, Misclassify("margin")), EPSILON * SIZES[rule.norm] / 4
    first = climb(rule, query, examples, small, until="best")
    carried = climb(rule, query, examples, 2 * small, start=first.pixels, until="best")
    assert (carried.objective >= first.objective - 1e-5).all()
    assert (carried.objective > first.objective).float().mean() > 0.9
    assert carried.success[first.success].all()
    assert_in_ball_and_box(carried.pixels, examples.pixels, 2 * small, rule.norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_equals_the_authors_code_from_the_same_start(norm, loss):
    base = pytest.importorskip(
        "pyautoattack.autopgd_base", reason="pyautoattack (extra test) is not installed"
    )
    net = small_net()
    forward, examples = case(net)
    epsilon = EPSILON * SIZES[norm]
    start = ball_of(norm).random(examples.pixels, epsilon, image_generators(examples.ids, (0,)))
    attack = base.APGDAttack(
        lambda pixels: net((pixels - 0.5) / 0.5),
        n_iter=60,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=epsilon,
        loss=loss,
    )
    attack.init_hyperparam(examples.pixels)
    _, stands, objective, _ = attack.attack_single_run(
        examples.pixels, examples.labels, x_init=start
    )
    query = Query(forward, Misclassify(loss))
    found = climb(APGD(60, norm), query, examples, epsilon, start=start)
    best = climb(APGD(60, norm), query, examples, epsilon, start=start, until="best")
    assert 0 < found.success.sum() < 64
    assert (found.success == ~stands.bool()).float().mean() >= 63 / 64
    near = (best.objective - objective.detach()).abs() < 1e-3 * (1 + objective.detach().abs())
    # Not all: their first step counts as rising when its loss is above 0, not above the start's.
    assert near.float().mean() >= 0.9
