"""What fine-tuning minimises, and where its negatives come from."""

from __future__ import annotations

from ebm_guard.registry.method import Method

_OBJECTIVES = "ebm_guard.training.objectives"
_NEGATIVES = "ebm_guard.training.negatives"
_JEM = "Grathwohl et al., Your Classifier is Secretly an Energy Based Model, ICLR 2020"

METHODS = (
    Method(
        "margin",
        "objective",
        f"{_OBJECTIVES}.margin:Margin",
        "Liu et al., Energy-based Out-of-distribution Detection, NeurIPS 2020",
        "CE + w (mean relu(E+ - m_in)^2 + mean relu(m_out - E-)^2) / (m_out - m_in)^2",
        ("labels", "negatives"),
        "margins from the net's own energies; scale-free weight; batch-norm statistics fixed",
        default=True,
    ),
    Method(
        "cross_entropy",
        "objective",
        f"{_OBJECTIVES}.cross_entropy:CrossEntropy",
        "-",
        "CE = -mean log p(y|x)",
        ("labels",),
        "the control: what training on gains without an energy term",
    ),
    Method(
        "jem",
        "objective",
        f"{_OBJECTIVES}.jem:Jem",
        _JEM,
        "CE + w_x (E(x+) - E(x-)) + w_xy (E(x+, y) - E(x-, y-)) + a mean ((E - E0)/s)^2",
        ("labels", "gradient"),
        "penalty centred on the net's own energy; class-Gaussian starts; clip, box and warm-up",
    ),
    Method(
        "hdge",
        "objective",
        f"{_OBJECTIVES}.hdge:Hdge",
        "Liu and Abbeel, Hybrid Discriminative-Generative Training, arXiv 2007.09070",
        "CE - w mean_i log [e^(f(x_i)[y_i]/T) / sum_k e^(f(x_k)[y_i]/T)], k over batch and queue",
        ("labels",),
        "exact sum on raw logits with a small weight; the normalised form is named",
    ),
    Method(
        "dat",
        "objective",
        f"{_OBJECTIVES}.dat:Dat",
        "DAT: dual adversarial training, arXiv 2510.13872",
        "CE + w BCE of the logit (c - E)/s; x- by descent on E, longer where AUROC >= 0.8",
        ("labels", "negatives", "gradient"),
        "starts need no auxiliary set; centre and scale measured; adversarial images on request",
    ),
    Method(
        "adversarial",
        "objective",
        f"{_OBJECTIVES}.adversarial:Adversarial",
        "Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
        "CE on PGD images for a share of the batch",
        ("labels", "gradient"),
        "no energy term: what buys robust accuracy",
    ),
    Method(
        "descent",
        "negatives",
        f"{_NEGATIVES}.descent:Descent",
        "DAT: dual adversarial training, arXiv 2510.13872",
        "x <- clip(x - a g/rms(g)), g = dE/dx, k steps; k + 1 where AUROC >= 0.8",
        ("images", "gradient"),
        "step scaled with the image size; the curriculum moves within hundreds of images",
    ),
    Method(
        "synthetic",
        "negatives",
        f"{_NEGATIVES}.synthetic:Synthetic",
        "Tack et al., CSI, NeurIPS 2020; Hendrycks et al., Outlier Exposure, ICLR 2019",
        "patch shuffles, blends and smooth noise of the batch",
        ("images",),
        "kinds disjoint from those that choose checkpoints and are reported",
        default=True,
    ),
    Method(
        "outliers",
        "negatives",
        f"{_NEGATIVES}.outliers:Outliers",
        "Hendrycks et al., Deep Anomaly Detection with Outlier Exposure, ICLR 2019",
        "images of the user's that belong to no class",
        ("OOD images",),
        "equal for any number of processes",
    ),
    Method(
        "replay",
        "negatives",
        f"{_NEGATIVES}.replay:Replay",
        "Tieleman, ICML 2008; Du and Mordatch, NeurIPS 2019",
        "chains on E(x) or E(x, y) that go on where they were left",
        ("images", "gradient"),
        "class-Gaussian starts; no chain twice in a draw; kept in the checkpoint",
    ),
    Method(
        "data_chains",
        "negatives",
        f"{_NEGATIVES}.chains:DataChains",
        "Hinton, Training Products of Experts by Minimizing Contrastive Divergence, 2002",
        "chains that start at the batch",
        ("images", "gradient"),
    ),
    Method(
        "noise_chains",
        "negatives",
        f"{_NEGATIVES}.chains:NoiseChains",
        "Nijkamp et al., NeurIPS 2019; Yang and Ji, JEM++, ICCV 2021",
        "chains that start at class-Gaussian or uniform noise",
        ("images", "gradient"),
    ),
    Method(
        "mixed",
        "negatives",
        f"{_NEGATIVES}.mixed:Mixed",
        "-",
        "several sources, each with its share",
        ("negatives",),
    ),
)
