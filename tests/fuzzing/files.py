"""Parsers of files: each with sound files, and the lies that fit its format."""

import io
import json
import zipfile
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import numpy as np
import torch
from export_cases import fitted, inputs
from safetensors.torch import load, save

from ebm_guard import Guard
from ebm_guard.gate import INVALID, DriftMonitor
from ebm_guard.gate.artifact import _digest
from fuzzing.bounds import Target
from fuzzing.mutations import (
    TEXTS,
    bytes_of,
    json_text,
    npy_of,
    pickled_mark,
    safetensors_header,
    zip_of,
)
from fuzzing.runs import (
    baseline_lies,
    checkpoint_lies,
    history_lies,
    journal_lies,
    read_baseline,
    read_checkpoint,
    read_journal,
    read_lines,
    read_toml,
    read_weights,
    toml_lies,
    weights_lies,
)

ODD_LOGITS = torch.tensor([[0.0, 1, 2, 3], [torch.nan, 0, 0, 0], [torch.inf, 0, 0, 0]])


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def file_target(name, ending, make, read):
    """A parser of one file."""

    def run(content, place):
        path = place / f"file{ending}"
        path.write_bytes(content)
        return read(path)

    return Target(name, make, run)


# --- guards and monitors


def forged(rng, content, key="ebm_guard"):
    """Change the manifest or the tensors, and make the hash anew."""
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    if rng.random() < 0.8:
        metadata[key] = json_text(rng, json.loads(metadata[key])).decode("utf-8", "ignore")
    if rng.random() < 0.3:
        name = rng.choice(sorted(tensors))
        way = rng.randrange(4)
        if way == 0:
            del tensors[name]
        elif way == 1:
            tensors[name] = torch.full(tensors[name].shape, 10**6, dtype=tensors[name].dtype)
        elif way == 2:
            tensors[name] = torch.zeros(rng.choice([(0,), (1,), (3, 4), (1, 1, 1)]))
        else:
            tensors[name] = torch.full((5,), torch.nan)
    metadata["sha256"] = _digest(metadata[key], tensors)
    return save(tensors, metadata)


def safetensors_lies(rng, sound):
    content = rng.choice(sound)
    way = rng.random()
    if way < 0.6:
        return forged(rng, content)
    return safetensors_header(rng, content) if way < 0.85 else bytes_of(rng, content)


@cache
def guard_files(folder):
    made = (fitted(), fitted(risk=0.3), fitted(per_class=True), fitted(score="knn"))
    made += (fitted(calibrator="isotonic"), fitted(score="vim"))
    return [
        guard.save(folder / f"guard{number}.safetensors").read_bytes()
        for number, guard in enumerate(made)
    ]


def read_guard(path):
    guard = Guard.load(path)
    assert guard.summary()
    state = guard.state()
    width = state.facts["features"] if state.score.needs_features else None
    features = None if width is None else torch.zeros(3, int(width))
    # Of other classes it is refused with a message.
    assert guard.decide(ODD_LOGITS, features).status[1:].tolist() == [INVALID] * 2
    return True


@cache
def monitor_files(folder):
    guard = fitted()
    monitor = guard.drift_monitor()
    fresh = monitor.save(folder / "monitor0").read_bytes()
    monitor.update(guard(inputs(50, 5)).score)
    return [fresh, monitor.save(folder / "monitor1").read_bytes()]


def read_monitor(path):
    monitor = DriftMonitor.load(path)
    assert monitor.state.n >= 0
    return True


# --- exported programs


@cache
def programs(folder, kind):
    from ebm_guard.deploy import export

    path = folder / f"gate.{kind}"
    export(fitted(), kind, path, example=inputs(64, 9))
    return path.read_bytes()


