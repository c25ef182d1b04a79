"""Samplers of the energy."""

from __future__ import annotations

from ebm_guard.registry.method import Method

_SAMPLING = "ebm_guard.sampling"

METHODS = (
    Method(
        "sgld",
        "sampler",
        f"{_SAMPLING}.sgld:SGLD",
        "Welling and Teh, Stochastic Gradient Langevin Dynamics, ICML 2011; JEM, ICLR 2020, eq. 3",
        "x <- x - clip(a dE/dx) + s xi, kept in the box",
        ("pixels", "gradient"),
        "for [0, 1] pixels; short_run: JEM's settings, rescaled, with clip and box; langevin: the "
        "noise that belongs to the step",
        default=True,
    ),
    Method(
        "mala",
        "sampler",
        f"{_SAMPLING}.mcmc:MALA",
        "Roberts and Tweedie, Exponential Convergence of Langevin Distributions, Bernoulli 1996",
        "Langevin proposal; accept by exp(-dE/T) q(x|x') / q(x'|x)",
        ("pixels", "gradient"),
        "sums over all values of a chain; walls reject or reflect",
    ),
    Method(
        "hmc",
        "sampler",
        f"{_SAMPLING}.mcmc:HMC",
        "Neal, MCMC Using Hamiltonian Dynamics, 2011, section 5.3",
        "leapfrog on E/T + |p|^2/2; accept by exp(H_start - H_end)",
        ("pixels", "gradient"),
        "kinetic energy over all values of a chain; walls reject or reflect",
    ),
    Method(
        "ais",
        "density",
        f"{_SAMPLING}.annealing:annealed_log_z",
        "Neal, Annealed Importance Sampling, Statistics and Computing 2001",
        "log Z of q exp(-E): log mean of exp(-sum_t (b_t - b_{t-1}) E(x_t)) over chains",
        ("energy", "gradient"),
        "with an interval, effective chains, and whether they suffice",
    ),
    Method(
        "gaussian_mixture",
        "density",
        f"{_SAMPLING}.densities:GaussianMixture",
        "Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, 2009",
        "q(h) = sum_k pi_k N(h; m_k, S)",
        ("features", "labels"),
        "one shrunk covariance; log Z of its tilt by a linear head in closed form",
        default=True,
    ),
    Method(
        "truncated_normal_mixture",
        "density",
        f"{_SAMPLING}.densities:TruncatedNormalMixture",
        "-",
        "q(x) = sum_k pi_k prod_i N(x_i; m_ki, s_ki) cut off at [0, 1]",
        ("pixels", "labels"),
    ),
)
