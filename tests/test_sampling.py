"""SGLD is the rule of the papers; runs leave a trace of figures and no trace in the model."""

import json
import math
from contextlib import nullcontext

import numpy as np
import oracles
import pytest
import torch
from attack_cases import HALF, pixels_of, small_net
from torch import nn

import ebm_guard
from ebm_guard import EnergyClassifier, Preprocessing, registry
from ebm_guard import energy as formulas
from ebm_guard.errors import EbmGuardWarning, InvalidInputError
from ebm_guard.model.isolation import pixel_forward, untouched
from ebm_guard.sampling import (
    HMC,
    MALA,
    SGLD,
    Chains,
    ReplayBuffer,
    SamplingNet,
    make_sampler,
    sample,
)

SAMPLERS = [SGLD.short_run(4), SGLD.langevin(1e-4, num_steps=4), MALA(4, 1e-4), HMC(3, 0.01, 2)]


def bowl(x):
    return (x - 0.5).square().flatten(1).sum(dim=1) * 3 + x.flatten(1)[:, 0]


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def start_of(n=5, shape=(3, 4, 4), dtype=torch.float64):
    return torch.from_numpy(oracles.generator("start").random((n, *shape))).to(dtype)


def test_sgld_is_the_rule_of_the_paper_value_by_value():
    sampler = SGLD(6, 0.2, 0.05, clip=0.03)
    found = sampler.run(bowl, start_of(), numbers(1)).points
    x, source = start_of().numpy().copy(), numbers(1)
    for _ in range(6):
        xi = torch.randn(x.shape, generator=source, dtype=torch.float64).numpy()
        for place in np.ndindex(*x.shape):
            first = place[1:] == (0, 0, 0)
            change = 0.2 * (6 * (x[place] - 0.5) + first)
            change = max(-0.03, min(0.03, change))
            x[place] = min(1.0, max(0.0, x[place] - change + 0.05 * xi[place]))
    assert np.allclose(found.numpy(), x, atol=1e-12)


def test_short_run_is_jem_rescaled():
    # JEM on u = 2 x - 1 in [-1, 1]: step 1, noise .01, the same random numbers.
    sampler = SGLD.short_run(clip=None, box=None)
    assert (sampler.num_steps, sampler.step_size, sampler.noise_std) == (20, 0.25, 0.005)

    def on_wide(u):
        return (u.pow(4) / 4 + u).flatten(1).sum(dim=1) / 10

    found = sampler.run(lambda x: on_wide(2 * x - 1), start_of(), numbers()).points
    u, source = 2 * start_of() - 1, numbers()
    for _ in range(20):
        u = u - 1.0 * (u.pow(3) + 1) / 10
        u = u + 0.01 * torch.randn(u.shape, generator=source, dtype=torch.float64)
    assert torch.allclose(2 * found - 1, u, atol=1e-12)
    assert sampler.temperature == pytest.approx(5e-5)
    kinder = SGLD.short_run()
    assert (kinder.clip, kinder.box, kinder.boundary) == (0.1, (0.0, 1.0), "clamp")


def test_langevin_has_the_noise_of_its_step_and_temperature():
    sampler = SGLD.langevin(0.08, 0.5)
    assert sampler.step_size == 0.04
    assert sampler.noise_std == pytest.approx(math.sqrt(0.08 * 0.5))
    assert sampler.temperature == pytest.approx(0.5)
    assert (sampler.clip, sampler.boundary) == (None, "reflect")


