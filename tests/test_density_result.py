"""The density of a run: checked, offered or refused, saved, loaded and shown."""

import json
import math
from dataclasses import replace

import jsonschema
import pytest
import torch
from density_cases import classifier_around, images, linear_net, rows, truth
from finetune_cases import quick
from finetune_examples import result as example
from finetune_examples import sides
from test_finetune_report import SCHEMA

from ebm_guard.errors import DataError, InvalidInputError, NotFittedError
from ebm_guard.report.finetune_report import finetune_report
from ebm_guard.report.render import render_finetune_html, render_finetune_markdown
from ebm_guard.sampling.densities import GaussianMixture
from ebm_guard.training import finetune
from ebm_guard.training.density.checks import check_density
from ebm_guard.training.density.record import EnergyDensity, in_bits, load_density
from ebm_guard.training.density.spaces import FeatureSpace

SHAPE = (4, 4)


@pytest.fixture(scope="module")
def run():
    """Gaussian classes, which the model can be the density of; the start knows them badly."""
    start = linear_net(SHAPE)
    with torch.no_grad():
        start[1].weight.add_(0.5 * truth(SHAPE).means)
    return finetune(
        classifier_around(start),
        images(600, 1),
        images(600, 2),
        objective="nce",
        updates=12,
        batch_size=64,
        evaluate_every=6,
        outlier_rows=30,
        max_acc_drop=0.05,
        max_nll_rise=0.2,
    )


def test_a_density_that_agrees_is_offered_and_is_that_of_the_data(run):
    density = run.density
    assert run.accepted
    assert density.offered, density.reason
    assert abs(density.constant - density.checks["exact"]) < 0.2
    points, pixels, _ = rows(400, 5, SHAPE)
    found = density.log_density(points)
    gap = truth(SHAPE).log_density(points) - found
    # 512 rows fit 16 means of 3 classes and a covariance: about (48 + 136) / (2 * 512) nats.
    assert abs(float(gap.mean())) < 0.5
    # Images pass the net: the same up to what the pixels' clamp and float32 take.
    assert torch.allclose(density.log_density(pixels), found, atol=1e-3)
    bits = density.bits_per_dim(points)
    assert torch.allclose(bits, -found / (16 * math.log(2)))
    low, high = density.checks["bits"]["low"], density.checks["bits"]["high"]
    assert low - 0.2 < float(bits.mean()) < high + 0.2
    assert run.story[-2].startswith("A density of features is offered: log Z = ")


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
    with pytest.raises(DataError, match="other weights"):
        load_density(tmp_path / "density.safetensors", classifier_around(linear_net(SHAPE)))
    # A later run into the same folder without a density leaves none behind.
    replace(run, density=None).save(tmp_path)
    assert not (tmp_path / "density.safetensors").exists()
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot read"):
        load_density(tmp_path / "bad.safetensors")


def checked(shift=0.0, moved=0.0, scale=1.0):
    """Checks of the discriminant's head, with its energies shifted, or on other held-out rows."""
    space, density = FeatureSpace(), truth()
    middle = density.weights @ density.means
    space._noise = density
    space._base = GaussianMixture(torch.ones(1), middle[None], density.scale_tril)
    weight = scale * (density.means - middle)
    squares = density.means.square().sum(1) - middle.square().sum()
    bias = density.weights.log() - scale * squares / 2 + shift

    def energy(points):
        return -torch.logsumexp(points @ weight.T + bias, dim=1)

    generator = torch.Generator().manual_seed(0)
    train, held_out = (rows(1500, seed)[0] + moved for seed in (1, 2))
    return check_density(space, energy, train, held_out, generator, head=(weight, bias))


def test_checks_agree_with_the_truth_and_follow_a_constant():
    plain, shifted = checked(), checked(shift=7.0)
    assert plain.problems() == shifted.problems() == []
    assert plain.exact == pytest.approx(0, abs=1e-9)
    assert shifted.exact == pytest.approx(7)
    assert shifted.constant.value == pytest.approx(7 + plain.constant.value, abs=0.2)
    assert abs(plain.difference.value) < 0.05


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_an_energy_that_is_no_density_of_these_data_is_told(scale):
    problems = checked(scale=scale).problems()
    assert problems[0].startswith("it tells held-out data from noise in")
    assert scale < 1 or "apart where" in problems[1]
    assert scale < 1 or "in closed form" in problems[2]


def test_the_checks_are_of_the_normaliser_and_blind_to_data_that_lie_elsewhere():
    """A density that is its own noise passes; bits per dimension tell the two sets apart."""
    here, there = checked(), checked(moved=1.0)
    assert there.problems() == []
    assert there.bits.low > here.bits.high


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
def test_digits_go_from_end_to_end(settings):
    if settings["objective"] == "fce":
        pytest.importorskip("zuko")
    found = quick(**({"scope": "head"} | settings))
    density = found.density
    assert density is not None
    assert density.offered <= found.accepted
    assert found.to_dict()["density"] == json.loads(json.dumps(density.to_dict()))
    assert any("density" in line for line in found.story)
    if not found.accepted:
        assert "the start was returned" in density.reason
    elif not density.offered:
        with pytest.raises(NotFittedError, match="no density"):
            density.log_density(torch.zeros(1, 1, 8, 8))


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
    refused = reported(replace(run.density, status="not offered", reason="c and log Z <b>part</b>"))
    page, text = render_finetune_html(refused, {}), render_finetune_markdown(refused)
    assert "No density offered" in page
    assert "<b>part" not in page
    assert "Bits per dimension" not in page + text
    without = reported(None)
    assert without["density"]["not_run"].startswith("this objective learns no density")
    assert 'id="density"' not in render_finetune_html(without, {})
