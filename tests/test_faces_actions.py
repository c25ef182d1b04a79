"""The GitHub Actions example: its file is sound, and its shell steps do what they say."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from ebm_guard.cli import main

FOLDER = Path(__file__).parents[1] / "examples" / "github_actions"
# GitHub runs `run:` steps so.
BASH = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c"]


@pytest.fixture(scope="module")
def workflow():
    # YAML 1.1 reads the key `on` as True; GitHub reads it as text.
    return yaml.load((FOLDER / "ebm-guard.yml").read_text(), Loader=yaml.BaseLoader)


def steps_of(workflow):
    return workflow["jobs"]["reliability"]["steps"]


def step(workflow, name):
    return next(item for item in steps_of(workflow) if item.get("name") == name)


def test_the_workflow_reads_only_and_runs_on_pull_requests(workflow):
    assert set(workflow["on"]) == {"pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "{{ secrets" not in (FOLDER / "ebm-guard.yml").read_text()
    job = workflow["jobs"]["reliability"]
    assert int(job["timeout-minutes"]) <= 60
    for item in job["steps"]:
        assert ("uses" in item) != ("run" in item)
        assert "uses" not in item or "@v" in item["uses"]


def test_the_report_outlives_a_failed_check(workflow):
    late = steps_of(workflow)[-2:]
    assert [item["if"] for item in late] == ["always()", "always()"]
    assert late[1]["uses"].startswith("actions/upload-artifact@")
    assert late[1]["with"]["path"].split() == ["reliability", "reliability.xml"]


def test_every_variable_of_the_shell_is_set(workflow):
    known = set(workflow["jobs"]["reliability"]["env"]) | {"GITHUB_STEP_SUMMARY"}
    for item in steps_of(workflow):
        for word in item.get("run", "").replace('"', " ").replace("/", " ").split():
            name = word.removeprefix("$")
            assert not word.startswith("$") or name.startswith("{") or name in known


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A repository with a guard, and the command on the path."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "bin").mkdir()
    shim = folder / "bin" / "ebm-guard"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ebm_guard "$@"\n')
    shim.chmod(0o755)
    shutil.copy(FOLDER / "bounds.toml", folder / "bounds.toml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data", "demo:", "--output", str(folder / "guard.safetensors")])
    assert stop.value.code in (0, None)
    return folder


def run_steps(workflow, place, **changed):
    """Run the shell steps in order, as GitHub does; return (exit code of Report, its stderr)."""
    summary = place / "summary.md"
    summary.unlink(missing_ok=True)
    environment = os.environ | {
        **workflow["jobs"]["reliability"]["env"],
        "MODEL": "",
        "DATA": "demo:",
        "OOD": "--ood far=demo:far_ood",
        "GUARD": "guard.safetensors",
        "BOUNDS": "bounds.toml",
        "GITHUB_STEP_SUMMARY": str(summary),
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **changed,
    }
    found = {}
    for name in ("Report", "Summary"):
        found[name] = subprocess.run(
            [*BASH, step(workflow, name)["run"]],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert found["Summary"].returncode == 0, found["Summary"].stderr
    return found["Report"].returncode, found["Report"].stderr, summary.read_text()


def fresh(place):
    shutil.rmtree(place / "reliability", ignore_errors=True)
    (place / "reliability.xml").unlink(missing_ok=True)


def failures(place):
    return [
        case.get("name")
        for case in ET.parse(place / "reliability.xml").iter("testcase")
        if case.find("failure") is not None
    ]


@pytest.mark.slow
def test_the_steps_run_pass_and_fail_as_they_say(workflow, place):
    fresh(place)
    # The main branch: no baseline yet, so nothing to compare with.
    bounds = (place / "bounds.toml").read_text()
    (place / "first.toml").write_text(bounds.partition("# How much worse")[0])
    code, errors, summary = run_steps(workflow, place, BOUNDS="first.toml")
    assert code == 0, errors
    assert failures(place) == []
    assert "Reliability report" in summary
    main_branch = place / "reports" / "main"
    main_branch.mkdir(parents=True)
    for name in ("report.json", "rows.npz"):
        shutil.copy(place / "reliability" / name, main_branch)
    # A pull request that changes nothing.
    fresh(place)
    code, errors, _ = run_steps(workflow, place)
    assert code == 0, errors
    # One that asks for what does not hold.
    fresh(place)
    (place / "hard.toml").write_text('[requirements]\naccuracy = ">=0.999@lower"\n')
    code, errors, summary = run_steps(workflow, place, BOUNDS="hard.toml")
    assert code == 1, errors
    assert failures(place) == ["accuracy>=0.999@lower"]
    assert "Reliability report" in summary


@pytest.mark.slow
def test_a_missing_guard_fails_the_check_and_is_told(workflow, place):
    fresh(place)
    code, errors, summary = run_steps(workflow, place, GUARD="none.safetensors")
    assert code > 1
    assert "none.safetensors" in errors
    assert "There is no report" in summary
