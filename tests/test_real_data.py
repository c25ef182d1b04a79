"""Our figures on real data and published nets equal the independently counted ones.

The figures and their protocols are those of the data folder's README; the tolerance is one unit
in the last digit printed there (plus rounding noise).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ebm_guard import Guard, build_report
from ebm_guard.calibration import TemperatureScaling, calibration_metrics, row_statistics
from ebm_guard.ood import make_score, ood_metrics

DIGITS4, DIGITS3 = 1.0001e-4, 1.0001e-3


def calibration(part, temperature=1.0):
    rows = row_statistics(part.logits, part.require_labels("this test"), temperature)
    return calibration_metrics(rows, seed=0)


def detection(inside, outside, score="energy"):
    score = make_score(score)
    return ood_metrics(score.of(inside), score.of(outside), draws=20)


def float32_msp(inside, outside):
    """AUROC and FPR95 of the plain softmax confidence, ties included."""
    odds = [
        -torch.softmax(torch.from_numpy(np.array(part.logits)), 1).amax(1).numpy()
        for part in (inside, outside)
    ]
    return ood_metrics(*(part.astype(np.float64) for part in odds), draws=20)


# --- CIFAR-10, ResNet-20


@pytest.mark.slow
def test_resnet20_on_the_complete_test_set(resnet20):
    part = resnet20("test")
    assert len(part) == 10_000
    assert part.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    found = calibration(part)
    assert found.accuracy.value == pytest.approx(0.9173, abs=DIGITS4)
    assert found.nll.value == pytest.approx(0.3727, abs=DIGITS4)
    assert found.ece.value == pytest.approx(0.0532, abs=DIGITS4)
    assert found.brier.value == pytest.approx(0.1344, abs=DIGITS4)
    confidence = found.accuracy.value + found.overconfidence.value
    assert confidence == pytest.approx(0.9702, abs=DIGITS4)
    for name in ("accuracy", "nll", "ece", "brier"):
        metric = getattr(found, name)
        assert metric.low < metric.value < metric.high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "energy", "fpr95", "odds"),
    [
        ("dtd", None, 0.8988, 0.507, 0.8766),
        ("cifar100", 1000, 0.8838, 0.598, 0.8621),
        # The README calls this one float32; it is the value without ties.
        ("cifar100", None, 0.8809, 0.589, 0.8594),
    ],
)
def test_resnet20_against_outliers(resnet20, name, rows, energy, fpr95, odds):
    inside, outside = resnet20("test"), resnet20(name).select(slice(rows))
    found = detection(inside, outside)
    assert found.auroc.value == pytest.approx(energy, abs=DIGITS4)
    assert found.fpr95.value == pytest.approx(fpr95, abs=DIGITS3)
    assert detection(inside, outside, "msp").auroc.value == pytest.approx(odds, abs=DIGITS4)


@pytest.mark.slow
def test_resnet20_float32_confidence_ties_cost_area(resnet20):
    """The plain softmax in float32, 0.8762 for the textures; on CIFAR-100 its last bit decides."""
    inside, outside = resnet20("test"), resnet20("dtd")
    tied = float32_msp(inside, outside)
    assert tied.auroc.value == pytest.approx(0.8762, abs=DIGITS4)
    assert tied.fpr95.value == pytest.approx(0.685, abs=DIGITS3)


@pytest.mark.slow
def test_float32_confidence_ties_where_log_odds_do_not(resnet20):
    logits = torch.from_numpy(np.array(resnet20("test").logits))
    tied = (torch.softmax(logits, 1).amax(1) == 1).double().mean()
    assert float(tied) == pytest.approx(0.33, abs=0.01)
    odds = make_score("msp").of(resnet20("test"))
    assert len(np.unique(odds)) > 0.99 * len(odds)


@pytest.mark.slow
def test_resnet20_temperature(resnet20):
    part = resnet20("test")
    first, rest = part.select(slice(5000)), part.select(slice(5000, None))
    fitted = TemperatureScaling().fit(first.logits, first.labels)
    assert fitted.status == "converged"
    assert float(fitted.temperature) == pytest.approx(2.386, abs=DIGITS3)
    before, after = calibration(rest), calibration(rest, float(fitted.temperature))
    for name, old, new in (
        ("nll", 0.3450, 0.2359),
        ("ece", 0.0513, 0.0105),
        ("brier", 0.1306, 0.1182),
    ):
        assert getattr(before, name).value == pytest.approx(old, abs=DIGITS4)
        assert getattr(after, name).value == pytest.approx(new, abs=DIGITS4)


@pytest.mark.slow
def test_resnet20_report_shows_the_same_figures(resnet20):
    """The report's own path: protocol `calibration on the first half`, and all rows for OOD."""
    part = resnet20("test")
    report = build_report(
        part.select(slice(5000, None)),
        calibration=part.select(slice(5000)),
        ood={"far_dtd": replace(resnet20("dtd"), labels=None)},
    ).to_dict()
    before, after = report["calibration"]["before"], report["calibration"]["after"]
    assert after["calibrator"]["temperature"] == pytest.approx(2.386, abs=DIGITS3)
    assert before["ece"]["value"] == pytest.approx(0.0513, abs=DIGITS4)
    assert after["ece"]["value"] == pytest.approx(0.0105, abs=DIGITS4)
    assert after["nll"]["value"] == pytest.approx(0.2359, abs=DIGITS4)
    assert report["gate"]["n"] == 5000
    coverage = report["gate"]["coverage"]
    assert coverage["high"] >= 0.95
    assert report["energy"]["verdict"]["status"] != "not_run"
    whole = build_report(part, ood={"far_dtd": replace(resnet20("dtd"), labels=None)}).to_dict()
    assert whole["calibration"]["before"]["accuracy"]["value"] == pytest.approx(0.9173, abs=DIGITS4)
    energy = whole["ood"]["far_dtd"]["scores"]["energy"]
    assert energy["auroc"]["value"] == pytest.approx(0.8988, abs=DIGITS4)
    assert energy["fpr95"]["value"] == pytest.approx(0.507, abs=DIGITS3)


