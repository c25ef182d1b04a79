"""SGLD-refined inference: its steps, its three gradients, and what it leaves untouched."""

import math
from itertools import pairwise

import pytest
import torch
from attack_cases import HALF, pixels_of, small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import Examples, Misclassify, Query
from ebm_guard.attacks.goals import margin
from ebm_guard.errors import InvalidInputError, ModelOutputError
from ebm_guard.model.classifier import ClassifierOutput
from ebm_guard.model.isolation import pixel_forward, untouched
from ebm_guard.robustness import Purification, Purifier, refine
from ebm_guard.robustness.purify import MODES
from ebm_guard.sampling.sgld import SGLD

NOISY = Purification(3, step_size=0.02, noise_std=0.01, start_noise_std=0.02, clip=None)
KINDS = {
    "plain": NOISY,
    "clipped": Purification(3, step_size=0.5, noise_std=0.01, clip=0.03),
    "in a ball": Purification(4, step_size=0.5, noise_std=0.02, start_noise_std=0.1, radius=0.05),
    "still": Purification(3, step_size=0.05, noise_std=0.0),
    "chains": Purification(2, step_size=0.05, noise_std=0.02, num_chains=3),
}


def forward_of(net=None, dtype=torch.float64):
    """A smooth net on pixels, in float64 for finite differences."""
    net = (small_net() if net is None else net).to(dtype)
    for part in net.parameters():
        part.requires_grad_(False)
    return lambda pixels: ClassifierOutput(net((pixels - 0.5) / 0.5), None)


def images(n=3, seed=1):
    # Away from the edges, where clamping has no derivative.
    return 0.2 + 0.6 * pixels_of(n, seed).double()


def gradient_of(forward, pixels, labels):
    leaf = pixels.clone().requires_grad_()
    (found,) = torch.autograd.grad(margin(forward(leaf).logits, labels).sum(), leaf)
    return found


def slope(function, pixels, direction, h=1e-5):
    return (function(pixels + h * direction) - function(pixels - h * direction)) / (2 * h)


def naive(forward, pixels, purification, generator):
    """The paper's loop, chain by chain copies in the same order of random numbers."""
    x0 = pixels.repeat_interleave(purification.chains, dim=0)

    def draw():
        return torch.randn(x0.shape, generator=generator, dtype=x0.dtype)

    def kept(x):
        x = x.clamp(0, 1)
        r = purification.radius
        return x if r is None else x0 + (x - x0).clamp(-r, r)

    x = x0
    if purification.start_noise_std:
        x = kept(x + purification.start_noise_std * draw())
    for _ in range(purification.num_steps):
        x = x.detach().requires_grad_()
        energy = -torch.logsumexp(forward(x).logits, dim=1).sum()
        change = purification.step_size * torch.autograd.grad(energy, x)[0]
        if purification.clip is not None:
            change = change.clamp(-purification.clip, purification.clip)
        x = x.detach() - change
        if purification.noise_std:
            x = x + purification.noise_std * draw()
        x = kept(x)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_refining_is_the_loop_of_the_paper(kind):
    forward, pixels, purification = forward_of(), images(), KINDS[kind]
    purifier = Purifier(forward, purification)
    generator = torch.Generator().manual_seed(purifier._generator.initial_seed())
    expected = naive(forward, pixels, purification, generator)
    found = purifier.refine(pixels)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not torch.equal(found, pixels.repeat_interleave(purification.chains, dim=0))
    assert found.min() >= 0
    assert found.max() <= 1


def test_without_a_ball_it_is_the_sampler_itself():
    forward, pixels = forward_of(), images()
    purification = KINDS["clipped"]
    purifier = Purifier(forward, purification)
    generator = torch.Generator().manual_seed(purifier._generator.initial_seed())
    sampler = SGLD(3, 0.5, 0.01, clip=0.03)
    expected = sampler.run(lambda x: -forward(x).logits.logsumexp(dim=1), pixels, generator)
    assert torch.equal(purifier.refine(pixels), expected.points)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["identity", "unrolled"])
def test_both_gradients_start_from_the_deployed_prediction(kind, mode):
    """At the same noise the differentiable forward gives the logits of the deployed one."""
    forward, pixels = forward_of(), images()
    purifier = Purifier(forward, KINDS[kind], seed=(7,))
    expected = purifier(pixels).logits
    purifier.reseed(7)
    found = purifier.hook(mode)(pixels.clone().requires_grad_()).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert found.requires_grad
    assert not expected.requires_grad


