"""The command line, mostly in process: results, files, exit codes, and what bad input is told."""

import contextlib
import csv
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toys import listing

import ebm_guard.report
from ebm_guard import Predictions
from ebm_guard.cli import COMMANDS, cli, run
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.report import figures
from ebm_guard.report.render import output

SCHEMA = json.loads((Path(ebm_guard.report.__file__).parent / "schema.json").read_text())
REPORT_FILES = {"report.json", "report.html", "report.md"}

# On the command line a warning is a line on stderr, not an error.
pytestmark = pytest.mark.filterwarnings("default::ebm_guard.errors.EbmGuardWarning")


def invoke(*args, code=0):
    """Run a command in this process; return what it wrote to stdout and stderr.

    Synthetic outliers cost seconds a report; test_cli_ood looks at them.
    """
    if args[0] == "report" and not {"--ood", "--synthetic", "--no-synthetic"} & set(args):
        args = (*args, "--no-synthetic")
    return invoke_as_it_is(*args, code=code)


def invoke_as_it_is(*args, code=0):
    """Run a command in this process; return what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = run([str(arg) for arg in args])
    assert got == code, f"exit code {got}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def refused(*args, code, words, folder=None):
    """A command fails with a code and words on stderr, without a traceback, and leaves nothing."""
    before = listing(folder) if folder else None
    out, err = invoke(*args, code=code)
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in: {err}"
    if folder:
        assert listing(folder) == before
    return err


@pytest.fixture
def quick(monkeypatch):
    """Files in place of figures: drawing has its own tests."""

    def save(report, folder):
        folder.mkdir()
        pairs = {"roc": (folder / "roc.png", folder / "roc.svg")} if report["ood"] else {}
        for pair in pairs.values():
            for path in pair:
                path.write_bytes(b"drawn")
        return pairs

    monkeypatch.setattr(figures, "save_figures", save)
    monkeypatch.setattr(figures, "inline_svgs", lambda report: {})
    assert output.render_html


@pytest.fixture(scope="module")
def fit_guard(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "guard.safetensors"
    out, err = invoke("fit", "--data", "demo:", "-o", path, "-q")
    return path, out, err


@pytest.fixture(scope="module")
def guard(fit_guard):
    return fit_guard[0]


NETS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Reads 8x8 RGB images; gives logits from the channel means."""

    def __init__(self, classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.fc = nn.Linear(3, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(classes, 3, generator=generator) * 4)
            self.fc.bias.zero_()
        self.pretrained_cfg = {"architecture": "net", "input_size": (3, 8, 8),
                               "mean": (0.5,) * 3, "std": (0.1,) * 3}

    def forward(self, x):
        return self.fc(x.mean(dim=(2, 3)))

class Breaks(Net):
    def forward(self, x):
        z = super().forward(x)
        z[x.mean(dim=(1, 2, 3)) > 0] = float("nan")
        return z

class Odds(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)

class Narrow(Net):
    def forward(self, x):
        return super().forward(x[:, :2].mean(dim=(2, 3)))

def net(): return Net()
def five(): return Net(5)
def breaks(): return Breaks()
def odds(): return Odds()
def crashes(): return Narrow()
def bare():
    model = Net()
    del model.pretrained_cfg
    return model
def number(): return 3
def needs(argument): return Net()
def tiny_timm():
    import timm
    model = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), test_input_size=None)
    return model
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with factories (nets.py) and images with labels (set.npz, 300 rows)."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "nets.py").write_text(textwrap.dedent(NETS))
    generator = np.random.default_rng(0)
    colours = generator.integers(60, 200, (300, 1, 1, 3))
    noise = generator.integers(-20, 20, (300, 8, 8, 3))
    images = (colours + noise).astype(np.uint8)
    space = {}
    exec(NETS, space)
    x = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        labels = space["net"]()((x - 0.5) / 0.1).argmax(1).numpy()
    labels[::6] = (labels[::6] + 1) % 3
    np.savez(folder / "set.npz", images=images, labels=labels)
    np.savez(folder / "five.npz", images=images, labels=np.arange(300) % 5, classes=list("abcde"))
    save_file(space["net"]().state_dict(), folder / "net.safetensors")
    return folder


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command):
    text, _ = invoke(command, "--help")
    assert f"ebm-guard {command}" in text
    params = cli.get_command(click.Context(cli), command).params
    for param in params:
        if isinstance(param, click.Argument):
            assert param.make_metavar(click.Context(cli)).strip("[]") in text
            continue
        assert max(param.opts, key=len) in text
        assert (param.help or "").strip(), f"{command} {param.opts}: no help text"
    assert invoke(command, "-h")[0] == text


