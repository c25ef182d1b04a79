"""Published architectures: the published weights load strictly and give the published figures."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

FACTORIES = {
    "cifar10_resnet20": (269_722, 10),
    "cifar10_densenet_bc100_k12": (769_162, 10),
    "mnist0to7_densenet_bc100_k12": (768_044, 8),
    "mnist_convnet_oe": (21_840, 10),
    "mnist_lenet5": (648_226, 10),
    "imagenet_tf_efficientnet_lite0": (4_652_008, 1000),
}
WEIGHTS = {
    "cifar10_resnet20": "cifar10_resnet20",
    "cifar10_densenet_bc100_k12": "cifar10_densenet_bc100_k12",
    "mnist0to7_densenet_bc100_k12_pretrained": "mnist0to7_densenet_bc100_k12",
    "mnist0to7_densenet_bc100_k12_energy_ft": "mnist0to7_densenet_bc100_k12",
    "mnist_convnet_oe_baseline": "mnist_convnet_oe",
    "mnist_convnet_oe_tune": "mnist_convnet_oe",
    "mnist_lenet5_clean": "mnist_lenet5",
    "mnist_lenet5_pgd_eps03": "mnist_lenet5",
    "imagenet_tf_efficientnet_lite0_fp16": "imagenet_tf_efficientnet_lite0",
}


@pytest.fixture(scope="module")
def nets():
    path = Path(__file__).parent.parent / "examples" / "published_nets.py"
    spec = importlib.util.spec_from_file_location("published_nets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The DenseNets meet denormal values, which are several times slower.
    torch.set_flush_denormal(True)
    yield module
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def published(nets, data_dir):
    def build(name):
        model = getattr(nets, WEIGHTS[name])()
        model.load_state_dict(load_file(data_dir / f"{name}.safetensors"), strict=True)
        return model

    return build


@pytest.fixture(scope="module")
def cifar10(data_dir):
    with np.load(data_dir / "cifar10_test.npz") as stored:
        return stored["images"], stored["labels"]


@pytest.fixture(scope="module")
def mnist(data_dir):
    with np.load(data_dir / "mnist.npz") as stored:
        return stored["test_images"], stored["test_labels"]


def logits_of(model, images, batch_size=250):
    config = model.pretrained_cfg
    pixels = torch.from_numpy(images).float() / 255
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in ((pixels - mean) / std).split(batch_size)])


def figures(logits, labels):
    labels = torch.from_numpy(labels)
    accuracy = (logits.argmax(1) == labels).double().mean()
    return accuracy.item(), torch.nn.functional.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("factory", FACTORIES)
def test_factory(nets, factory):
    parameters, classes = FACTORIES[factory]
    model = getattr(nets, factory)()
    config = model.pretrained_cfg
    channels, *_ = config["input_size"]
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(config["mean"]) == len(config["std"]) == channels
    assert config["num_classes"] == classes
    assert config["crop_pct"] == (0.875 if factory.startswith("imagenet") else 1.0)
    assert len(config.get("label_names", range(classes))) == classes
    with torch.inference_mode():
        logits = model(torch.rand(2, *config["input_size"]))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_published_weights_load_strictly(published, name):
    model = published(name)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_every_weights_file_has_a_factory(data_dir):
    assert {path.stem for path in data_dir.glob("*.safetensors")} == set(WEIGHTS)


@pytest.mark.parametrize(
    ("name", "accuracy", "nll"),
    [("mnist_convnet_oe_baseline", 0.9906, 0.0278), ("mnist_convnet_oe_tune", 0.9908, None)],
)
def test_mnist_convnet_on_the_complete_test_set(published, mnist, name, accuracy, nll):
    images, labels = mnist
    got = figures(logits_of(published(name), images), labels)
    assert got[0] == pytest.approx(accuracy, abs=2e-4)
    if nll is not None:
        assert got[1] == pytest.approx(nll, abs=1e-4)


# Prefixes: the tolerance is about four standard deviations of the share of right predictions.
@pytest.mark.parametrize(
    ("name", "rows", "accuracy", "tolerance"),
    [
        ("cifar10_resnet20", 500, 0.9173, 0.05),
        ("cifar10_densenet_bc100_k12", 50, 0.9154, 0.16),
    ],
)
def test_cifar10_prefix(published, cifar10, name, rows, accuracy, tolerance):
    images, labels = cifar10
    got, _ = figures(logits_of(published(name), images[:rows]), labels[:rows])
    assert got == pytest.approx(accuracy, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "rows", "tolerance"),
    [
        ("mnist0to7_densenet_bc100_k12_pretrained", 40, 0.04),
        ("mnist0to7_densenet_bc100_k12_energy_ft", 40, 0.04),
        ("mnist_lenet5_clean", 1000, 0.015),
        ("mnist_lenet5_pgd_eps03", 1000, 0.015),
    ],
)
def test_mnist_prefix(published, mnist, name, rows, tolerance):
    images, labels = mnist
    known = np.flatnonzero(labels < (8 if "0to7" in name else 10))[:rows]
    got, _ = figures(logits_of(published(name), images[known]), labels[known])
    assert got == pytest.approx(0.99, abs=tolerance)


def imagenet_figures(model, data_dir, step):
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config({}, model=model))
    files = sorted((data_dir / "imagenet_sample").glob("*/*.jpg"))
    right = 0
    for label in range(0, len(files), step):
        with Image.open(files[label]) as image, torch.inference_mode():
            logits = model(transform(image.convert("RGB")).unsqueeze(0))
        right += int(logits.argmax()) == label
    return right / len(range(0, len(files), step))


def test_imagenet_every_fiftieth_class(published, data_dir):
    model = published("imagenet_tf_efficientnet_lite0_fp16")
    assert imagenet_figures(model, data_dir, step=50) >= 0.5


@pytest.mark.slow
def test_resnet20_on_the_complete_test_set(published, cifar10):
    images, labels = cifar10
    accuracy, nll = figures(logits_of(published("cifar10_resnet20"), images), labels)
    assert accuracy == pytest.approx(0.9173, abs=2e-4)
    assert nll == pytest.approx(0.3727, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy"), [("mnist_lenet5_clean", 0.9889), ("mnist_lenet5_pgd_eps03", 0.9864)]
)
def test_lenet5_on_the_complete_test_set(published, mnist, name, accuracy):
    images, labels = mnist
    got, _ = figures(logits_of(published(name), images), labels)
    assert got == pytest.approx(accuracy, abs=2e-4)


@pytest.mark.slow
def test_cifar10_densenet_on_the_first_2000(published, cifar10):
    images, labels = (array[:2000] for array in cifar10)
    accuracy, nll = figures(logits_of(published("cifar10_densenet_bc100_k12"), images), labels)
    assert accuracy == pytest.approx(0.9205, abs=6e-4)
    assert nll == pytest.approx(0.3222, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "accuracy", "auroc", "tolerance"),
    [
        ("mnist0to7_densenet_bc100_k12_pretrained", 0.9975, 0.9884, 6e-4),
        # Measured on all of the test set, here on a fifth.
        ("mnist0to7_densenet_bc100_k12_energy_ft", 0.9969, 0.9988, 6e-3),
    ],
)
def test_mnist_densenet_on_the_first_2000(published, mnist, name, accuracy, auroc, tolerance):
    images, labels = (array[:2000] for array in mnist)
    logits = logits_of(published(name), images)
    known = labels < 8
    got, _ = figures(logits[torch.from_numpy(known)], labels[known])
    assert got == pytest.approx(accuracy, abs=tolerance)
    assert roc_auc_score(~known, -logits.logsumexp(1)) == pytest.approx(auroc, abs=tolerance)


@pytest.mark.slow
def test_imagenet_every_fifth_class(published, data_dir):
    model = published("imagenet_tf_efficientnet_lite0_fp16")
    assert imagenet_figures(model, data_dir, step=5) == pytest.approx(0.846, abs=0.08)