def program_lies(rng, folder):
    content = programs(folder, "torch")
    if rng.random() < 0.15:
        return bytes_of(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    sound = dict(members)
    for _ in range(rng.randint(0, 2)):
        name = rng.choice([*members, *[name for name in members if "/models/" in name] * 6])
        way = rng.random()
        if name.endswith(".json") and name in sound and way < 0.8:
            members[name] = program_text(rng, sound[name])
        elif way < 0.9:
            members[name] = rng.choice([b"", pickled_mark(folder / "MARK"), b"\0" * 8])
        else:
            members[f"archive/{rng.choice(TEXTS)[:20]}"] = members.pop(name)
    buffer = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name.encode("utf-8", "ignore").decode(), content)
    return buffer.getvalue()


CODE = ("open('MARK','w')", "Symbol('s0').__class__", "9**9**9**9", "exit()", "[1][0]", "Pow(9,9)")


def program_text(rng, content):
    """Change a program's text, or put code where torch would run it."""
    if rng.random() < 0.5:
        return json_text(rng, json.loads(content), changes=2)
    text = content.decode()
    old, new = rng.choice(
        [
            ("Symbol('s77', positive=True, integer=True)", rng.choice(CODE)),
            ('"guards_code": []', f'"guards_code": ["{rng.choice(CODE)}"]'),
            (
                "torch.ops.aten.isfinite.default",
                rng.choice(["torch.os.system", "torch.load", "#x"]),
            ),
            ("builtins.dict", "collections.defaultdict"),
            ("null", '{"__enum__": true, "fqn": "os.system", "name": "x"}'),
        ]
    )
    return text.replace(old, new, rng.choice([1, -1])).encode()


def onnx_lies(rng, folder):
    content = programs(folder, "onnx")
    way = rng.random()
    if way < 0.5:
        return bytes_of(rng, content)
    import onnx

    model = onnx.load_from_string(content)
    graph, sound = model.graph, {entry.key: entry.value for entry in model.metadata_props}
    for _ in range(rng.randint(1, 3)):
        action = rng.randrange(6)
        if action == 0:
            tensor = rng.choice(graph.initializer)
            tensor.dims[:] = rng.choice([[2**40], [0], [-1], [2**31, 2**31], [1]])
        elif action == 1:
            tensor = rng.choice(graph.initializer)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", rng.choice(TEXTS)[:40]), ("length", "64")):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value.encode("utf-8", "ignore").decode()
        elif action == 2:
            rng.choice(graph.node).op_type = rng.choice(["Loop", "X", "", "ConstantOfShape", "Exp"])
        elif action == 3:
            del graph.node[rng.randrange(len(graph.node))]
        elif action == 4:
            entry = rng.choice(model.metadata_props)
            text = sound[entry.key]
            changed = json_text(rng, json.loads(text)) if text[:1] == "{" else b"x"
            entry.value = changed.decode("utf-8", "ignore")
        else:
            node = rng.choice(graph.node)
            if node.input:
                node.input[0] = rng.choice([*node.output, "", "x"])
    return model.SerializeToString()


def read_program(path):
    from ebm_guard.deploy import load_exported

    with redirect_stderr(io.StringIO()):
        program = load_exported(path)
        found = program(torch.zeros(2, *program.facts["input"]["shape"]))
    assert found.accept.shape == (2,)
    return True


# --- arrays, predictions, lists, texts


def npz_lies(rng):
    members = {
        "images.npy": npy(np.zeros((3, 8, 8), dtype=np.uint8)),
        "labels.npy": npy(np.arange(3)),
        "classes.npy": npy(np.array(["a", "b", "c"])),
        "logits.npy": npy(np.eye(3) * 3),
        "groups.npy": npy(np.arange(3)),
        "features.npy": npy(np.ones((3, 2))),
    }
    if rng.random() < 0.3:
        del members["logits.npy"]
        members["probs.npy"] = npy(np.full((3, 3), 1 / 3))
        members["sample_weight.npy"] = npy(np.ones(3))
    return zip_of(rng, members)


