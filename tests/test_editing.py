"""Inpainting, denoising and morphing: measured rightly, beside fills that are what they say."""

from contextlib import nullcontext

import numpy as np
import oracles
import pytest
import torch
from attack_cases import HALF, pixels_of, small_net
from scipy import signal, stats
from test_sampling import Fragile, assert_same, trace
from torch import nn

import ebm_guard
from ebm_guard import EnergyClassifier, Preprocessing
from ebm_guard import energy as formulas
from ebm_guard.errors import EbmGuardWarning, InvalidInputError
from ebm_guard.model.isolation import pixel_forward
from ebm_guard.sampling import (
    HMC,
    MALA,
    SGLD,
    centre_mask,
    denoise,
    inpaint,
    morph,
    surroundings_fill,
    wiener_filter,
)
from ebm_guard.sampling.edited import frame_steps

NAMES = ("sgld:short_run", "mala", "hmc")


def case(n=6):
    classifier = EnergyClassifier(small_net(), preprocessing=HALF)
    return classifier, pixels_of(n), torch.arange(n) % 5


# --- the fills


def test_the_fill_solves_the_laplace_equation():
    # By hand: a matrix with one row for each unknown value of a channel, solved as a whole.
    rng = oracles.generator("laplace")
    images = rng.random((2, 2, 7, 6))
    known = rng.random((2, 1, 7, 6)) < 0.6
    found = surroundings_fill(torch.from_numpy(images), torch.from_numpy(known)).numpy()
    for row, channel in np.ndindex(2, 2):
        mask, image = known[row, 0], images[row, channel]
        places = {tuple(place): number for number, place in enumerate(np.argwhere(~mask))}
        matrix, right = np.eye(len(places)) * 4, np.zeros(len(places))
        for (y, x), number in places.items():
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                # Beyond the edge lies the edge's own value.
                there = min(6, max(0, y + dy)), min(5, max(0, x + dx))
                if there in places:
                    matrix[number, places[there]] -= 1
                else:
                    right[number] += image[there]
        exact = np.linalg.solve(matrix, right)
        assert np.array_equal(found[row, channel][mask], image[mask])
        assert np.allclose(found[row, channel][~mask], exact, atol=0.02)


def test_the_fill_does_not_look_into_the_hole():
    images, known = pixels_of(3), centre_mask(8, 8, 0.5)
    other = torch.where(known, images, torch.full_like(images, torch.nan))
    assert torch.equal(surroundings_fill(images, known), surroundings_fill(other, known))
    dark = surroundings_fill(images, torch.zeros(1, 1, 8, 8, dtype=torch.bool))
    assert torch.equal(dark, torch.zeros_like(dark))


def test_the_filter_is_that_of_scipy_away_from_the_edge():
    images = oracles.generator("wiener").random((2, 3, 9, 11))
    for window in (3, 5):
        found = wiener_filter(torch.from_numpy(images), 0.2, window).numpy()
        edge = window // 2
        inside = (..., slice(edge, -edge), slice(edge, -edge))
        for row, channel in np.ndindex(2, 3):
            exact = signal.wiener(images[row, channel], window, noise=0.04)
            assert np.allclose(found[row, channel][inside], exact[inside], atol=1e-12)
    with pytest.raises(InvalidInputError, match="odd side"):
        wiener_filter(torch.zeros(1, 1, 4, 4), 0.1, 4)


def test_the_hole_is_in_the_middle():
    hole = ~centre_mask(9, 6, 1 / 3)[0, 0]
    assert hole.sum() == 3 * 2
    assert hole[3:6, 2:4].all()
    with pytest.raises(InvalidInputError, match="share"):
        centre_mask(4, 4, 1.0)


# --- inpainting


@pytest.mark.parametrize("sampler", NAMES)
def test_only_the_hole_changes_and_all_figures_are_those_of_the_net(sampler):
    classifier, images, labels = case()
    known = centre_mask(8, 8, 0.5)
    made = inpaint(classifier, images, known, labels, sampler=sampler, num_steps=6, num_frames=3)
    everywhere = known.expand_as(images)
    for pixels in (*made.pixels.values(), *made.frames):
        assert torch.equal(pixels[everywhere], images[everywhere])
        assert 0 <= pixels.min() <= pixels.max() <= 1
    assert torch.equal(made.frames[0], made.pixels["given"])
    assert torch.equal(made.frames[-1], made.pixels["chains"])
    assert made.frame_steps == (0, 3, 6)
    for stage, pixels in made.pixels.items():
        logits = pixel_forward(classifier)(pixels).logits.detach()
        assert torch.allclose(made.energy[stage], formulas.energy(logits), atol=1e-5)
        assert torch.equal(made.predicted[stage], logits.argmax(dim=1))
        hole = (pixels - images).double().square()[..., 2:6, 2:6]
        assert torch.allclose(made.errors(stage), hole.flatten(1).mean(dim=1).sqrt())
    assert torch.allclose(made.trace.energy[-1], made.energy["chains"], atol=1e-4)
    assert torch.equal(made.pixels["given"], made.pixels["trivial"])
    assert made.settings["hidden_share"] == pytest.approx(0.25)


