"""The fine-tuning section of the main report: whose run it is, what it says, what it refuses."""

import copy
import io
import json
import re
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from finetune_examples import EVIL, C, net, pair, report, result, sides
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from ebm_guard import EnergyClassifier, Predictions, build_report
from ebm_guard.cli import cli
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model.weights import weights_hash
from ebm_guard.report.finetune_section import Finetuned
from ebm_guard.report.model_card import render_model_card
from ebm_guard.report.render import (
    finetune_view,
    output,
    render_html,
    render_markdown,
    render_terminal,
    view,
)

SCHEMA = json.loads((Path(output.__file__).parents[1] / "schema.json").read_text("utf-8"))
VALID = jsonschema.Draft202012Validator(SCHEMA)
SECTION = jsonschema.Draft202012Validator({"$ref": "#/$defs/finetune", "$defs": SCHEMA["$defs"]})

# Name -> (full fine-tuning report, seed of the net that it returned).
KINDS = {
    "accepted": report,
    "returned": lambda: report(result("start returned")),
    "no candidate": lambda: report(result("start returned", acceptance=False), None),
    "no loss": lambda: report(both=sides(ood={})),
    "several": lambda: report(
        both=sides(
            ood={
                **sides().ood,
                "street_2": ("unseen", pair(21, labels=False)),
                "synthetic_smooth_noise": ("trained_on", pair(22, labels=False, shift=-1.0)),
            }
        )
    ),
    "hostile": lambda: report(both=sides(ood={EVIL: ("unseen", pair(8, labels=False, shift=3.0))})),
}


@cache
def made(name):
    return KINDS[name]()


