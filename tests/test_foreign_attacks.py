"""Attacks of other libraries: what they are handed, what they may return, and how it is judged."""

import importlib.util
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from torch import nn
from toys import Pixels

from ebm_guard import EnergyClassifier
from ebm_guard.attacks import (
    PGD,
    Examples,
    Misclassify,
    Outcome,
    Query,
    climb,
    pixel_forward,
    untouched,
)
from ebm_guard.attacks.foreign import ForeignOutcome, autoattack, judge_callable
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import InvalidInputError
from ebm_guard.model.classifier import ClassifierOutput


class Normed(Pixels):
    """The toy of pixels with a part that train mode would change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3).eval()
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, x):
        return super().forward(self.drop(self.norm(x)))


@pytest.fixture
def setting():
    """A model, its query, and images of which the model gets all but the last right."""
    model = Normed()
    classifier = EnergyClassifier(model)
    query = Query(pixel_forward(classifier), Misclassify("margin"), batch_size=4)
    pixels = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    with torch.no_grad():
        labels = query.forward(pixels).logits.argmax(dim=1)
    labels[9] = (labels[9] + 1) % 3
    return model, query, Examples.of(pixels, labels)


def signed_step(model, x, y, epsilon):
    x.requires_grad_()
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    return (x + epsilon * x.grad.sign()).clamp(0, 1)


def test_it_is_judged_like_our_own_attack(setting):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(signed_step, query, examples, 0.1)
        ours = climb(
            PGD(1, 1.0, random_start=False),
            Query(query.forward, Misclassify()),
            examples,
            0.1,
            until="last",
        )
    assert isinstance(found, Outcome)
    assert torch.equal(found.success, ours.success)
    torch.testing.assert_close(found.pixels, ours.pixels)
    assert found.errors == {}
    assert found.source == "signed_step"
    # One pass with a gradient, and one to judge.
    assert found.gradients.tolist() == [1] * 10
    assert found.forwards.tolist() == [2] * 10
    assert found.step.tolist() == [1] * 10


def test_outcomes_can_be_selected_and_joined(setting):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(lambda m, x, y, e: x + 2 * e, query, examples, 0.1)
    part = found.select(torch.tensor([0, 3]))
    assert isinstance(part, ForeignOutcome)
    assert part.errors == {"outside the ball": 2}
    joined = ForeignOutcome.concatenate([part, found])
    assert joined.errors == {"outside the ball": 12}
    assert joined.source == found.source == "<lambda>"


def test_what_the_attack_is_handed(setting):
    model, query, examples = setting
    seen = []

    def look(handed, x, y, epsilon):
        assert isinstance(handed, nn.Module)
        assert not handed.training
        assert not any(part.requires_grad for part in handed.parameters())
        assert next(handed.parameters()).device == x.device
        assert torch.is_grad_enabled()
        with torch.no_grad():
            expected = model(
                EnergyClassifier(model).preprocessing.normalize(x)
            )  # normalisation is inside
            torch.testing.assert_close(handed(x), expected)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert epsilon == 0.1
        seen.append(len(x))
        return x

    with untouched(model), torch.no_grad():
        judge_callable(look, query, examples, 0.1)
        assert seen == [4, 4, 2]
        judge_callable(look, query, examples, 0.1, batch_size=10)
    assert seen == [4, 4, 2, 10]


def spoil(kind):
    """An attack that does right by the first image of each batch and wrong by all others."""

    def attack(model, x, y, epsilon):
        good, bad = signed_step(model, x, y, epsilon).detach(), x.detach().clone()
        if kind == "not finite":
            bad[:, 0, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.5])[
                : len(x)
            ]
            bad[3:, 0, 0, 0] = float("nan")
        elif kind == "outside [0, 1]":
            bad[:, 0, 0, 0] = -2e-6
        else:
            bad = bad + 1.0001 * epsilon * torch.sign(good - bad)
        return torch.cat([good[:1], bad[1:]])

    return attack


@pytest.mark.parametrize("kind", ["not finite", "outside [0, 1]", "outside the ball"])
def test_images_that_break_the_rules_fail_closed(setting, kind):
    model, query, examples = setting
    if kind == "outside [0, 1]":
        examples.pixels[:, 0, 0, 0] = 0.05  # so that -2e-6 is within the ball
    with untouched(model):
        found = judge_callable(spoil(kind), query, examples, 0.1)
        clean = query.answer(examples.pixels, examples, gradient=False)
        right = judge_callable(signed_step, query, examples, 0.1)
    assert found.errors == {kind: 7}
    broken = found.fault > 0
    assert torch.equal(broken, torch.tensor([row % 4 > 0 for row in range(10)]))
    # They count as robust where the clean image is right, and only there.
    assert torch.equal(found.success[broken], clean.success[broken])
    assert torch.equal(found.objective[broken], clean.objective[broken])
    assert torch.equal(found.pixels[broken], examples.pixels[broken])
    assert (found.step[broken] == 0).all()
    assert torch.equal(found.success[~broken], right.success[~broken])


def test_rounding_is_forgiven(setting):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(lambda m, x, y, e: x + e + 5e-7, query, examples, 0.1)
        assert found.errors == {}
        dark = Examples.of(torch.zeros_like(examples.pixels), examples.labels)
        found = judge_callable(lambda m, x, y, e: x - 5e-7, query, dark, 0.1)
    assert found.errors == {}
    assert found.pixels.min() == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_is_that_of_the_norm(setting, norm):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(
            lambda m, x, y, e: x + e / 8 * (1 - 2 * (x > 0.5)), query, examples, 0.5, norm=norm
        )
    # 192 pixels moved by epsilon / 8: 1.73 epsilon long.
    assert found.errors == ({} if norm == "linf" else {"outside the ball": 10})


def test_clean_images_fool_nobody(setting):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(lambda m, x, y, e: x, query, examples, 0.1)
    assert found.success.tolist() == [False] * 9 + [True]
    assert found.errors == {}
    assert found.step.tolist() == [0] * 10


def test_no_budget_asks_no_attack(setting):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(lambda m, x, y, e: 1 / 0, query, examples, 0)
    assert found.success.tolist() == [False] * 9 + [True]
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="epsilon"):
            judge_callable(signed_step, query, examples, wrong)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda x: (x * 255).to(torch.uint8), "torch.uint8 of shape"),
        (lambda x: x[:1], r"shape \(1, 3, 8, 8\)"),
        (lambda x: x.flatten(1), r"shape \(4, 192\)"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: (x, x, x[:, 0, 0, 0] > 0), "tuple"),
        (lambda x: None, "NoneType"),
    ],
)
def test_something_else_than_images_is_an_error(setting, returned, words):
    model, query, examples = setting
    attack = lambda m, x, y, e: returned(x)  # noqa: E731
    with untouched(model), pytest.raises(InvalidInputError, match=words) as caught:
        judge_callable(attack, query, examples, 0.1, name="mine")
    assert "'mine'" in str(caught.value)


def test_other_floating_types_are_taken(setting):
    model, query, examples = setting
    with untouched(model):
        found = judge_callable(lambda m, x, y, e: x.double() + e, query, examples, 0.1)
        assert found.errors == {}
        assert found.pixels.dtype == torch.float32
        # Half precision cannot hold the ball.
        found = judge_callable(lambda m, x, y, e: (x + e).half(), query, examples, 0.1)
    assert found.errors["outside the ball"] >= 5


def test_exceptions_come_through_with_the_place(setting):
    model, query, examples = setting

    def fails(model, x, y, epsilon):
        raise RuntimeError("out of luck")

    with untouched(model), pytest.raises(RuntimeError, match="out of luck") as caught:
        judge_callable(fails, query, examples, 0.1)
    assert "'fails', at images 0 to 3 at epsilon 0.1" in caught.value.__notes__[0]


def test_nothing_of_the_model_is_reached(setting):
    model, query, examples = setting
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def rude(handed, x, y, epsilon):
        handed.train()
        handed.requires_grad_(True)
        handed.zero_grad()
        handed.double()
        for module in handed.modules():
            module.training = True
        logits = handed(x.requires_grad_())
        logits.sum().backward()
        with torch.no_grad():
            logits.fill_(0)
            for parameter in handed.parameters():
                parameter.add_(1)
        y.fill_(0)
        x.data.fill_(0.5)
        return x

    inputs = examples.pixels.clone(), examples.labels.clone()
    with untouched(model):
        judge_callable(rude, query, examples, 0.9)
    assert torch.equal(inputs[0], examples.pixels)
    assert torch.equal(inputs[1], examples.labels)
    assert not any(part.training for part in model.modules())
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_in_train_mode_is_attacked_as_deployed(setting):
    model, query, examples = setting
    with untouched(model):
        expected = judge_callable(signed_step, query, examples, 0.1)
    model.train()
    statistics = model.norm.running_mean.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with untouched(model):
            found = judge_callable(signed_step, query, examples, 0.1)
    assert torch.equal(found.objective, expected.objective)
    assert torch.equal(model.norm.running_mean, statistics)
    assert all(part.training for part in (model, model.norm, model.drop))


def everything_random(model, x, y, epsilon):
    noise = torch.rand_like(x) + torch.from_numpy(np.random.rand(*x.shape)).float()  # noqa: NPY002
    return x + epsilon * (noise * random.random() - 0.5)


def test_global_random_numbers_are_seeded_and_restored(setting):
    model, query, examples = setting

    def state():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def run(seed, attack=everything_random):
        with untouched(model):
            return judge_callable(attack, query, examples, 0.1, seed=seed)

    def seeding(model, x, y, epsilon):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        sys.settrace(lambda *_: None)
        torch.set_grad_enabled(False)
        return x

    torch_state, numpy_state, state_of_python = (
        torch.get_rng_state(),
        np.random.get_state(),  # noqa: NPY002
        random.getstate(),
    )
    trace = sys.gettrace()
    expected = state()

    def rewind():
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(state_of_python)

    rewind()
    first = run((1,))
    run((1,), seeding)
    assert sys.gettrace() is trace
    assert torch.is_grad_enabled()
    assert state() == expected
    assert torch.equal(first.pixels, run((1,)).pixels)
    assert not torch.equal(first.pixels, run((2,)).pixels)
    rewind()


def test_costs_add_up(setting):
    model, query, examples = setting

    def greedy(handed, x, y, epsilon):
        for _ in range(3):
            signed_step(handed, x.clone(), y, epsilon)
        with torch.no_grad():
            handed(x[:1])
        return x

    with untouched(model):
        found = judge_callable(greedy, query, examples, 0.1)
    assert int(found.gradients.sum()) == 30
    assert int(found.forwards.sum()) == 30 + 3 + 10  # attack, one image a batch, and the verdict


# The reference AutoAttack.


def demo(images):
    rows = load_demo("evaluation")
    pixels = torch.from_numpy(rows.images[:images]).unsqueeze(1) / 255
    return Examples.of(pixels, torch.from_numpy(rows.labels[:images]))


def test_without_the_extra_it_says_what_to_install(setting, monkeypatch):
    _, query, examples = setting
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(InvalidInputError, match=r'pip install "ebm-guard\[attacks\]"'):
        autoattack(query, examples, 0.1)


def autoattack_or_skip(*arguments, **settings):
    pytest.importorskip("pyautoattack", reason="pyautoattack is the `attacks` extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return autoattack(*arguments, **settings)


@pytest.mark.parametrize(
    ("norm", "epsilon", "images"),
    [("linf", 0.5, 6), pytest.param("l2", 0.8, 2, marks=pytest.mark.slow)],
)
def test_autoattack_is_judged_by_us(norm, epsilon, images, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = demo(images)
    classifier = EnergyClassifier(demo_classifier())
    with untouched(classifier.model):
        query = Query(pixel_forward(classifier), Misclassify(), batch_size=8)
        found = autoattack_or_skip(query, examples, epsilon, norm=norm)
        again = autoattack_or_skip(query, examples, epsilon, norm=norm)
        ours = climb(PGD(40, norm=norm), query, examples, epsilon)
    assert found.errors == {}
    assert (found.success >= ours.success).all()
    assert found.success.any()
    assert torch.equal(found.pixels, again.pixels)
    assert found.source.startswith("pyautoattack 0.")
    assert found.source.endswith("apgd-ce, apgd-t, fab-t, square")
    assert found.messages == ()
    assert found.gradients.sum() > 0
    # No prints, no log files.
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_autoattack_tells_what_its_checks_say():
    classifier = EnergyClassifier(demo_classifier())
    with untouched(classifier.model):
        forward = pixel_forward(classifier)
        softmax = lambda pixels: ClassifierOutput(forward(pixels).logits.softmax(1), None)  # noqa: E731
        found = autoattack_or_skip(Query(softmax, Misclassify()), demo(2), 0.9)
    assert len(found.messages) == 1
    assert "probability distribution" in found.messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 5])
def test_autoattack_with_few_classes(classes):
    classifier = EnergyClassifier(demo_classifier())
    with untouched(classifier.model):
        forward = pixel_forward(classifier)
        few = lambda pixels: ClassifierOutput(forward(pixels).logits[:, :classes], None)  # noqa: E731
        examples = demo(30)
        examples = examples.select(examples.labels < classes).select(slice(0, 1))
        found = autoattack_or_skip(Query(few, Misclassify()), examples, 0.02)
    assert ("apgd-t" in found.source) == (classes >= 4)
    assert found.errors == {}


# The example file, with the library that is installed.


@pytest.fixture(scope="module")
def example():
    path = EXAMPLES / "foreign_attacks.py"
    spec = importlib.util.spec_from_file_location("foreign_attacks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_the_example_runs_foolbox(example, capsys):
    pytest.importorskip("foolbox", reason="foolbox is the `bench` extra")
    example.main(["--attack", "foolbox_pgd", "foolbox_fmn", "--epsilon", "0.15", "--images", "24"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "linf 0.15, 24 images of the demo classifier"
    assert lines[1].startswith("foolbox_pgd: accuracy 0.")
    assert lines[1].endswith("20.0 gradients an image, refused: none")
    assert lines[2].endswith("100.0 gradients an image, refused: none")


@pytest.mark.filterwarnings("ignore")
def test_our_verdict_on_foolbox_is_its_own_on_honest_images(example):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is the `bench` extra")
    claims = []

    def attack(model, x, y, epsilon):
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        rule = foolbox.attacks.LinfPGD(steps=20)
        _, clipped, success = rule(wrapped, x, y, epsilons=epsilon)
        claims.append(success)
        return clipped

    classifier = EnergyClassifier(demo_classifier())
    with untouched(classifier.model):
        query = Query(pixel_forward(classifier), Misclassify(), batch_size=16)
        found = judge_callable(attack, query, demo(40), 0.1)
    assert torch.equal(found.success, torch.cat(claims))
    assert found.errors == {}
    # It calls backward() through our module, and leaves no gradient in the user's model.
    assert all(parameter.grad is None for parameter in classifier.model.parameters())


@pytest.mark.parametrize("name", ["torchattacks_pgd", "art_pgd", "adv_lib_pgd"])
def test_adapters_of_libraries_that_are_not_installed_load_them_late(example, name):
    library = {"torchattacks_pgd": "torchattacks", "art_pgd": "art", "adv_lib_pgd": "adv_lib"}[name]
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    with pytest.raises(ModuleNotFoundError, match=library) as caught:
        example.judge(name, 0.1, 2)
    assert "images 0 to 1" in caught.value.__notes__[0]
