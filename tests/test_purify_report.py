"""Purification in an evaluation of robustness: its stage, its pages, its options."""

import copy
import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from rich.console import Console
from test_cli_attack import invoke
from torch import nn

import ebm_guard.report
from ebm_guard import EnergyClassifier
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import DataError
from ebm_guard.intervals import proportion
from ebm_guard.report.render import (
    purification_view,
    render_attack_html,
    render_attack_markdown,
    render_attack_terminal,
    robustness_view,
)
from ebm_guard.report.robustness_section import robustness_section
from ebm_guard.robustness import AttackOptions, Purification, Threat, evaluate_robustness, runner
from ebm_guard.robustness.plan import Scope, make_plan
from ebm_guard.robustness.presets import preset_of
from ebm_guard.robustness.purify import MODES
from ebm_guard.robustness.runner import Speed

N = 3


def demo(n=N):
    part = load_demo("evaluation")
    pixels = torch.from_numpy(part.images[:n, None]).float() / 255
    return EnergyClassifier(demo_classifier()), pixels, torch.from_numpy(part.labels[:n]).long()


def evaluated(n=N, **changes):
    options = {
        "threats": (Threat.of("linf", ["0.15"]),),
        "corruptions": "none",
        "purify": Purification(1, start_noise_std=0.02),
    }
    say = changes.pop("say", None)
    return evaluate_robustness(*demo(n), options=AttackOptions(**options | changes), say=say)


@pytest.fixture(scope="module")
def found():
    return evaluated()


def test_the_minimum_is_below_every_mode(found):
    result = found.purification
    assert [mode.name for mode in result.modes] == list(MODES)
    assert result.n == N
    assert result.text == "0.15"
    for mode in result.modes:
        assert result.worst_case.value <= mode.robust_accuracy.value <= result.clean.value
        right = round(result.clean.value * result.n)
        assert mode.fooled == right - round(mode.robust_accuracy.value * result.n)
        assert mode.gradients > 0
    assert result.eot_samples >= 20
    assert result.success_draws >= 10
    assert result.bare_clean == found.clean
    assert result.bare == found.norms[0].at("0.15").worst_case
    assert "With purification (1 SGLD steps): " in robustness_section(found).verdict.sentence


def same(one, two):
    dicts = [item.to_dict() for item in (one, two)]
    return all(dicts[0][key] == dicts[1][key] for key in dicts[0] if key != "run")


@pytest.mark.slow
def test_it_repeats_and_resumes(found, tmp_path):
    def stop(line):
        if "identity" in line:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        evaluated(state=state, say=stop)
    with pytest.raises(DataError, match="another evaluation"):
        evaluated(state=state, resume=True, purify=None)
    assert same(evaluated(state=state, resume=True), found)


@pytest.mark.slow
def test_without_it_nothing_changes(found):
    plain = evaluated(purify=None)
    assert plain.purification is None
    assert plain.norms == found.norms
    assert plain.flags == found.flags


@pytest.mark.slow
def test_what_the_budget_cuts_is_named(monkeypatch):
    monkeypatch.setattr(runner.Runner, "left", property(lambda self: 0.0))
    cut = evaluated(time_budget=1e9)
    assert cut.purification is None
    assert any("purification" in item["name"] for item in cut.left_out)