def test_help_of_the_group():
    text, _ = invoke("--help")
    for command in COMMANDS:
        assert command in text
    for code in ("0 done", "1 a requirement failed", "2 wrong usage", "3 bad data", "4 a live"):
        assert code in " ".join(text.split())
    assert ebm_guard.__version__ in invoke("--version")[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["reprot"], ["no command 'reprot'", "did you mean 'report'"]),
        (["report", "--dat", "demo:"], ["--dat"]),
        (["report", "--unknown"], ["--unknown"]),
        (["report"], ["--data"]),
        (["fit", "--data", "demo:"], ["--output"]),
        (["predict", "--data", "demo:", "-o", "x"], ["GUARD"]),
        (["report", "--data", "demo:", "-o", "x", "--score", "enrgy"], ["enrgy", "energy"]),
        (["report", "--data", "demo:", "-o", "x", "--limit", "1"], ["--limit"]),
        (["report", "--data", "demo:", "-o", "x", "--batch-size", "0"], ["--batch-size"]),
        (["report", "--data", "demo:", "-o", "x", "--mean", "a,b"], ["'a,b'", "numbers such as"]),
        (["report", "--data", "demo:", "-o", "x", "--ood", "demo:"], ["NAME=SPEC"]),
        (
            ["report", "--data", "demo:", "-o", "x", "--ood", "a=demo:", "--ood", "a=demo:"],
            ["'a' twice", "names must differ"],
        ),
        (["report", "--data", "demo:", "-o", "x", "--ood", "fit=demo:far_ood"], ["'fit'"]),
        (["report", "--data", "demo:", "-o", "x", "--ood", "a.b=demo:far_ood"], ["'a.b'"]),
        (["report", "--data", "npy:x", "-o", "x"], ["'npy'", "did you mean 'npz'"]),
        (["report", "--data", "demo:", "-o", "x", "--require", "ece<5%"], ["ece<=0.05"]),
        (
            ["report", "--data", "demo:", "-o", "x", "--guard", "g", "--calibration-data", "demo:"],
            ["--guard and --calibration-data", "leave one out"],
        ),
        (["report", "--data", "demo:", "-o", "x", "--device", "quantum"], ["'quantum'"]),
        (
            [
                "report",
                "--model",
                "ebm_guard.data.demo:demo_classifier",
                "--data",
                "demo:",
                "-o",
                "x",
                "--device",
                "quantum",
            ],
            ["'quantum'", "cannot be used"],
        ),
        (["fit", "--data", "demo:", "-o", "x", "--false-reject-rate", "0"], ["(0, 1)"]),
        (
            ["fit", "--data", "demo:", "-o", "x", "--false-reject-rate", "0.001"],
            ["450 calibration rows", "needs at least 2995"],
        ),
        (["list", "--family", "scores"], ["scores"]),
    ],
)
def test_wrong_usage_is_exit_code_2(args, words, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    refused(*args, code=2, words=words, folder=tmp_path)


# --- list and info


def test_list(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text, _ = invoke("list")
    rows = json.loads(invoke("list", "--json")[0])
    assert {row["family"] for row in rows} == set(ebm_guard.registry.FAMILIES)
    for row in rows:
        assert row["name"] in text
        assert set(row) >= {"family", "name", "paper", "equation", "needs", "default"}
    scores = json.loads(invoke("list", "--family", "score", "--json")[0])
    assert [row["name"] for row in scores] == [r["name"] for r in rows if r["family"] == "score"]


def test_fit_and_info(fit_guard):
    path, out, err = fit_guard
    assert "at least 0.95" in out
    assert str(path) in err
    info, _ = invoke("info", path)
    assert [line for line in info.splitlines() if "created" not in line] == [
        line for line in out.splitlines() if "created" not in line
    ]
    manifest = json.loads(invoke("info", path, "--json")[0])
    assert manifest["facts"]["n"] == 450
    assert manifest["facts"]["source"] == "demo:"
    assert manifest["model"]["name"] == "demo_digits_convnet"


def test_fit_json(tmp_path):
    path = tmp_path / "guard.safetensors"
    out, _ = invoke(
        "fit",
        "--data",
        "demo:",
        "-o",
        path,
        "-q",
        "--json",
        "--no-canary",
        "--score",
        "msp",
        "--threshold",
        "marginal",
        "--false-reject-rate",
        "0.1",
    )
    manifest = json.loads(out)
    assert manifest["score"]["name"] == "msp"
    assert manifest["canary"] is None
    assert manifest["threshold"]["method"] == "marginal"
    assert manifest["threshold"]["false_reject_rate"] == 0.1
    assert listing(tmp_path) == ["guard.safetensors"]


def test_info_refuses_what_is_no_guard(tmp_path, guard):
    refused("info", tmp_path / "none", code=3, words=["not a file", "guard.save"])
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, weights)
    refused("info", weights, code=3, words=["not a guard", "ebm-guard fit"])
    content = bytearray(guard.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    refused("info", weights, code=3, words=["changed after it was saved"])
    weights.write_bytes(content[:100])
    refused("info", weights, code=3, words=["damaged"])


# --- predict


@pytest.mark.parametrize(("part", "n"), [("evaluation", 450), ("near_ood", 354)])
def test_predict_jsonl(guard, tmp_path, part, n):
    path = tmp_path / "out.jsonl"
    out, _ = invoke("predict", guard, "--data", f"demo:{part}", "-o", path, "-q")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"] for row in rows] == [str(number) for number in range(n)]
    assert f"{n} rows" in out
    fields = [
        "id",
        "status",
        "accept",
        "label",
        "class",
        "confidence",
        "energy",
        "score",
        "p_value",
        "reason",
    ]
    for row in rows:
        assert list(row) == fields
        assert row["accept"] == (row["status"] == "ACCEPT")
        assert row["class"] == str(row["label"])
        assert (row["reason"] == "") == row["accept"]
    share = sum(row["accept"] for row in rows) / n
    assert share > 0.9 if part == "evaluation" else share < 0.5


def test_predict_csv_says_the_same(guard, tmp_path):
    one, two = tmp_path / "out.jsonl", tmp_path / "out.csv"
    invoke("predict", guard, "--data", "demo:", "-o", one, "-q")
    out, _ = invoke(
        "predict", guard, "--data", "demo:", "-o", two, "--format", "csv", "--json", "-q"
    )
    rows = [json.loads(line) for line in one.read_text().splitlines()]
    with two.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    for text, row in zip(table, rows, strict=True):
        assert text["accept"] == str(row["accept"])
        for name in ("confidence", "energy", "score", "p_value", "label"):
            assert float(text[name]) == row[name]
    summary = json.loads(out)
    assert summary["rows"] == 450
    assert summary["ACCEPT"] + summary.get("REJECT", 0) == 450
    assert summary["output"] == str(two)


def test_predict_adds_the_lowest_energy_labels(guard, tmp_path):
    logits = np.random.default_rng(0).normal(size=(9, 8)) * 4
    np.savez(tmp_path / "z.npz", logits=logits)
    common = ["predict", guard, "--data", f"logits:{tmp_path / 'z.npz'}", "--top-k", 3, "-q"]
    invoke(*common, "-o", tmp_path / "out.jsonl")
    invoke(*common, "-o", tmp_path / "out.csv", "--format", "csv")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for place, (row, text) in enumerate(zip(rows, table, strict=True)):
        best = np.argsort(-logits[place], kind="stable")[:3]
        truth = [(int(label), str(label), -logits[place, label]) for label in best]
        found = [(item["label"], item["class"], item["energy"]) for item in row["top"]]
        assert found == truth
        assert json.loads(text["top"]) == row["top"]
        assert row["top"][0]["label"] == row["label"]
    invoke("predict", guard, "--data", "demo:", "--top-k", 8, "-q", "-o", tmp_path / "demo.jsonl")
    row = json.loads((tmp_path / "demo.jsonl").read_text().splitlines()[0])
    energies = [item["energy"] for item in row["top"]]
    assert energies == sorted(energies)
    assert -np.logaddexp.reduce(-np.array(energies)) == pytest.approx(row["energy"], rel=1e-5)
    many = ["predict", guard, "--data", "demo:", "--top-k", 9, "-q", "-o", tmp_path / "many"]
    assert "needed 1 to 8" in invoke(*many, code=2)[1]
    assert not (tmp_path / "many").exists()


def test_predict_on_stored_logits_equals_predict_on_images(guard, tmp_path):
    images = (torch.from_numpy(load_demo("near_ood").images).float() / 255).unsqueeze(1)
    model = demo_classifier()
    cfg = model.pretrained_cfg
    with torch.no_grad():
        logits = model((images - cfg["mean"][0]) / cfg["std"][0]).numpy()
    np.savez(tmp_path / "near.npz", logits=logits)
    found = []
    for number, spec in enumerate(("demo:near_ood", f"logits:{tmp_path / 'near.npz'}")):
        path = tmp_path / f"{number}.jsonl"
        invoke("predict", guard, "--data", spec, "-o", path, "-q")
        found.append([json.loads(line) for line in path.read_text().splitlines()])
    assert [row["status"] for row in found[0]] == [row["status"] for row in found[1]]
    for one, two in zip(*found, strict=True):
        assert one["energy"] == pytest.approx(two["energy"], abs=1e-4)


def test_predict_refuses_probabilities_for_an_energy_gate(guard, tmp_path):
    np.savez(tmp_path / "odds.npz", probs=np.full((5, 8), 0.125))
    refused(
        "predict",
        guard,
        "--data",
        f"logits:{tmp_path / 'odds.npz'}",
        "-o",
        tmp_path / "out.jsonl",
        code=3,
        words=["needs logits", "probabilities"],
        folder=tmp_path,
    )


def test_predict_refuses_another_number_of_classes(guard, tmp_path):
    np.savez(tmp_path / "z.npz", logits=np.random.default_rng(0).normal(size=(9, 5)) * 4)
    err = invoke_any(
        "predict",
        guard,
        "--data",
        f"logits:{tmp_path / 'z.npz'}",
        "-o",
        tmp_path / "out.jsonl",
        codes=(2, 3),
    )
    assert "5 classes" in err
    assert "8" in err
    assert listing(tmp_path) == ["z.npz"]


def invoke_any(*args, codes):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run([str(arg) for arg in args]) in codes
    return err.getvalue()


def test_predict_writes_a_row_for_an_unreadable_image(place, tmp_path):
    from PIL import Image

    guard = tmp_path / "guard.safetensors"
    model = f"{place / 'nets.py'}:net"
    invoke("fit", "--model", model, "--data", f"npz:{place / 'set.npz'}", "-o", guard, "-q")
    folder = tmp_path / "images"
    folder.mkdir()
    images = np.load(place / "set.npz")["images"]
    for number in range(5):
        Image.fromarray(images[number]).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"broken")
    out = tmp_path / "out.jsonl"
    invoke("predict", guard, "--model", model, "--data", folder, "--top-k", 2, "-o", out, "-q")
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert sorted(rows) == [f"{n}.png" for n in range(5)]
    broken = rows["2.png"]
    assert broken["status"] == "INVALID"
    assert broken["accept"] is False
    assert broken["reason"].startswith("unreadable: cannot read image")
    assert broken["energy"] is None
    assert [len(rows[f"{n}.png"]["top"]) for n in range(5)] == [2, 2, 0, 2, 2]
    before = sorted(listing(tmp_path))
    refused(
        "predict",
        guard,
        "--model",
        model,
        "--data",
        folder,
        "-o",
        tmp_path / "b.jsonl",
        "-q",
        "--strict",
        code=3,
        words=["2.png", "--strict"],
    )
    assert sorted(listing(tmp_path)) == before


# --- reports


def report_of(folder):
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    out, err = invoke("demo", "-o", folder, "-q", "--json")
    return folder, out, err


def test_demo_writes_everything(demo):
    folder, out, err = demo
    names = set(listing(folder))
    assert names >= REPORT_FILES | {"guard.safetensors", "decisions.jsonl", "figures"}
    for name in ("reliability", "energy_histogram", "roc", "score_ranking"):
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()
    assert not [name for name in names if name.startswith(".")]
    assert listing(folder.parent)[0] == "out"
    assert json.loads(out) == json.loads((folder / "report.json").read_text())
    assert "report.html" in err
    assert "guard.safetensors" in err


def test_demo_report_is_valid_and_says_what_it_must(demo):
    report = report_of(demo[0])
    assert report["calibration"]["before"]["accuracy"]["value"] == pytest.approx(0.9867, abs=0.005)
    assert set(report["ood"]) == {"near_digits_8_9", "far_photo_patches"}
    assert report["gate"]["n"] == 450
    assert "small_n" in {item["code"] for item in report["warnings"]}
    html = (demo[0] / "report.html").read_text()
    assert "data:image/png" in html
    assert 'src="http' not in html
    for section in ("groups", "robustness", "finetune"):
        assert report[section]["not_run"]
    assert report["selective"]["accuracy_at"]["90"]["confidence"]["accuracy"]["value"] > 0.98


def test_demo_guard_and_decisions(demo, tmp_path):
    folder = demo[0]
    info = json.loads(invoke("info", folder / "guard.safetensors", "--json")[0])
    report = report_of(folder)
    assert info["threshold"]["cut"] == report["gate"]["threshold"]
    rows = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    sizes = {name: part["n"] for name, part in report["data"]["ood"].items()}
    sizes["evaluation"] = report["data"]["evaluation"]["n"]
    for name, size in sizes.items():
        mine = [row for row in rows if row["set"] == name]
        assert len(mine) == size, "a row per image"
        share = sum(row["accept"] for row in mine) / size
        stated = report["gate"]["coverage" if name == "evaluation" else "accepted_ood"]
        stated = stated if name == "evaluation" else stated[name]
        assert share == pytest.approx(stated["value"], abs=1e-9)


def test_demo_again_gives_the_same_numbers_over_the_old_files(demo, tmp_path, quick):
    folder = tmp_path / "out"
    shutil.copytree(demo[0], folder)
    (folder / "mine.txt").write_text("mine")
    out, _ = invoke("demo", "-o", folder, "-q")
    assert "ACCEPT" in out
    assert without_run(report_of(folder)) == without_run(report_of(demo[0]))
    assert (folder / "mine.txt").read_text() == "mine"


def without_run(report):
    report["meta"]["run"] = report["meta"]["command"] = None
    return report


def numbers_of(report):
    """All of a report but where it came from."""
    report = json.loads(json.dumps(report))
    del report["meta"]["run"], report["meta"]["command"], report["meta"]["environment"]
    del report["meta"]["model"], report["meta"]["preprocessing"]
    sets = [
        report["data"]["evaluation"],
        report["data"]["calibration"],
        *report["data"]["ood"].values(),
    ]
    for part in filter(None, sets):
        for name in ("spec", "fingerprint", "class_match", "classes"):
            del part[name]
    for items in report["gallery"].values():
        for item in items if isinstance(items, list) else []:
            item["thumbnail"] = None
    del report["gallery"]["images"], report["gallery"]["note"]
    return report


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_report_from_saved_rows_equals_the_report_from_the_model(tmp_path, quick, held_out):
    calibration = ["--calibration-data", "demo:"] if held_out else []
    one, saved = tmp_path / "one", tmp_path / "saved"
    invoke(
        "report",
        "--data",
        "demo:",
        "--ood",
        "near=demo:near_ood",
        "--ood",
        "far=demo:",
        *calibration,
        "--save-predictions",
        saved,
        "-o",
        one,
        "-q",
    )
    expected = numbers_of(report_of(one))
    assert listing(saved)[0] == ("calibration" if held_out else "evaluation")

    def specs(kind, form):
        calibration = ["--calibration-data", form(kind, "calibration")] if held_out else []
        return [
            "--data",
            form(kind, "evaluation"),
            "--ood",
            f"near={form(kind, 'near')}",
            "--ood",
            f"far={form(kind, 'far')}",
            *calibration,
        ]

    two = tmp_path / "two"
    invoke("report", *specs("predictions", lambda kind, name: f"{kind}:{saved / name}"), "-o", two)
    assert numbers_of(report_of(two)) == expected

    for folder in saved.iterdir():
        part = Predictions.load(folder)
        more = {"labels": part.labels, "classes": part.classes, "features": part.features}
        more |= {"head_weight": part.head.weight, "head_bias": part.head.bias}
        more = {name: column for name, column in more.items() if column is not None}
        np.savez(tmp_path / f"{folder.name}.npz", logits=part.logits, **more)
    three = tmp_path / "three"
    invoke(
        "report", *specs("logits", lambda kind, name: f"{kind}:{tmp_path / name}.npz"), "-o", three
    )
    assert numbers_of(report_of(three)) == expected
    assert report_of(three)["meta"]["model"]["name"] == "stored predictions"


def test_json_on_stdout_is_the_file(tmp_path, quick):
    out, err = invoke("report", "--data", "demo:", "-o", tmp_path / "out", "--json")
    assert json.loads(out) == report_of(tmp_path / "out")
    assert "report:" in err


def test_progress_is_on_stderr_and_quiet_is_quiet(tmp_path, quick):
    out, err = invoke("report", "--data", "demo:", "-o", tmp_path / "out")
    assert "450/450" in err
    assert "450/450" not in out
    _, err = invoke("report", "--data", "demo:", "-o", tmp_path / "out", "-q")
    assert "450/450" not in err


@pytest.mark.slow
def test_requirements(tmp_path, quick):
    base = ["report", "--data", "demo:", "--ood", "far=demo:", "-q", "-o", tmp_path / "out"]
    invoke(*base)
    accuracy = report_of(tmp_path / "out")["calibration"]["after"]["accuracy"]
    low, value, high = accuracy["low"], accuracy["value"], accuracy["high"]
    assert 0 < low < value < high < 1
    met = ["accuracy>=0.5", "auroc>=0.9", "ood.far.scores.energy.fpr95<=0.5", "coverage>=0.8"]
    failed, unclear = f"accuracy>={(1 + high) / 2}", f"accuracy>={(low + value) / 2}"

    def judged(*bounds, code, more=()):
        _, err = invoke(*base, *(f"--require={bound}" for bound in bounds), *more, code=code)
        found = report_of(tmp_path / "out")["requirements"]
        assert [item["text"] for item in found] == list(bounds)
        for item in found:
            assert f"{item['status']}: {item['text']}" in err
        return [item["status"] for item in found]

    assert judged(*met, code=0) == ["met"] * 4
    assert judged(met[0], failed, code=1) == ["met", "failed"]
    assert judged(unclear, code=1) == ["unclear"]
    assert judged(unclear, met[0], code=0, more=["--allow-unclear"]) == ["unclear", "met"]
    assert judged(unclear, failed, code=1, more=["--allow-unclear"]) == ["unclear", "failed"]


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ("ece.value<=0.1", ["ece"]),
        ("calibration.after.acuracy>=0.5", ["'acuracy'", "did you mean 'accuracy'"]),
        ("ood.fra.scores.energy.auroc>=0.5", ["'fra'", "did you mean 'far'"]),
        ("ood.far.scores.enrgy.auroc>=0.5", ["did you mean 'energy'"]),
        ("calibration.after>=0.5", ["not a metric"]),
    ],
)
def test_unknown_metric_is_wrong_usage(bound, words, tmp_path, quick):
    refused(
        "report",
        "--data",
        "demo:",
        "--ood",
        "far=demo:",
        "-q",
        "--require",
        bound,
        "-o",
        tmp_path / "out",
        code=2,
        words=words,
        folder=tmp_path,
    )


