import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

# Tests run in one process per core: more threads each would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data and published weights."""
    folder = os.environ.get("EBM_GUARD_DATA")
    if not folder:
        pytest.skip("EBM_GUARD_DATA is not set: no folder of real data and published weights")
    return Path(folder)


@pytest.fixture(scope="session")
def published_predictions(data_dir):
    """Run a published net over an npz set, once per test run: (factory, weights, set) -> rows."""
    from ebm_guard import EnergyClassifier, predict
    from ebm_guard.data import batches, open_source
    from ebm_guard.model.loading import load_model

    models, kept = {}, {}

    def get(factory, weights, spec):
        if (weights, spec) not in kept:
            if weights not in models:
                name = f"{EXAMPLES / 'published_nets.py'}:{factory}"
                checkpoint = data_dir / f"{weights}.safetensors"
                models[weights] = EnergyClassifier(load_model(name, checkpoint=checkpoint))
            classifier = models[weights]
            source = open_source(f"npz:{data_dir / spec}")
            if source.labels is not None and source.labels.max() > 9:
                source.labels = None  # CIFAR-100: classes of its own
            rows = batches(source, classifier.preprocessing, batch_size=500)
            kept[weights, spec] = predict(classifier, rows, source=spec)
        return kept[weights, spec]

    return get


@pytest.fixture(scope="session")
def resnet20(published_predictions):
    """The CIFAR-10 ResNet-20 on one set, from the one pass of this run: set name -> rows."""

    def get(name):
        spec = {
            "test": "cifar10_test.npz",
            "dtd": "dtd_1200_32x32.npz",
            "cifar100": "cifar100_test3k.npz",
        }[name]
        return published_predictions("cifar10_resnet20", "cifar10_resnet20", spec)

    return get


class SkipList:
    """Fail a run in which a test was skipped that is not on the list (used by CI)."""

    def __init__(self, path):
        lines = path.read_text(encoding="utf-8").splitlines()
        self.allowed = [line.split()[0] for line in lines if line.strip() and line[0] != "#"]
        self.unexpected = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.check(report.nodeid, report.longrepr)

    def pytest_collectreport(self, report):
        if report.skipped:
            self.check(report.nodeid, report.longrepr)

    def check(self, name, reason):
        if not any(fnmatch(name, pattern) for pattern in self.allowed):
            reason = reason[-1] if isinstance(reason, tuple) else reason
            self.unexpected.append(f"{name}: {reason}")

    def pytest_sessionfinish(self, session):
        if self.unexpected and session.exitstatus in (pytest.ExitCode.OK, 0):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.unexpected:
            terminalreporter.write_line(f"UNEXPECTED SKIP {line}", red=True)


def pytest_configure(config):
    path = os.environ.get("EBM_GUARD_EXPECTED_SKIPS")
    if path:
        config.pluginmanager.register(SkipList(Path(path)), "ebm-guard-skips")
