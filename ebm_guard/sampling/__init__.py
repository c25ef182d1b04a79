"""Samplers of a classifier's energy: chains in pixel space, and what they leave behind."""

from ebm_guard.sampling.buffer import Drawn, ReplayBuffer
from ebm_guard.sampling.conditional import SampleSheet, sample
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.making import make_sampler
from ebm_guard.sampling.mcmc import HMC, MALA
from ebm_guard.sampling.sampler import (
    Chains,
    EnergyFunction,
    Sampler,
    Samples,
    StepRecord,
    Trace,
    energy_and_gradient,
)
from ebm_guard.sampling.sgld import SGLD
from ebm_guard.sampling.starts import ClassGaussian, Start, UniformStart

__all__ = [
    "HMC",
    "MALA",
    "SGLD",
    "Chains",
    "ClassGaussian",
    "Drawn",
    "EnergyFunction",
    "ReplayBuffer",
    "SampleSheet",
    "Sampler",
    "Samples",
    "SamplingNet",
    "Start",
    "StepRecord",
    "Trace",
    "UniformStart",
    "energy_and_gradient",
    "make_sampler",
    "sample",
]
