"""Where chains start: the low-rank Gaussian of each class."""

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from ebm_guard.errors import DataError, InvalidInputError, NotFittedError
from ebm_guard.sampling import ClassGaussian, UniformStart
from ebm_guard.sampling.starts import start_from_state

SHAPE = (2, 3, 3)
LEVEL = 1e-3


def case(n=120, classes=3, shape=SHAPE):
    rng = oracles.generator("classes", n, classes)
    labels = rng.integers(0, classes, n)
    means = rng.uniform(0.45, 0.55, size=(classes, *shape))
    mix = rng.normal(size=(int(np.prod(shape)),) * 2) * 0.012
    noise = (rng.normal(size=(n, mix.shape[0])) @ mix).reshape(n, *shape)
    return torch.from_numpy(means[labels] + noise).float(), torch.from_numpy(labels)


def naive_covariance(pixels, labels, label):
    """w (own) + (1 - w) (within all classes), w = n / (n + D)."""
    rows, ys = pixels.flatten(1).double().numpy(), labels.numpy()
    within = sum(
        np.cov(rows[ys == y], rowvar=False) * ((ys == y).sum() - 1) for y in np.unique(ys)
    ) / (len(rows) - len(np.unique(ys)))
    n, size = (ys == label).sum(), rows.shape[1]
    weight = n / (n + size)
    return weight * np.cov(rows[ys == label], rowvar=False) + (1 - weight) * within


def test_draws_follow_mean_and_covariance_of_their_class():
    pixels, labels = case()
    start = ClassGaussian(noise_std=0.0).fit(pixels, labels)
    for label in range(3):
        wanted = torch.full((800,), label)
        drawn = start.draw(wanted, torch.Generator().manual_seed(label)).flatten(1).double()
        mean = pixels[labels == label].flatten(1).double().mean(dim=0)
        root = np.linalg.cholesky(np.linalg.inv(naive_covariance(pixels, labels, label)))
        z = (drawn - mean).numpy() @ root
        # White in all directions: lengths by their distribution, and means by their sum.
        size = z.shape[1]
        assert stats.kstest((z**2).sum(axis=1), stats.chi2(size).cdf).pvalue > LEVEL
        assert stats.chi2.sf(len(z) * (z.mean(axis=0) ** 2).sum(), size) > LEVEL
        other = pixels[labels == (label + 1) % 3].flatten(1).double().mean(dim=0)
        wrong = (drawn - other).numpy() @ root
        assert stats.chi2.sf(len(z) * (wrong.mean(axis=0) ** 2).sum(), size) < LEVEL


def test_the_noise_comes_on_top():
    pixels = torch.full((10, *SHAPE), 0.5)
    drawn = ClassGaussian(noise_std=0.03).fit(pixels, torch.arange(10) % 2)
    values = drawn.draw(2000, torch.Generator().manual_seed(0)).flatten().numpy()
    assert stats.kstest((values - 0.5) / 0.03, "norm").pvalue > LEVEL


def test_large_images_are_smooth_around_their_mean_and_stay_in_the_box():
    shape = (3, 32, 32)
    pixels = torch.from_numpy(0.5 + 0.02 * oracles.generator("large").random((60, *shape)))
    labels = torch.arange(60) % 2
    start = ClassGaussian(noise_std=0.0).fit(pixels, labels)
    drawn = start.draw(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(1))
    assert drawn.shape == (3, *shape)
    # Between the middles of two cells, 17.5 and 21.5, the deviation is linear.
    smooth = drawn[0] - start.state_dict()["means"][0]
    assert smooth.abs().max() > 1e-3
    assert (smooth[:, :, 18:22].diff(n=2, dim=2)).abs().max() < 1e-6
    dark = ClassGaussian(noise_std=0.3).fit(torch.zeros(4, *SHAPE), torch.zeros(4).long())
    values = dark.draw(50, torch.Generator())
    assert 0 == values.min() < values.max() <= 1


def test_classes_without_images_and_rows_without_label():
    pixels, labels = case()
    labels[labels == 1] = -1
    start = ClassGaussian(noise_std=0.0).fit(pixels, labels, num_classes=4)
    assert start.num_classes == 4
    means = start.state_dict()["means"]
    rest = pixels[labels >= 0].mean(dim=0)
    assert torch.allclose(means[1], rest)
    assert torch.allclose(means[3], rest)
    assert start.settings()["images"] == int((labels >= 0).sum())
    # Without labels asked for, no class without images is drawn.
    lone = ClassGaussian(noise_std=0.0).fit(pixels, torch.full((120,), 2))
    assert torch.allclose(lone.draw(400, torch.Generator()).mean(0), pixels.mean(0), atol=0.02)


def test_many_classes_share_one_covariance():
    rng = oracles.generator("many")
    pixels = torch.from_numpy(rng.random((1000, 3, 8, 8))).float()
    start = ClassGaussian().fit(pixels, torch.arange(1000) % 500)
    assert start.settings()["shared_covariance"]
    assert start.state_dict()["factors"].shape == (1, 192, 192)
    assert start.draw(torch.tensor([0, 499]), torch.Generator()).shape == (2, 3, 8, 8)


def test_a_state_gives_the_same_draws():
    pixels, labels = case()
    start = ClassGaussian().fit(pixels, labels)
    again = start_from_state(start.settings(), SHAPE, start.state_dict())
    draws = [part.draw(torch.tensor([2, 0]), torch.Generator()) for part in (start, again)]
    assert torch.equal(*draws)
    assert again.settings() == start.settings()
    with pytest.raises(DataError, match="a start 'x'"):
        start_from_state({"start": "x"}, SHAPE, {})
    with pytest.raises(DataError, match="lacks counts, factors"):
        start.load_state_dict({"means": torch.zeros(1)})


def test_uniform_noise_is_uniform():
    drawn = UniformStart(SHAPE).draw(torch.tensor([0, 1] * 50), torch.Generator())
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > LEVEL


def test_what_cannot_be_fitted_is_refused():
    pixels, labels = case()
    with pytest.raises(NotFittedError, match="fit"):
        ClassGaussian().draw(3, torch.Generator())
    with pytest.raises(InvalidInputError, match="needed floating pixels"):
        ClassGaussian().fit(pixels, labels[:5])
    with pytest.raises(InvalidInputError, match=r"needed \[0, 1\]"):
        ClassGaussian().fit(pixels * 255, labels)
    with pytest.raises(InvalidInputError, match="two labelled"):
        ClassGaussian().fit(pixels, torch.full_like(labels, -1))
    with pytest.raises(InvalidInputError, match="label 2 with num_classes=2"):
        ClassGaussian().fit(pixels, labels, num_classes=2)
    with pytest.raises(InvalidInputError, match=r"knows the classes 0\.\.2"):
        ClassGaussian().fit(pixels, labels).draw(torch.tensor([3]), torch.Generator())
    with pytest.raises(InvalidInputError, match="grid=0"):
        ClassGaussian(grid=0)
    with pytest.raises(InvalidInputError, match="shape"):
        UniformStart(())
