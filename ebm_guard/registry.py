"""The table of methods: what exists, from which paper, and where its code lives.

It imports no torch, so that ``ebm-guard list`` and every ``--help`` stay instant. Command-line
choices, report columns and documentation tables render from it. Adding a method means its code
and one row here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from ebm_guard.errors import InvalidInputError, suggest

FAMILIES = (
    "score",
    "feature_score",
    "input_score",
    "calibrator",
    "conformal",
    "selective",
    "threshold",
    "calibration_metric",
    "ood_metric",
    "gate",
    "drift",
    "outlier",
)


@dataclass(frozen=True)
class Method:
    """One registered method.

    Args:
        name: the word used in code, command line, JSON and docs.
        family: one of ``FAMILIES``.
        target: ``module:attribute`` of its code.
        paper: authors, title or venue, year.
        equation: the formula, with the project's symbols.
        needs: what it must be given, such as ``logits`` or ``features``.
        differs: how ours departs from the paper or from common code, or ''.
        default: whether it is used when nothing is asked for.
    """

    name: str
    family: str
    target: str
    paper: str
    equation: str
    needs: tuple[str, ...]
    differs: str = ""
    default: bool = False

    def load(self) -> Any:
        """Import and return the code of this method."""
        module, _, attribute = self.target.partition(":")
        return getattr(import_module(module), attribute)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types."""
        return asdict(self) | {"needs": list(self.needs)}


_SCORES = "ebm_guard.ood.logit_scores"
_FEATURES = "ebm_guard.ood.feature_scores"
_CALIBRATORS = "ebm_guard.calibration.calibrators"
_CAL = "ebm_guard.calibration.metrics"
_OOD = "ebm_guard.ood.metrics"
_GATE = "ebm_guard.gate"
_DRIFT = "ebm_guard.gate.drift"
_OUT = "ebm_guard.data.outliers.makers"
_SHIFT = "ebm_guard.data.outliers.shifts"

