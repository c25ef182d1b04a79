"""A purified classifier under attack: three gradients, many draws, and no lucky one."""

from types import SimpleNamespace

import pytest
import torch
from attack_cases import HALF, pixels_of, small_net
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import PGD, Examples, Misclassify, Query, climb, pixel_forward
from ebm_guard.attacks.goals import wrong
from ebm_guard.errors import InvalidInputError, UnsupportedModelError
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.model.isolation import untouched
from ebm_guard.robustness import Purification, Purifier, purify_stage
from ebm_guard.robustness.purify import MODES
from ebm_guard.robustness.purify_attack import (
    DrawnTogether,
    PurifyBudget,
    attack_purified,
    majority_wrong,
)

BUDGET = PurifyBudget(100, 6, eot_samples=4, success_draws=5)
STILL = Purification(2, step_size=0.05, noise_std=0.0)
NOISY = Purification(2, step_size=0.05, noise_std=0.02)


def small_case(n=24):
    forward = pixel_forward(EnergyClassifier(small_net(), preprocessing=HALF))
    pixels = pixels_of(n)
    with torch.no_grad():
        return forward, Examples.of(pixels, forward(pixels).logits.argmax(dim=1))


@pytest.fixture(autouse=True)
def no_weight_gradients():
    with untouched(None):
        yield


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_steps_every_mode_is_the_attack_on_the_bare_classifier(mode, norm):
    forward, examples = small_case()
    epsilon = 0.01 if norm == "linf" else 0.1
    nothing = Purification(0, num_chains=3)
    found = attack_purified(
        Purifier(forward, nothing), examples, epsilon, mode, BUDGET.needed(nothing), norm=norm
    )
    query = Query(forward, Misclassify("margin"))
    bare = climb(PGD(BUDGET.num_steps, norm=norm), query, examples, epsilon)
    assert 0 < int(bare.success.sum()) < len(examples)
    assert torch.equal(found.fooled, bare.success)
    assert torch.equal(found.pixels, bare.pixels)


@pytest.mark.parametrize("mode", MODES)
def test_epsilon_zero_is_the_clean_prediction(mode):
    forward, examples = small_case()
    purifier = Purifier(forward, STILL)
    labels = purifier(examples.pixels).logits.argmax(dim=1)
    labels[::3] = (labels[::3] + 1) % 5
    examples = Examples.of(examples.pixels, labels)
    found = attack_purified(purifier, examples, 0.0, mode, BUDGET.needed(STILL))
    assert torch.equal(found.fooled, torch.arange(len(examples)) % 3 == 0)
    assert torch.equal(found.pixels, examples.pixels)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_called_fooled_is_wrong_when_purified_and_in_the_ball(mode):
    forward, examples = small_case()
    purifier = Purifier(forward, STILL)
    found = attack_purified(purifier, examples, 0.02, mode, BUDGET.needed(STILL))
    assert bool(found.fooled.any())
    with torch.no_grad():
        deployed = purifier(found.pixels).logits
    assert torch.equal(wrong(deployed, examples.labels), found.fooled)
    assert (found.pixels - examples.pixels).abs().max() <= 0.02 + 1e-6
    assert found.pixels.min() >= 0
    assert found.pixels.max() <= 1


class Binary(nn.Module):
    """Tell a bright image from a dark one; its energy is highest at grey."""

    def forward(self, x):
        level = x.flatten(1) - 0.5
        # Each pixel has a logit of its own, so that descent drives every pixel to black or white.
        return 40 * torch.stack([level.mean(dim=1), -level.mean(dim=1)], dim=1)


