"""What fine-tuning minimises on labels: LeCun's table, and losses beside it."""

from __future__ import annotations

from ebm_guard.registry.method import Method

_LOSSES = "ebm_guard.training.class_losses"
_TUTORIAL = "LeCun et al., A Tutorial on Energy-Based Learning, 2006"
_NEEDS = ("logits", "labels")

# E_C = E(x, y); E_I = min of E(x, y') over y' != y; e = E - centre. "margin" is that of the loss
# in the plane (E_C, E_I).
METHODS = (
    Method(
        "nll",
        "class_loss",
        f"{_LOSSES}.likelihood:NegativeLogLikelihood",
        _TUTORIAL,
        "E_C + 1/b log sum_y exp(-b E(x, y)); margin: any positive",
        _NEEDS,
        "with b = 1 this is cross-entropy; MMI is the same loss",
        default=True,
    ),
    Method(
        "mee",
        "class_loss",
        f"{_LOSSES}.likelihood:MinimumEmpiricalError",
        _TUTORIAL,
        "1 - exp(-b E_C) / sum_y exp(-b E(x, y)); margin: any positive",
        _NEEDS,
    ),
    Method(
        "energy",
        "class_loss",
        f"{_LOSSES}.plain:EnergyLoss",
        _TUTORIAL,
        "E_C; margin: none",
        _NEEDS,
        "the control: no lower bound on free logits",
    ),
    Method(
        "perceptron",
        "class_loss",
        f"{_LOSSES}.plain:Perceptron",
        _TUTORIAL,
        "E_C - min_y E(x, y); margin: 0",
        _NEEDS,
    ),
    Method(
        "hinge",
        "class_loss",
        f"{_LOSSES}.margins:Hinge",
        _TUTORIAL,
        "max(0, m + E_C - E_I); margin: m",
        _NEEDS,
    ),
    Method(
        "log",
        "class_loss",
        f"{_LOSSES}.margins:Log",
        _TUTORIAL,
        "log(1 + exp(E_C - E_I)); margin: any positive",
        _NEEDS,
    ),
    Method(
        "lvq2",
        "class_loss",
        f"{_LOSSES}.margins:Lvq2",
        _TUTORIAL,
        "min(M, max(0, E_C - E_I)); margin: 0",
        _NEEDS,
        "the table's form; the text's ratio needs positive energies",
    ),
    Method(
        "mce",
        "class_loss",
        f"{_LOSSES}.margins:MinimumClassificationError",
        _TUTORIAL,
        "1 / (1 + exp(-(E_C - E_I))); margin: any positive",
        _NEEDS,
    ),
    Method(
        "square_square",
        "class_loss",
        f"{_LOSSES}.absolute:SquareSquare",
        _TUTORIAL,
        "([e_C]+)^2 + (max(0, m - e_I))^2; margin: m",
        _NEEDS,
        "plus between the squares; negative energies are not squared; softplus on request",
    ),
    Method(
        "square_exponential",
        "class_loss",
        f"{_LOSSES}.absolute:SquareExponential",
        _TUTORIAL,
        "([e_C]+)^2 + g exp(-e_I); margin: any positive",
        _NEEDS,
        "negative energies are not squared; below the centre the exponential goes on as a line",
    ),
    Method(
        "bromley",
        "class_loss",
        f"{_LOSSES}.absolute:Bromley",
        "LeCun and Canziani, Deep Learning, NYU, week 11, after Bromley et al., NIPS 1993",
        "[e_C]+ + [m - e_I]+; margin: m",
        _NEEDS,
    ),
    Method(
        "additive_margin",
        "class_loss",
        f"{_LOSSES}.margins:AdditiveMargin",
        "LeCun and Canziani, Deep Learning, NYU, week 11; Weston and Watkins, 1999",
        "sum over y' != y of max(0, m + E_C - E(x, y')); margin: m",
        _NEEDS,
        "also squared, and as log(1 + exp(.)) with any positive margin",
    ),
    Method(
        "info_nce",
        "class_loss",
        f"{_LOSSES}.contrast:InfoNce",
        "van den Oord et al., Contrastive Predictive Coding, arXiv 1807.03748",
        "-log [exp(-E(x_i, y_i)/T) / sum_k exp(-E(x_k, y_i)/T)], k over the batch; margin: none",
        _NEEDS,
        "the class is the query; images of the same class stay in the sum",
    ),
)