@pytest.mark.slow
def test_ends_of_the_interval_and_the_value_alone(tmp_path, quick):
    base = ["report", "--data", "demo:", "-q", "-o", tmp_path / "out"]
    invoke(*base)
    accuracy = report_of(tmp_path / "out")["calibration"]["after"]["accuracy"]
    bound = (accuracy["low"] + accuracy["value"]) / 2
    for end, code in (("", 1), ("@value", 0), ("@upper", 0), ("@lower", 1)):
        _, err = invoke(*base, "--require", f"accuracy>={bound}{end}", code=code)
        # The last line is the verdict, and names what does not hold.
        last = err.rstrip().splitlines()[-1]
        assert (f"accuracy>={bound}{end} (" in last) is (code == 1)
    assert "1 requirement passed" in invoke(*base, "--require", "accuracy>=0.5")[1]


def test_outputs_for_ci(tmp_path, quick):
    junit, card = tmp_path / "ci" / "junit.xml", tmp_path / "out" / "card.md"
    base = ["report", "--data", "demo:", "-q", "-o", tmp_path / "out"]
    files = ["--junit", junit, "--model-card", card]
    _, err = invoke(*base, *files, "--require", "accuracy>=0.5", "--require", "ece<=1e-9", code=1)
    suite = ET.parse(junit).getroot()[0]
    failures = [
        case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None
    ]
    assert failures == ["ece<=1e-9"]
    assert suite.get("failures") == "1"
    assert f"junit: {junit}" in err
    assert f"model card: {card}" in err
    assert "model-index:" in card.read_text()
    # The report holds the same verdicts, and a second run replaces all files.
    assert [item["status"] == "met" for item in report_of(tmp_path / "out")["requirements"]] == [
        True,
        False,
    ]
    invoke(*base, *files)
    assert ET.parse(junit).getroot().get("failures") == "0"


