"""The before/after report: what it says of every outcome, its pages, figures and files."""

import copy
import io
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from finetune_examples import EVIL, N, history, pair, report, result, robustness, sides
from rich.console import Console

from ebm_guard.calibration.calibrators.temperature import BestTemperature
from ebm_guard.errors import DataError
from ebm_guard.report import figures
from ebm_guard.report.finetune_report import NO_CANDIDATE
from ebm_guard.report.finetune_robustness import compare_robustness
from ebm_guard.report.finetune_training import training_section
from ebm_guard.report.render import (
    finetune_view,
    output,
    render_finetune_html,
    render_finetune_markdown,
    render_finetune_terminal,
    write_finetune_outputs,
)
from ebm_guard.training.temperatures import Temperatures

SCHEMA = json.loads((Path(output.__file__).parents[1] / "finetune_schema.json").read_text("utf-8"))


# --- the course of a run


def test_a_rollback_starts_an_attempt():
    section = training_section(history())
    assert section.made == 12
    assert section.updates["attempt"] == [0] * 8 + [1] * 4
    assert [row["attempt"] for row in section.evaluations] == [0, 0, 0, 1]
    assert [row["update"] for row in section.evaluations] == [0, 4, 8, 8]
    assert section.events == [{"update": 7, "text": "back to update 4: " + EVIL}]


def test_long_runs_are_averaged_within_their_attempt():
    lines = [
        {"kind": "update", "update": n, "loss": float(n), "parts": {"a": 2.0 * n}, "attempt": a}
        for a, count in ((0, 501), (1, 450))
        for n in range(count)
    ]
    section = training_section(lines)
    assert (section.made, section.averaged) == (951, 4)
    assert len(section.updates["loss"]) == 126 + 113
    assert section.updates["loss"][0] == pytest.approx(np.mean([0, 1, 2, 3]))
    assert section.updates["loss"][125] == 500, "the last block of an attempt is short"
    assert section.updates["parts"]["a"][1] == pytest.approx(2 * np.mean([4, 5, 6, 7]))


def test_numbers_that_blew_up_are_not_known():
    lines = [
        {"kind": "update", "update": 0, "loss": float("nan"), "gap": None},
        {"kind": "update", "update": 1, "loss": float("inf"), "gap": 1.0},
    ]
    columns = training_section(lines).updates
    assert columns["loss"] == [None, None]
    assert columns["gap"] == [None, 1.0]


# --- what the report says


def test_the_verdict_follows_the_outcome_and_names_losses():
    accepted = of_kind("accepted")
    assert accepted["verdict"]["status"] == "attention"
    assert accepted["verdict"]["headline"].startswith("Accepted, with")
    gains, losses = accepted["verdict"]["sentence"].split("Worse: ")
    assert "AUROC on street" in gains
    assert "AUROC on given" in losses
    returned = of_kind("returned")
    assert returned["verdict"]["status"] == "attention"
    assert "stays as it was" in returned["verdict"]["headline"]
    assert returned["comparison"]["n"] == N, "a refused candidate is compared too"


def test_the_verdict_speaks_of_unseen_sets_or_says_that_there_are_none():
    assert "Energy AUROC on street, never seen:" in of_kind("accepted")["verdict"]["sentence"]
    more = sides()
    more.ood["street_2"] = ("unseen", pair(21, labels=False))
    assert "Mean energy AUROC, never seen:" in report(both=more)["verdict"]["sentence"]
    none = sides()
    del none.ood["street"], none.ood["given"]
    verdict = report(both=none)["verdict"]
    assert verdict["status"] == "attention"
    assert verdict["headline"] == "Accepted, on unknown images of known kinds alone"
    assert "--ood" in verdict["sentence"]


def test_what_was_trained_on_proves_nothing():
    found = of_kind("accepted")
    assert found["ood"]["synthetic_blend"]["auroc"]["better"] is False
    names = [name for name, _, _ in finetune_view.changed(found, better=False)]
    assert not [name for name in names if "synthetic_blend" in name]
    assert "synthetic_blend" not in found["verdict"]["sentence"]
    assert "synthetic_blend" in render_finetune_markdown(found)


