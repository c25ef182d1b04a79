"""``ebm-guard finetune`` as a user runs it: files, outcome, exit codes, resuming, bad input."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ebm_guard.cli import cli, run
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.errors import InvalidInputError
from ebm_guard.gate import Guard
from ebm_guard.model.loading import load_weights
from ebm_guard.report.render import output

SCHEMA = json.loads((Path(output.__file__).parents[1] / "finetune_schema.json").read_text("utf-8"))
DEMO = ["finetune", "--train-data", "demo:", "--val-data", "demo:"]
FEW = ["--train-batch-size", "16", "--max-acc-drop", "0.05", "--quiet"]


def invoke(*args):
    """Run a command; return (exit code, stdout, stderr)."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        code = getattr(result.exception, "exit_code", 2)
        return code, result.output, str(result.exception)
    code = result.return_value if isinstance(result.return_value, int) else 0
    return code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Eight gentle updates, with unknown images of which some are trained on."""
    folder = tmp_path_factory.mktemp("tuned")
    far = load_demo("far_ood").images
    np.savez(folder / "outliers.npz", images=far[:60])
    np.savez(folder / "other.npz", images=far[200:300])
    np.savez(folder / "mixed.npz", images=far[50:150])
    code, out, err = invoke(
        *DEMO, "--model", "ebm_guard.data.demo:demo_classifier", "--updates", 8, "--lr", 1e-5,
        "--outliers", f"npz:{folder / 'outliers.npz'}",
        "--ood", f"other=npz:{folder / 'other.npz'}", "--ood", f"mixed=npz:{folder / 'mixed.npz'}",
        "--json", "-o", folder / "out", *FEW,
    )  # fmt: skip
    assert code == 0, err
    return folder / "out", json.loads(out), err


def test_everything_is_written_and_fits_the_schema(tuned):
    folder, content, _ = tuned
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert json.loads((folder / "finetune_report.json").read_text("utf-8")) == content
    for name in ("finetune_report.html", "finetune_report.md", "history.jsonl", "finetune.json"):
        assert (folder / name).stat().st_size > 500
    assert not (folder / "finetune-state").exists()
    facts = json.loads((folder / "finetune.json").read_text("utf-8"))
    assert facts["status"] == content["outcome"]["status"]


def test_the_weights_load_and_are_the_guard_s(tuned):
    folder, content, _ = tuned
    assert content["outcome"]["status"] == "accepted", content["outcome"]["reason"]
    model = demo_classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, folder / "weights.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    # The guard knows the weights it was fitted on.
    assert Guard.load(folder / "guard.safetensors", model).threshold is not None


def test_the_report_knows_its_rows(tuned):
    _, content, _ = tuned
    assert content["comparison"]["own"] is False
    assert content["comparison"]["n"] == content["acceptance"]["n"]
    # The same rows, the same figure.
    test = next(item for item in content["acceptance"]["tests"] if item["name"] == "accuracy")
    accuracy = content["comparison"]["before"]["accuracy"]
    assert accuracy["start"]["value"] == pytest.approx(test["start"])
    assert accuracy["candidate"]["value"] == pytest.approx(test["candidate"])
    # Every selection row is right, so there is no temperature, and nothing to show after it.
    assert "every row is right" in content["comparison"]["temperature"]["note"]
    assert content["comparison"]["after"] == {}
    after = content["comparison"]["before"]["nll"]
    test = next(item for item in content["acceptance"]["tests"] if item["name"] == "nll")
    assert after["candidate"]["value"] == pytest.approx(test["candidate"], abs=1e-5)


def test_what_training_saw_is_not_called_unseen(tuned):
    _, content, err = tuned
    roles = {name: found["role"] for name, found in content["ood"].items()}
    assert roles["outliers"] == "trained_on"
    assert roles["other"] == "unseen"
    assert roles["mixed"] == "trained_on", "ten of its images are among the outliers"
    assert "10 of the 100 images of mixed are in --outliers" in err
    assert roles["synthetic_blend"] == "trained_on"
    assert roles["synthetic_rotation"] == "guard_kind"
    assert content["robustness"]["not_run"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--updates", "5", "--epochs", "1"], "give one of them"),
        (["--epsilon", "0.1"], "without --attacks"),
        (["--attacks", "quick", "--epsilon", "8"], "8/255"),
        (["--ood", "train=demo:far_ood"], "name of another set"),
        (["--ood", "demo:far_ood"], "NAME=SPEC"),
        (["--objective-setting", "weight"], "NAME=VALUE"),
        (["--resume"], "no interrupted run"),
        (["--objective", "margn"], "margin"),
        (["--objective", "nowhere.py:loss"], "does not exist"),
        (["--objective-setting", "wait=1", "--updates", "1"], "weight"),
        (["--scope", "tail"], "last_block"),
        (["--lr", "0"], "0"),
    ],
)
def test_bad_usage_is_explained_and_leaves_nothing(tmp_path, args, words):
    code, _, err = invoke(*DEMO, *args, "-q", "-o", tmp_path / "out")
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_train_and_validation_must_differ(tmp_path):
    code, _, err = invoke(
        "finetune", "--train-data", "demo:train", "--val-data", "demo:train", "-q",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 3
    assert "train" in err
    assert not (tmp_path / "out").exists()


def test_report_rows_must_be_new(tmp_path):
    code, _, err = invoke(*DEMO, "--data", "demo:train", "-q", "-o", tmp_path / "out")
    assert code == 3
    assert "--data and --train-data share" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_destructive_run_returns_the_start(tmp_path):
    """A wild learning rate: the start is returned, which is no error unless it is made one."""
    wild = [*DEMO, "--objective", "cross_entropy", "--lr", "30", "--optimizer", "sgd"]
    code, out, err = invoke(
        *wild, "--updates", 12, "--require-accepted", "--json", "-o", tmp_path / "out", *FEW
    )
    assert code == 1, err
    content = json.loads(out)
    assert content["outcome"]["status"] == "start returned"
    assert "stays as it was" in content["verdict"]["headline"]
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    model = demo_classifier()
    load_weights(model, tmp_path / "out" / "weights.safetensors")
    before = demo_classifier().state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "out" / "finetune_report.html").exists()
    assert invoke(*wild, "--updates", 12, "-o", tmp_path / "again", *FEW)[0] == 0


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_resume(tmp_path, monkeypatch):
    import ebm_guard.cli.finetuning as finetuning

    loud = [item for item in FEW if item != "--quiet"]
    args = [*DEMO, "--updates", "12", "--lr", "1e-4", "--evaluate-every", "4", *loud]
    seen = []

    def stop(line):
        seen.append(line)
        if line["kind"] == "update" and line["update"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "say", stop)
        assert run([*args, "-o", str(tmp_path / "one")]) == 0
    first = json.loads((tmp_path / "one" / "finetune_report.json").read_text("utf-8"))
    assert first["outcome"]["interrupted"]
    assert (tmp_path / "one" / "finetune-state").is_dir()
    assert run([*args, "--resume", "-o", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "finetune-state").exists()
    assert run([*args, "-o", str(tmp_path / "two")]) == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_own_rows_attacks_and_an_objective_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def brier(context, batch):\n"
        "    p = context.logits(batch.augmented).softmax(dim=1)\n"
        "    return (p.gather(1, batch.labels[:, None]) - 1).square().mean()\n"
    )
    code, out, err = invoke(
        *DEMO, "--data", "demo:", "--objective", f"{file}:brier", "--updates", 6, "--lr", 1e-5,
        "--attacks", "quick", "--epsilon", "0.1", "--attack-images", 12, "--json",
        "--ood-validation", "demo:near_ood", "-o", tmp_path / "out", *FEW,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(out)
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert content["comparison"]["own"] is True
    assert content["comparison"]["n"] == content["data"]["evaluation"]["n"]
    assert content["ood"]["ood_validation"]["role"] == "validation"
    assert content["ood"]["synthetic_blend"]["role"] == "unseen", "it trains on no negatives"
    (row,) = content["robustness"]["norms"][0]["rows"]
    assert row["worst_case"]["start"]["n"] == 12
    assert content["robustness"]["n"] == 12
    assert not any(line.startswith("<") for line in err.splitlines())


def test_every_choice_reaches_the_run(tmp_path, monkeypatch):
    import inspect

    from ebm_guard.cli import finetuning
    from ebm_guard.cli.finetune_options import PASSED
    from ebm_guard.training import finetune

    seen = {}

    def stopped(*args, **given):
        seen.update(given)
        raise InvalidInputError("seen enough")

    monkeypatch.setattr(finetuning, "finetune", stopped)
    given = {
        "lr": 0.01, "optimizer": "sgd", "weight_decay": 0.2, "scope": "head", "evaluate_every": 3,
        "max_acc_drop": 0.03, "max_nll_rise": 0.04, "max_ece_rise": 0.06, "outlier_share": 0.7,
        "selection_rows": 77, "outlier_rows": 33, "warm_up": 0.3, "gradient_clip": 1.5, "ema": 0.5,
        "attempts": 1, "precision": "float32", "epochs": 0.5,
        "labelled_share": 0.3,
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    demo = ["--train-data", "demo:", "--val-data", "demo:", "-o", str(tmp_path / "out")]
    terms = ["--class-loss", "hinge,m=2", "--regulariser", "dsm,weight=0.02,sigma=0.2"]
    assert run(["finetune", *demo, *flags, *terms, "--unlabelled", "demo:"]) == 2
    assert seen["class_loss"].settings() == {"class_loss": "hinge", "m": 2.0}
    assert [each.settings() for each in seen["regularisers"]] == [
        {"regulariser": "dsm", "weight": 0.02, "warm_up": 0.1, "sigma": 0.2}
    ]
    assert len(seen["unlabelled"]) == len(load_demo("train").images)
    given["learning_rate"] = given.pop("lr")
    assert {name: seen[name] for name in given} == given
    assert set(PASSED) <= set(inspect.signature(finetune).parameters)
    assert {*given, "resume"} == set(PASSED)