@pytest.mark.slow
def test_junit_passes_what_allow_unclear_lets_pass(tmp_path, quick):
    base = ["report", "--data", "demo:", "-q", "-o", tmp_path / "out"]
    invoke(*base)
    value = report_of(tmp_path / "out")["calibration"]["after"]["accuracy"]["value"]
    junit = tmp_path / "junit.xml"
    for more, code in (([], 1), (["--allow-unclear"], 0)):
        invoke(*base, "--require", f"accuracy>={value}", "--junit", junit, *more, code=code)
        assert ET.parse(junit).getroot().get("failures") == str(code)


def test_a_file_of_requirements(tmp_path, quick):
    bounds = tmp_path / "bounds.toml"
    bounds.write_text('[requirements]\naccuracy = ">=0.5"\ncoverage = [">=0.5", "<=1"]\n')
    base = ["report", "--data", "demo:", "-q", "-o", tmp_path / "out", "--require-file", bounds]
    invoke(*base, "--require", "brier<=1")
    texts = [item["text"] for item in report_of(tmp_path / "out")["requirements"]]
    assert texts == ["brier<=1", "accuracy>=0.5", "coverage>=0.5", "coverage<=1"]
    bounds.write_text("[requirements]\naccuracy = 0.5\n")
    invoke(*base, code=2)
    bounds.unlink()
    invoke(*base, code=3)