def test_chains_go_down_the_energy_that_was_asked_for():
    classifier, images, labels = case()
    known = centre_mask(8, 8, 0.7)
    settings = {"num_steps": 15, "start": "noise"}
    plain = inpaint(classifier, images, known, labels, **settings)
    told = inpaint(classifier, images, known, labels, conditional=True, **settings)
    assert (plain.trace.energy[-1] < plain.trace.energy[0]).all()
    assert (told.trace.energy[-1] < told.trace.energy[0]).all()
    logits = pixel_forward(classifier)(told.pixels["chains"]).logits.detach()
    joint = -logits[torch.arange(6), labels]
    assert torch.allclose(told.trace.energy[-1], joint, atol=1e-4)
    assert not torch.equal(plain.pixels["given"], plain.pixels["trivial"])
    with pytest.raises(InvalidInputError, match="conditional=True needs labels"):
        inpaint(classifier, images, known, conditional=True)


def test_holes_of_other_sizes_run_in_batches_of_their_own():
    classifier, images, labels = case()
    known = torch.cat([centre_mask(8, 8, share) for share in (0.3, 0.6, 0.3, 0.5, 0.6, 0.3)])
    sampler = SGLD(5, 0.25, 0.0, clip=0.1)
    settings = {"sampler": sampler, "conditional": True, "num_frames": 2}
    whole = inpaint(classifier, images, known, labels, batch_size=2, **settings)
    for row in range(6):
        mine = slice(row, row + 1)
        alone = inpaint(classifier, images[mine], known[mine], labels[mine], **settings)
        assert torch.allclose(whole.pixels["chains"][mine], alone.pixels["chains"], atol=1e-5)
        assert torch.allclose(whole.trace.energy[:, mine], alone.trace.energy, atol=1e-4)
        assert torch.allclose(whole.frames[:, mine], alone.frames, atol=1e-5)
        assert torch.allclose(whole.errors("chains")[mine], alone.errors("chains"), atol=1e-5)


def test_the_hidden_values_are_used_for_the_measurement_alone():
    classifier, images, _ = case()
    known = centre_mask(8, 8, 0.5)
    other = torch.where(known, images, 1 - images)
    made = [inpaint(classifier, each, known, num_steps=5) for each in (images, other)]
    assert torch.equal(made[0].pixels["chains"], made[1].pixels["chains"])
    assert not torch.equal(made[0].errors("chains"), made[1].errors("chains"))
    lost = torch.where(known, images, torch.full_like(images, torch.nan))
    unknown = inpaint(classifier, lost, known, num_steps=5, truth=False)
    assert torch.equal(unknown.pixels["chains"], made[0].pixels["chains"])
    assert set(unknown.energy) == {"given", "trivial", "chains"}
    with pytest.raises(InvalidInputError, match="truth is not known"):
        unknown.errors("chains")


# --- denoising


class Prior(nn.Module):
    """E(x) = c |x - m|^2 / 2 + const: a Gaussian prior, so that the posterior is known."""

    def __init__(self, precision, mean):
        super().__init__()
        self.precision, self.mean = precision, mean

    def forward(self, x):
        energy = self.precision * (x - self.mean).square().flatten(1).sum(dim=1) / 2
        return torch.stack([-energy, -energy - 4, -energy - 5], dim=1)


def test_chains_follow_the_posterior_of_a_gaussian_prior():
    # p(x | y) = N((c m + y / s^2) / (c + 1 / s^2), 1 / (c + 1 / s^2)), value by value.
    precision, mean, std = 400.0, 0.4, 0.05
    classifier = EnergyClassifier(
        Prior(precision, mean).eval(), preprocessing=Preprocessing((0.0,), (1.0,))
    )
    noisy = torch.full((250, 1, 4, 4), 0.6)
    both = precision + 1 / std**2
    centre = (precision * mean + 0.6 / std**2) / both
    for sampler in (MALA(60, 8e-4), HMC(25, 0.03, 3)):
        made = denoise(classifier, noisy=noisy, noise_std=std, sampler=sampler)
        z = (made.pixels["chains"].double() - centre).flatten().numpy() * both**0.5
        assert stats.kstest(z, "norm").pvalue > 1e-3 / 2, sampler.name
        # Without the pull, or with a pull of the whole square, the same test fails.
        for wrong in (precision, precision + 2 / std**2):
            other = (precision * mean + 0.6 * (wrong - precision)) / wrong
            z = (made.pixels["chains"].double() - other).flatten().numpy() * wrong**0.5
            assert stats.kstest(z, "norm").pvalue < 1e-3 / 2