def test_box_clip_and_saturation():
    down = lambda x: 1e6 * x.flatten(1).sum(dim=1)  # noqa: E731
    clipped = SGLD(3, 1.0, 0.0, clip=0.1).run(down, torch.full((2, 4), 0.55), numbers())
    assert torch.allclose(clipped.points, torch.full((2, 4), 0.25))
    assert clipped.trace.saturation.tolist() == [0, 0, 0, 0]
    free = SGLD(2, 1.0, 0.0).run(down, torch.full((2, 4), 0.5), numbers())
    assert torch.equal(free.points, torch.zeros(2, 4))
    assert free.trace.saturation.tolist() == [0, 1, 1]
    unboxed = SGLD(2, 1.0, 0.0, box=None).run(down, torch.full((2, 4), 0.5), numbers())
    assert unboxed.trace.saturation is None
    assert unboxed.points.max() < -1e6


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_a_run_repeats_and_tells_what_happened(sampler):
    runs = [sampler.run(bowl, start_of(), numbers(3)) for _ in range(2)]
    assert torch.equal(runs[0].points, runs[1].points)
    assert not torch.equal(runs[0].points, sampler.run(bowl, start_of(), numbers(4)).points)
    trace, steps = runs[0].trace, sampler.num_steps
    assert trace.energy.shape == (steps + 1, 5)
    assert torch.allclose(trace.energy[0], bowl(start_of()))
    assert torch.allclose(trace.energy[-1], bowl(runs[0].points))
    gradient = 6 * (start_of() - 0.5)
    gradient.flatten(1)[:, 0] += 1
    assert torch.allclose(trace.gradient_norm[0], gradient.flatten(1).norm(dim=1))
    assert (trace.acceptance is None) == (sampler.name == "sgld")
    json.dumps([trace.to_dict(), sampler.settings()])
    assert not runs[0].points.requires_grad


def test_chains_do_not_feel_each_other():
    alone = SGLD(5, 0.1, 0.0).run(bowl, start_of()[:1], numbers()).points
    together = SGLD(5, 0.1, 0.0).run(bowl, start_of(), numbers()).points
    assert torch.allclose(alone, together[:1])


def test_a_step_uses_what_is_known():
    points = start_of()
    known = Chains(points, torch.zeros(5), torch.ones_like(points))

    def forbidden(x):
        raise AssertionError

    chains, record = SGLD(1, 0.01, 0.0).step(forbidden, known, numbers())
    assert torch.allclose(chains.points, (points - 0.01).clamp(min=0))
    assert torch.equal(record.energy, torch.zeros(5))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_under_no_grad(mode):
    with mode():
        samples = SGLD(2, 0.1, 0.0).run(bowl, start_of(), numbers())
    assert samples.energy.mean() < bowl(start_of()).mean()