@pytest.mark.slow
def test_resnet20_gate_keeps_its_promise_on_fresh_rows(resnet20):
    """The PAC cut of 1,000 rows, 300 times: the share of broken promises is at most 5 %."""
    from scipy.stats import binomtest

    from ebm_guard.gate import Threshold

    energies = make_score("energy").of(resnet20("test"))
    generator = np.random.default_rng(0)
    broken = 0
    for _ in range(300):
        order = generator.permutation(len(energies))
        cut = float(Threshold.fit(energies[order[:1000]]).cut)
        # The promise is about the other rows as a population: their true share is known here.
        broken += (energies[order[1000:]] <= cut).mean() < 0.95
    assert binomtest(broken, 300, 0.05, alternative="greater").pvalue > 1e-3
    guard = Guard().fit(resnet20("test").select(slice(1000)))
    decision = guard.decide(torch.from_numpy(np.array(resnet20("dtd").logits)))
    assert float(decision.accept.double().mean()) < 0.75


# --- MNIST


@pytest.fixture(scope="session")
def mnist(published_predictions, tmp_path_factory, data_dir):
    negative = tmp_path_factory.mktemp("mnist") / "negative.npz"
    with np.load(data_dir / "mnist.npz") as stored:
        np.savez(negative, images=255 - stored["test_images"])
    specs = {
        "test": "mnist.npz#test",
        "fashion": "fashion_mnist_test.npz",
        # An absolute path replaces the data folder.
        "negative": str(negative),
    }

    def get(weights, name):
        factory = "mnist_convnet_oe" if "convnet" in weights else "mnist_lenet5"
        return published_predictions(factory, weights, specs[name])

    return get


def test_outlier_exposure_baseline(mnist):
    found = calibration(mnist("mnist_convnet_oe_baseline", "test"))
    assert found.accuracy.value == pytest.approx(0.9906, abs=DIGITS4)
    assert found.nll.value == pytest.approx(0.0278, abs=DIGITS4)
    assert found.ece.value == pytest.approx(0.0018, abs=DIGITS4)


def test_outlier_exposure_tuned(mnist):
    found = calibration(mnist("mnist_convnet_oe_tune", "test"))
    assert found.accuracy.value == pytest.approx(0.9908, abs=DIGITS4)