def test_denoising_is_measured_beside_the_filter():
    classifier, images, labels = case()
    made = denoise(classifier, images, labels, noise_std=0.2, num_steps=8, num_frames=4)
    noisy = made.pixels["given"]
    assert torch.equal(made.frames[0], noisy)
    for stage in ("given", "trivial", "chains"):
        mse = (made.pixels[stage].double() - images.double()).square().flatten(1).mean(dim=1)
        assert torch.allclose(made.psnr(stage), 10 * torch.log10(1 / mse))
    assert made.psnr("truth").tolist() == [100.0] * 6
    # The noise is what was asked for: a chi-square of all values, none of them clamped.
    kept = denoise(classifier, images * 0 + 0.5, noise_std=0.05, num_steps=0).pixels["chains"]
    assert 0.04 < float((kept - 0.5).std()) < 0.06
    again = denoise(classifier, noisy=noisy, noise_std=0.2, num_steps=8)
    assert set(again.pixels) == {"given", "trivial", "chains"}
    assert torch.allclose(again.pixels["trivial"], wiener_filter(noisy, 0.2).clamp(0, 1))


def test_steps_fit_the_pull():
    classifier, images, _ = case(2)
    for std in (0.01, 0.1, 2.0):
        step = denoise(classifier, images, noise_std=std, num_steps=1).settings["step_size"]
        assert step == pytest.approx(min(0.25, std**2 / 2))
    langevin = denoise(classifier, images, sampler="sgld:langevin", num_steps=1).settings
    assert langevin["temperature"] == pytest.approx(1.0)
    with pytest.raises(InvalidInputError, match="overshoot the pull"):
        denoise(classifier, images, noise_std=0.1, sampler=SGLD(3, 0.03))


# --- morphing


def test_a_morph_starts_at_a_and_ends_at_b():
    classifier, images, _ = case(30)
    labels = torch.arange(30) % 5
    way = morph(classifier, 1, 3, num_chains=4, num_frames=5, images=images, labels=labels)
    assert way.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for row in way.start:
        found = torch.nonzero((images == row).flatten(1).all(dim=1)).flatten()
        assert labels[found].tolist() == [1]
    for number, t in enumerate(way.t.tolist()):
        logits = pixel_forward(classifier)(way.frames[number]).logits.detach()
        joint = -logits
        assert torch.allclose(way.joint_energy_a[number], joint[:, 1], atol=1e-5)
        assert torch.allclose(way.joint_energy_b[number], joint[:, 3], atol=1e-5)
        assert torch.allclose(way.energy[number], formulas.energy(logits), atol=1e-5)
        share = logits.softmax(dim=1)
        assert torch.allclose(way.probability_a[number], share[:, 1], atol=1e-5)
        assert torch.allclose(way.probability_b[number], share[:, 3], atol=1e-5)
        assert torch.equal(way.predicted[number], logits.argmax(dim=1))
        # What was sampled is the weighted sum, and each frame goes on from the last one.
        sampled = (1 - t) * joint[:, 1] + t * joint[:, 3]
        assert torch.allclose(way.traces[number].energy[-1], sampled, atol=1e-4)
        before = way.frames[number - 1] if number else way.start
        logits = pixel_forward(classifier)(before).logits.detach()
        sampled = -(1 - t) * logits[:, 1] - t * logits[:, 3]
        assert torch.allclose(way.traces[number].energy[0], sampled, atol=1e-4)
    assert way.probability_a[0].mean() > 0.9
    assert way.probability_b[-1].mean() > 0.9
    gaps = (way.frames - way.start).square().flatten(2).mean(dim=2).sqrt()
    assert torch.allclose(way.moved.float(), gaps, atol=1e-6)
    naive = [
        min(float((image - row).square().mean().sqrt()) for image in images[labels == 3])
        for row in way.start
    ]
    assert way.nearest_b.tolist() == pytest.approx(naive, abs=1e-6)
    naive = [
        min(float((image - row).square().mean().sqrt()) for image in images[labels == 3])
        for row in way.frames[-1]
    ]
    assert way.nearest_b_end.tolist() == pytest.approx(naive, abs=1e-6)


