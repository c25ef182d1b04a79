"""Samplers of a classifier's energy: chains in pixel space, and what they leave behind."""

from ebm_guard.sampling.buffer import Drawn, ReplayBuffer
from ebm_guard.sampling.conditional import SampleSheet, sample
from ebm_guard.sampling.edited import Denoised, Edited, Inpainted
from ebm_guard.sampling.editing import denoise, inpaint
from ebm_guard.sampling.fills import centre_mask, surroundings_fill, wiener_filter
from ebm_guard.sampling.folding import SamplingNet
from ebm_guard.sampling.making import make_sampler
from ebm_guard.sampling.masked import Unknown, run_masked
from ebm_guard.sampling.mcmc import HMC, MALA
from ebm_guard.sampling.morphing import Morph, morph
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
    "Denoised",
    "Drawn",
    "Edited",
    "EnergyFunction",
    "Inpainted",
    "Morph",
    "ReplayBuffer",
    "SampleSheet",
    "Sampler",
    "Samples",
    "SamplingNet",
    "Start",
    "StepRecord",
    "Trace",
    "UniformStart",
    "Unknown",
    "centre_mask",
    "denoise",
    "energy_and_gradient",
    "inpaint",
    "make_sampler",
    "morph",
    "run_masked",
    "sample",
    "surroundings_fill",
    "wiener_filter",
]
