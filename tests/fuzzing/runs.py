"""Parsers of what long runs and reports leave: journals, checkpoints, baselines, histories."""

import io
import json
import zipfile
import zlib
from functools import cache

import torch
from predict_cases import IDENTITY, Lines, outputs_in, run_to_the_end
from safetensors.torch import save

from ebm_guard.deploy.batch_journal import SCHEMA
from fuzzing.mutations import (
    bytes_of,
    json_text,
    odd_tree,
    pickled_mark,
    safetensors_header,
    zip_of,
)


def journal_lies(rng):
    def line(value):
        text = json_text(rng, value, changes=2)
        return b"%08x %s\n" % (zlib.crc32(text), text.replace(b"\n", b" "))

    mark = {"counts": {"ACCEPT": 4}, "broken": 0, "files": [[9, 5], [0, 0]], "complete": False}
    mark["finals"] = []
    content = line(IDENTITY | {"schema": SCHEMA}) + line(mark) + line({**mark, "complete": True})
    return bytes_of(rng, content) if rng.random() < 0.3 else content


def read_journal(content, place):
    outputs = outputs_in(place)
    outputs.journal.write_bytes(content)
    (place / "rows.part").write_bytes(b"123456789")
    tally = run_to_the_end(outputs, Lines())
    assert tally.rows == Lines().n
    return True


def checkpoint_lies(rng, folder):
    buffer = io.BytesIO()
    settings = json_text(rng, {"seed": 1}).decode("utf-8", "ignore")
    state = {"schema": "ebm_guard.checkpoint/1", "settings": settings, "now": torch.zeros(3)}
    torch.save(odd_tree(rng, state) if rng.random() < 0.3 else state, buffer)
    content = buffer.getvalue()
    way = rng.random()
    if way < 0.3:
        return bytes_of(rng, content)
    if way < 0.4:
        return rng.choice([pickled_mark(folder / "MARK"), b"", b"PK\3\4"])
    if way < 0.5:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        key = next(name for name in members if name.endswith("data.pkl"))
        members[key] = pickled_mark(folder / "MARK")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, part in members.items():
                archive.writestr(name, part)
        return buffer.getvalue()
    return content


def read_checkpoint(content, place):
    from ebm_guard.training.checkpoint import load_checkpoint

    (place / "checkpoint.pt").write_bytes(content)
    return "now" in load_checkpoint(place, {"seed": 1})


def read_weights(path):
    from ebm_guard.model.loading import load_weights

    load_weights(torch.nn.Linear(2, 3), path)
    return True


def weights_lies(rng):
    content = save({"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    way = rng.random()
    if way < 0.1:
        return content
    return safetensors_header(rng, content) if way < 0.6 else bytes_of(rng, content)


@cache
def report_file(folder):
    from ebm_guard.cli import run

    assert run(["report", "--data", "demo:", "--limit", "200", "-q", "-o", str(folder / "r")]) == 0
    return {name: (folder / "r" / name).read_bytes() for name in ("report.json", "rows.npz")}


def baseline_lies(rng, folder):
    files = dict(report_file(folder))
    if rng.random() < 0.7:
        files["report.json"] = json_text(rng, json.loads(files["report.json"]))
    else:
        with zipfile.ZipFile(io.BytesIO(files["rows.npz"])) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        files["rows.npz"] = zip_of(rng, members)
    return files


def read_baseline(files, place):
    from ebm_guard.report.comparison import Baseline

    for name, content in files.items():
        (place / name).write_bytes(content)
    return Baseline.read(place).report is not None


def history_lies(rng):
    line = json_text(rng, {"kind": "update", "update": 1, "loss": 0.5})
    last = bytes_of(rng, line) if rng.random() < 0.5 else line
    return b"\n".join([line, b'{"kind": "event"}', last])


def read_lines(path):
    from ebm_guard.training import read_history

    return isinstance(read_history(path), list)


def toml_lies(rng):
    text = (
        '[requirements]\nece = "<=0.05@upper"\ncoverage = [">=0.9"]\n[max-regression]\nece = 0.1\n'
    )
    body = bytes_of(rng, text.encode(), 2) if rng.random() < 0.7 else text.encode()
    return body.replace(b"=", b"= " + b"[" * 2000, 1) if rng.random() < 0.1 else body


def read_toml(path):
    from ebm_guard.report.requirements import parse_requirement, read_requirements

    return all(map(parse_requirement, read_requirements(path)))
