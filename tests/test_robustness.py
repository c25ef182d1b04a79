"""The evaluation as a whole: curves, denominators, the gate in the loop, budgets, resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ebm_guard import EnergyClassifier, Guard
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import DataError, InvalidInputError, UnsupportedModelError
from ebm_guard.model import Preprocessing
from ebm_guard.robustness import AttackOptions, Images, Threat, evaluate_robustness
from ebm_guard.robustness.plan import FEWEST, Scope, make_plan
from ebm_guard.robustness.presets import PRESETS, preset_of
from ebm_guard.robustness.runner import Runner, Speed, Store
from ebm_guard.robustness.subject import Subject, rounded
from ebm_guard.robustness.threat import default_threats, parse_epsilon

THREATS = (Threat.of("linf", ["0.05", "0.15", "0.4"]),)
N = 20
STANDARD = AttackOptions(preset="standard", threats=(Threat.of("linf", ["0.15", "0.4"]),), images=N)


def demo_rows(role, limit=None):
    part = load_demo(role)
    pixels = torch.from_numpy(part.images[:limit]).float() / 255
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    labels = None if part.labels is None else torch.from_numpy(part.labels[:limit]).long()
    return pixels, labels


@pytest.fixture(scope="module")
def guard():
    guard = Guard(EnergyClassifier(demo_classifier()))
    pixels, labels = demo_rows("calibration")
    return guard.fit([(guard.classifier.pixels(pixels), labels)])


@pytest.fixture(scope="module")
def found(guard):
    pixels, labels = demo_rows("evaluation", N)
    ood, _ = demo_rows("near_ood", 40)
    return evaluate_robustness(guard, pixels, labels, ood={"near": ood}, options=STANDARD)


def plain(found):
    """The record without what differs between two runs."""
    return {key: value for key, value in found.to_dict().items() if key != "run"}


def test_epsilon_zero_is_the_clean_accuracy(guard, found):
    pixels, labels = demo_rows("evaluation", N)
    right = guard.classifier(guard.classifier.pixels(pixels)).argmax(dim=1) == labels
    assert found.clean.value == pytest.approx(float(right.double().mean()), abs=1e-12)
    assert found.clean.n == N


def test_curves_fall_and_every_attack_only_takes_away(found):
    (norm,) = found.norms
    before = found.clean.value
    for row in norm.epsilons:
        for attack in row.attacks:
            assert attack.robust_accuracy.value <= before
            before = attack.robust_accuracy.value
        assert row.worst_case.value == before
        assert row.worst_case.n == N
        assert row.rounded.value >= row.worst_case.value
        low, high = row.worst_case.low, row.worst_case.high
        assert low <= row.worst_case.value <= high


def test_the_success_rate_is_of_images_right_at_first(found):
    right = round(found.clean.value * found.n)
    for row in found.norms[0].epsilons:
        assert row.success_rate.n == right
        lost = right - round(row.worst_case.value * found.n)
        assert row.success_rate.value == pytest.approx(lost / right)


def test_the_gate_never_looks_better_to_one_who_knows_it(found):
    for row in found.norms[0].epsilons:
        gated = row.gated
        assert gated.aware.value <= gated.plain.value
        # Wrong and accepted is a part of wrong.
        assert gated.aware.value >= row.worst_case.value
        assert gated.success_rate.n == found.gate["right_and_accepted"]
    refusals = [row.gated.forced_rejection.value for row in found.norms[0].epsilons]
    assert refusals == sorted(refusals)


def test_ood_images_are_pushed_in(found):
    rows = found.ood["near"].rows
    assert rows[0].epsilon == 0
    shares = [row.accepted.value for row in rows]
    areas = [row.auroc.value for row in rows]
    assert shares == sorted(shares)
    assert areas == sorted(areas, reverse=True)


def test_the_minimal_distances_give_the_same_curve_within_reach(found):
    """FMN and the attacks with a budget are different code: their curves must not be far apart."""
    minimal = found.norms[0].minimal
    for row in found.norms[0].epsilons:
        assert abs(minimal.curve[row.text].value - row.worst_case.value) <= 3 / N


def test_a_naive_loop_agrees_on_the_worst_case(guard, found):
    """Twenty steps of the plainest PGD never fool an image that the worst case calls robust."""
    pixels, labels = demo_rows("evaluation", N)
    model, prepare = guard.classifier.model, guard.classifier.preprocessing.normalize
    row = found.norms[0].epsilons[0]
    x = pixels.clone()
    fooled = model(prepare(x)).argmax(dim=1) != labels
    for _ in range(20):
        x.requires_grad_()
        loss = nn.functional.cross_entropy(model(prepare(x)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        step = x.detach() + row.epsilon / 8 * gradient.sign()
        x = (pixels + (step - pixels).clamp(-row.epsilon, row.epsilon)).clamp(0, 1)
        fooled |= model(prepare(x)).argmax(dim=1) != labels
    assert row.worst_case.value <= 1 - float(fooled.double().mean())


@pytest.mark.slow
def test_everything_is_json_and_repeats(guard, found):
    json.dumps(found.to_dict(), allow_nan=False)
    pixels, labels = demo_rows("evaluation", 12)
    one, two = (
        evaluate_robustness(guard, pixels, labels, options=AttackOptions(threats=THREATS))
        for _ in range(2)
    )
    assert plain(one) == plain(two)


def test_nothing_of_the_model_is_touched(guard):
    model = guard.classifier.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [
        (part.training, [p.requires_grad for p in part.parameters()]) for part in model.modules()
    ]
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    pixels, labels = demo_rows("evaluation", 8)
    evaluate_robustness(
        guard, pixels, labels, options=AttackOptions(threats=THREATS, corruptions="none")
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == drawn).all()  # noqa: NPY002
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert flags == [
        (part.training, [p.requires_grad for p in part.parameters()]) for part in model.modules()
    ]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_gate_its_numbers_are_missing_and_say_why(guard):
    pixels, labels = demo_rows("evaluation", 16)
    found = evaluate_robustness(
        guard.classifier,
        pixels,
        labels,
        no_gate="too few rows",
        options=AttackOptions(threats=THREATS, corruptions="none"),
    )
    assert found.gate == {"not_run": "too few rows"}
    assert found.clean_gated is None
    assert all(row.gated is None for row in found.norms[0].epsilons)


@pytest.mark.slow
def test_without_labels_the_predictions_stand_for_them(guard):
    pixels, _ = demo_rows("evaluation", 16)
    found = evaluate_robustness(
        guard, Images(pixels), options=AttackOptions(threats=THREATS, corruptions="none")
    )
    assert found.label_source == "predicted labels"
    assert found.clean.value == 1


def test_a_budget_that_allows_nothing_gives_no_weaker_number(guard):
    pixels, labels = demo_rows("evaluation", 16)
    found = evaluate_robustness(
        guard, pixels, labels, options=AttackOptions(threats=THREATS, time_budget=1e-9)
    )
    for row in found.norms[0].epsilons:
        assert row.worst_case is None
        assert all(attack.reason == "not run: budget" for attack in row.attacks)
        assert row.gated.aware is None
    assert found.corruptions is None
    assert found.energy_path is None
    assert len(found.left_out) >= 4
    assert all("budget" in item["reason"] for item in found.left_out)


class StoppedError(Exception):
    pass


def interrupted_after(stages):
    seen = []

    def say(line):
        seen.append(line)
        if len(seen) > stages:
            raise StoppedError

    return say


@pytest.mark.parametrize(
    "stages",
    [
        3,
        pytest.param(0, marks=pytest.mark.slow),
        pytest.param(7, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_evaluation_goes_on_where_it_stopped(guard, tmp_path, stages):
    pixels, labels = demo_rows("evaluation", 12)
    options = AttackOptions(threats=THREATS, state=tmp_path / "state")
    whole = evaluate_robustness(guard, pixels, labels, options=replace(options, state=None))
    with pytest.raises(StoppedError):
        evaluate_robustness(guard, pixels, labels, options=options, say=interrupted_after(stages))
    lines = []
    resumed = evaluate_robustness(
        guard, pixels, labels, options=replace(options, resume=True), say=lines.append
    )
    assert plain(resumed) == plain(whole)
    assert sum("kept" in line for line in lines) == stages + 1


@pytest.mark.slow
def test_another_evaluation_is_not_resumed(guard, tmp_path):
    pixels, labels = demo_rows("evaluation", 16)
    options = AttackOptions(threats=THREATS, state=tmp_path / "state", corruptions="none")
    evaluate_robustness(guard, pixels, labels, options=options)
    with pytest.raises(DataError, match="another evaluation"):
        evaluate_robustness(guard, pixels, labels, options=replace(options, seed=1, resume=True))
    # Without --resume the old stages are thrown away.
    evaluate_robustness(guard, pixels, labels, options=replace(options, seed=1))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(DataError, match="other files"):
        Store(tmp_path, {}, resume=False)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_a_damaged_stage_is_run_again(tmp_path):
    store = Store(tmp_path / "state", {"a": 1}, resume=False)
    store.put("x", {"forwards": np.array(3)})
    next((tmp_path / "state").glob("*.npz")).write_bytes(b"PK no zip")
    runner = Runner(Speed(1, 1), store=Store(tmp_path / "state", {"a": 1}, resume=True))
    assert runner.run("x", "again", lambda: {"forwards": torch.tensor([4])})["forwards"] == 4


class Coin(nn.Module):
    """Right classes, with noise that flips one answer in three of the doubtful ones."""

    def __init__(self, scale):
        super().__init__()
        self.inner, self.scale = demo_classifier(), scale
        self.pretrained_cfg = self.inner.pretrained_cfg

    def forward(self, x):
        logits = self.inner(x)
        return logits + self.scale * torch.randn_like(logits)


@pytest.mark.slow
def test_random_inference_is_found_and_averaged(guard):
    pixels, labels = demo_rows("evaluation", 12)
    found = evaluate_robustness(
        EnergyClassifier(Coin(0.3).eval()),
        pixels,
        labels,
        options=AttackOptions(threats=(Threat.of("linf", ["0.1"]),), corruptions="none"),
    )
    assert found.settings["random_inference"]
    assert found.settings["eot_samples"] == 20
    assert found.settings["success_draws"] >= 10
    assert {flag["name"]: flag["status"] for flag in found.flags}["random_forward"] == "raised"


def test_probabilities_are_refused(guard):
    inner = demo_classifier()
    model = nn.Sequential(inner, nn.Softmax(dim=1)).eval()
    classifier = EnergyClassifier(model, preprocessing=Preprocessing.from_model(inner))
    pixels, labels = demo_rows("evaluation", 8)
    with pytest.raises(UnsupportedModelError, match="probabilities"):
        evaluate_robustness(classifier, pixels, labels)


@pytest.mark.slow
def test_a_given_attack_runs_last_and_is_judged_by_us(guard):
    pixels, labels = demo_rows("evaluation", 24)
    calls = []

    def liar(model, x, y, epsilon):
        calls.append(len(x))
        return torch.zeros_like(x)  # far outside the ball

    options = AttackOptions(threats=THREATS, attackers={"liar": liar}, corruptions="none")
    found = evaluate_robustness(guard, pixels, labels, options=options)
    for row in found.norms[0].epsilons:
        assert row.attacks[-1].label == "liar"
        assert row.attacks[-1].robust_accuracy.value == row.attacks[-2].robust_accuracy.value
    assert calls
    assert found.norms[0].epsilons[-1].outside >= 1


def test_rounded_images_are_files():
    pixels = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    values = rounded(pixels) * 255
    assert torch.allclose(values, values.round(), atol=1e-4)
    assert (rounded(pixels) - pixels).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8", "8/255"),
        ("0", "> 0"),
        ("-1/255", "number"),
        ("8/0", "number"),
        ("x", "number"),
        ("nan", "number"),
    ],
)
def test_bad_budgets_are_explained(text, words):
    with pytest.raises(InvalidInputError, match=words):
        parse_epsilon(text)


def test_budgets_are_sorted_and_the_largest_is_the_reference():
    threat = Threat.of("linf", ["8/255", "0.5/255", "2/255"])
    assert [epsilon.text for epsilon in threat.epsilons] == ["0.5/255", "2/255", "8/255"]
    assert threat.reference.text == "8/255"
    assert parse_epsilon("2", "l2").value == 2
    assert [threat.norm for threat in default_threats(3, with_l2=True)] == ["linf", "l2"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_their_budget(name):
    preset = preset_of(name, 3)
    assert all(any(letter.isdigit() for letter in item.label) for item in preset.attackers)
    # Three classes have two wrong ones.
    targeted = [item for item in preset.attackers if item.name == "apgd_targeted"]
    assert all(len(item.goals) == 2 for item in targeted)


def test_a_plan_cuts_images_and_no_steps():
    scope = Scope(
        preset_of("standard", 10), THREATS, ((1.0, 1.0, 1.0),), 10_000, True, {"far": 900}
    )
    whole = make_plan(scope, Speed(0.001, 0.003), None)
    cut = make_plan(scope, Speed(0.001, 0.003), whole.seconds / 2)
    assert whole.n == 512
    assert FEWEST <= cut.n < whole.n
    assert cut.cut
    assert cut.seconds <= whole.seconds / 2
    assert [line.title for line in cut.lines] == [line.title for line in whole.lines]
    assert make_plan(scope, Speed(1, 3), 1.0).n == FEWEST


@pytest.mark.slow
def test_verdicts_hang_little_on_the_batch_size(guard):
    pixels, labels = demo_rows("evaluation", 64)
    curves = []
    for batch_size in (1, 64):
        options = AttackOptions(threats=THREATS, batch_size=batch_size, corruptions="none")
        found = evaluate_robustness(guard, pixels, labels, options=options)
        curves.append([row.fooled for row in found.norms[0].epsilons])
    assert np.abs(np.subtract(*curves)).max() <= 1


def test_a_subject_without_a_head_says_so(guard):
    from ebm_guard.gate.deciding import Parts
    from ebm_guard.ood import make_score

    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = demo_classifier()

        def forward(self, x):
            return self.inner(x) * 2

    parts = Parts(make_score("knn"), guard.threshold)
    classifier = EnergyClassifier(Headless().eval(), preprocessing=guard.classifier.preprocessing)
    pixels, _ = demo_rows("evaluation", 8)
    with pytest.raises(UnsupportedModelError, match="last linear layer"):
        Subject(classifier, parts).check(pixels)


@pytest.mark.slow
def test_other_corruptions_are_run_and_none_are_none(guard):
    pixels, labels = demo_rows("evaluation", 12)
    options = AttackOptions(threats=THREATS, corruptions="none")
    assert evaluate_robustness(guard, pixels, labels, options=options).corruptions is None
    found = evaluate_robustness(guard, pixels, labels, options=AttackOptions(threats=THREATS))
    assert found.corruptions["source"] == "built-in set, not ImageNet-C"


def test_the_cost_is_what_the_model_was_asked(guard):
    """Count outside of the package: every pass, with and without a gradient."""
    counts = {"gradients": 0, "forwards": 0}

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = guard.classifier.model

        def forward(self, x):
            counts["gradients" if x.requires_grad else "forwards"] += len(x)
            return self.inner(x)

    classifier = EnergyClassifier(Counted().eval(), preprocessing=guard.classifier.preprocessing)
    pixels, labels = demo_rows("evaluation", 10)
    found = evaluate_robustness(
        classifier, pixels, labels, gate=guard.state().parts, options=AttackOptions(threats=THREATS)
    )
    # Whether probabilities come out, or gradients and noise, is asked of the model itself.
    slack = 2 * 64 * 8
    assert 0 <= counts["gradients"] - found.cost["gradients"] <= slack
    assert 0 <= counts["forwards"] - found.cost["forwards"] <= slack


class Closed(nn.Module):
    """Detaches its input: no gradient reaches the pixels."""

    def __init__(self):
        super().__init__()
        self.inner = demo_classifier()
        self.pretrained_cfg = self.inner.pretrained_cfg

    def forward(self, x):
        return self.inner(x.detach())


def test_a_model_without_gradients_is_judged_by_square_alone():
    pixels, labels = demo_rows("evaluation", 6)
    found = evaluate_robustness(
        EnergyClassifier(Closed().eval()),
        pixels,
        labels,
        options=AttackOptions(threats=(Threat.of("linf", ["0.4"]),), corruptions="none"),
    )
    assert [item.name for item in found.norms[0].epsilons[0].attacks] == ["square"]
    assert found.norms[0].epsilons[0].worst_case.value < found.clean.value
    statuses = {flag["name"]: flag["status"] for flag in found.flags}
    assert statuses["hidden_gradient"] == "raised"
    assert any("Square" in item["reason"] for item in found.left_out)


def test_nothing_right_is_no_robustness(guard):
    from ebm_guard.report.robustness_section import robustness_section

    pixels, _ = demo_rows("evaluation", 8)
    right = guard.classifier(guard.classifier.pixels(pixels)).argmax(dim=1)
    found = evaluate_robustness(
        guard,
        pixels,
        (right + 1) % 3,
        options=AttackOptions(threats=THREATS, corruptions="none"),
    )
    section = robustness_section(found)
    assert section.verdict.status == "unclear"
    assert "check labels" in section.verdict.sentence.lower()


def cut_short(found):
    """The same evaluation, its two larger budgets cut by the time budget."""
    (norm,) = found.norms
    rows = [norm.epsilons[0]]
    for row in norm.epsilons[1:]:
        gated = replace(row.gated, aware=None, plain=None)
        rows.append(replace(row, worst_case=None, gated=gated))
    return replace(found, norms=(replace(norm, epsilons=tuple(rows)),))


def test_a_smaller_budget_never_answers_for_the_reference(found):
    from ebm_guard.report.robustness_section import robustness_section

    section = robustness_section(cut_short(found))
    assert section.robust_accuracy is None
    assert section.gated_accuracy is None
    assert "The reference 0.4 was not run: budget" in section.verdict.sentence
    assert "at linf 0.15" in section.verdict.sentence


def test_what_an_authors_attack_adds_counts(found):
    from ebm_guard.intervals import proportion
    from ebm_guard.report.robustness_section import robustness_section

    lower = proportion(0, N).to_dict()
    reference = {"label": "pyautoattack standard", "epsilon": "0.4", "attacked": 3, "fooled": 3,
                 "robust_accuracy": lower, "version": "", "messages": []}  # fmt: skip
    section = robustness_section(replace(found, reference=reference))
    assert section.robust_accuracy.value == 0
    assert "pyautoattack" in section.verdict.sentence


def test_rows_that_were_not_kept_are_run_again(tmp_path, guard):
    """A stage belongs to its rows: with other rows it is not taken from the folder."""
    from ebm_guard.robustness.runner import rows_key

    assert rows_key(torch.tensor([1, 2])) != rows_key(torch.tensor([1, 3]))
    pixels, labels = demo_rows("evaluation", 12)
    options = AttackOptions(threats=THREATS, state=tmp_path / "state", corruptions="none")
    whole = evaluate_robustness(guard, pixels, labels, options=options)
    # What a budget left out is missing in the folder: take one stage away.
    files = sorted((tmp_path / "state").glob("*.npz"))
    for file in files[::3]:
        file.unlink()
    again = evaluate_robustness(guard, pixels, labels, options=replace(options, resume=True))
    left, right = plain(again), plain(whole)
    assert left == right


def test_bad_input_is_refused_before_the_work(guard):
    pixels, labels = demo_rows("evaluation", 4)
    with pytest.raises(InvalidInputError, match="needed torch tensors"):
        evaluate_robustness(guard, pixels.numpy(), labels)
    with pytest.raises(InvalidInputError, match="OOD set far"):
        evaluate_robustness(guard, pixels, labels, ood={"far": pixels * 255})
    with pytest.raises(InvalidInputError, match="whole number"):
        AttackOptions(seed=-1)
    with pytest.raises(InvalidInputError, match="labels from 0 to 77"):
        evaluate_robustness(guard, pixels, torch.tensor([0, 1, 2, 77]))


class Unreachable(torch.nn.Module):
    """Name class 1 above a mean of 125.05 grey values; no gradient reaches the pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1e4))
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,), "input_size": (1, 2, 2)}
        self.eval()

    @torch.no_grad()
    def forward(self, x):
        rise = self.weight * (x.mean(dim=(1, 2, 3)) - 125.05 / 255)
        return torch.stack([torch.ones_like(rise), 1 + rise], dim=1)


def test_what_rounding_undoes_is_left_out_where_no_gradient_reaches_the_pixels():
    pixels = torch.full((4, 1, 2, 2), 100 / 255)
    found = evaluate_robustness(
        Unreachable(),
        pixels,
        torch.zeros(4, dtype=torch.int64),
        # 100 + 25.12 grey values are beyond the border, and rounded to 125 they are not.
        options=AttackOptions(threats=(Threat.of("linf", [str(25.12 / 255)]),), corruptions="none"),
    )
    row = found.norms[0].epsilons[0]
    assert row.worst_case.value == 0.0
    assert row.rounded is None
