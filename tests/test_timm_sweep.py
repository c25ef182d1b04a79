"""Real networks: the smallest model of every timm module, wrapped, its head found and proved.

``fixtures/timm_sweep.json`` is the list, and with it the denominator. 20 of its models run in every
run of pytest, the others with ``pytest -m sweep``. ``python tests/test_timm_sweep.py`` writes the
table in ``reports/timm_sweep/README.md``.
"""

import json
import platform
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import ebm_guard
from ebm_guard import Predictions, registry
from ebm_guard.errors import EbmGuardWarning
from ebm_guard.ood import make_score

LIST = Path(__file__).parent / "fixtures" / "timm_sweep.json"
PAGE = Path(__file__).parents[1] / "reports" / "timm_sweep" / "README.md"
SHARE = 0.95
TOLERANCE = 1e-4
SWEEP = json.loads(LIST.read_text(encoding="utf-8"))
MODELS = SWEEP["models"]
SHAPES = {model["module"]: model for model in MODELS}
LOGITS_ONLY = {"logits"}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    module: str
    model: str
    parameters: int
    kind: str
    names: str
    width: int
    result: str


def released(text):
    """Return the numbers of a version such as 1.0.31."""
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def redrawn(model, generator):
    """Take a fresh network away from the constant function.

    Untrained networks are nearly constant in x, and some have logits near zero, where any check
    passes: layers with C outputs are redrawn from N(0, 0.02), LayerScale factors of 1e-6 are set to
    0.5.
    """
    with torch.no_grad():
        for layer in model.modules():
            is_layer = isinstance(layer, (nn.Linear, nn.Conv2d))
            if is_layer and layer.weight.shape[0] == model.num_classes:
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
        for name, parameter in model.named_parameters():
            if "gamma" in name and parameter.max() < 1e-3:
                parameter.fill_(0.5)
    return model


def warmed(model, x):
    """Set the BatchNorm statistics to those of x, by one pass in train mode."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if norms:
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            model.train()(x)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
    return model


def built(entry):
    """Build the network and a batch of two, from a seed, the global generator left alone."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Deprecations inside timm and torch are not ours to fix.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = timm.create_model(entry["model"], pretrained=False)
        generator = torch.Generator().manual_seed(0)
        size = ebm_guard.EnergyClassifier(model).preprocessing.image_size
        redrawn(model, generator)
        x = torch.randn(2, 3, *size, generator=generator)
        return warmed(model, x), x


def snapshot(model):
    """Return everything that wrapping must leave as it was."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        {name: tensor.detach().clone() for name, tensor in tensors},
        [part.training for part in model.modules()],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert list(before[0]) == list(after[0])
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), f"{name} changed"
    assert before[1:] == after[1:]


def rebuilt_by_hand(model, names, features):
    """Average the named layers' outputs, without the code under test."""
    layers = [model.get_submodule(name) for name in names]
    widths = [layer.weight.shape[1] for layer in layers]
    total = 0
    for layer, part in zip(layers, features.double().split(widths, dim=1), strict=True):
        total = total + part @ layer.weight.detach().double().flatten(1).T
        if layer.bias is not None:
            total = total + layer.bias.detach().double()
    return total / len(layers)


def check_gate(guard, logits, x):
    """The guard's logit scores work, fitted on these logits and asked with the model."""
    predictions = Predictions(logits.numpy())
    for method in registry.methods("score"):
        if set(method.needs) != LOGITS_ONLY:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EbmGuardWarning)  # no labels, and train mode
            guard.fit(predictions, score=method.name, threshold="marginal", false_reject_rate=0.5)
        score = make_score(method.name).of(predictions)
        assert np.isfinite(score).all(), method.name
        assert score[0] != score[1], method.name
        decision = guard.decide(logits)
        # n = 2 and rank 2: the cut is the larger of the two scores.
        assert decision.accept.all(), method.name
        assert np.array_equal(decision.score.numpy(), score), method.name
    decision = guard(x)
    assert torch.equal(decision.logits, logits)
    assert torch.equal(decision.label, logits.argmax(dim=1))
    assert decision.accept.all()


@cache
def swept(module):
    """Run all checks on one model; raises AssertionError where one fails."""
    entry = SHAPES[module]
    model, x = built(entry)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == entry["parameters"]

    with torch.no_grad():
        expected = model.eval()(x)
    model.train()  # as timm hands it out
    before = snapshot(model)
    guard = ebm_guard.wrap(model)
    classifier = guard.classifier
    with pytest.warns(EbmGuardWarning, match="train mode"):
        head = classifier.probe_head(x)
    with torch.no_grad():
        output = classifier.forward(x, features=True)
    assert torch.equal(output.logits, expected)
    check_gate(guard, expected, x)
    assert_unchanged(model, before)

    facts = (entry["module"], entry["model"], count)
    if not head.found:
        assert output.features is None
        return Row(*facts, "-", "-", 0, head.message)
    layers = [model.get_submodule(name) for name in head.names]
    assert output.features.shape == (2, sum(layer.weight.shape[1] for layer in layers))
    scale = TOLERANCE * expected.abs().max()
    by_hand = rebuilt_by_hand(model, head.names, output.features)
    folded = output.features @ head.weight.T + head.bias
    assert (by_hand - expected).abs().max() <= scale
    assert (folded - expected).abs().max() <= scale
    # The same check can fail: the features of the other row do not give these logits.
    crossed = rebuilt_by_hand(model, head.names, output.features.flip(0))
    assert (crossed - expected).abs().max() > scale
    kinds = " and ".join(sorted({type(layer).__name__ for layer in layers}))
    kind = kinds if len(layers) == 1 else f"average of {len(layers)} {kinds}"
    return Row(*facts, kind, ", ".join(head.names), output.features.shape[1], "verified")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small batches are fastest on one thread; denormal numbers of random nets are slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def check(module):
    entry = SHAPES[module]
    if released(timm.__version__) < released(SWEEP["timm"]) and not timm.is_model(entry["model"]):
        pytest.skip(f"timm {timm.__version__} has no {entry['model']} yet")
    row = swept(module)
    assert row.result == SWEEP["exceptions"].get(module, "verified")
    if timm.__version__ == SWEEP["timm"]:
        assert line_of(row) in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("module", [m["module"] for m in MODELS if m["every_run"]])