def test_means_are_over_groups_and_never_twice_the_same():
    found = of_kind("accepted")
    assert list(found["ood_means"]) == ["all that was not trained on"]
    more = sides()
    more.ood["street_2"] = ("unseen", pair(21, labels=False))
    assert list(report(both=more)["ood_means"]) == ["never seen", "all that was not trained on"]


def test_both_nets_are_attacked_alike():
    item = compare_robustness(robustness(0), robustness(1, lost=12)).to_dict()
    small, large = item["norms"][0]["rows"]
    assert small["worst_case"]["difference"]["value"] == pytest.approx(-12 / 40)
    assert small["worst_case"]["better"] is False
    assert large["worst_case"]["candidate"]["value"] == 0
    assert item["corrupted"]["accuracy"]["difference"]["value"] == pytest.approx(-12 / 40)
    cut = compare_robustness(robustness(0), robustness(1, cut=True)).to_dict()
    assert cut["norms"][0]["rows"][1]["worst_case"] is None
    assert cut["norms"][0]["rows"][1]["reason"] == "not run: budget"


# --- pages

FITTED, NONE = BestTemperature(1.5, "converged"), BestTemperature(1.0, "separable")
KINDS = {
    "accepted": report,
    "attacked": lambda: report(robustness=(robustness(0), robustness(1, lost=3))),
    "cut": lambda: report(robustness=(robustness(0), robustness(1, cut=True))),
    "returned": lambda: report(result("start returned")),
    "no candidate": lambda: report(result("start returned", acceptance=False), None),
    "no temperature": lambda: report(result(acceptance=False)),
    "one temperature": lambda: report(result(temperatures=Temperatures.of(FITTED, NONE))),
    "no temperatures": lambda: report(result(temperatures=Temperatures.of(NONE, NONE))),
    "no ood": lambda: report(both=sides(ood={})),
    "hostile": lambda: report(
        both=sides(ood={EVIL: ("unseen", pair(8, labels=False))}, note=EVIL, own=False),
        title=EVIL,
    ),
    "no history": lambda: report(SimpleNamespace(**{**vars(result()), "history": ()})),
}


@cache
def made(name):
    return KINDS[name]()


def of_kind(name):
    return copy.deepcopy(made(name))


@pytest.fixture(params=KINDS)
def kind(request):
    return of_kind(request.param)


def test_every_kind_fits_the_schema(kind):
    jsonschema.Draft202012Validator(SCHEMA).validate(kind)
    json.dumps(kind, allow_nan=False)


def test_every_kind_has_its_pages(kind):
    svgs = figures.inline_svgs(kind)
    page = render_finetune_html(kind, svgs)
    assert "<script" not in page
    assert "nan" not in re.sub(r"<[^>]+>", " ", page).lower().split()
    for name, svg in svgs.items():
        assert svg in page, f"{name} is drawn and not shown"
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    text = render_finetune_markdown(kind)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        lines = block.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, block
        assert lines[1].startswith("| --- |"), block
        assert len(lines) > 2, f"a blank line ends a table: {block}"
    console = Console(width=110, record=True, file=io.StringIO())
    render_finetune_terminal(kind, console)
    assert kind["verdict"]["headline"] in console.export_text()


def test_every_figure_is_said_with_its_interval():
    found = of_kind("attacked")
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", render_finetune_html(found, {})))
    plain = plain.replace("\u00a0", " ")
    for name, item, kind in finetune_view._all_changes(found):
        said = finetune_view.difference(item["difference"], kind)
        ends = finetune_view.difference_interval(item["difference"], kind)
        assert f"{said} {ends}" in plain, name


def test_a_missing_candidate_is_explained():
    found = of_kind("no candidate")
    assert found["comparison"] == {"not_run": NO_CANDIDATE}
    assert "Training reached no state" in render_finetune_html(found, {})
    assert found["robustness"] == {"not_run": NO_CANDIDATE}