@pytest.mark.parametrize(
    ("weights", "name", "msp", "energy"),
    [
        ("mnist_convnet_oe_baseline", "fashion", 0.9930, 0.9993),
        ("mnist_convnet_oe_baseline", "negative", 0.9856, 0.9968),
        ("mnist_convnet_oe_tune", "fashion", 0.9990, 0.9998),
        ("mnist_convnet_oe_tune", "negative", 0.9990, 0.9999),
    ],
)
def test_outlier_exposure_against_outliers(mnist, weights, name, msp, energy):
    inside, outside = mnist(weights, "test"), mnist(weights, name)
    assert detection(inside, outside).auroc.value == pytest.approx(energy, abs=DIGITS4)
    assert float32_msp(inside, outside).auroc.value == pytest.approx(msp, abs=DIGITS4)


def test_outlier_exposure_other_fpr95(mnist):
    """That paper's FPR95 has OOD positive: our ``fpr95_ood_positive``, 0.0296 for the MSP."""
    weights = "mnist_convnet_oe_baseline"
    found = float32_msp(mnist(weights, "test"), mnist(weights, "fashion"))
    assert found.fpr95_ood_positive.value == pytest.approx(0.0296, abs=DIGITS4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "accuracy", "ece"),
    [("mnist_lenet5_clean", 0.9889, None), ("mnist_lenet5_pgd_eps03", 0.9864, 0.0057)],
)
def test_lenet5(mnist, weights, accuracy, ece):
    found = calibration(mnist(weights, "test"))
    assert found.accuracy.value == pytest.approx(accuracy, abs=DIGITS4)
    if ece is not None:
        assert found.ece.value == pytest.approx(ece, abs=DIGITS4)


# --- stored softmax outputs of published models


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("wrn16_4_cifar10", 0.9109),
        ("densenet_bc100_cifar100", 0.7541),
        ("wrn16_4_cifar100", 0.7543),
    ],
)
def test_stored_softmax_outputs(data_dir, name, accuracy):
    from ebm_guard.data import parse_spec
    from ebm_guard.predictions import stored_predictions

    part = stored_predictions(parse_spec(f"logits:{data_dir / f'softmax_{name}.npz'}"))
    assert part.kind == "probs"
    assert calibration(part).accuracy.value == pytest.approx(accuracy, abs=DIGITS4)


# --- DenseNets, slow on a CPU


@pytest.fixture
def no_denormals():
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.slow
def test_cifar10_densenet(published_predictions, no_denormals):
    def get(spec):
        return published_predictions(
            "cifar10_densenet_bc100_k12", "cifar10_densenet_bc100_k12", spec
        )

    inside = get("cifar10_test.npz[:2000]")
    found = calibration(inside)
    assert found.accuracy.value == pytest.approx(0.9205, abs=DIGITS4)
    assert found.nll.value == pytest.approx(0.3222, abs=DIGITS4)
    assert found.ece.value == pytest.approx(0.0448, abs=DIGITS4)
    for spec, auroc, fpr95 in (
        ("dtd_1200_32x32.npz[::2]", 0.9090, 0.468),
        ("cifar100_test3k.npz[:1000]", 0.8891, 0.603),
    ):
        found = detection(inside, get(spec))
        assert found.auroc.value == pytest.approx(auroc, abs=DIGITS4)
        assert found.fpr95.value == pytest.approx(fpr95, abs=DIGITS3)


@pytest.mark.slow
def test_mnist0to7_densenet(published_predictions, no_denormals):
    """First 2,000 test images: 1,614 of digits 0..7 against 386 of 8 and 9."""
    name = "mnist0to7_densenet_bc100_k12"

    def get(suffix):
        return published_predictions(name, f"{name}_pretrained", f"mnist.npz#test{suffix}")

    inside, outside = get("[:2000]?classes=0-7"), get("[:2000]?classes=8,9")
    assert max(int(part.ids[-1]) for part in (inside, outside)) == 1999
    found = calibration(inside)
    assert found.accuracy.value == pytest.approx(0.9975, abs=DIGITS4)
    assert found.ece.value == pytest.approx(0.0033, abs=DIGITS4)
    energy, msp = detection(inside, outside), float32_msp(inside, outside)
    assert energy.auroc.value == pytest.approx(0.9884, abs=DIGITS4)
    assert energy.fpr95.value == pytest.approx(0.0285, abs=DIGITS4)
    assert msp.auroc.value == pytest.approx(0.9865, abs=DIGITS4)
    assert msp.fpr95.value == pytest.approx(0.0415, abs=DIGITS4)
