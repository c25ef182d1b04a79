"""Improve the energy of a trained classifier, or give the start back."""

from ebm_guard.training.acceptance import Acceptance, accept
from ebm_guard.training.class_losses import ClassLoss, make_class_loss
from ebm_guard.training.context import Context, TrainingBatch
from ebm_guard.training.density.record import EnergyDensity, load_density
from ebm_guard.training.finetuning import finetune
from ebm_guard.training.history import read_history
from ebm_guard.training.images import TrainingImages, as_training_images
from ebm_guard.training.objectives import LossTerms, Objective, make_objective
from ebm_guard.training.options import FineTuneOptions
from ebm_guard.training.regularisers import Regulariser, make_regulariser
from ebm_guard.training.result import FinetuneResult
from ebm_guard.training.selection import ValidationParts, split_validation

__all__ = [
    "Acceptance",
    "ClassLoss",
    "Context",
    "EnergyDensity",
    "FineTuneOptions",
    "FinetuneResult",
    "LossTerms",
    "Objective",
    "Regulariser",
    "TrainingBatch",
    "TrainingImages",
    "ValidationParts",
    "accept",
    "as_training_images",
    "finetune",
    "load_density",
    "make_class_loss",
    "make_objective",
    "make_regulariser",
    "read_history",
    "split_validation",
]