@pytest.mark.parametrize("name", ["accepted", "one temperature", "no temperatures"])
def test_a_temperature_that_was_not_fitted_is_told(name):
    found = of_kind(name)
    given, after = found["comparison"]["temperature"], found["comparison"]["after"]
    assert given == found["acceptance"]["temperature"]
    page = re.sub(r"\s+", " ", render_finetune_html(found, {})).replace("\u00a0", " ")
    text = render_finetune_markdown(found)
    fitted = "T = 1.5 for the start and T = 0.7 for the candidate, each fitted on the selection"
    for said in (page, text):
        assert (fitted in said) == (name == "accepted")
        assert ("No temperature could be fitted" in said) == (name != "accepted")
    assert ("every row is right" in page) == (name != "accepted")
    # Without any temperature, the figures before it must not be counted twice.
    assert bool(after) == (name != "no temperatures")
    names = [key for key, _, _ in finetune_view.key_changes(found)]
    assert ("NLL after temperature" in names) == bool(after)
    worse_and_better = [entry for entry, _, _ in finetune_view._all_changes(found)]
    assert len(worse_and_better) == len(set(worse_and_better))


def test_acceptance_rows_are_named_as_such():
    own = finetune_view.limits(of_kind("accepted"))
    shared = finetune_view.limits(of_kind("hostile"))
    assert len(shared) == len(own) + 1
    assert "acceptance rows themselves" in " ".join(shared)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (0.0, "percent", "0 points"),
        (-0.0123, "percent", "−1.23 points"),
        (0.00004, "score", "+0.000"),
        (0.0, "small", "0.0000"),
        (-0.5, "fixed", "−0.500"),
        (None, "score", "n/a"),
    ],
)
def test_differences_in_words(value, kind, said):
    assert finetune_view.difference({"value": value}, kind) == said


# --- figures


@pytest.mark.parametrize("name", ["accepted", "hostile"])
def test_the_dumbbells_are_the_report(name):
    kind = of_kind(name)
    figure = figures.finetune_ood(kind)
    marks = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    wanted = [
        [found["auroc"][side]["value"] for side in ("start", "candidate")]
        for _, found in figures.finetune.ood_order(kind["ood"])
    ]
    np.testing.assert_allclose(marks, wanted)


def test_what_a_rollback_undid_is_thin():
    section = of_kind("accepted")["training"]
    figure = figures.finetune_training(section, "energy")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1]
    drawn = {
        (line.get_linewidth(), tuple(map(int, line.get_xdata())))
        for line in lines
        if line.get_color() == figures.style.OVER and len(set(line.get_xdata())) > 1
    }
    assert drawn == {(1.4, (0, 1, 2, 3)), (0.7, (3, 4, 5, 6, 7)), (1.4, (4, 5, 6, 7))}


def test_panels_without_numbers_are_left_out():
    assert figures.finetune.training_panels(of_kind("no history")["training"]) == []
    assert figures.finetune.training_panels(of_kind("accepted")["training"]) == list(
        figures.finetune.PANELS
    )


# --- files


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_the_files_are_whole_and_the_same_again(tmp_path):
    found = of_kind("attacked")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "weights.safetensors").write_text("kept")
    paths = write_finetune_outputs(found, tmp_path / "one")
    assert {path.relative_to(tmp_path / "one") for path in paths} == set(output.FINETUNE_OURS)
    write_finetune_outputs(found, tmp_path / "two")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert one.pop("weights.safetensors") == b"kept"
    assert one == two
    write_finetune_outputs(of_kind("no candidate"), tmp_path / "one")
    left = tree(tmp_path / "one")
    assert "weights.safetensors" in left
    assert "figures/finetune_robustness.png" not in left, "it is of an older run"


def test_nan_is_refused_and_leaves_nothing(tmp_path):
    found = of_kind("accepted")
    found["outcome"]["seconds"] = float("nan")
    with pytest.raises(DataError, match="JSON"):
        write_finetune_outputs(found, tmp_path / "out")
    assert not list(tmp_path.iterdir())