_METHODS = (
    Method(
        "energy",
        "score",
        f"{_SCORES}:Energy",
        "Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020",
        "E(x) = -T logsumexp(f(x)/T)",
        ("logits",),
        "the paper scores with -E; here the score is E itself, higher = more OOD",
        default=True,
    ),
    Method(
        "msp",
        "score",
        f"{_SCORES}:MSP",
        "Hendrycks and Gimpel, A Baseline for Detecting Misclassified and OOD Examples, ICLR 2017",
        "s(x) = logsumexp_{k != y} f_k - f_y with y = argmax f",
        ("logits",),
        "log-odds of the maximum softmax probability: the same order, without the ties at 1.0",
    ),
    Method(
        "maxlogit",
        "score",
        f"{_SCORES}:MaxLogit",
        "Hendrycks et al., Scaling OOD Detection for Real-World Settings, ICML 2022",
        "s(x) = -max_k f_k",
        ("logits",),
    ),
    Method(
        "gen",
        "score",
        f"{_SCORES}:GEN",
        "Liu et al., GEN: Pushing the Limits of Softmax-Based OOD Detection, CVPR 2023",
        "s(x) = log sum_{k in top M} p_k^g (1 - p_k)^g, g = 0.1, M = 100",
        ("logits",),
        "computed and stored as a logarithm: clamped probabilities tie on confident networks",
    ),
    Method(
        "energy_react",
        "feature_score",
        f"{_FEATURES}.activations:EnergyReAct",
        "Sun et al., ReAct: OOD Detection With Rectified Activations, NeurIPS 2021",
        "s(x) = -logsumexp(W min(h, c) + b), c = the 90th percentile of ID features",
        ("features", "head"),
        "pooled features; refused where features go negative",
    ),
    Method(
        "energy_scale",
        "feature_score",
        f"{_FEATURES}.activations:EnergyScale",
        "Xu et al., Scaling for Training Time and Post-hoc OOD Detection Enhancement, ICLR 2024",
        "s(x) = -logsumexp(W (e^r h) + b), r = sum of h / sum of its top 15 %",
        ("features", "head"),
        "pooled features; refused where features go negative; r is held in its bounds",
    ),
    Method(
        "vim",
        "feature_score",
        f"{_FEATURES}.vim:ViM",
        "Wang et al., ViM: Out-Of-Distribution with Virtual-logit Matching, CVPR 2022",
        "s(x) = a ||(h - u) R|| - logsumexp f, R = the smallest principal directions",
        ("logits", "features", "head"),
        "float64 eigenvectors, dimension capped at D/2, refused where the residual is rounding",
    ),
    Method(
        "mahalanobis",
        "feature_score",
        f"{_FEATURES}.mahalanobis:Mahalanobis",
        "Lee et al., NeurIPS 2018; Ren et al., 2021 (relative); Mahalanobis++, ICML 2025",
        "s(x) = min_c (h - m_c)' S^-1 (h - m_c), h scaled to length 1",
        ("features", "labels"),
        "float64, a named shrinkage estimator, never negative, right at N < D",
    ),
    Method(
        "knn",
        "feature_score",
        f"{_FEATURES}.neighbours:KNN",
        "Sun et al., OOD Detection with Deep Nearest Neighbors, ICML 2022",
        "s(x) = distance to the k-th nearest ID row, features of length 1",
        ("features",),
        "a bounded class-balanced bank, the same in any order and any shards",
    ),
    Method(
        "fdbd",
        "feature_score",
        f"{_FEATURES}.fdbd:FDBD",
        "Liu and Qin, Fast Decision Boundary based OOD Detector, ICML 2024",
        "s(x) = -mean_{c != y} (f_y - f_c) / ||w_y - w_c|| / ||h - m||",
        ("logits", "features", "head"),
        "no (C, C, D) tensor; the paper's score is high for ID",
    ),
    Method(
        "nnguide",
        "feature_score",
        f"{_FEATURES}.neighbours:NNGuide",
        "Park et al., Nearest Neighbor Guidance for OOD Detection, ICCV 2023",
        "s(x) = -L(x) mean of the k largest cos(h, h_i) L(x_i), L = logsumexp f",
        ("logits", "features"),
        "a bounded class-balanced bank; the paper's score is high for ID",
    ),
    Method(
        "combine",
        "feature_score",
        "ebm_guard.ood.combination:Combined",
        "-",
        "s(x) = mean_j F_j(s_j(x)), F_j = ranks among the fit rows, log tails beyond them",
        ("what its scores need",),
        "a combination is a score like any other: the gate's promise holds for it",
    ),
    Method(
        "approximate_mass",
        "input_score",
        "ebm_guard.ood.gradient_scores:approximate_mass",
        "Grathwohl et al., Your Classifier is Secretly an EBM, ICLR 2020, section 5.3.3",
        "s(x) = ||dE(x)/dx||",
        ("inputs", "a backward pass"),
        "the paper's score is the negative; off by default",
    ),
    Method(
        "temperature",
        "calibrator",
        f"{_CALIBRATORS}.temperature:TemperatureScaling",
        "Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2",
        "p(y|x) = softmax(f(x)/T), T = argmin NLL",
        ("logits", "labels"),
        "root of the gradient by Newton in log T, with status, bounds and a standard error",
        default=True,
    ),
    Method(
        "vector",
        "calibrator",
        f"{_CALIBRATORS}.vector:VectorScaling",
        "Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2",
        "p(y|x) = softmax(w * l + b), l = log softmax(f(x)/T), w and b per class",
        ("logits", "labels", "10 rows per class"),
        "a penalty, chosen by cross-validation, draws to the temperature; may change the class",
    ),
    Method(
        "dirichlet",
        "calibrator",
        f"{_CALIBRATORS}.dirichlet:DirichletCalibration",
        "Kull et al., Beyond temperature scaling (Dirichlet calibration), NeurIPS 2019, ODIR",
        "p(y|x) = softmax(W l + b), l = log softmax(f(x)/T)",
        ("logits", "labels", "10 rows per class", "C <= 100 or 20 C^2 rows"),
        "penalties per entry, chosen by cross-validation, draw to the temperature; may change the "
        "class",
    ),
    Method(
        "isotonic",
        "calibrator",
        f"{_CALIBRATORS}.isotonic:IsotonicCalibration",
        "Zadrozny and Elkan, KDD 2002",
        "p(y|x) = g(log-odds of the confidence) for y = argmax f, g non-decreasing (PAV)",
        ("logits", "labels", "100 rows"),
        "top label only, the rest of the mass in raw proportion; keeps the class; not in auto",
    ),
    Method(
        "auto",
        "calibrator",
        f"{_CALIBRATORS}.auto:AutoCalibrator",
        "one-standard-error rule: Breiman et al., Classification and Regression Trees, 1984",
        "temperature, unless vector or dirichlet has a lower cross-validated NLL by > 1 SE",
        ("logits", "labels"),
        "compared row by row on the same 5 folds",
    ),
    Method(
        "lac",
        "conformal",
        "ebm_guard.calibration.conformal:LAC",
        "Sadinle, Lei and Wasserman, Least Ambiguous Set-Valued Classifiers, JASA 2019",
        "C(x) = {c: s_c <= q}, s_c = log((1 - p_c) / p_c)",
        ("log-probabilities", "labels"),
        "log-odds of the paper's 1 - p: the same order, and nothing ties at 1",
        default=True,
    ),
    Method(
        "aps",
        "conformal",
        "ebm_guard.calibration.conformal:APS",
        "Romano, Sesia and Candès, Classification with Valid and Adaptive Coverage, NeurIPS 2020",
        "C(x) = {c: s_c <= q}, s_c = log(a / (1 - a)), a = sum of p_k over p_k > p_c",
        ("log-probabilities", "labels"),
        "not randomised, and the mass strictly ahead of the class: the top class is always in",
    ),
    Method(
        "sgr",
        "selective",
        "ebm_guard.calibration.certified_cuts:sgr",
        "Geifman and El-Yaniv, Selective Classification for Deep Networks, NeurIPS 2017, alg. 1",
        "binary search over ranks: P(Bin(m, risk) <= errors) <= delta / k, k = ceil(log2(n + 1))",
        ("one ranking", "errors"),
        "strict cuts and the last certified step; its condition is named",
        default=True,
    ),
    Method(
        "bonferroni",
        "selective",
        "ebm_guard.calibration.certified_cuts:bonferroni",
        "Angelopoulos et al., Learn then Test, 2021",
        "P(Bin(m, risk) <= errors) <= delta / G over G declared rules",
        ("one or two rankings", "errors"),
    ),
    Method(
        "fixed_sequence",
        "selective",
        "ebm_guard.calibration.certified_cuts:fixed_sequence",
        "Angelopoulos et al., Learn then Test, 2021",
        "declared rules from strict to loose, until the first that fails at delta",
        ("one or two rankings", "errors", "cuts from other rows"),
    ),
    Method(
        "pac",
        "threshold",
        "ebm_guard.gate.thresholds:pac_rank",
        "Vovk, Conditional Validity of Inductive Conformal Predictors, ACML 2012",
        "smallest k with P(Beta(k, n+1-k) >= 1-a) >= assurance; cut at the k-th smallest score",
        ("calibration scores",),
        default=True,
    ),
    Method(
        "marginal",
        "threshold",
        "ebm_guard.gate.thresholds:marginal_rank",
        "Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005",
        "k = ceil((n+1)(1-a)); cut at the k-th smallest score",
        ("calibration scores",),
        "the promise holds on average over calibration sets, not for the one at hand",
    ),
    Method(
        "accuracy",
        "calibration_metric",
        f"{_CAL}.proper:accuracy",
        "-",
        "mean 1[argmax f = y]; Wilson interval",
        ("logits", "labels"),
        "ties in the argmax go to the first class, as in numpy and torch",
    ),
    Method(
        "nll",
        "calibration_metric",
        f"{_CAL}.proper:nll",
        "-",
        "mean -log p(y|x)",
        ("logits", "labels"),
    ),
    Method(
        "brier",
        "calibration_metric",
        f"{_CAL}.proper:brier",
        "Brier, Verification of Forecasts Expressed in Terms of Probability, 1950",
        "mean sum_k (p_k - 1[y = k])^2, in [0, 2]",
        ("logits", "labels"),
        "the multiclass sum of the paper, not its half",
    ),
    Method(
        "brier_top_label",
        "calibration_metric",
        f"{_CAL}.proper:brier_top_label",
        "-",
        "mean (confidence - correct)^2 = miscalibration - discrimination + uncertainty",
        ("logits", "labels"),
    ),
    Method(
        "miscalibration",
        "calibration_metric",
        f"{_CAL}.decomposition:miscalibration",
        "Dimitriadis et al., Stable Reliability Diagrams (CORP), PNAS 2021",
        "MCB = S(c) - S(r): S top-label Brier score, r isotonic regression of correct on c",
        ("logits", "labels"),
    ),
    Method(
        "discrimination",
        "calibration_metric",
        f"{_CAL}.decomposition:discrimination",
        "Dimitriadis et al., Stable Reliability Diagrams (CORP), PNAS 2021",
        "DSC = S(a) - S(r), a the accuracy",
        ("logits", "labels"),
    ),
    Method(
        "uncertainty",
        "calibration_metric",
        f"{_CAL}.decomposition:uncertainty",
        "Dimitriadis et al., Stable Reliability Diagrams (CORP), PNAS 2021",
        "UNC = S(a) = a (1 - a)",
        ("logits", "labels"),
    ),
    Method(
        "ece",
        "calibration_metric",
        f"{_CAL}.binned:ece",
        "Naeini et al., AAAI 2015; Guo et al., ICML 2017, eq. 3",
        "sum_b n_b/n |acc_b - conf_b|, 15 equal-width bins (lo, hi] of the top-label confidence",
        ("logits", "labels"),
        "confidence 1.0 is in the last bin and 0.0 in the first (torchmetrics 1.9 adds a bin)",
    ),
    Method(
        "ece_adaptive",
        "calibration_metric",
        f"{_CAL}.binned:ece_adaptive",
        "Nguyen and O'Connor, Posterior Calibration for NLP Models, EMNLP 2015",
        "the same sum over 15 bins of equal mass",
        ("logits", "labels"),
        "rows of equal confidence are never split, so their order does not matter",
    ),
    Method(
        "smooth_ece",
        "calibration_metric",
        f"{_CAL}.smooth:smooth_ece",
        "Blasiok and Nakkiran, Smooth ECE, ICLR 2024",
        "s = integral |mean K_s(t, conf) (conf - correct)| dt, K_s a reflected Gaussian",
        ("logits", "labels"),
        "a confidence of exactly 1 counts once (relplot 1.0.3 counts it twice)",
    ),
    Method(
        "overconfidence",
        "calibration_metric",
        f"{_CAL}.proper:overconfidence",
        "-",
        "mean confidence - accuracy; positive = overconfident",
        ("logits", "labels"),
    ),
    Method(
        "aurc",
        "calibration_metric",
        f"{_CAL}.ranking:aurc",
        "Geifman et al., Bias-Reduced Uncertainty Estimation, ICLR 2019",
        "mean over rows i of the risk of {j: conf_j >= conf_i}",
        ("logits", "labels"),
        "rows of equal confidence share a threshold, so their order does not matter",
    ),
    Method(
        "e_aurc",
        "calibration_metric",
        f"{_CAL}.ranking:e_aurc",
        "Geifman et al., Bias-Reduced Uncertainty Estimation, ICLR 2019",
        "AURC - AURC of the best ranking with the same accuracy",
        ("logits", "labels"),
        "the best ranking's exact sum, not its limit r + (1 - r) ln(1 - r)",
    ),
    Method(
        "ece_classwise",
        "calibration_metric",
        f"{_CAL}.classwise:ece_classwise",
        "Kull et al., Beyond Temperature Scaling, NeurIPS 2019",
        "mean over classes k of the ECE of p(y = k)",
        ("logits", "labels"),
        "on request; the mean over classes, where some papers print the sum",
    ),
    Method(
        "ece_l2_debiased",
        "calibration_metric",
        f"{_CAL}.binned:ece_l2_debiased",
        "Kumar et al., Verified Uncertainty Calibration, NeurIPS 2019",
        "sqrt(max(0, sum_b n_b/n (g_b^2 - s_b^2/n_b))), g = confidence - correct",
        ("logits", "labels"),
        "on request; the variance of confidence - correct instead of y (1 - y)",
    ),
    Method(
        "mce",
        "calibration_metric",
        f"{_CAL}.binned:mce",
        "Naeini et al., AAAI 2015",
        "max_b |acc_b - conf_b| over the bins of the ECE",
        ("logits", "labels"),
        "on request; only bins with 30 rows or more",
    ),
    Method(
        "class_table",
        "calibration_metric",
        f"{_CAL}.classwise:class_table",
        "Gupta and Ramdas, Top-label Calibration, ICLR 2022; Benjamini and Hochberg, 1995",
        "accuracy, overconfidence, exact p-value and flag of each predicted class",
        ("logits", "labels"),
        "on request",
    ),
    Method(
        "auroc",
        "ood_metric",
        f"{_OOD}:auroc",
        "Mann-Whitney; interval: DeLong et al., Biometrics 1988",
        "P(s_ood > s_id) + P(s_ood = s_id)/2",
        ("ID scores", "OOD scores"),
        "the interval is DeLong's on the logit scale, so that it stays inside (0, 1)",
    ),
    Method(
        "aupr_in",
        "ood_metric",
        f"{_OOD}:aupr_in",
        "Davis and Goadrich, ICML 2006 (average precision)",
        "average precision with ID positive; with its base rate and at 1:1",
        ("ID scores", "OOD scores"),
    ),
    Method(
        "aupr_out",
        "ood_metric",
        f"{_OOD}:aupr_out",
        "Davis and Goadrich, ICML 2006 (average precision)",
        "average precision with OOD positive; with its base rate and at 1:1",
        ("ID scores", "OOD scores"),
    ),
    Method(
        "fpr95",
        "ood_metric",
        f"{_OOD}:fpr95",
        "Liang et al., ODIN, ICLR 2018; Liu et al. (energy), NeurIPS 2020",
        "share of OOD accepted at the smallest cut that accepts 95 % of ID",
        ("ID scores", "OOD scores"),
        "ID is the positive class, as in the energy paper; first cut >= 95 %, ties counted",
    ),
    Method(
        "fpr95_ood_positive",
        "ood_metric",
        f"{_OOD}:fpr95_ood_positive",
        "Zhang et al., OpenOOD v1.5, 2023",
        "share of ID refused at the largest cut that catches 95 % of OOD",
        ("ID scores", "OOD scores"),
        "OOD is the positive class, as in OpenOOD v1.5 and pytorch-ood",
    ),
    Method(
        "class_conditional",
        "gate",
        f"{_GATE}.class_conditional:ClassConditionalThreshold",
        "Vovk, Conditional Validity of Inductive Conformal Predictors, ACML 2012 (Mondrian)",
        "score <= cut_g, g = group of argmax f(x); one PAC cut for each group",
        ("score", "predicted class"),
        "by predicted class; classes with few rows share a group that is calibrated on itself",
    ),
    Method(
        "risk_rule",
        "gate",
        f"{_GATE}.risk_rule:RiskRule",
        "Angelopoulos et al., Learn then Test, 2021",
        "confidence > a and score < b with P(wrong | accepted) <= risk certified",
        ("score", "confidence", "labels"),
        "on further rows, after the threshold; 100 declared pairs of ranks share delta",
    ),
    Method(
        "screen_batch",
        "gate",
        f"{_GATE}.screening:screen_batch",
        "Benjamini and Hochberg, JRSS B 1995; Bates et al., Annals of Statistics 2023",
        "flag p_(i) <= fdr i / m for all up to the last such i",
        ("p-values",),
        "never changes a decision; says when a lone outlier cannot be flagged",
    ),
    Method(
        "auto",
        "gate",
        f"{_GATE}.choice:choose_score",
        "-",
        "the score with the best mean AUROC of synthetic outliers, on rows of their own",
        ("images, or outliers",),
        "no real OOD row is used; rows of the threshold and of a detector are not either",
    ),
    Method(
        "compare",
        "gate",
        f"{_GATE}.shadow:compare",
        "McNemar, Psychometrika 1947; Agresti and Min, 2005",
        "(b - c) / n, b and c = rows that only the old or only the new guard accepts",
        ("two guards", "traffic"),
    ),
    Method(
        "martingale",
        "drift",
        f"{_DRIFT}.monitor:DriftMonitor",
        "Vovk et al., Retrain or Not Retrain, COPA 2021; Fedorova et al., ICML 2012",
        "alarm when wealth >= 1/delta; p_t = (#{s_i > s_t} + u #{s_i = s_t}) / t, all earlier i",
        ("calibration scores", "traffic scores"),
        "the reference grows, so the level is exact; six bets; a reserve outlasts quiet stretches",
        default=True,
    ),
    Method(
        "reject_rate",
        "drift",
        f"{_DRIFT}.distances:clopper_pearson",
        "Clopper and Pearson, Biometrika 1934",
        "refused / n with the exact binomial interval; invalid scores count as refused",
        ("cut", "traffic scores"),
        default=True,
    ),
    Method(
        "psi",
        "drift",
        f"{_DRIFT}.distances:psi",
        "Lewis, 1992; Yurdakul and Naranjo, 2020",
        "sum_b (p_b - q_b) ln(p_b / q_b) over bins by reference quantiles",
        ("calibration scores", "traffic scores"),
        "half a count in each bin; its chance level at these sizes instead of 0.1 and 0.25",
        default=True,
    ),
    Method(
        "ks",
        "drift",
        f"{_DRIFT}.distances:ks",
        "Hodges, 1958",
        "max_x |F_n(x) - G_m(x)|",
        ("calibration scores", "traffic scores"),
        "exact up to a million pairs; for one look; ties make p too large",
        default=True,
    ),
    Method(
        "patch_shuffle",
        "outlier",
        f"{_OUT}:patch_shuffle",
        "Noroozi and Favaro, ECCV 2016; Tack et al., CSI, NeurIPS 2020",
        "4 x 4 patches in another order",
        ("images",),
        "for training",
    ),
    Method(
        "blend",
        "outlier",
        f"{_OUT}:blend",
        "Zhang et al., mixup, ICLR 2018",
        "(a + b) / 2 of two classes",
        ("images",),
        "for training; no mixed labels",
    ),
    Method(
        "smooth_noise",
        "outlier",
        f"{_OUT}:smooth_noise",
        "Hendrycks et al., Outlier Exposure, ICLR 2019 (blobs)",
        "5 x 5 pixels of the image, blown up smoothly",
        ("images",),
        "for training; in the image's own colours",
    ),
    Method(
        "rotation",
        "outlier",
        f"{_OUT}:rotation",
        "Hendrycks et al., NeurIPS 2019",
        "turned by 90, 180 or 270 degrees",
        ("images",),
        "for guarding; in-distribution where up means nothing",
        default=True,
    ),
    Method(
        "paste",
        "outlier",
        f"{_OUT}:paste",
        "Yun et al., CutMix, ICCV 2019",
        "a quarter to half of the area from another class",
        ("images",),
        "for guarding; at another place, no mixed labels",
        default=True,
    ),
    Method(
        "pixel_shuffle",
        "outlier",
        f"{_OUT}:pixel_shuffle",
        "-",
        "pixels shuffled within blocks of 1/8 of the sides",
        ("images",),
        "for guarding",
        default=True,
    ),
    Method(
        "gaussian_noise",
        "outlier",
        f"{_OUT}:gaussian_noise",
        "Hendrycks and Gimpel, ICLR 2017",
        "N(mean_c, std_c) of the image's channels",
        ("images",),
        "for guarding; the image's moments",
        default=True,
    ),
    Method(
        "uniform_noise",
        "outlier",
        f"{_OUT}:uniform_noise",
        "Hendrycks and Gimpel, ICLR 2017",
        "U[0, 1] in every value",
        ("images",),
        "for guarding",
        default=True,
    ),
    Method(
        "brightness",
        "outlier",
        f"{_SHIFT}:brightness",
        "-",
        "x +- 0.1",
        ("images",),
        "a shift that keeps the label",
    ),
    Method(
        "contrast",
        "outlier",
        f"{_SHIFT}:contrast",
        "-",
        "mean_c + {3/4, 5/4} (x - mean_c)",
        ("images",),
        "a shift that keeps the label",
    ),
    Method(
        "blur",
        "outlier",
        f"{_SHIFT}:blur",
        "-",
        "Gaussian of max(0.5, side/200) pixels",
        ("images",),
        "a shift that keeps the label",
    ),
    Method(
        "noise",
        "outlier",
        f"{_SHIFT}:noise",
        "-",
        "x + N(0, 0.02)",
        ("images",),
        "a shift that keeps the label",
    ),
)


def methods(family: str | None = None) -> tuple[Method, ...]:
    """Return the registered methods, all or of one family, in their documented order.

    Raises:
        InvalidInputError: the family is not one of ``FAMILIES``.

    Example:
        >>> [method.name for method in methods("score")]
        ['energy', 'msp', 'maxlogit', 'gen']
    """
    if family is None:
        return _METHODS
    if family not in FAMILIES:
        raise InvalidInputError(
            f"got family {family!r}; known families are {', '.join(FAMILIES)}"
            f"{suggest(family, FAMILIES)}"
        )
    return tuple(method for method in _METHODS if method.family == family)


def get(family: str, name: str) -> Method:
    """Return one method.

    Raises:
        InvalidInputError: no such family or name; near names are suggested.

    Example:
        >>> get("score", "energy").needs
        ('logits',)
    """
    rows = {method.name: method for method in methods(family)}
    if name not in rows:
        raise InvalidInputError(
            f"got {family} {name!r}; known are {', '.join(rows)}{suggest(name, rows)}; "
            "`ebm-guard list` shows them all"
        )
    return rows[name]
