"""Chains on a part of the values: the rest stays bit by bit; the conditional is the right one."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling import HMC, MALA, SGLD, Chains, Unknown, run_masked

SHAPE, HIDDEN = (2, 2, 2), 3
LEVEL = 1e-3
BOX = {"box": (0.0, 1.0), "boundary": "reflect"}


def numbers(*names):
    return torch.Generator().manual_seed(int(oracles.generator(*names).integers(2**62)))


def masks(rows, hidden=HIDDEN, shape=SHAPE, *names):
    """Another mask for each row, with the same number of unknown values."""
    rng, size = oracles.generator("masks", *names), int(np.prod(shape))
    known = np.ones((rows, size), dtype=bool)
    for row in known:
        row[rng.permutation(size)[:hidden]] = False
    return torch.from_numpy(known).view(rows, *shape)


class Correlated:
    """A Gaussian over all values of a chain, with the conditional of any of them given the rest."""

    def __init__(self):
        rng, size = oracles.generator("correlated"), int(np.prod(SHAPE))
        turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
        self.precision = turn @ np.diag(rng.uniform(0.5, 3, size)) @ turn.T
        self.mean = rng.normal(size=size)

    def __call__(self, x):
        gap = x.flatten(1) - torch.from_numpy(self.mean)
        return ((gap @ torch.from_numpy(self.precision)) * gap).sum(dim=1) / 2

    def z_scores(self, points, known, finite_step=0.0):
        """Whiten each row's unknown values by p(u | k): N(0, I) where the chains are right.

        p(u | k) = N(m_u - P_uu^-1 P_uk (k - m_k), P_uu^-1); Langevin steps of size a end at the
        covariance P_uu^-1 (I - a P_uu / 4)^-1.
        """
        rows = []
        for x, mask in zip(points.flatten(1).numpy(), known.flatten(1).numpy(), strict=True):
            own, cross = self.precision[np.ix_(~mask, ~mask)], self.precision[np.ix_(~mask, mask)]
            mean = self.mean[~mask] - np.linalg.solve(own, cross @ (x[mask] - self.mean[mask]))
            covariance = np.linalg.inv(own) @ np.linalg.inv(
                np.eye(len(own)) - finite_step * own / 4
            )
            rows.append(np.linalg.solve(np.linalg.cholesky(covariance), x[~mask] - mean))
        return np.array(rows)


def p_values(z):
    """Of means, of squares, of the products of two values, and of the lengths."""
    squares = stats.chi2.cdf((z**2).sum(), z.size)
    means = stats.chi2.sf(len(z) * (z.mean(axis=0) ** 2).sum(), z.shape[1])
    pairs = [stats.pearsonr(z[:, i], z[:, j]).pvalue for i, j in ((0, 1), (0, 2), (1, 2))]
    lengths = stats.kstest((z**2).sum(axis=1), stats.chi2(z.shape[1]).cdf).pvalue
    return [means, 2 * min(squares, 1 - squares), min(1.0, 3 * min(pairs)), lengths]


def started(rows=600):
    start = torch.from_numpy(oracles.generator("start", rows).normal(size=(rows, *SHAPE)))
    return start, masks(rows)


RIGHT = [
    (MALA(60, 0.5), 0.0),
    (HMC(20, 0.6, 3), 0.0),
    (SGLD.langevin(0.3, num_steps=60, box=None), 0.3),
]


@pytest.mark.parametrize(("sampler", "step"), RIGHT, ids=["mala", "hmc", "langevin"])
def test_chains_follow_the_conditional_of_a_gaussian(sampler, step):
    bell, (start, known) = Correlated(), started()
    samples = run_masked(sampler, bell, start, known, numbers(sampler.name, "conditional"))
    found = p_values(bell.z_scores(samples.points, known, step))
    assert min(found) > LEVEL / len(found), found
    assert torch.allclose(samples.energy, bell(samples.points))
    if samples.trace.acceptance is not None:
        assert 0.3 < samples.trace.acceptance.mean() < 0.99


def reset_afterwards(sampler, energy, start, known, generator):
    """The wrong way: all values move and are tested, then the known ones are put back."""
    points = start
    for _ in range(sampler.num_steps):
        points = sampler.step(energy, Chains(points), generator)[0].points
        points = torch.where(known, start, points)
    return points


def gradient_alone(sampler, energy, start, known, generator):
    """Wrong too: known values get no gradient, but the start's own values at the others."""
    frozen = torch.where(known, start, torch.zeros_like(start))
    moved = lambda x: energy(torch.where(known, frozen * 0, x))  # noqa: E731
    return torch.where(known, start, sampler.run(moved, start, generator).points)


@pytest.mark.parametrize("wrong", [reset_afterwards, gradient_alone])
@pytest.mark.parametrize("sampler", [MALA(60, 0.5), HMC(20, 0.6, 3)], ids=["mala", "hmc"])
def test_wrong_rules_fail_the_same_test(sampler, wrong):
    bell, (start, known) = Correlated(), started()
    points = wrong(sampler, bell, start, known, numbers(sampler.name, wrong.__name__))
    found = p_values(bell.z_scores(points, known))
    assert min(found) < LEVEL / len(found), found


