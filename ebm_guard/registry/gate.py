"""Thresholds, other parts of the gate, and what watches it in service."""

from __future__ import annotations

from ebm_guard.registry.method import Method

_GATE = "ebm_guard.gate"
_DRIFT = "ebm_guard.gate.drift"

METHODS = (
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
)
