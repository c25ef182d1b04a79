"""The level and the power of merged evidence, on the fleets that reports/scale.md tells of."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest

from ebm_guard.gate import DriftMonitor

SCRIPTS = Path(__file__).parents[1] / "reports" / "scale"


@pytest.fixture(scope="module")
def simulate():
    """The report's own simulation, as a module."""
    return script("simulate")


def script(name):
    spec = importlib.util.spec_from_file_location(f"scale_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_the_arrays_are_the_monitors(simulate):
    rng = oracles.generator("arrays")
    reference, scores = rng.normal(size=80), rng.normal(0.3, 1, size=(5, 120))
    found = simulate.fleet.play(reference, scores, np.random.default_rng(0))
    for row, wealth in zip(scores, found, strict=True):
        monitor = DriftMonitor(reference, cut=1.6, seed=0)
        for score, value in zip(row, wealth, strict=True):
            np.testing.assert_allclose(monitor.update(score).wealth, value, rtol=1e-12)


def keeps(found):
    return {name: test["keeps_level"] for name, test in found["rules"].items()}


def test_a_small_quiet_fleet_keeps_the_level_merged_and_not_each_alone(simulate):
    found = keeps(simulate.quiet(replicas=60, steps=150, runs=120))
    assert found["merged"]
    assert found["bonferroni"]
    assert found["mean_at_one_look"]
    assert not found["any_alone"]


def test_mirrored_traffic_breaks_a_product_and_not_the_merged_evidence(simulate):
    found = keeps(simulate.quiet(replicas=60, steps=60, runs=120, mirrored=True))
    assert found["merged"]
    assert not found["product"]


@pytest.mark.slow
def test_a_thousand_quiet_replicas_keep_the_level_merged_and_not_each_alone(simulate):
    found = keeps(simulate.quiet(replicas=1000, steps=200, runs=100))
    assert found["merged"]
    assert found["mean_at_one_look"]
    assert not found["any_alone"]


def test_a_drift_of_all_and_of_one_is_found_after_its_start(simulate):
    for shift, who in ((1.0, "all"), (3.0, "one")):
        found = simulate.drifting(shift, who, replicas=40, steps=240, runs=4)
        assert found["share_of_runs_with_an_alarm"]["merged"] == 1.0
        assert 0 < found["median_scores_of_a_replica_to_the_alarm"]["merged"] < 140


def test_the_page_shows_the_measured_figures():
    """If this fails: python reports/scale/render.py."""
    page = (SCRIPTS.parent / "scale.md").read_text(encoding="utf-8")
    found = json.loads((SCRIPTS / "results.json").read_text(encoding="utf-8"))
    render = script("render")
    assert render.rendered(page, found) == page
    assert all(f"<!-- {name} -->\n|" in page for name in render.TABLES)
    spent = sum(part["cpu_seconds_of_this_part"] for part in found.values())
    assert spent < 15 * 60
    tests = [run["rules"]["merged"] for run in found["simulation"]["quiet"]]
    assert all(test["keeps_level"] for test in tests)