@pytest.mark.slow
def test_max_regression(tmp_path, quick):
    """A model whose logits are blurred is worse on the same rows; itself it is not."""
    generator = np.random.default_rng(0)
    labels = np.arange(600) % 4
    logits = 3 * np.eye(4)[labels] + generator.normal(size=(600, 4))
    np.savez(tmp_path / "old.npz", logits=logits, labels=labels)
    blurred = logits + 3 * generator.normal(size=logits.shape)
    np.savez(tmp_path / "new.npz", logits=blurred, labels=labels)

    def report(name, *more, code=0):
        data = ["--data", f"logits:{tmp_path / name}.npz", "-o", tmp_path / f"{name}-out"]
        return invoke("report", *data, *more, code=code)[1]

    report("old")
    limits = ["--max-regression", "accuracy=0", "--max-regression", "nll=0.001"]
    against = ["--baseline", tmp_path / "old-out" / "report.json", *limits]
    assert "2 requirements passed" in report("old", *against)
    # The first run has replaced the baseline by the same report.
    err = report("new", *against, "--junit", tmp_path / "junit.xml", code=1)
    found = report_of(tmp_path / "new-out")["requirements"]
    assert [item["status"] for item in found] == ["failed", "failed"]
    assert [item["text"] for item in found] == [
        "max-regression accuracy=0",
        "max-regression nll=0.001",
    ]
    last = err.rstrip().splitlines()[-1]
    assert "max-regression accuracy=0 (failed); max-regression nll=0.001 (failed)" in last
    assert ET.parse(tmp_path / "junit.xml").getroot().get("failures") == "2"
    jsonschema.validate(report_of(tmp_path / "new-out"), SCHEMA)
    # Without the rows nothing can be paired, and that is no pass.
    (tmp_path / "old-out" / "rows.npz").unlink()
    err = report("new", *against, code=1)
    assert "no rows.npz" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--require", "acuracy>=0.5"], 2, ["did you mean 'accuracy'"]),
        (["--require", "ece<=0.1@uper"], 2, ["did you mean 'upper'"]),
        (["--max-regression", "ece=0.1"], 2, ["without --baseline"]),
        (["--max-regression", "ece"], 2, ["METRIC=AMOUNT"]),
        (["--max-regression", "ecee=1"], 2, ["did you mean 'ece'"]),
        (["--require-file", "none.toml"], 3, ["none.toml"]),
        (["--junit", "{}"], 2, ["--junit", "a folder"]),
        (["--junit", "{}/out/report.json"], 2, ["report.json of --output"]),
        (["--model-card", "{}/out/report.md"], 2, ["report.md of --output"]),
        (["--junit", "{}/a", "--model-card", "{}/a"], 2, ["which is --junit"]),
        (["--model-card", "{}/README.md"], 3, ["it was not touched"]),
        (["--junit", "{}/README.md/a.xml"], 3, ["cannot write"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_for_ci_are_refused_before_the_work(tmp_path, args, code, words, monkeypatch):
    monkeypatch.setattr("ebm_guard.report.build_report", None)
    (tmp_path / "README.md").write_text("# My model\n")
    args = [arg.replace("{}", str(tmp_path)) for arg in args]
    base = ["report", "--data", "demo:", "-q", "-o", tmp_path / "out"]
    refused(*base, *args, code=code, words=words, folder=tmp_path)


def test_a_requirement_on_what_was_not_run_fails(tmp_path, quick):
    _, err = invoke(
        "report",
        "--data",
        "demo:",
        "-q",
        "--require",
        "auroc>=0.5",
        "--require",
        "robustness.pgd<=0.5",
        "-o",
        tmp_path / "out",
        code=1,
    )
    statuses = [item["status"] for item in report_of(tmp_path / "out")["requirements"]]
    assert statuses == ["failed", "failed"]
    assert "no OOD set was given" in err
    assert "add --attacks quick" in err


def test_report_of_a_given_guard(guard, tmp_path, quick):
    invoke(
        "report",
        "--guard",
        guard,
        "--data",
        "demo:",
        "--ood",
        "far=demo:",
        "-q",
        "-o",
        tmp_path / "out",
    )
    report = report_of(tmp_path / "out")
    manifest = json.loads(invoke("info", guard, "--json")[0])
    assert report["gate"]["threshold"] == manifest["threshold"]["cut"]
    assert report["gate"]["n"] == 450
    assert report["calibration"]["after"]["calibrator"]["n"] == 450
    assert "evaluated as it is" in report["gate"]["protocol"]
    predicted = tmp_path / "out.jsonl"
    invoke("predict", guard, "--data", "demo:", "-o", predicted, "-q")
    accepted = [json.loads(line)["accept"] for line in predicted.read_text().splitlines()]
    assert report["gate"]["coverage"]["value"] == pytest.approx(np.mean(accepted), abs=1e-9)


def test_report_of_a_guard_on_its_own_rows_is_refused(guard, tmp_path):
    refused(
        "report",
        "--guard",
        guard,
        "--data",
        "demo:calibration",
        "-q",
        "-o",
        tmp_path / "out",
        code=3,
        words=["very rows", "has not seen"],
        folder=tmp_path,
    )


def test_report_of_a_guard_with_other_classes_is_refused(guard, tmp_path):
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "z.npz", logits=generator.normal(size=(90, 5)), labels=np.arange(90) % 5)
    err = invoke_any(
        "report",
        "--guard",
        guard,
        "--data",
        f"logits:{tmp_path / 'z.npz'}",
        "-o",
        tmp_path / "out",
        codes=(2, 3),
    )
    assert "classes" in err
    assert listing(tmp_path) == ["z.npz"]


def test_limit_is_said(tmp_path, quick):
    invoke(
        "report",
        "--data",
        "demo:",
        "--ood",
        "far=demo:",
        "--limit",
        "120",
        "-q",
        "-o",
        tmp_path / "out",
    )
    report = report_of(tmp_path / "out")
    assert report["data"]["evaluation"]["n"] == report["data"]["evaluation"]["limit"] == 120
    assert report["data"]["ood"]["far"]["n"] == 120
    limited = [item["message"] for item in report["warnings"] if item["code"] == "limited"]
    assert len(limited) == 2
    assert "not the full figures" in limited[0]
    invoke(
        "report", "--data", "demo:", "--limit", "120", "--seed", "1", "-q", "-o", tmp_path / "other"
    )
    prints = [
        report_of(tmp_path / name)["data"]["evaluation"]["fingerprint"] for name in ("out", "other")
    ]
    assert prints[0] != prints[1]


@pytest.mark.parametrize("limit", [450, 10_000])
def test_a_limit_that_cuts_nothing_is_not_said(tmp_path, quick, limit):
    invoke("report", "--data", "demo:", "--limit", limit, "-q", "-o", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["data"]["evaluation"]["n"] == 450
    assert report["data"]["evaluation"]["limit"] is None
    assert "limited" not in {item["code"] for item in report["warnings"]}


def test_no_images(tmp_path, quick):
    invoke("report", "--data", "demo:", "--no-images", "-q", "-o", tmp_path / "out")
    assert "data:image" not in (tmp_path / "out" / "report.html").read_text()
    gallery = report_of(tmp_path / "out")["gallery"]
    assert gallery["images"] is False
    assert gallery["highest_energy"]
    assert not any(item["thumbnail"] for item in gallery["highest_energy"])


def test_shared_rows_are_refused(tmp_path):
    for option in (["--ood", "far=demo:evaluation"], ["--calibration-data", "demo:evaluation"]):
        refused(
            "report",
            "--data",
            "demo:evaluation",
            *option,
            "-q",
            "-o",
            tmp_path / "out",
            code=3,
            words=["share 450 rows", "[:5000]"],
            folder=tmp_path,
        )


# --- models


@pytest.mark.parametrize(
    "form", ["file", "module", "timm", "tiny", "safetensors", "pt", "nested", "prefixed"]
)
def test_ways_to_name_a_model(place, tmp_path, monkeypatch, form):
    monkeypatch.chdir(place)
    model, more = "nets.py:net", []
    if form == "module":
        model = "nets:net"
    elif form == "tiny":
        model = "nets.py:tiny_timm"
    elif form == "timm":
        model, more = "test_resnet", ["--num-classes", "3", "--limit", "70", "--img-size", "32"]
    elif form == "safetensors":
        more = ["--checkpoint", "net.safetensors"]
    elif form in ("pt", "nested", "prefixed"):
        from safetensors.torch import load_file

        state = load_file("net.safetensors")
        if form == "prefixed":
            state = {f"module.{name}": value for name, value in state.items()}
        whole = {"epoch": 3, "state_dict": state} if form == "nested" else state
        torch.save(whole, tmp_path / "net.pt")
        more = ["--checkpoint", tmp_path / "net.pt"]
    out, _ = invoke(
        "fit",
        "--model",
        model,
        "--data",
        "npz:set.npz",
        "-o",
        tmp_path / "g",
        "-q",
        "--json",
        *more,
    )
    manifest = json.loads(out)
    assert manifest["facts"]["num_classes"] == 3
    assert manifest["model"]["weights_sha256"].startswith("sha256:")
    if form not in ("timm", "tiny"):
        assert manifest["model"]["name"] == "net"
    sys.modules.pop("nets", None)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("none.py:net", 2, ["does not exist"]),
        ("net.py:net", 2, ["does not exist", "did you mean 'nets.py'"]),
        ("nets.py:nett", 2, ["no callable 'nett'", "did you mean 'net'"]),
        ("nets.py:number", 4, ["returned a int", "nn.Module"]),
        ("nets.py:needs", 2, ["failed", "without arguments"]),
        ("nowhere.at.all:net", 2, ["cannot import 'nowhere'", "module:factory"]),
        ("resnet1888", 2, ["timm does not know", "did you mean"]),
        ("nets.py:net --pretrained", 2, ["--pretrained", "for timm names"]),
        ("nets.py:odds", 4, ["probabilities", "remove the final Softmax"]),
        (
            "nets.py:crashes",
            4,
            ["model failed", "IndexError: Dimension out of range", "--img-size"],
        ),
        ("nets.py:bare", 2, ["no pretrained_cfg", "--mean", "--std"]),
        ("nets.py:breaks", 4, ["NaN or infinite", "first:", "half precision"]),
        ("", 2, ["no --model was given", "module:factory"]),
    ],
)
def test_models_that_do_not_work(place, tmp_path, monkeypatch, model, code, words):
    monkeypatch.chdir(place)
    given = ["--model", *model.split()] if model else []
    for command in ("fit", "report"):
        refused(
            command,
            *given,
            "--data",
            "npz:set.npz",
            "-o",
            tmp_path / "out",
            "-q",
            code=code,
            words=words,
            folder=tmp_path,
        )