def test_a_morph_without_images_starts_from_noise():
    classifier, _, _ = case()
    way = morph(classifier, 0, 1, num_chains=3, num_frames=2, image_size=(8, 8), sampler=MALA(2))
    assert way.nearest_b is None
    assert way.nearest_b_end is None
    assert way.settings["start"] == "uniform"
    assert way.frames.shape == (2, 3, 3, 8, 8)
    for settings, message in [
        ({"a": 0, "b": 0}, "none twice"),
        ({"a": 0, "b": 9}, r"0\.\.4"),
        ({"a": 0, "b": 1, "num_frames": 1}, "num_frames"),
        ({"a": 0, "b": 1, "start": "data"}, "needs images="),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            morph(classifier, image_size=(8, 8), **settings)


# --- all of them


CALLS = {
    "inpaint": lambda model, images, labels, **more: inpaint(
        model, images, centre_mask(8, 8), labels, num_steps=3, **more
    ),
    "denoise": lambda model, images, labels, **more: denoise(
        model, images, labels, num_steps=3, **more
    ),
    "morph": lambda model, images, labels, **more: morph(
        model, 0, 1, num_chains=2, num_frames=2, num_steps=2, images=images, labels=labels, **more
    ),
}


def ends_of(made):
    return made.frames if hasattr(made, "t") else made.pixels["chains"]


@pytest.mark.parametrize("name", CALLS)
def test_it_repeats_by_its_seed_and_takes_guards(name):
    classifier, images, _ = case(10)
    labels = torch.arange(10) % 5
    runs = [ends_of(CALLS[name](classifier, images, labels, seed=seed)) for seed in (4, 4, 5)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    guard = ebm_guard.wrap(small_net(), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(ends_of(CALLS[name](guard, images, labels, seed=4)), runs[0])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("fails_at", [None, 5])
def test_nothing_of_the_model_changes(name, fails_at):
    model = Fragile(fails_at, traceable=False)
    classifier = EnergyClassifier(model, preprocessing=HALF)
    images, labels = pixels_of(10), torch.arange(10) % 5
    before = trace(model)
    failing = pytest.raises(RuntimeError, match="out of luck") if fails_at else nullcontext()
    with failing, pytest.warns(EbmGuardWarning, match="train mode"):
        CALLS[name](classifier, images, labels)
    assert_same(before, trace(model))


def test_what_does_not_fit_is_refused():
    classifier, images, labels = case()
    known = centre_mask(8, 8)
    for call, message in [
        (lambda: inpaint(classifier, images * 2, known), r"\[0, 1\]"),
        (lambda: inpaint(classifier, [1], known), "images as list"),
        (lambda: inpaint(classifier, images, known, labels[:2]), "one label per image"),
        (lambda: inpaint(classifier, images, known, start="mean"), "known are surroundings"),
        (lambda: inpaint(classifier, images, centre_mask(9, 9)), "broadcasts to it"),
        (lambda: inpaint(classifier, images, torch.ones(8, 8, dtype=torch.bool)), "0 to 0 unknown"),
        (lambda: inpaint(classifier, images[:0], known), "no images"),
        (lambda: inpaint(classifier, images, known, num_frames=-1), "num_frames"),
        (lambda: denoise(classifier), "neither images nor noisy"),
        (lambda: denoise(classifier, images, noise_std=0), "noise_std"),
        (lambda: denoise(classifier, images, noisy=images[:2]), "one noisy image"),
        (lambda: denoise(classifier, noisy=images * torch.nan), "NaN"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            call()


def test_frames_are_spread_from_start_to_end():
    assert frame_steps(10, 3) == (0, 5, 10)
    assert frame_steps(1, 9) == (0, 1)
    assert frame_steps(7, 1) == (7,)
    assert frame_steps(0, 4) == (0,)


def classifier_of_small_net():
    return EnergyClassifier(small_net(), preprocessing=Preprocessing((0.5,) * 3, (0.5,) * 3))


@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_samplers_by_name_take_steps_that_fit_small_noise(name):
    images = pixels_of(4)
    found = denoise(classifier_of_small_net(), images, noise_std=0.01, sampler=name)
    assert float(found.trace.acceptance.mean()) > 0.2
    assert not torch.equal(found.pixels["chains"], found.pixels["given"])


@pytest.mark.parametrize("labels", [[-1, 0], [0, 99], [True, False], [0.0, 1.0]])
def test_labels_that_are_no_classes_are_refused(labels):
    images = pixels_of(2)
    with pytest.raises(InvalidInputError, match="got labels"):
        inpaint(
            classifier_of_small_net(),
            images,
            centre_mask(8, 8, 0.5),
            torch.tensor(labels),
            conditional=True,
        )


def test_labels_of_bytes_are_taken():
    images = pixels_of(2)
    labels = torch.tensor([0, 1], dtype=torch.uint8)
    known = centre_mask(8, 8, 0.5)
    found = inpaint(classifier_of_small_net(), images, known, labels, conditional=True, num_steps=1)
    assert found.labels.dtype == torch.int64