def test_models_of_every_run(module):
    check(module)


@pytest.mark.sweep
@pytest.mark.parametrize("module", [m["module"] for m in MODELS if not m["every_run"]])
def test_all_other_models(module):
    check(module)


@pytest.mark.sweep
def test_share_that_passes():
    """Counts what the run itself found; the list is the denominator."""
    rows = [swept(model["module"]) for model in MODELS]
    found = sum(row.result == "verified" for row in rows)
    assert found >= SHARE * len(MODELS)
    assert found == len(MODELS) - len(SWEEP["exceptions"])


# --- the list and the table


def test_list_is_complete():
    """Every module of timm is on the list, or left out with its reason."""
    left_out = {entry["module"]: entry for entry in SWEEP["left_out"]}
    assert not left_out.keys() & SHAPES.keys()
    assert len(SHAPES) == len(MODELS) == 88
    assert sum(model["every_run"] for model in MODELS) == 20
    assert SWEEP["exceptions"].keys() <= SHAPES.keys()
    assert len(SWEEP["exceptions"]) <= (1 - SHARE) * len(MODELS)
    assert all(model["parameters"] <= SWEEP["most_parameters"] for model in MODELS)
    for entry in left_out.values():
        assert "num_classes" in entry["reason"] or entry["parameters"] > SWEEP["most_parameters"]
    if timm.__version__ == SWEEP["timm"]:
        modules = set(timm.list_modules())
        assert modules == SHAPES.keys() | left_out.keys()


def test_table_is_that_of_the_list():
    """Somebody who edits the list has to write the table again."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    table = {row[0]: row for row in cells if len(row) == 7 and row[0] in SHAPES}
    assert table.keys() == SHAPES.keys()
    for module, row in table.items():
        entry = SHAPES[module]
        assert row[1] == entry["model"]
        assert int(row[2].replace(",", "")) == entry["parameters"]
        assert row[6] == SWEEP["exceptions"].get(module, "verified")


def attempted(entry):
    """Return a line of the table, also where a check failed."""
    try:
        return swept(entry["module"])
    except Exception as error:  # noqa: BLE001 - whatever went wrong is the result
        facts = (entry["module"], entry["model"], entry["parameters"])
        words = " ".join(str(error).split()) or "no message"
        return Row(*facts, "-", "-", 0, f"failed: {type(error).__name__}: {words[:200]}")


def line_of(row):
    names = "-" if row.names == "-" else f"`{row.names}`"
    return (
        f"| {row.module} | `{row.model}` | {row.parameters:,} | {row.kind} | {names} | "
        f"{row.width or '-'} | {row.result} |"
    )


METHOD = """\
The list is `tests/fixtures/timm_sweep.json`: the smallest model of every timm module that has a
classifier and up to {most:,} parameters. Weights are random: layers with C outputs are redrawn
from N(0, 0.02), LayerScale factors of 1e-6 are set to 0.5, and BatchNorm statistics are taken from
the batch, because a fresh network is nearly constant in x and any check would pass. Each model runs
real forward passes of two rows at its own input size. The check is
max |features @ W.T + b - logits| <= 1e-4 max |logits|, once by the package and once by the test.
"""


def page(rows):
    """Write the table as Markdown; no date, no time, no machine name."""
    found = sum(row.result == "verified" for row in rows)
    averaged = sum(row.kind.startswith("average") for row in rows)
    convs = sum("Conv2d" in row.kind for row in rows)
    sound = sum(not row.result.startswith("failed") for row in rows)
    lines = [
        "# timm sweep: the last layer of every architecture",
        "",
        f"**{found} of {len(rows)}** models: features found, and features @ W.T + b proved equal",
        f"to the logits. {averaged} average several heads, {convs} end in a 1x1 convolution.",
        f"{sound} of {len(rows)} give bit-identical logits, keep weights, flags and hooks as they",
        "were, and offer the logit scores.",
        "",
        *METHOD.format(most=SWEEP["most_parameters"]).splitlines(),
        "",
        "```bash",
        "python tests/test_timm_sweep.py   # writes this page",
        "pytest tests/test_timm_sweep.py   # 20 of the models, as in every run of pytest",
        "pytest -m sweep                   # the other models, and the share that passes",
        "```",
        "",
        f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]},",
        f"Python {platform.python_version()}, CPU, one thread, float32, seed 0.",
        "",
        "| module | model | parameters | head | layers | feature width | result |",
        "| --- | --- | ---: | --- | --- | ---: | --- |",
    ]
    lines += [line_of(row) for row in rows]
    lines += ["", "Left out:", "", "| module | smallest model | parameters | reason |"]
    lines += ["| --- | --- | ---: | --- |"]
    lines += [
        f"| {entry['module']} | {entry['model']} | {entry['parameters']:,} | {entry['reason']} |"
        for entry in SWEEP["left_out"]
    ]
    return "\n".join(lines) + "\n"


def main():
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    for entry in MODELS:
        rows.append(attempted(entry))
        print(f"{len(rows)}/{len(MODELS)} {rows[-1].model}: {rows[-1].result}", flush=True)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
