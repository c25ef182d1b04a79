"""An exported torch program: written whole or not at all, read without unpickling, the same."""

import io
import json
import zipfile

import pytest
import torch
from export_cases import Net, case, ensemble, fitted, inputs, labelled
from torch import nn
from toys import Pixels

import ebm_guard
from ebm_guard.cli import run as run_command
from ebm_guard.deploy import export, load_exported
from ebm_guard.deploy.exported import FACTS_FILE
from ebm_guard.errors import (
    ArtifactError,
    DataError,
    InvalidInputError,
    NotFittedError,
    UnsupportedModelError,
)
from ebm_guard.gate import INVALID
from ebm_guard.model.weights import weights_hash


@pytest.fixture(scope="module")
def guard():
    return fitted(risk=0.3)


@pytest.fixture(scope="module")
def written(guard, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "gate.pt2"
    export(guard, "torch", path, example=inputs(256, 9, spread=2.0))
    return path


@pytest.fixture(scope="module")
def program(written):
    return load_exported(written)


def rewritten(source, target, change):
    """Copy an archive; ``change`` maps (name, bytes) to bytes, or None to leave it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_a_loaded_program_decides_like_the_guard(guard, program):
    for n in (1, 2, 7, 130):
        x = inputs(n, n, spread=2.0)
        found, decision = program(x), guard(x)
        assert torch.equal(found.status, decision.status)
        assert torch.equal(found.label, decision.label)
        assert torch.equal(found.logits, decision.logits)
        assert torch.equal(found.p_value, decision.p_value)
        torch.testing.assert_close(found.confidence, decision.confidence)
        assert not found.logits.requires_grad
    x = inputs(3)
    x[1, 1] = float("nan")
    assert program(x).status[1] == INVALID


def test_the_facts_say_what_is_inside(guard, program):
    facts = program.facts
    assert facts["weights_sha256"] == weights_hash(guard.classifier.model)
    assert facts["input"] == {"kind": "model", "shape": [6], "dtype": "float32"}
    assert facts["parity"]["rows"] == 256
    assert facts["parity"]["decisions_that_differ"] == 0
    assert facts["guard"]["guarantee"] == guard.state().guarantee
    assert facts["guard_sha256"].startswith("sha256:")
    json.dumps(facts, allow_nan=False)


@pytest.mark.slow
def test_the_hash_is_that_of_what_decides(guard, program, tmp_path):
    guard.save(tmp_path / "g.safetensors")
    again = ebm_guard.Guard.load(tmp_path / "g.safetensors", guard.classifier.model)
    same = export(again, "torch", tmp_path / "a.pt2").facts["guard_sha256"]
    assert same == program.facts["guard_sha256"]
    other = export(fitted(), "torch", tmp_path / "b.pt2").facts["guard_sha256"]
    assert other != same


def test_nothing_in_the_file_is_pickled(written):
    with zipfile.ZipFile(written) as archive:
        for info in archive.infolist():
            content = archive.read(info)
            # A pickle of protocol 2 or later begins with this opcode; torch.save writes a zip.
            assert content[:2] not in (b"\x80\x02", b"\x80\x04", b"PK"), info.filename


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_the_users_model_is_left_as_it_was(training, tmp_path):
    model = Net().train(training)
    model.fc.weight.requires_grad_(False)
    before = weights_hash(model)
    guard = fitted(model)
    export(guard, "torch", tmp_path / "g.pt2")
    assert weights_hash(model) == before
    assert model.drop.training is training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert not model._forward_pre_hooks
    assert not model.fc._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda m: nn.DataParallel(m).eval(), lambda m: m.bfloat16()])
def test_wrapped_and_half_precision_models(wrap, tmp_path):
    model = wrap(Net())
    dtype = next(model.parameters()).dtype
    rows = [(x.to(dtype), labels) for x, labels in labelled(Net())]
    guard = ebm_guard.wrap(model).fit(rows)
    program = export(guard, "torch", tmp_path / "g.pt2")
    x = inputs(40).to(dtype)
    assert torch.equal(program(x).accept, guard(x).accept)


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["product", "mixture"])
def test_an_ensemble_is_one_program(combine, tmp_path):
    guard = fitted(ensemble(combine))
    path = tmp_path / "g.pt2"
    export(guard, "torch", path, example=inputs(256, 9, spread=2.0))
    program, x = load_exported(path), inputs(64, 3, spread=2.0)
    for n in (1, 2, 7, 64):
        assert torch.equal(program(x[:n]).accept, guard(x[:n]).accept)
        torch.testing.assert_close(program(x[:n]).logits, guard(x[:n]).logits)


@pytest.mark.slow
def test_a_model_in_channels_last_takes_either_layout(tmp_path):
    model = Pixels().to(memory_format=torch.channels_last)
    x = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    guard = ebm_guard.wrap(model)
    with torch.no_grad():
        labels = model(guard.classifier.pixels(x)).argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 3
    guard.fit([(guard.classifier.pixels(x), labels)])
    program = export(guard, "torch", tmp_path / "g.pt2", input="pixels")
    for n in (1, 2, 7, 64):
        wanted = guard.pixels(x[:n]).accept
        assert torch.equal(program(x[:n]).accept, wanted)
        assert torch.equal(program(x[:n].to(memory_format=torch.channels_last)).accept, wanted)


@pytest.mark.slow
def test_features_and_mixed_scores_survive_the_file(tmp_path):
    guard = case("combine")
    program = export(guard, "torch", tmp_path / "g.pt2")
    x = inputs(50, 3, spread=3.0)
    torch.testing.assert_close(program(x).score, guard(x).score, rtol=1e-9, atol=1e-12)


# --- refusals


class Branches(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class OneByOne(Net):
    def forward(self, x):
        return torch.stack([super(OneByOne, self).forward(row) for row in x])


class Pretends(Net):
    """Gives other logits while it is exported, as a model with a switch for deployment may."""

    def forward(self, x):
        logits = super().forward(x)
        return logits * 1.5 if torch.compiler.is_exporting() else logits


@pytest.mark.parametrize(
    ("model", "words"),
    [(Branches, "cannot be traced"), (Pretends, "does not agree"), (OneByOne, "cannot be traced")],
)
def test_a_model_that_cannot_be_kept_leaves_no_file(model, words, tmp_path, capfd):
    guard = fitted(Net())
    guard.classifier = ebm_guard.EnergyClassifier(model())
    path = tmp_path / "new" / "g.pt2"
    with pytest.raises(UnsupportedModelError, match=words):
        export(guard, "torch", path, example=inputs(256))
    assert list(tmp_path.iterdir()) == []
    # The tracer would print the graph.
    assert capfd.readouterr() == ("", "")


def test_wrong_calls_are_refused(guard, tmp_path):
    path = tmp_path / "g.pt2"
    for arguments, words in (
        (("tensorrt", path), "tensorrt"),
        (("torch", path, {"input": "images"}), "images"),
        (("torch", path, {"opset": 20}), "opset"),
        (("torch", path, {"example": torch.arange(6)[None]}), "int64"),
        (("torch", path, {"example": torch.zeros(6)}), r"\(6,\)"),
        (("torch", path, {"example": [1.0]}), "list"),
        (("torch", path, {"example": torch.zeros(0, 6)}), r"\(0, 6\)"),
    ):
        name, place, *rest = arguments
        with pytest.raises(InvalidInputError, match=words):
            export(guard, name, place, **(rest[0] if rest else {}))
    with pytest.raises(DataError, match="folder"):
        export(guard, "torch", tmp_path)
    with pytest.raises(NotFittedError):
        export(ebm_guard.wrap(Net()), "torch", path)
    no_canary = ebm_guard.wrap(Net()).fit(labelled(Net(), 400), canary=False)
    with pytest.raises(InvalidInputError, match="example="):
        export(no_canary, "torch", path)
    with torch.autocast("cpu"), pytest.raises(InvalidInputError, match="autocast"):
        export(guard, "torch", path)
    guard = fitted()
    guard.facts["dtype"] = "bfloat16"
    with pytest.raises(InvalidInputError, match="bfloat16"):
        export(guard, "torch", path)
    assert list(tmp_path.iterdir()) == []


def test_a_program_refuses_other_inputs(program):
    for x in (
        inputs(2).double(),
        torch.zeros(2, 7),
        torch.zeros(6),
        torch.zeros(0, 6),
        [[0.0] * 6],
    ):
        with pytest.raises(InvalidInputError, match=r"takes the model's input of shape \(B, 6\)"):
            program(x)


# --- files that are not ours, or damaged


def test_pickled_parts_are_refused_before_they_are_read(written, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(written) as archive:
        facts = archive.read(next(n for n in archive.namelist() if n.endswith(FACTS_FILE)))
    graph = torch.export.export(nn.Linear(6, 4), (inputs(2),))
    torch.export.save(graph, buffer, extra_files={FACTS_FILE: facts.decode()})
    path = tmp_path / "pickled.pt2"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ArtifactError, match="pickled"):
        load_exported(path)

    def marked(name, content):
        if name.endswith("weights_config.json"):
            content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            content = content.replace(b'"use_pickle":false', b'"use_pickle":true')
        return content

    with pytest.raises(ArtifactError, match="pickled"):
        load_exported(rewritten(written, path, marked))


def test_archives_of_another_layout_are_refused(written, tmp_path):
    path = tmp_path / "x.pt2"
    with pytest.raises(ArtifactError, match="no facts"):
        load_exported(rewritten(written, path, lambda n, c: None if n.endswith(FACTS_FILE) else c))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", b"\x80\x02.")
    with pytest.raises(ArtifactError, match="layout"):
        load_exported(path)


def test_changed_weights_fail_the_self_test(written, tmp_path):
    def negated(name, content):
        if "/data/weights/weight_" in name:
            content = (-torch.frombuffer(bytearray(content), dtype=torch.uint8)).numpy().tobytes()
        return content

    with pytest.raises(ArtifactError, match="self-test"):
        load_exported(rewritten(written, tmp_path / "x.pt2", negated))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "ebm_guard.export/0"),
        ("label", "softmax"),
        ("input", {"kind": "model", "shape": [7], "dtype": "float32"}),
        ("input", {"kind": "model", "shape": [6], "dtype": "nn"}),
        ("input", {"shape": [6], "dtype": "float32"}),
        ("input", [6]),
        ("self_test", {"logits": [0.0] * 5}),
        ("self_test", None),
    ],
)
def test_edited_facts_are_refused(written, tmp_path, key, value):
    def edited(name, content):
        if name.endswith(FACTS_FILE):
            content = json.dumps({**json.loads(content), key: value}).encode()
        return content

    with pytest.raises(ArtifactError):
        load_exported(rewritten(written, tmp_path / "x.pt2", edited))


def test_damaged_files_are_refused(written, tmp_path):
    content, path = written.read_bytes(), tmp_path / "x.pt2"
    for part in (b"", b"no program", content[:100], content[:-100], content[: len(content) // 2]):
        path.write_bytes(part)
        with pytest.raises((ArtifactError, InvalidInputError)):
            load_exported(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        load_exported(tmp_path / "missing.pt2")


# --- the command


def test_the_command_writes_what_it_says(tmp_path, capsys):
    guard = tmp_path / "g.safetensors"
    assert run_command(["fit", "--data", "demo:calibration", "-q", "-o", str(guard)]) == 0
    capsys.readouterr()
    out = str(tmp_path / "gate.pt2")
    arguments = ["export", str(guard), "--data", "demo:evaluation", "-q", "--format", "torch"]
    assert run_command([*arguments, "--input", "pixels", "-o", out, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["input"] == {"kind": "pixels", "shape": [1, 8, 8], "dtype": "float32"}
    assert facts["parity"]["rows"] == 256
    assert load_exported(out).facts["guard_sha256"] == facts["guard_sha256"]
    assert run_command([*arguments, "--amp", "-o", out]) == 2
    # A guard of the demo classifier needs no --model; one of another model does.
    assert run_command(["export", str(guard), "--format", "torch", "-o", out]) == 0
    assert "256 of 256 decisions equal" in capsys.readouterr().out
    other = str(fitted().save(tmp_path / "other.safetensors"))
    assert run_command(["export", other, "--format", "torch", "-o", out]) == 2
    assert "--model" in capsys.readouterr().err