@pytest.mark.slow
def test_a_random_model_is_judged_by_draws_of_its_own():
    """Dropout of the user's model at inference: one mask for a batch, so draws are not batched."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = demo_classifier()
            self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,), "input_size": (1, 8, 8)}

        def forward(self, x):
            mask = (torch.rand(x.shape[1:]) > 0.05).float()
            return self.net(x * mask)

    model = Dropping().eval()
    _, pixels, labels = demo(3)
    options = AttackOptions(
        threats=(Threat.of("linf", ["0.1"]),), corruptions="none", purify=Purification(1)
    )
    one, two = (
        evaluate_robustness(EnergyClassifier(model), pixels, labels, options=options)
        for _ in range(2)
    )
    assert same(one, two)
    transfer = one.purification.modes[-1]
    assert transfer.label == "PGD-10, 20 gradients a step"


@pytest.mark.slow
def test_a_model_without_gradient_is_left_out_with_the_reason():
    classifier, pixels, labels = demo(2)
    model = classifier.model

    def closed(x):
        with torch.no_grad():
            return model(x)

    # Less than a grey value: nothing is pushed on to be wrong as a file.
    options = AttackOptions(
        threats=(Threat.of("linf", ["0.003"]),), corruptions="none", purify=Purification(1)
    )
    closed_classifier = EnergyClassifier(closed, preprocessing=classifier.preprocessing)
    found = evaluate_robustness(closed_classifier, pixels, labels, options=options)
    assert found.purification is None
    (reason,) = [item["reason"] for item in found.left_out if item["name"] == "purification"]
    assert "no gradient reaches" in reason


def test_the_plan_names_it():
    threats = (Threat.of("linf", ["0.1", "0.2"]),)
    scope = Scope(preset_of("quick", 10), threats, ((1.0, 0.5),), 100, with_gate=False, ood={})
    speed = Speed(0.001, 0.002)
    plain = make_plan(scope, speed, None)
    settings = Purification(4)
    plan = make_plan(replace(scope, purify=settings), speed, None)
    (line,) = set(plan.lines) - set(plain.lines)
    assert line.images == 32
    # Half of the images stand at the reference: each pays for 11 answers, the others for 2.5.
    answers = 32 * (0.5 * 11 + 0.5 * 2.5)
    per_answer = 2 * (20 * 5 + 11 * 4) + 1 + 11 * 4
    assert line.gradients == round(answers * per_answer)
    assert line.forwards == round(answers * 33)


# --- the report


SCHEMAS = {
    name: json.loads((Path(ebm_guard.report.__file__).parent / name).read_text(encoding="utf-8"))
    for name in ("attack_schema.json", "schema.json")
}
FIXTURES = Path(__file__).parent / "fixtures"


def report_of(change=None):
    section = json.loads((FIXTURES / "robustness_standard.json").read_text(encoding="utf-8"))
    share = [proportion(count, 128).to_dict() for count in (128, 96, 64, 32, 0)]
    section["purification"] = {
        "settings": Purification(8, radius=0.1).to_dict(),
        "norm": "linf",
        "epsilon": 8 / 255,
        "text": "8/255",
        "n": 128,
        "clean": share[1],
        "bare_clean": share[0],
        "bare": share[4],
        "modes": [
            {
                "name": name,
                "label": "PGD-20, 20 gradients a step",
                "robust_accuracy": share[2 + (place > 0)],
                "fooled": 32,
                "gradients": 123456,
                "forwards": 6543,
                "reason": "",
            }
            for place, name in enumerate(MODES)
        ],
        "worst_case": share[4],
        "eot_samples": 20,
        "success_draws": 11,
        "gradients_per_image": 8,
        "forwards_per_image": 1,
    }
    if change is not None:
        change(section["purification"])
    example = json.loads((FIXTURES / "report_example.json").read_text(encoding="utf-8"))
    meta = {**copy.deepcopy(example["meta"]), "settings": section["settings"], "protocol": []}
    data = example["data"]["evaluation"]
    return {"schema": "ebm_guard.attack/1", "meta": meta, "data": data, "robustness": section}


def cut(result):
    result["modes"][1].update(robust_accuracy=None, fooled=0, reason="not run: budget")
    result["worst_case"] = result["bare"] = None


@pytest.mark.parametrize("change", [None, cut])
def test_the_pages_show_it(change):
    report = report_of(change)
    jsonschema.Draft202012Validator(SCHEMAS["attack_schema.json"]).validate(report)
    html, markdown = render_attack_html(report, {}), render_attack_markdown(report)
    stream = io.StringIO()
    render_attack_terminal(report, Console(file=stream, width=400))
    for text in (html, markdown, stream.getvalue()):
        assert "8 SGLD steps" in text
        assert "broken by adaptive attacks" in text
        assert ("not all three gradients were run" in text) == (change is not None)
    for text in (html, markdown):
        assert "Purified, unrolled" in text
        assert ("not run: budget" in text) or change is None
    assert "by at most 0.1" in html
    names = [name for name, _, _ in robustness_view.key_metrics(report["robustness"])]
    assert any("with purification" in name for name in names) == (change is None)


def test_a_page_without_it_is_as_before():
    report = report_of()
    report["robustness"]["purification"] = None
    gone = copy.deepcopy(report)
    del gone["robustness"]["purification"]
    assert render_attack_markdown(report) == render_attack_markdown(gone)
    assert "urification" not in render_attack_html(gone, {})
    assert purification_view.result(gone["robustness"]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("worst_case", 0.5), ("modes", []), ("n", 0), ("eot_samples", None), ("extra", 1)],
)
def test_the_schemas_refuse(name, value):
    report = report_of(lambda result: result.update({name: value}))
    schema = SCHEMAS["attack_schema.json"]
    part = {"$ref": "#/$defs/purification", "$defs": schema["$defs"]}
    checker = jsonschema.Draft202012Validator(part)
    assert checker.is_valid(report_of()["robustness"]["purification"])
    assert not checker.is_valid(report["robustness"]["purification"])


# --- the command line


def test_the_command_writes_it(tmp_path):
    code, out, err = invoke(
        "attack", "--data", "demo:", "--epsilon", "0.1", "--attack-images", "2", "--quiet",
        "--corruptions", "none", "--purify", "1", "--purify-radius", "0.2", "--purify-step-size",
        "0.1", "--purify-noise", "0.01", "--json", "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(out)
    assert json.loads((tmp_path / "out" / "robustness.json").read_text()) == content
    jsonschema.Draft202012Validator(SCHEMAS["attack_schema.json"]).validate(content)
    result = content["robustness"]["purification"]
    settings = {"num_steps": 1, "step_size": 0.1, "noise_std": 0.01, "radius": 0.2}
    assert settings.items() <= result["settings"].items()
    assert np.isfinite(result["worst_case"]["value"])
    assert "With purification" in (tmp_path / "out" / "robustness.html").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["attack", "--purify", "0"], "0"),
        (["attack", "--purify-radius", "0.1"], "without --purify"),
        (["attack", "--purify", "2", "--purify-radius", "-1"], "radius"),
        (["report", "--purify", "2"], "without --attacks"),
    ],
)
def test_bad_usage_is_explained(tmp_path, args, words):
    code, _, err = invoke(*args, "--data", "demo:", "-o", tmp_path / "out")
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()
