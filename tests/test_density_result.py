"""The density of a run: checked, offered or refused, saved, loaded and shown."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from density_cases import (
    classifier_around,
    images,
    linear_net,
    rows,
    start_net,
    truth,
)
from finetune_cases import quick
from finetune_examples import result as example
from finetune_examples import sides
from safetensors import safe_open
from safetensors.torch import save_file
from test_finetune_report import SCHEMA

from ebm_guard.errors import DataError, InvalidInputError, ModelOutputError, NotFittedError
from ebm_guard.report.finetune_density import density_section
from ebm_guard.report.finetune_report import finetune_report
from ebm_guard.report.render import render_finetune_html, render_finetune_markdown
from ebm_guard.sampling.densities import GaussianMixture
from ebm_guard.training import finetune, finetuning, finishing
from ebm_guard.training.density import checks
from ebm_guard.training.density.record import EnergyDensity, in_bits, load_density

SHAPE = (4, 4)


def toy_run(**changes):
    settings = {
        "objective": "nce",
        "objective_settings": {"base": "gaussian"},
        "updates": 12,
        "batch_size": 64,
        "evaluate_every": 6,
        "outlier_rows": 30,
        "max_acc_drop": 0.05,
        "max_nll_rise": 0.2,
    }
    start = classifier_around(start_net(SHAPE))
    return finetune(start, images(600, 1), images(1300, 2), **(settings | changes))


@pytest.fixture(scope="module")
def run():
    """Gaussian classes, which the model can be the density of; the start knows them badly."""
    return toy_run()


def test_a_density_that_agrees_is_offered_and_is_that_of_the_data(run):
    density = run.density
    assert run.accepted
    assert density.offered, density.reason
    # Where log Z is known it is offered, and not what was learned.
    assert density.constant == density.checks["exact"] != density.checks["learned"]
    assert abs(density.checks["learned"] - density.constant) < 0.2
    points, pixels, _ = rows(400, 5, SHAPE)
    found = density.log_density(points)
    gap = truth(SHAPE).log_density(points) - found
    # 600 rows fit 16 means of 3 classes and a covariance: about (48 + 136) / (2 * 600) nats.
    assert abs(float(gap.mean())) < 0.5
    # Images pass the net: the same up to what the pixels' clamp and float32 take.
    assert torch.allclose(density.log_density(pixels), found, atol=1e-3)
    bits = density.bits_per_dim(points)
    assert torch.allclose(bits, -found / (16 * math.log(2)))
    low, high = density.checks["bits"]["low"], density.checks["bits"]["high"]
    assert low - 0.2 < float(bits.mean()) < high + 0.2
    assert run.story[-2].startswith("A density of features is offered: log Z = ")
    assert "no more than its noise" in run.story[-2]
    assert "no more than its noise" in density.reason


def test_it_is_saved_and_loads_again(run, tmp_path):
    run.save(tmp_path)
    facts = json.loads((tmp_path / "finetune.json").read_text())
    assert facts["density"]["status"] == "offered"
    points, pixels, _ = rows(20, 6, SHAPE)
    alone = load_density(tmp_path / "density.safetensors")
    assert torch.equal(alone.log_density(points), run.density.log_density(points))
    with pytest.raises(NotFittedError, match="loaded without its net"):
        alone.log_density(pixels)
    winner = classifier_around(run.model)
    whole = load_density(tmp_path / "density.safetensors", winner)
    assert torch.equal(whole.log_density(pixels), run.density.log_density(pixels))
    # One image alone proves nothing about a layer, but its density can be asked for.
    fresh = load_density(tmp_path / "density.safetensors", classifier_around(run.model))
    assert torch.allclose(fresh.log_density(pixels[:1]), run.density.log_density(pixels)[:1])
    with pytest.raises(DataError, match="other weights"):
        load_density(tmp_path / "density.safetensors", classifier_around(linear_net(SHAPE)))
    # A later run into the same folder without a density leaves none behind.
    replace(run, density=None).save(tmp_path)
    assert not (tmp_path / "density.safetensors").exists()
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read"):
        load_density(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("damage", ["width", "nan", "none"])
def test_a_damaged_head_does_not_load(run, damage, tmp_path):
    path = run.density.save(tmp_path / "density.safetensors")
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = file.metadata()
    if damage == "width":
        tensors["head.weight"] = tensors["head.weight"][:, :5].contiguous()
    elif damage == "nan":
        tensors["head.bias"][0] = math.nan
    else:
        del tensors["head.weight"]
    save_file(tensors, path, facts)
    with pytest.raises(DataError, match=r"is damaged: .*head"):
        load_density(path)


def test_points_that_have_no_density_are_refused(run):
    density, (points, pixels, _) = run.density, rows(3, 6, SHAPE)
    small = (pixels * 255).round().to(torch.uint8)
    assert torch.allclose(density.log_density(small), density.log_density(small.float() / 255))
    for bad, match in [
        (points.masked_fill(points > 0, math.nan), "some NaN or infinite"),
        (pixels.masked_fill(pixels > 0.5, math.nan), "some NaN or infinite"),
        (points.round().long(), "of torch.int64; needed finite features"),
        (pixels * 255, r"needed pixels in \[0, 1\]"),
    ]:
        with pytest.raises(InvalidInputError, match=match):
            density.log_density(bad)


@pytest.mark.slow
def test_what_fce_learned_is_offered():
    pytest.importorskip("zuko")
    found = toy_run(objective="fce")
    assert found.accepted
    assert found.density.offered, found.density.reason


def test_what_is_not_offered_says_why():
    normal = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2))
    made = EnergyDensity("not offered", "the checks disagree", "features", normal, 0.0, {}, None)
    for ask in (made.log_density, made.bits_per_dim):
        with pytest.raises(NotFittedError, match="no density: the checks disagree"):
            ask(torch.zeros(1, 2))
    with pytest.raises(NotFittedError, match="no density to save"):
        made.save("nowhere")
    head = torch.ones(2, 2), torch.zeros(2)
    with pytest.raises(InvalidInputError, match=r"needed features \(N, 2\)"):
        replace(made, status="offered", head=head).log_density(torch.zeros(1, 3))
    assert in_bits(torch.zeros(1), 3, "pixels") == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "nce", "objective_settings": {"base": "mixture"}},
        pytest.param(
            {"objective": "nce", "objective_settings": {"space": "pixels"}, "scope": "all"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"objective": "fce"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: settings["objective"],
)
def test_digits_go_from_end_to_end_and_are_too_few(settings, monkeypatch):
    if settings["objective"] == "fce":
        pytest.importorskip("zuko")
    monkeypatch.setattr(checks, "_TEMPERATURES", (2,))
    # Wide limits: what is looked at is the density of what was accepted.
    wide = {"scope": "head", "max_acc_drop": 1.0, "max_nll_rise": 50.0, "max_ece_rise": 1.0}
    monkeypatch.setattr(finishing, "_accept", accepting)
    density = (found := quick(**(wide | settings))).density
    assert found.accepted
    assert not density.offered
    assert "too few held-out rows to tell" in density.reason
    assert found.to_dict()["density"] == json.loads(json.dumps(density.to_dict()))
    assert f"No density is offered: {density.reason}." in found.story
    with pytest.raises(NotFittedError, match="no density"):
        density.log_density(torch.zeros(1, 1, 8, 8))


def accepting(*_):
    return SimpleNamespace(passed=True, tests=(), story=[], to_dict=dict)


def refusing(*_):
    test = SimpleNamespace(passed=False, what="it is better")
    return SimpleNamespace(passed=False, tests=(test,), story=[], to_dict=dict)


def reported_reason(result):
    given = SimpleNamespace(candidate=1, density=result.density, no_density=result.no_density)
    return density_section(given, "no candidate").not_run


def test_a_start_that_is_returned_has_no_density_to_check(monkeypatch):
    monkeypatch.setattr(finishing, "_accept", refusing)
    monkeypatch.setattr(finishing, "measure_density", None)
    found = toy_run(updates=2)
    assert found.candidate is not None
    assert not found.accepted
    assert found.density is None
    assert "No density is offered: the start was returned, and" in found.story[-2]
    assert reported_reason(found).startswith("the start was returned")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelOutputError("energies are not")])
def test_trouble_in_the_checks_does_not_lose_the_result(monkeypatch, error):
    seconds, plain = [], finetuning.finish

    def failing(*_):
        raise error

    def finish(of, trained, so_far):
        seconds.append(so_far)
        return plain(of, trained, so_far)

    monkeypatch.setattr(finishing, "_accept", accepting)
    monkeypatch.setattr(finishing, "measure_density", failing)
    monkeypatch.setattr(finetuning, "finish", finish)
    found = toy_run(updates=2)
    assert found.accepted
    assert found.interrupted == isinstance(error, KeyboardInterrupt)
    assert "No density is offered: its checks " in found.story[-2]
    assert reported_reason(found).startswith("its checks ")
    # The time of the end counts.
    assert found.seconds > seconds[0]


def test_other_objectives_offer_none():
    found = quick(objective="cross_entropy", updates=2)
    assert found.density is None
    assert found.to_dict()["density"] is None


def reported(density):
    given = example()
    given.density = density
    net = classifier_around(linear_net((2, 2)))
    pair = sides()
    content = finetune_report(given, pair, net, {}, known=pair.evaluation.start).to_dict()
    jsonschema.validate(content, SCHEMA)
    return content


def test_the_report_shows_checks_and_bits(run):
    content = reported(run.density)
    assert content["density"]["status"] == "offered"
    page, text = render_finetune_html(content, {}), render_finetune_markdown(content)
    assert "Density offered" in page
    for part in (page, text):
        assert "Bits per dimension" in part
        assert f"{run.density.constant:.3f} nats" in part
        assert "log Z, exact" in part
        assert "no more than its noise" in part
        assert f"{run.density.checks['learned']:.3f} nats" in part
    refused = reported(replace(run.density, status="not offered", reason="c and log Z <b>part</b>"))
    page, text = render_finetune_html(refused, {}), render_finetune_markdown(refused)
    assert "No density offered" in page
    assert "<b>part" not in page
    assert "Bits per dimension" not in page + text
    without = reported(None)
    assert without["density"]["not_run"].startswith("this objective learns no density")
    assert 'id="density"' not in render_finetune_html(without, {})