def test_samplers_by_name():
    assert make_sampler("sgld").settings() == SGLD.short_run().settings()
    assert make_sampler("sgld:langevin", step_size=0.1).settings() == SGLD.langevin(0.1).settings()
    ready = MALA()
    assert make_sampler(ready) is ready
    for method in registry.methods("sampler"):
        assert make_sampler(method.name, num_steps=2).name == method.name
    for call, message in [
        (lambda: make_sampler("sgdl"), "sgld"),
        (lambda: make_sampler("sgld:short"), "short_run"),
        (lambda: make_sampler("mala:short_run"), "known: none"),
        (lambda: make_sampler("mala", leapfrog=3), "its settings are num_steps"),
        (lambda: make_sampler("sgld:langevin"), "needs step_size"),
        (lambda: make_sampler(ready, num_steps=3), "build the sampler with them"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            call()


# The user's model.


class Fragile(nn.Module):
    """Train mode, a frozen weight, random inference, a forward that may fail."""

    def __init__(self, fails_at=None, traceable=True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(216, 5)
        self.conv.bias.requires_grad_(False)
        self.fc.weight.grad = torch.ones_like(self.fc.weight)
        self.fails_at, self.traceable, self.calls = fails_at, traceable, 0
        self.train()
        self.bn.eval()

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of luck")
        if not self.traceable and x.sum() > -1e9:
            x = x + 0.01 * torch.randn_like(x)
        return self.fc(self.drop(self.bn(self.conv(x)).tanh().flatten(1)))


def trace(model):
    """Everything that a run might leave behind."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [part.training for part in model.modules()],
        "flags": [part.requires_grad for part in model.parameters()],
        "grads": [None if part.grad is None else part.grad.clone() for part in model.parameters()],
        "torch": torch.get_rng_state(),
    }


def assert_same(before, after):
    for key in ("modes", "flags"):
        assert before[key] == after[key], key
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for one, other in zip(before["grads"], after["grads"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert torch.equal(before["torch"], after["torch"])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("way", ["folded", "as it is", "raising"])
def test_nothing_of_the_model_changes(sampler, way):
    fails_at = 6 if way == "raising" else None
    model = Fragile(fails_at, traceable=way == "folded")
    classifier = EnergyClassifier(model, preprocessing=HALF)
    before = trace(model)
    failing = pytest.raises(RuntimeError, match="out of luck") if fails_at else nullcontext()
    with failing, pytest.warns(EbmGuardWarning, match="train mode"):
        sheet = sample(classifier, sampler=sampler, per_class=2, image_size=(8, 8))
    assert_same(before, trace(model))
    if way != "raising":
        assert sheet.settings["net"]["folded"] == (way == "folded")


def test_a_run_of_ones_own_under_untouched_leaves_nothing_behind():
    model = Fragile(traceable=False)
    forward = pixel_forward(EnergyClassifier(model, preprocessing=HALF))
    before = trace(model)
    with pytest.warns(EbmGuardWarning, match="train mode"), untouched(model):
        SGLD.short_run(3).run(lambda x: formulas.energy(forward(x).logits), pixels_of(4), numbers())
    assert_same(before, trace(model))


# The sheet.


def case():
    return EnergyClassifier(small_net(), preprocessing=HALF), pixels_of(60)


def test_a_sheet_goes_down_the_energy_of_each_class():
    classifier, images = case()
    labels = torch.arange(60) % 5
    sheet = sample(classifier, images=images, labels=labels, per_class=3, num_steps=15)
    assert sheet.classes == (0, 1, 2, 3, 4)
    assert sheet.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert sheet.settings["start"] == "class_gaussian"
    assert (sheet.trace.energy[-1] < sheet.trace.energy[0]).all()
    logits = pixel_forward(classifier)(sheet.pixels).logits.detach()
    assert torch.allclose(sheet.energy, formulas.energy(logits))
    assert torch.equal(sheet.predicted, logits.argmax(dim=1))
    rows = torch.arange(15)
    assert torch.allclose(sheet.joint_energy, -logits[rows, sheet.labels])
    assert torch.allclose(sheet.trace.energy[-1], sheet.joint_energy, atol=1e-4)
    assert (sheet.predicted == sheet.labels).float().mean() > 0.8
    assert sheet.per_class == 3
    record = sheet.to_dict()
    assert record["classes"][1]["joint_energy"] == pytest.approx(
        float(sheet.joint_energy[3:6].mean())
    )
    json.dumps(record)


def test_without_a_class_chains_go_down_the_energy():
    classifier, _ = case()
    settings = {"per_class": 2, "image_size": (8, 8), "num_steps": 5}
    sheet = sample(classifier, conditional=False, **settings)
    assert torch.allclose(sheet.trace.energy[-1], sheet.energy, atol=1e-4)
    assert not torch.equal(sheet.pixels, sample(classifier, **settings).pixels)


def test_chains_may_start_at_the_data():
    classifier, images = case()
    labels = torch.arange(60) % 5
    settings = {"images": images, "labels": labels, "start": "data"}
    sheet = sample(classifier, classes=[4, 2], num_steps=0, **settings)
    assert sheet.classes == (4, 2)
    for label, pixels in zip(sheet.labels, sheet.pixels, strict=True):
        rows = torch.nonzero((images == pixels).flatten(1).all(dim=1)).flatten()
        assert labels[rows].tolist() == [label]
    assert len({tuple(row.flatten().tolist()) for row in sheet.pixels}) == 16
    with pytest.raises(InvalidInputError, match="got 12 images of class 1 for 13 chains"):
        sample(classifier, classes=[1], per_class=13, **settings)


@pytest.mark.parametrize("sampler", ["mala", "hmc", "sgld:short_run"])
def test_a_sheet_repeats_by_its_seed_and_stays_in_the_box(sampler):
    classifier, _ = case()
    settings = {"sampler": sampler, "per_class": 2, "image_size": (8, 8), "num_steps": 4}
    sheets = [sample(classifier, seed=seed, **settings) for seed in (5, 5, 6)]
    assert torch.equal(sheets[0].pixels, sheets[1].pixels)
    assert not torch.equal(sheets[0].pixels, sheets[2].pixels)
    assert 0 <= sheets[0].pixels.min() <= sheets[0].pixels.max() <= 1
    assert (sheets[0].trace.acceptance is None) == (sampler == "sgld:short_run")
    assert not torch.equal(sheets[0].pixels, sheets[0].start)


def test_batches_of_chains_are_put_side_by_side():
    classifier, _ = case()
    settings = {"sampler": MALA(3, 1e-4), "per_class": 2, "image_size": (8, 8)}
    sheet = sample(classifier, batch_size=4, **settings)
    assert sheet.trace.energy.shape == (4, 10)
    assert sheet.trace.acceptance.shape == (3,)
    assert sheet.trace.saturation is None
    whole = sample(classifier, **settings)
    assert torch.equal(sheet.start, whole.start)
    assert torch.allclose(sheet.trace.energy[0], whole.trace.energy[0], atol=1e-5)


def test_guards_and_models_are_taken_too():
    net = small_net()
    settings = {"per_class": 1, "image_size": (8, 8), "num_steps": 2}
    sheets = [
        sample(each, **settings)
        for each in (
            EnergyClassifier(net, preprocessing=HALF),
            ebm_guard.wrap(net, mean=(0.5,) * 3, std=(0.5,) * 3),
        )
    ]
    assert torch.equal(sheets[0].pixels, sheets[1].pixels)
    net.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 8, 8)}
    net.pretrained_cfg["label_names"] = ("ant", "bee", "cat", "dog", "eel")
    settings.pop("image_size")
    sheet = sample(net, classes=["bee", 3], **settings)
    assert (sheet.classes, sheet.names) == ((1, 3), ("bee", "dog"))


def test_persistent_chains_go_below_the_data():
    """Samplers, buffer and lean net together, as training uses them."""
    rng, generator = oracles.generator("persistent"), numbers()
    labels = torch.from_numpy(rng.integers(0, 8, 400))
    images = rng.random((8, 1, 8, 8))[labels] * 0.7 + rng.random((400, 1, 8, 8)) * 0.3
    images = torch.from_numpy(images).float()
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Flatten())
    net.append(nn.Linear(288, 8))
    with torch.no_grad():
        for part in net.parameters():
            part.copy_(torch.randn(part.shape, generator=generator) * 0.1)
    weights = list(net.parameters())
    for _ in range(30):
        rows = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
        for part, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            part.data -= 0.05 * gradient
    classifier = EnergyClassifier(net.eval(), preprocessing=Preprocessing((0.0,), (1.0,)))
    lean = SamplingNet(classifier, images[:8])
    assert lean.folded == 1
    buffer = ReplayBuffer((1, 8, 8), capacity=64, reinit_prob=0.0)
    means = []
    for _ in range(4):
        drawn = buffer.draw(64)
        samples = SGLD.short_run(5).run(lean.energy, drawn.points, generator)
        buffer.store(drawn.slots, samples.points)
        means.append(float(samples.energy.mean()))
    assert means == sorted(means, reverse=True)
    with torch.no_grad():
        assert means[-1] < float(lean.energy(images[:64]).mean())