def fixed(purifier, mode):
    """The hook with the same noise at every call."""

    def forward(pixels):
        purifier.reseed(3)
        return purifier.hook(mode)(pixels)

    return forward


@pytest.mark.parametrize("kind", KINDS)
def test_the_unrolled_gradient_is_that_of_the_whole_chain(kind):
    forward, pixels, labels = forward_of(), images(), torch.tensor([0, 1, 2])
    whole = fixed(Purifier(forward, KINDS[kind]), "unrolled")
    gradient = gradient_of(whole, pixels, labels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)).double()

    def objective(x):
        return margin(whole(x).logits, labels).sum()

    expected = slope(objective, pixels, direction)
    assert float((gradient * direction).sum()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_gradient_is_that_at_the_refined_image(kind):
    forward, pixels, labels = forward_of(), images(), torch.tensor([0, 1, 2])
    purifier = Purifier(forward, KINDS[kind])
    chains = KINDS[kind].chains
    gradient = gradient_of(fixed(purifier, "identity"), pixels, labels)
    purifier.reseed(3)
    refined = purifier.refine(pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)).double()

    def objective(points):
        logits = forward(points).logits.reshape(len(pixels), chains, -1).mean(dim=1)
        return margin(logits, labels).sum()

    expected = slope(objective, refined, direction.repeat_interleave(chains, dim=0))
    assert float((gradient * direction).sum()) == pytest.approx(float(expected), rel=1e-5)