def kept(folder, content):
    """Write a fine-tuning report where `finetune` does."""
    folder.mkdir(exist_ok=True)
    (folder / "finetune_report.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@cache
def rows():
    """What some net said about labelled rows."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, 120)
    logits = rng.normal(size=(120, C)) + 3 * np.eye(C)[labels]
    return Predictions(logits, labels=labels, source="npz:x")


@cache
def bare():
    """A report of these rows, without a run."""
    return build_report(rows()).to_dict()


def built(folder, content, returned=None, **more):
    seed = int(content["outcome"]["status"] == "accepted") if returned is None else returned
    classifier = EnergyClassifier(net(seed))
    return build_report(
        rows(), classifier=classifier, finetuned=Finetuned.read(kept(folder, content)), **more
    ).to_dict()


@pytest.fixture(params=KINDS)
def kind(request):
    return copy.deepcopy(made(request.param))


def test_the_run_names_both_weights(kind):
    weights = kind["outcome"]["weights"]
    assert weights["start"] == weights_hash(net(0)) == kind["meta"]["model"]["weights_sha256"]
    same = weights["winner"] == weights["start"]
    assert same == (kind["outcome"]["status"] == "start returned")
    assert weights["winner"] in (weights_hash(net(0)), weights_hash(net(1)))


def test_the_section_repeats_the_run(kind, tmp_path):
    section = Finetuned.read(kept(tmp_path, kind)).section.to_dict()
    SECTION.validate(section)
    outcome, acceptance = kind["outcome"], kind["acceptance"]
    for name in ("status", "reason", "updates"):
        assert section[name] == outcome[name]
    assert (section["objective"], section["seed"]) == ("margin", kind["meta"]["seed"])
    assert section["verdict"]["sentence"] == kind["verdict"]["sentence"]
    assert section["page"] == str(tmp_path / "finetune_report.html")
    if "not_run" in acceptance:
        assert section["acceptance"] == acceptance
    else:
        assert section["acceptance"] == {"n": acceptance["n"], "tests": acceptance["tests"]}
    for name, role in (("never_seen", "unseen"), ("trained_on", "trained_on")):
        sets = [item["auroc"] for item in kind["ood"].values() if item["role"] == role]
        item = section["mean_auroc"][name]
        assert (item is None) == (not sets)
        for side in ("start", "candidate", "difference") if sets else ():
            wanted = np.mean([each[side]["value"] for each in sets])
            assert item[side]["value"] == pytest.approx(wanted)
            assert item["sets"] == len(sets)


def test_losses_are_those_of_the_full_report(kind, tmp_path):
    section = Finetuned.read(kept(tmp_path, kind)).section
    worse = finetune_view.changed(kind, better=False)
    assert len(section.losses) == len(worse)
    for line, (name, item, style) in zip(section.losses, worse, strict=True):
        assert line.startswith(f"{name}: {finetune_view.difference(item['difference'], style)}")
    accepted = section.status == "accepted"
    assert (section.verdict.status == "good") == (accepted and not worse)
    if accepted:
        said = f"with {len(worse) or 'no'} figure{'' if len(worse) < 2 else 's'} worse"
        assert section.verdict.headline == f"Accepted, {said}"


def test_the_whole_report_fits_the_schema_and_shows_it(kind, tmp_path):
    section = Finetuned.read(kept(tmp_path, kind)).section.to_dict()
    found = {**bare(), "finetune": section}
    VALID.validate(found)
    page = render_html(found, {})
    assert 'id="finetune"' in page
    assert "<script" not in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    text = render_markdown(found)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
    console = Console(width=2000, record=True, file=io.StringIO())
    render_terminal(found, console)
    shown = console.export_text()
    card = render_model_card(found)
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("\u00a0", " ")
    for said in (plain, text, shown, card):
        assert f"Objective margin, 12 updates, seed {section['seed']}" in said
        assert ("The candidate was refused" in said) == (section["status"] == "start returned")
        for _, note, item in finetune_view.section_means(section):
            assert note in said
            assert finetune_view.difference(item["difference"], "score") in said
    assert section["verdict"]["headline"] in shown
    for line in section["losses"]:
        assert line in shown
    for said in (plain, text, shown):
        assert "finetune_report.html" in said
    assert str(tmp_path) not in card, "a card is published"


def test_without_a_run_it_says_how_to_add_one():
    found = bare()
    VALID.validate(found)
    assert set(found["finetune"]) == {"not_run"}
    assert "--finetuned" in found["finetune"]["not_run"]
    for page in (render_html(found, {}), render_markdown(found)):
        assert "--finetuned" in page
    assert "Fine-tuning" not in render_model_card(found)


def test_a_section_that_ran_is_not_listed_as_left_out(tmp_path, monkeypatch):
    section = Finetuned.read(kept(tmp_path, made("accepted"))).section.to_dict()
    found = {**bare(), "finetune": section}
    assert "Fine-tuning" in [name for name, _ in view.not_run_sections(bare())]
    assert "Fine-tuning" not in [name for name, _ in view.not_run_sections(found)]
    monkeypatch.setattr(view, "NOT_RUN_NAMES", {"finetune": "Fine-tuning"})
    for page in (render_html(found, {}), render_markdown(found)):
        assert "No section was left out" in page
    for page in (render_html(bare(), {}), render_markdown(bare())):
        assert "No section was left out" not in page


def test_figures_of_the_run_can_be_required(tmp_path):
    path = "finetune.mean_auroc.never_seen.difference"
    found = built(tmp_path, made("several"), requirements=[f"{path}>=-1", f"{path}>=1"])
    assert [item["status"] for item in found["requirements"]] == ["met", "failed"]


# --- whose run it is


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("accepted", 0, "the one that it began with"),
        ("accepted", 2, "another one"),
        ("returned", 1, "another one"),
    ],
)
def test_another_model_is_refused(tmp_path, name, model, words):
    with pytest.raises(DataError, match=f"not the one that fine-tuning returned .*{words}"):
        built(tmp_path, made(name), model)


def test_stored_outputs_cannot_be_checked(tmp_path):
    tuned = Finetuned.read(kept(tmp_path, made("accepted")))
    with pytest.raises(InvalidInputError, match="not stored outputs"):
        build_report(rows(), finetuned=tuned)
    with pytest.raises(InvalidInputError, match="no model whose weights"):
        build_report(rows(), classifier=EnergyClassifier(lambda x: x), finetuned=tuned)


# --- what cannot be read


def test_a_folder_without_a_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="ebm-guard finetune"):
            Finetuned.read(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read"),
        ("[1, 2", "cannot read"),
        ("[1, 2]", "cannot read"),
        ('{"schema": NaN}', "holds NaN"),
        ('{"schema": "ebm_guard.finetune/99"}', "has schema 'ebm_guard.finetune/99'"),
        ('{"schema": "ebm_guard.report/2"}', "this version reads"),
        ('{"schema": "ebm_guard.finetune/1"}', "damaged"),
        ("[" * 100_000, "cannot read"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text, words):
    (tmp_path / "finetune_report.json").write_text(text)
    with pytest.raises(DataError, match=words):
        Finetuned.read(tmp_path)


def places(value, path=()):
    """List every place of a JSON value, but for the course of training, which is not read."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("training", "environment", "run"):
                yield from places(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, (*path, number))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@given(data=st.data())
def test_damage_is_refused_or_harmless(damaged, data):
    content = copy.deepcopy(made("several"))
    path = data.draw(st.sampled_from([item for item in places(content) if item]))
    other = st.sampled_from([None, "x", "", 7, -1, 0.5, True, [], {}, [1], {"a": 1}, 10**400])
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(other)
    kept(damaged, content)
    try:
        tuned = Finetuned.read(damaged)
    except DataError:
        return
    section = tuned.section.to_dict()
    SECTION.validate(section)
    json.dumps(section, allow_nan=False)


# --- the command line


def invoke(*args):
    result = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    return getattr(result.exception, "exit_code", result.return_value), str(result.exception)


@pytest.fixture
def images(tmp_path):
    """Images as small as the net of the hand-made run takes them, and its weights in a file."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        images=rng.integers(0, 256, (60, 2, 2, 1), dtype=np.uint8),
        labels=np.arange(60) % C,
    )
    save_file(net(1).state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "small.py").write_text(
        "import torch\n\n\ndef small():\n"
        f"    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, {C}))\n"
    )
    return ["report", "--model", tmp_path / "small.py:small", "--mean", "0.5", "--std", "0.5",
            "--data", f"npz:{tmp_path / 'images.npz'}", "--no-synthetic", "-q"]  # fmt: skip


def test_the_command_line_reads_a_run(tmp_path, images):
    kept(tmp_path / "tuned", made("accepted"))
    weights = ["--checkpoint", tmp_path / "weights.safetensors"]
    code, words = invoke(*images, *weights, "--finetuned", tmp_path / "tuned",
                         "-o", tmp_path / "out")  # fmt: skip
    assert code == 0, words
    found = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert found["finetune"]["status"] == "accepted"
    assert 'id="finetune"' in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "said"),
    [("tuned", "not the one that fine-tuning returned"), ("nowhere", "no finetune_report.json")],
)
def test_the_command_line_refuses_before_the_work(tmp_path, images, name, said, monkeypatch):
    """The weights are other ones (of no checkpoint), or there is no run."""
    from ebm_guard.cli.session import Session

    monkeypatch.setattr(Session, "predictions", lambda *_, **__: pytest.fail("it went to work"))
    kept(tmp_path / "tuned", made("accepted"))
    code, words = invoke(*images, "--finetuned", tmp_path / name, "-o", tmp_path / "out")
    assert code == 3
    assert said in words
    assert not (tmp_path / "out").exists()