SAMPLERS = [
    SGLD.short_run(5),
    SGLD.langevin(1e-2, num_steps=5),
    MALA(5, 1e-2, **BOX),
    HMC(4, 0.1, 3, **BOX),
    HMC(4, 0.1, 3, box=(0.0, 1.0)),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_known_values_stay_bit_by_bit_at_every_step_and_every_energy(sampler):
    start = torch.rand(6, *SHAPE, generator=numbers("bits"))
    # Values that arithmetic would change: an edge of the box, a denormal, minus zero.
    start[:, 0, 0] = torch.tensor([1e-42, -0.0])
    known = masks(6)
    known[:, 0, 0] = True
    hidden = (~known).flatten(1).sum(dim=1)
    known = known[hidden == hidden.max()]
    start = start[hidden == hidden.max()]
    seen, observed = [], []

    def energy(x):
        seen.append(x.detach().clone())
        return (x - 0.3).square().flatten(1).sum(dim=1) * 4 + x.flatten(1).prod(dim=1)

    samples = run_masked(
        sampler, energy, start, known, numbers("run"),
        observe=lambda step, chains: observed.append((step, chains.points.clone())),
    )  # fmt: skip
    assert [step for step, _ in observed] == list(range(sampler.num_steps + 1))
    bits = start[known].view(torch.int32)
    for points in [*seen, *(points for _, points in observed), samples.points]:
        assert torch.equal(points[known].view(torch.int32), bits)
    assert len(seen) > sampler.num_steps
    assert not torch.equal(samples.points[~known], start[~known])
    assert torch.equal(observed[-1][1], samples.points)


def test_it_is_a_walk_of_the_unknown_values_alone():
    # The rule by hand, value by value: only unknown values move, by their own part of dE/dx.
    start, known = started(5)
    bell = Correlated()
    found = run_masked(SGLD(4, 0.1, 0.0, box=None), bell, start, known, numbers("walk"))
    x, norms = start.flatten(1).numpy().copy(), []
    mask = known.flatten(1).numpy()
    for _ in range(4):
        gradient = (x - bell.mean) @ bell.precision
        norms.append([np.sqrt(sum(g[~m] ** 2)) for g, m in zip(gradient, mask, strict=True)])
        for row, column in np.argwhere(~mask):
            x[row, column] -= 0.1 * gradient[row, column]
    assert np.allclose(found.points.flatten(1).numpy(), x, atol=1e-12)
    assert np.allclose(found.trace.gradient_norm.numpy(), norms)


def test_the_share_on_the_edge_is_of_the_unknown_values():
    start = torch.zeros(2, 1, 2, 2)
    known = torch.tensor([[True, False], [True, True]])
    push = lambda x: -9.0 * x.flatten(1).sum(dim=1)  # noqa: E731
    run = run_masked(SGLD(1, 0.05, 0.0), push, start, known, torch.Generator())
    assert run.trace.saturation.tolist() == [1.0, 0.0]
    assert run.points[0].flatten().tolist() == pytest.approx([0, 0.45, 0, 0])


@oracles.QUICK
@given(
    rows=st.integers(1, 4),
    hidden=st.integers(1, 7),
    channels=st.booleans(),
    name=st.integers(0, 10**6),
)
def test_packing_and_unpacking_are_inverse(rows, hidden, channels, name):
    shape = (3, 2, 4)
    known = masks(rows, hidden, shape if channels else (1, 2, 4), name)
    points = torch.from_numpy(oracles.generator("points", name).normal(size=(rows, *shape)))
    unknown = Unknown(points, known)
    assert unknown.size == hidden * (1 if channels else 3)
    packed = unknown.pack(points)
    assert torch.equal(unknown.unpack(packed), points)
    other = torch.randn(packed.shape, dtype=torch.float64, generator=numbers(name))
    whole = unknown.unpack(other)
    assert torch.equal(unknown.pack(whole), other)
    assert torch.equal(whole[known.expand_as(whole)], points[known.expand_as(points)])


def test_masks_that_do_not_fit_are_refused():
    start = torch.zeros(2, 1, 2, 2)
    uneven = torch.tensor([[True, True, True, False], [True, True, False, False]])
    for known, message in [
        (torch.ones(2, 2), "torch.float32; needed a bool"),
        ([True], "got a mask as list"),
        (torch.ones(3, 3, dtype=torch.bool), "broadcasts to it"),
        (torch.ones(2, 2, dtype=torch.bool), "with 0 to 0 unknown"),
        (uneven.view(2, 1, 2, 2), "with 1 to 2 unknown"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            run_masked(MALA(1), Correlated(), start, known, torch.Generator())
    hole = torch.tensor([[True, True], [True, False]])
    with pytest.raises(InvalidInputError, match="stays in the box"):
        run_masked(SGLD(1), Correlated(), start + 2, hole, torch.Generator())