def test_a_masked_gradient_alone_would_make_purification_look_safe():
    """Long steps drive every pixel to black or white: through the clamp no gradient passes.

    The attack through all steps of the sampler, the "exact" one, finds nothing; the other two
    break what it calls robust, so that the worst of the three is near zero.
    """
    net = Binary()
    forward = lambda pixels: ClassifierOutput(net(pixels), None)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    pixels = 0.6 + 0.05 * torch.rand(12, 1, 8, 8, generator=generator)
    pixels[::2] = 1 - pixels[::2]
    labels = (pixels.flatten(1).mean(dim=1) < 0.5).long()
    strong = Purification(2, step_size=20.0, noise_std=0.0, clip=None)
    purifier = Purifier(forward, strong)
    assert set(purifier.refine(pixels).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(purifier(pixels).logits.argmax(dim=1), labels)
    examples = Examples.of(pixels, labels)
    fooled = {
        mode: attack_purified(purifier, examples, 0.2, mode, BUDGET.needed(strong)).fooled
        for mode in MODES
    }
    assert not fooled["unrolled"].any()
    assert fooled["identity"].all()
    assert fooled["transfer"].all()


def test_the_draws_of_an_image_in_one_batch_are_the_same_answer():
    """Without random numbers, and with the mean over many where there are some."""
    forward, examples = small_case(7)
    pixels = examples.pixels
    settings = {"batch_size": 8, "eot_samples": 3, "success_draws": 5}
    for gradient in (False, True):
        together, plain = (
            kind(forward, Misclassify("margin"), **settings).answer(
                pixels, examples, gradient=gradient
            )
            for kind in (DrawnTogether, Query)
        )
        assert torch.equal(together.success, plain.success)
        assert torch.allclose(together.objective, plain.objective, atol=1e-5)
        assert torch.allclose(together.logits, plain.logits, atol=1e-5)
        if gradient:
            assert torch.allclose(together.gradient, plain.gradient, atol=1e-5)


def test_the_gradient_is_the_mean_over_draws_of_the_same_noise():
    forward, examples = small_case(2)
    purifier = Purifier(forward, NOISY, seed=(1,))
    query = DrawnTogether(purifier.hook("identity"), Misclassify("margin"), eot_samples=6)
    found = query.answer(examples.pixels, examples, gradient=True).gradient
    purifier.reseed(1)
    rows = torch.arange(2).repeat_interleave(6)
    leaf = examples.pixels[rows].clone().requires_grad_()
    output = purifier.hook("identity")(leaf)
    objective = Misclassify("margin").objective(output, examples.select(rows))
    (each,) = torch.autograd.grad(objective.sum(), leaf)
    assert torch.allclose(found, each.reshape(2, 6, *each.shape[1:]).mean(dim=1), atol=1e-6)


@pytest.mark.parametrize("together", [True, False])
def test_a_majority_of_draws_decides(together):
    """A coin that is wrong in a share p of the draws: never judged by one lucky draw."""
    generator = torch.Generator().manual_seed(0)

    class Coin(Purifier):
        def __call__(self, pixels):
            share = pixels.flatten(1)[:, 0]
            heads = (torch.rand(len(pixels), generator=generator) < share).float()
            return ClassifierOutput(torch.stack([1 - heads, heads], dim=1), None)

    coin = Coin(None, STILL)
    pixels = torch.tensor([0.0, 0.25, 0.75, 1.0]).reshape(4, 1, 1, 1).expand(4, 500, 1, 1)
    pixels = pixels.reshape(2000, 1, 1, 1)
    labels = torch.zeros(2000, dtype=torch.int64)
    found = majority_wrong(coin, pixels, labels, 11, 64, together=together).reshape(4, 500)
    counts = found.sum(dim=1).tolist()
    assert counts[0] == 0
    assert counts[3] == 500
    # P(more than 5 of 11 at p = 1/4) = 0.0343: 500 of them stay in these bounds but for 1e-6.
    assert 1 <= counts[1] <= 45
    assert 455 <= counts[2] <= 499


def test_a_lucky_vote_of_the_search_is_not_believed():
    """At the search every vote says wrong, afterwards none does: nothing is fooled."""

    class Fickle(Purifier):
        asked = 0

        def __call__(self, pixels):
            Fickle.asked += 1
            lucky = float(Fickle.asked <= 1)
            return ClassifierOutput(torch.tensor([[1 - lucky, lucky]]).repeat(len(pixels), 1), None)

    _, examples = small_case(3)
    examples = Examples.of(examples.pixels, torch.zeros(3, dtype=torch.int64))

    def bare(pixels):
        total = pixels.flatten(1).sum(dim=1, keepdim=True)
        return ClassifierOutput(torch.cat([total, -total], dim=1), None)

    found = attack_purified(Fickle(bare, NOISY), examples, 0.1, "transfer", BUDGET)
    assert not found.fooled.any()
    # The images of the lucky votes were stepped on to the end.
    assert (found.outcome.gradients > 1).all()


def test_a_model_without_second_derivative_says_so():
    def once(pixels):
        rows = pixels.flatten(1)
        target = torch.zeros(rows.shape, dtype=torch.int64)
        loss = nn.functional.multilabel_margin_loss(rows, target, reduction="none")
        return ClassifierOutput(torch.stack([loss.square(), 1 - loss], dim=1), None)

    pixels = pixels_of(2)
    examples = Examples.of(pixels, once(pixels).logits.argmax(dim=1))
    purifier = Purifier(once, STILL)
    with pytest.raises(UnsupportedModelError, match="differentiated twice"):
        attack_purified(purifier, examples, 0.1, "unrolled", BUDGET.needed(STILL))
    assert len(attack_purified(purifier, examples, 0.1, "identity", BUDGET).fooled) == 2


def test_no_draw_is_refused():
    forward, examples = small_case(2)
    with pytest.raises(InvalidInputError, match="draws"):
        majority_wrong(Purifier(forward, STILL), examples.pixels, examples.labels, 0)


@pytest.mark.parametrize(("bare_samples", "wrong"), [(1, True), (20, False)])
def test_clean_votes_have_draws_of_their_own(bare_samples, wrong):
    """A bare net with one mask for a batch: its first answer is wrong, for all rows of it."""
    asked = []

    def forward(pixels):
        asked.append(len(pixels))
        right = torch.tensor([0.0, 1.0] if len(asked) > 1 else [1.0, 0.0])
        return ClassifierOutput(right.expand(len(pixels), 2) + 0 * pixels.mean(), None)

    pixels, labels = torch.full((1, 1, 2, 2), 0.5), torch.tensor([1])
    context = SimpleNamespace(
        examples=Examples.of(pixels, labels),
        subject=SimpleNamespace(
            forward=forward, batch_size=64, classifier=SimpleNamespace(device=None)
        ),
        seed=0,
        runner=SimpleNamespace(
            run=lambda name, title, work, **cost: {
                key: each.numpy() for key, each in work().items()
            }
        ),
    )
    settings = Purification(0, start_noise_std=0.01)
    budget = PurifyBudget.of("quick").needed(settings, bare_samples)
    found = purify_stage._clean(context, settings, budget, 1, "clean")
    assert found.tolist() == [wrong]
    assert asked == ([11] if bare_samples == 1 else [1] * 11)