def test_checkpoints_that_do_not_work(place, tmp_path):
    files = {
        "other.safetensors": (lambda p: save_file({"a": torch.zeros(2)}, p), ["does not fit"]),
        "other.pt": (lambda p: torch.save({"fc.weight": torch.zeros(9)}, p), ["does not fit"]),
        "object.pt": (lambda p: torch.save(Path(), p), ["never pickled", "state_dict()"]),
        "list.pt": (lambda p: torch.save([1, 2], p), ["holds a list", "state dict"]),
        "keys.pt": (lambda p: torch.save({0: torch.zeros(2)}, p), ["keys.pt"]),
        "values.pt": (lambda p: torch.save({"fc.weight": 3, "fc.bias": "x"}, p), ["values.pt"]),
        "text.pt": (lambda p: p.write_text("no weights"), ["cannot read checkpoint"]),
        "empty.pt": (lambda p: p.write_bytes(b""), ["cannot read checkpoint"]),
        "text.safetensors": (lambda p: p.write_text("no weights"), ["cannot read checkpoint"]),
        "none.pt": (lambda p: None, ["not a file"]),
    }
    for name, (make, words) in files.items():
        path = tmp_path / name
        make(path)
        refused(
            "fit",
            "--model",
            f"{place / 'nets.py'}:net",
            "--checkpoint",
            path,
            "--data",
            f"npz:{place / 'set.npz'}",
            "-o",
            tmp_path / "g",
            "-q",
            code=3,
            words=words,
        )
    assert "g" not in listing(tmp_path)


