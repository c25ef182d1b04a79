"""Where negatives come from, one file for each source.

:func:`make_negatives` makes one by its registered name. Chains start from the buffer that they
were left in (``replay``: persistent), from the data (``data_chains``: contrastive divergence) or
from noise (``noise_chains``).
"""

from __future__ import annotations

from ebm_guard.training.negatives.base import Negatives
from ebm_guard.training.negatives.chains import ChainNegatives, DataChains, NoiseChains
from ebm_guard.training.negatives.denoising import Denoising
from ebm_guard.training.negatives.descent import Descent
from ebm_guard.training.negatives.making import given_negatives, make_negatives
from ebm_guard.training.negatives.mixed import Mixed
from ebm_guard.training.negatives.outliers import Outliers, PixelRows
from ebm_guard.training.negatives.replay import Replay
from ebm_guard.training.negatives.synthetic import Synthetic

__all__ = [
    "ChainNegatives",
    "DataChains",
    "Denoising",
    "Descent",
    "Mixed",
    "Negatives",
    "NoiseChains",
    "Outliers",
    "PixelRows",
    "Replay",
    "Synthetic",
    "given_negatives",
    "make_negatives",
]