def test_the_two_gradients_differ_where_the_energy_is_curved():
    forward, pixels, labels = forward_of(), images(), torch.tensor([0, 1, 2])
    purifier = Purifier(forward, Purification(3, step_size=0.2, noise_std=0.0, clip=None))
    found = [gradient_of(fixed(purifier, mode), pixels, labels) for mode in MODES]
    for one, two in pairwise(found):
        assert not torch.allclose(one, two, rtol=1e-2, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chains", [1, 4])
def test_without_steps_it_is_the_bare_classifier(mode, chains):
    forward, pixels, labels = forward_of(), images(), torch.tensor([0, 1, 2])
    hook = Purifier(forward, Purification(0, num_chains=chains)).hook(mode)
    examples = Examples(pixels, labels, torch.arange(3))
    answers = [
        Query(each, Misclassify("margin")).answer(pixels, examples, gradient=True)
        for each in (hook, forward)
    ]
    for name in ("objective", "success", "logits", "gradient"):
        assert torch.equal(*(getattr(answer, name) for answer in answers)), name
    with torch.no_grad():
        assert torch.equal(hook(pixels).logits, forward(pixels).logits)


@given(
    steps=st.integers(0, 3),
    step_size=st.floats(1e-3, 50),
    noise=st.floats(0, 1),
    start=st.floats(0, 1),
    radius=st.none() | st.floats(1e-3, 1),
    chains=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_refined_images_stay_in_box_and_ball(steps, step_size, noise, start, radius, chains, seed):
    pixels = pixels_of(2, seed % 100).double()
    purification = Purification(steps, step_size, noise, start, None, radius, chains)
    found = Purifier(forward_of(), purification, seed=(seed,)).refine(pixels)
    assert found.shape == (2 * purification.chains, *pixels.shape[1:])
    assert found.min() >= 0
    assert found.max() <= 1
    if radius is not None:
        change = found - pixels.repeat_interleave(purification.chains, dim=0)
        assert change.abs().max() <= radius + 1e-12
    if not purification.random:
        again = Purifier(forward_of(), purification, seed=(seed + 1,)).refine(pixels)
        assert torch.equal(found, again)


def test_draws_are_fresh_and_repeat_by_seed():
    forward, pixels = forward_of(), images()
    one, same, other = (Purifier(forward, NOISY, seed=(seed,)) for seed in (4, 4, 5))
    first = one(pixels).logits
    assert torch.equal(first, same(pixels).logits)
    assert not torch.equal(first, one(pixels).logits)
    assert not torch.equal(first, other(pixels).logits)


def test_purification_lowers_the_energy_where_the_step_is_small():
    forward, pixels = forward_of(), images(8)

    def energy(x):
        return -forward(x).logits.logsumexp(dim=1)

    found = Purifier(forward, Purification(5, 0.01, 0.0, clip=None)).refine(pixels)
    assert (energy(found) < energy(pixels)).all()


class Training(nn.Module):
    """A net in train mode with batch norm and dropout, and a gradient in a parameter."""

    def __init__(self, broken=False):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(4, 3)
        self.broken = broken
        self.conv.weight.grad = torch.ones_like(self.conv.weight)
        self.norm.bias.requires_grad_(False)

    def forward(self, x):
        hidden = self.drop(self.norm(self.conv(x)).tanh()).mean(dim=(2, 3))
        return self.last(hidden) * (math.nan if self.broken else 1)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_nothing_of_the_model_is_touched(broken):
    model = Training(broken).train()
    classifier, pixels = EnergyClassifier(model, preprocessing=HALF), pixels_of(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: part.requires_grad for name, part in model.named_parameters()}
    state, given = torch.get_rng_state(), pixels.clone()
    if broken:
        with pytest.raises(ModelOutputError, match="not finite"):
            refine(classifier, pixels, NOISY)
    else:
        refine(classifier, pixels, NOISY)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pixels, given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(part.training for part in model.modules())
    for name, part in model.named_parameters():
        assert part.requires_grad == wanted[name]
        expected = torch.ones_like(part) if name == "conv.weight" else None
        assert (part.grad is None) if expected is None else torch.equal(part.grad, expected)


def test_refine_is_the_purifier_batch_by_batch():
    net = small_net()
    classifier, pixels = EnergyClassifier(net, preprocessing=HALF), pixels_of(5)
    purification = KINDS["chains"]
    found = refine(classifier, pixels, purification, seed=2, batch_size=2)
    assert found.pixels.shape == (5, 3, 3, 8, 8)
    with untouched(net):
        purifier = Purifier(pixel_forward(classifier), purification, seed=(2,))
        expected = torch.cat([purifier(part).logits for part in pixels.split(2)])
        again = purifier.forward(found.pixels.flatten(0, 1)).logits.reshape(5, 3, -1).mean(dim=1)
    assert torch.equal(found.logits, expected)
    assert torch.allclose(found.logits, again, atol=1e-5)


def test_attention_is_differentiated_twice():
    """Fused attention has no second derivative; the unrolled gradient needs one."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(8, 3).requires_grad_(requires_grad=False)

        def forward(self, x):
            rows = x.reshape(len(x), 1, -1, 8)
            mixed = nn.functional.scaled_dot_product_attention(rows, rows, rows)
            return self.last(mixed.mean(dim=(1, 2)))

    forward = forward_of(Attention(), torch.float32)
    labels, pixels = torch.tensor([0, 1, 2]), images().float()
    purifier = Purifier(forward, Purification(2, noise_std=0.0))
    assert gradient_of(purifier.hook("unrolled"), pixels, labels).abs().max() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": -1}, "num_steps"),
        ({"num_steps": 1.5}, "num_steps"),
        ({"num_steps": True}, "num_steps"),
        ({"num_chains": 0}, "num_chains"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.nan}, "step_size"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"start_noise_std": math.inf}, "start_noise_std"),
        ({"clip": 0}, "clip"),
        ({"radius": -1.0}, "radius"),
        ({"step_size": "a"}, "step_size='a'; needed a finite number > 0"),
        ({"step_size": None}, "step_size=None"),
        ({"noise_std": "0.1"}, "noise_std='0.1'; needed a finite number >= 0"),
        ({"num_chains": "2"}, "num_chains='2'; needed a whole number >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(InvalidInputError, match=words):
        Purification(**change)


def test_bad_input_is_explained():
    purifier = Purifier(forward_of(), NOISY)
    with pytest.raises(InvalidInputError, match=r"did you mean.*unrolled"):
        purifier.hook("unroled")
    classifier = EnergyClassifier(small_net(), preprocessing=HALF)
    with pytest.raises(InvalidInputError, match=r"\[0, 1\]"):
        refine(classifier, pixels_of(2) * 255)
    closed = Purifier(lambda x: ClassifierOutput(x.detach().flatten(1), None), NOISY)
    for ask in (closed, closed.hook("unrolled")):
        with pytest.raises(InvalidInputError, match="no gradient reaches"):
            ask(images().requires_grad_())