def test_nothing_is_unpickled(place, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pt")
    refused(
        "fit",
        "--model",
        f"{place / 'nets.py'}:net",
        "--checkpoint",
        tmp_path / "bomb.pt",
        "--data",
        f"npz:{place / 'set.npz'}",
        "-o",
        tmp_path / "g",
        code=3,
        words=["weights_only=True"],
    )
    assert listing(tmp_path) == ["bomb.pt"]


def test_class_count_different_from_the_data(place, tmp_path):
    model = f"{place / 'nets.py'}:net"
    refused(
        "fit",
        "--model",
        model,
        "--data",
        f"npz:{place / 'five.npz'}",
        "-o",
        tmp_path / "g",
        "-q",
        code=3,
        words=["3", "classes="],
        folder=tmp_path,
    )
    few = f"npz:{place / 'five.npz'}?classes=0-2"
    out, _ = invoke("fit", "--model", model, "--data", few, "-o", tmp_path / "g", "-q")
    assert "180 rows" in out


def test_labels_of_an_ood_set_are_not_used(place, tmp_path, quick):
    """They are numbers of other classes, and may be larger than any of the model's."""
    few, many = f"npz:{place / 'set.npz'}[:200]", f"npz:{place / 'five.npz'}[200:]"
    invoke(
        "report",
        "--model",
        f"{place / 'nets.py'}:net",
        "--data",
        few,
        "--ood",
        f"other={many}",
        "-o",
        tmp_path / "out",
        "-q",
    )
    report = report_of(tmp_path / "out")
    assert report["data"]["ood"]["other"]["n"] == 100
    assert report["data"]["ood"]["other"]["labelled"] is False


def test_missing_data(place, tmp_path):
    model = f"{place / 'nets.py'}:net"
    for spec, words in {
        f"npz:{place / 'sett.npz'}": ["does not exist", "did you mean 'set.npz'"],
        f"logits:{place / 'sets.npz'}": ["does not exist", "did you mean 'set.npz'"],
        f"predictions:{tmp_path / 'none'}": ["does not exist"],
        str(tmp_path): ["folder without images"],
        "demo:near": ["'near'", "use one of"],
    }.items():
        refused(
            "report",
            "--model",
            model,
            "--data",
            spec,
            "-o",
            tmp_path / "out",
            code=3,
            words=words,
            folder=tmp_path,
        )


def test_non_finite_values_in_a_file_are_bad_data(tmp_path):
    logits = np.random.default_rng(0).normal(size=(90, 4))
    logits[17, 2] = np.nan
    np.savez(tmp_path / "z.npz", logits=logits)
    for command in ("fit", "report"):
        refused(
            command,
            "--data",
            f"logits:{tmp_path / 'z.npz'}",
            "-o",
            tmp_path / "out",
            code=3,
            words=["1 of 90 rows", "first row 17", "finite"],
            folder=tmp_path,
        )


def test_predict_with_a_model_that_breaks_is_complete_and_code_4(place, tmp_path):
    broken = (tmp_path / "broken.py").resolve()
    shutil.copy(place / "nets.py", broken)
    guard, data = tmp_path / "guard.safetensors", f"npz:{place / 'set.npz'}"
    # The same weights: without the canary nothing tells the two apart before it breaks.
    invoke("fit", "--model", f"{broken}:net", "--data", data, "-o", guard, "-q", "--no-canary")
    path = tmp_path / "out.jsonl"
    _, err = invoke(
        "predict",
        guard,
        "--model",
        f"{broken}:breaks",
        "--data",
        data,
        "--top-k",
        2,
        "-o",
        path,
        "-q",
        code=4,
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    broken_rows = [row for row in rows if row["status"] == "INVALID"]
    assert len(rows) == 300
    assert 0 < len(broken_rows) < 300
    assert f"non-finite logits for {len(broken_rows)} rows" in err
    for row in broken_rows:
        assert row["label"] == -1
        assert row["class"] is None
        assert row["energy"] is None
        assert row["top"] == []


def test_guard_of_another_model(place, guard, tmp_path):
    """Other weights, other code, other preprocessing."""
    own, data = tmp_path / "own.safetensors", f"npz:{place / 'set.npz'}"
    nets = place / "nets.py"
    invoke("fit", "--model", f"{nets}:net", "--data", data, "-o", own, "-q")
    for which, model, words in (
        (guard, "net", ["demo_digits_convnet", "fit a new guard"]),
        (own, "five", ["3 classes", "5"]),
        (own, "breaks", ["canary", "code"]),
        (own, "tiny_timm", []),
    ):
        for command in ("predict", "report"):
            arguments = ["predict", which] if command == "predict" else ["report", "--guard", which]
            refused(
                *arguments,
                "--model",
                f"{nets}:{model}",
                "--data",
                data,
                "-o",
                tmp_path / "out",
                code=3,
                words=words,
                folder=tmp_path,
            )
    refused(
        "predict",
        own,
        "--model",
        f"{nets}:net",
        "--data",
        data,
        "--mean",
        "0.4,0.4,0.4",
        "-o",
        tmp_path / "out",
        code=3,
        words=["fitted with", "fit a new guard"],
        folder=tmp_path,
    )
    invoke(
        "predict",
        own,
        "--model",
        f"{nets}:net",
        "--data",
        data,
        "--mean",
        "0.5,0.5,0.5",
        "-o",
        tmp_path / "out.jsonl",
        "-q",
    )


def test_preprocessing_from_the_command_line(place, tmp_path):
    data = f"npz:{place / 'set.npz'}"
    cuts = []
    for model, more in (
        ("net", []),
        ("bare", ["--mean", "0.5,0.5,0.5", "--std", "0.1,0.1,0.1"]),
        ("net", ["--mean", "0.4,0.4,0.4"]),
    ):
        out, _ = invoke(
            "fit",
            "--model",
            f"{place / 'nets.py'}:{model}",
            "--data",
            data,
            "-o",
            tmp_path / "g",
            "-q",
            "--json",
            *more,
        )
        manifest = json.loads(out)
        cuts.append(manifest["threshold"]["cut"])
        assert "command line" in manifest["preprocessing"]["source"] or not more
    assert cuts[0] == pytest.approx(cuts[1])
    assert cuts[2] != cuts[0]


def test_amp_channels_last_and_workers(place, tmp_path):
    out, _ = invoke(
        "fit",
        "--model",
        f"{place / 'nets.py'}:net",
        "--data",
        f"npz:{place / 'set.npz'}",
        "-o",
        tmp_path / "g",
        "-q",
        "--json",
        "--amp",
        "--channels-last",
        "--batch-size",
        "64",
    )
    assert json.loads(out)["facts"]["n"] == 300


# --- places that cannot be written


@pytest.fixture
def blocked(tmp_path):
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file" / "x"


@pytest.mark.parametrize("command", ["report", "fit", "predict", "demo"])
def test_a_file_in_the_way(command, blocked, guard, tmp_path):
    args = {
        "report": ["report", "--data", "demo:"],
        "fit": ["fit", "--data", "demo:"],
        "predict": ["predict", guard, "--data", "demo:"],
        "demo": ["demo"],
    }[command]
    refused(
        *args,
        "-o",
        blocked,
        "-q",
        code=3,
        words=["annot write", str(blocked), "--output"],
        folder=tmp_path,
    )
    assert (tmp_path / "file").read_text() == "mine"


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["report", "fit", "predict", "demo", "save-predictions"])
def test_a_full_disk_leaves_nothing(command, guard, tmp_path, monkeypatch, quick):
    args = {
        "report": ["report", "--data", "demo:", "-o", tmp_path / "out"],
        "fit": ["fit", "--data", "demo:", "-o", tmp_path / "out"],
        "predict": ["predict", guard, "--data", "demo:", "-o", tmp_path / "out"],
        "demo": ["demo", "-o", tmp_path / "out"],
        "save-predictions": [
            "report",
            "--data",
            "demo:",
            "-o",
            tmp_path / "out",
            "--save-predictions",
            tmp_path / "rows",
        ],
    }[command]
    if command == "predict":
        opened = contextlib.nullcontext(full)
        monkeypatch.setattr("ebm_guard.deploy.batch.row_file", lambda *_: opened)
    elif command == "save-predictions":
        monkeypatch.setattr(np, "save", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    err = refused(*args, "-q", code=3, words=["No space left on device"], folder=tmp_path)
    assert "--output" in err


def test_a_full_disk_keeps_the_older_report(tmp_path, monkeypatch, quick):
    folder = tmp_path / "out"
    invoke("report", "--data", "demo:", "-o", folder, "-q")
    before = {name: (folder / name).read_bytes() for name in REPORT_FILES}
    monkeypatch.setattr(Path, "write_bytes", full)
    refused(
        "report",
        "--data",
        "demo:",
        "--limit",
        "100",
        "-o",
        folder,
        "-q",
        code=3,
        words=["No space left", "unchanged"],
        folder=tmp_path,
    )
    assert {name: (folder / name).read_bytes() for name in REPORT_FILES} == before


def test_interrupted_predict_keeps_the_older_file(guard, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    path.write_text("older")

    def interrupted(*_):
        raise KeyboardInterrupt

    opened = contextlib.nullcontext(interrupted)
    monkeypatch.setattr("ebm_guard.deploy.batch.row_file", lambda *_: opened)
    _, err = invoke("predict", guard, "--data", "demo:", "-o", path, "-q", code=130)
    assert "interrupted" in err
    assert listing(tmp_path) == ["out.jsonl"]
    assert path.read_text() == "older"


# --- the process


def test_exit_codes_reach_the_shell(tmp_path):
    np.savez(tmp_path / "z.npz", logits=np.full((9, 3), np.nan))
    for args, code in (
        (["--version"], 0),
        (["reprot"], 2),
        (["info", str(tmp_path / "none")], 3),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ebm_guard", *args], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_amp_is_the_same_in_fit_report_and_predict(tmp_path):
    guard = tmp_path / "guard.safetensors"
    invoke("fit", "--data", "demo:", "--amp", "-q", "-o", guard)
    assert json.loads(invoke("info", guard, "--json")[0])["facts"]["dtype"] == "bfloat16"
    args = ["--data", "demo:", "-q"]
    invoke("predict", guard, *args, "--amp", "-o", tmp_path / "rows.jsonl")
    invoke("report", *args, "--guard", guard, "--amp", "-o", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    share = sum(row["accept"] for row in rows) / len(rows)
    assert share == pytest.approx(report_of(tmp_path / "out")["gate"]["coverage"]["value"])
    # Without --amp the same guard sees another dtype, and says so.
    assert "same dtype" in invoke_any(
        "predict", guard, *args, "-o", tmp_path / "other.jsonl", codes=(3,)
    )
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize(
    "extra",
    [["--score", "msp"], ["--threshold", "pac"], ["--assurance", "0.9"]],
    ids=lambda extra: extra[0],
)
def test_a_given_guard_takes_no_gate_options(guard, tmp_path, extra):
    refused(
        *["report", "--data", "demo:", "--guard", guard, "-o", tmp_path / "out", *extra],
        code=2,
        words=[f"--guard and {extra[0]}", "leave one out"],
        folder=tmp_path,
    )


def test_a_checkpoint_without_a_model_is_refused(tmp_path):
    np.savez(tmp_path / "z.npz", logits=np.eye(4), labels=np.arange(4))
    args = ["report", "--data", f"logits:{tmp_path / 'z.npz'}", "-o", tmp_path / "out"]
    err = invoke_any(*args, "--checkpoint", "weights.safetensors", codes=(2,))
    assert "without --model" in err


def test_a_limit_holds_for_stored_rows_too(tmp_path):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(500, 4))
    np.savez(tmp_path / "z.npz", logits=logits, labels=logits.argmax(axis=1))
    args = ["--data", f"logits:{tmp_path / 'z.npz'}", "--limit", 200, "-o", tmp_path / "out"]
    invoke("report", *args)
    report = report_of(tmp_path / "out")
    assert report["data"]["evaluation"]["n"] == 200
    assert report["data"]["evaluation"]["limit"] == 200
    assert "limited" in {item["code"] for item in report["warnings"]}


@pytest.mark.parametrize("name", COMMANDS)
def test_example_lines_of_the_help_are_kept(name, capsys):
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "\\b" not in text
    lines = [line.strip() for line in text.splitlines()]
    if name not in ("demo", "list", "info"):
        assert any(line.startswith(f"ebm-guard {name} ") for line in lines)