def read_npz(path):
    from ebm_guard.data import open_source
    from ebm_guard.data.specs import parse_spec
    from ebm_guard.errors import EbmGuardError
    from ebm_guard.predictions.stored import stored_predictions

    taken = False
    for kind in ("npz", "logits"):
        try:
            if kind == "npz":
                source = open_source(f"npz:{path}")
                source.load(0)
                assert len(source) > 0
            else:
                rows = stored_predictions(parse_spec(f"logits:{path}"))
                assert np.isfinite(rows.logits).all()
            taken = True
        except EbmGuardError:
            continue
    return taken


@cache
def prediction_files(folder):
    from ebm_guard import Predictions

    rows = Predictions(np.eye(4, 3, dtype=np.float32), labels=np.array([0, 1, 2, 0]))
    rows.save(folder / "predictions")
    return {path.name: path.read_bytes() for path in (folder / "predictions").iterdir()}


def folder_lies(rng, folder):
    """A folder of predictions; mostly with the hashes made anew."""
    import hashlib

    files = dict(prediction_files(folder))
    header = json.loads(files["predictions.json"])
    if rng.random() < 0.6:
        name = rng.choice(["logits.npy", "labels.npy", "hashes.npy"])
        files[name] = npy_of(rng) if rng.random() < 0.7 else bytes_of(rng, files[name])
        header["files"][name[:-4]] = hashlib.sha256(files[name]).hexdigest()
    if rng.random() < 0.3:
        header["files"][rng.choice(TEXTS)[:60] + "/../logits"] = "0" * 64
    files["predictions.json"] = json_text(rng, header)
    return files


def read_folder(files, place):
    from ebm_guard import Predictions

    for name, content in files.items():
        (place / name).write_bytes(content)
    rows = Predictions.load(place)
    assert rows.logits.ndim == 2
    return True


LINES = ("a.png 0", "../b.png 1", "/etc/passwd", '"a b.png" 2', "a.png\t1\tg", "x" * 9000, "\0", "")
SPECS = (
    "npz:f.npz#test[:5]?classes=0-7",
    "folder:a/b",
    "logits:x.npz[::2]",
    "demo:train",
    "torch/cifar10#test[:3]",
    "hfds/x?input_key=a&target_key=b",
    "wds/#{000..003}.tar|9",
    "npz:~/a?classes=0-999999",
    "list:$HOME/x",
)


def text_lies(rng, whole, joint="\n"):
    text = joint.join(rng.choice(whole) for _ in range(rng.randint(1, 5)))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice([*TEXTS, "[", "]", ":", "?", "#", "-", "9" * 30]) + text[at:]
    return text


def read_list(path):
    from ebm_guard.data import open_source

    return len(open_source(f"list:{path}")) > 0


def read_spec(text, place):
    from ebm_guard.data.specs import existing_path, parse_spec

    spec = parse_spec(text)
    if spec.kind not in ("demo", "timm"):
        existing_path(spec)
    return True


def file_targets(folder):
    """All parsers of files; sound files are made under ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        file_target("guard", ".safetensors",
                    lambda rng: safetensors_lies(rng, guard_files(folder)), read_guard),
        file_target("monitor", ".safetensors",
                    lambda rng: safetensors_lies(rng, monitor_files(folder)), read_monitor),
        file_target("torch program", ".pt2", lambda rng: program_lies(rng, folder), read_program),
        file_target("ONNX program", ".onnx", lambda rng: onnx_lies(rng, folder), read_program),
        file_target("npz", ".npz", npz_lies, read_npz),
        Target("predictions", lambda rng: folder_lies(rng, folder), read_folder),
        file_target("list", ".txt",
                    lambda rng: text_lies(rng, LINES).encode("utf-8", "ignore"), read_list),
        Target("spec", lambda rng: text_lies(rng, SPECS, ""), read_spec),
        Target("journal", journal_lies, read_journal),
        Target("checkpoint", lambda rng: checkpoint_lies(rng, folder), read_checkpoint),
        file_target("weights", ".safetensors", weights_lies, read_weights),
        Target("baseline report", lambda rng: baseline_lies(rng, folder), read_baseline),
        file_target("history", ".jsonl", history_lies, read_lines),
        file_target("requirements", ".toml", toml_lies, read_toml),
    ]  # fmt: skip
