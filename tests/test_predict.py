"""``ebm-guard predict`` over large sets: resumed runs, the review queue, and Parquet."""

import contextlib
import io
import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predict_cases import FORMATS, Lines, files_of
from toys import Pixels

from ebm_guard.cli import run
from ebm_guard.cli.options import ModelOptions
from ebm_guard.cli.predicting import predict_rows
from ebm_guard.cli.session import Session
from ebm_guard.data import batches, open_source, parse_spec
from ebm_guard.data.sources import StreamSource
from ebm_guard.deploy import batch_formats, batch_source
from ebm_guard.deploy.batch_formats import fields_of, row_file, text_format
from ebm_guard.deploy.batch_source import guard_identity, rows_behind, stored_identity
from ebm_guard.gate import Guard
from ebm_guard.model.loading import load_model
from ebm_guard.predictions import Predictions

pytestmark = pytest.mark.filterwarnings("default::ebm_guard.errors.EbmGuardWarning")
FACTORY = "import sys; sys.path.insert(0, {folder!r})\nfrom toys import Pixels as net\n"


def invoke(*args, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        got = run([str(arg) for arg in args])
    assert got == code, f"exit code {got}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A guard, its model, and the same 50 images as a folder, a list, npz and stored rows."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "nets.py").write_text(FACTORY.format(folder=str(Path(__file__).parent)))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    images = (images // 4 + generator.integers(0, 190, (50, 1, 1, 3))).astype(np.uint8)
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{number:02}.png")
    for number in (3, 16, 17, 18, 19, 20, 21, 22, 23, 48):
        (folder / "images" / f"{number:02}.png").write_bytes(b"broken")
    names = sorted(path.name for path in (folder / "images").iterdir())
    (folder / "list.txt").write_text("\n".join(f"images/{name}" for name in names))
    np.savez(folder / "set.npz", images=images)
    model = f"{folder / 'nets.py'}:net"
    more = generator.integers(0, 256, (300, 1, 1, 3)) // 2 + np.zeros((300, 8, 8, 3), dtype=int)
    np.savez(folder / "fit.npz", images=(more + 40).astype(np.uint8))
    fit = ["--data", f"npz:{folder / 'fit.npz'}", "-q", "-o", folder / "guard.safetensors"]
    invoke("fit", "--model", model, "--score", "msp", "--false-reject-rate", "0.3", *fit)
    logits = generator.normal(size=(9000, 3)) * 4
    np.savez(folder / "z.npz", logits=logits.astype(np.float32))
    return folder


def command_of(place, spec, *more):
    model = [] if spec.startswith("logits:") else ["--model", f"{place / 'nets.py'}:net"]
    data = spec.format(place=place)
    guard = place / "guard.safetensors"
    return ["predict", guard, *model, "--data", data, "-q", "-b", "8", *more]


SPECS = ["{place}/images", "list:{place}/list.txt", "npz:{place}/set.npz", "logits:{place}/z.npz"]


@pytest.fixture
def interrupted(monkeypatch):
    """Press Ctrl-C at the third decision."""

    def start(error=KeyboardInterrupt):
        calls = []
        for name in ("forward", "decide_stored"):
            plain = getattr(Guard, name)

            def stop(self, x, plain=plain):
                calls.append(1)
                if len(calls) == 3:
                    raise error
                return plain(self, x)

            monkeypatch.setattr(Guard, name, stop)
        return calls

    yield start
    monkeypatch.undo()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_an_interrupted_run_goes_on(spec, file_format, place, tmp_path, monkeypatch, interrupted):
    if file_format == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is the extra `parquet`")
    command = command_of(place, spec, "--format", file_format, "--top-k", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    plain = [*command, "-o", one / "rows", "--review", one / "queue"]
    kept = [*command, "-o", two / "rows", "--review", two / "queue", "--resume"]
    first = json.loads(invoke(*plain, "--json")[0])
    calls = interrupted()
    _, err = invoke(*kept, code=130)
    done = 8192 if "logits" in spec else 16
    assert f"interrupted; {done:,} rows are kept" in err
    assert not (two / "rows").exists()
    monkeypatch.undo()
    second = json.loads(invoke(*kept, "--json")[0])
    assert files_of(one) == files_of(two)
    assert second.pop("taken_over") == done
    assert {**second, "output": "", "review": ""} == {**first, "output": "", "review": ""}
    assert len(calls) == 3


def test_a_run_that_the_model_stopped_goes_on(place, tmp_path, monkeypatch, interrupted):
    command = command_of(place, SPECS[0], "-o", tmp_path / "rows")
    interrupted(RuntimeError("CUDA out of memory"))
    _, err = invoke(*command, "--resume", code=4)
    assert "stopped; 16 rows are kept" in err
    assert "CUDA out of memory" in err
    monkeypatch.undo()
    out, _ = invoke(*command, "--resume")
    assert "16 rows of an earlier run" in out
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == [f"{number:02}.png" for number in range(50)]


def test_without_resume_nothing_is_left(place, tmp_path, interrupted):
    interrupted()
    command = command_of(place, SPECS[0], "-o", tmp_path / "rows", "--review", tmp_path / "queue")
    _, err = invoke(*command, code=130)
    assert "nothing half-written was left" in err
    assert files_of(tmp_path) == {}


def touched(place, tmp_path):
    os.utime(place / "images" / "00.png", ns=(1, 1))


def replaced(place, tmp_path):
    images = dict(np.load(place / "set.npz"))
    images["images"][49] ^= 1
    np.savez(place / "set.npz", **images)


def fewer(place, tmp_path):
    (place / "images" / "49.png").unlink()


def other_guard(place, tmp_path):
    fit = ["--data", f"npz:{place / 'fit.npz'}", "-q", "-o", place / "guard.safetensors"]
    invoke("fit", "--model", f"{place / 'nets.py'}:net", *fit)


def other_features(place, tmp_path):
    arrays = dict(np.load(place / "z.npz"))
    np.savez(place / "z.npz", **arrays, features=arrays["logits"][:, :2])


def other_rows(place, tmp_path):
    logits = np.load(place / "z.npz")["logits"]
    logits[8999] += 1
    np.savez(place / "z.npz", logits=logits)


@pytest.mark.parametrize(
    ("spec", "change", "options", "words"),
    [
        (SPECS[0], touched, [], "names"),
        (SPECS[0], fewer, [], "rows was 50, now 49"),
        (SPECS[1], touched, [], "names"),
        (SPECS[2], replaced, [], "content"),
        (SPECS[3], other_rows, [], "content"),
        (SPECS[3], other_features, [], "content"),
        (SPECS[2], other_guard, [], "guard"),
        (SPECS[2], None, ["-b", "4"], "batch_size was 8, now 4"),
        (SPECS[2], None, ["--top-k", "1"], "top_k"),
        (SPECS[2], None, ["--format", "csv"], "format was 'jsonl', now 'csv'"),
        (SPECS[2], None, ["--limit", "40"], "limit"),
        (SPECS[2], None, ["--amp"], "amp"),
        (SPECS[2], None, ["--review", "{tmp}/queue"], "review"),
        (SPECS[2], None, ["--workers", "0", "--strict"], None),
    ],
)
def test_what_the_rows_depend_on_must_be_the_same(
    spec, change, options, words, place, tmp_path, monkeypatch, interrupted
):
    own = tmp_path / "place"
    shutil.copytree(place, own)
    command = command_of(own, spec, "-o", tmp_path / "rows", "--resume")
    interrupted()
    invoke(*command, code=130)
    monkeypatch.undo()
    if change is not None:
        change(own, tmp_path)
    if "--amp" in options:
        # Another dtype is refused by the canary, before the journal is looked at.
        monkeypatch.setattr(Guard, "load", classmethod(loaded_without_canary))
    before = (tmp_path / "rows.part").read_bytes()
    options = [option.format(tmp=tmp_path) for option in options]
    _, err = invoke(*command, *options, code=0 if words is None else 3)
    if words is not None:
        assert words in err
        assert "belongs to another run" in err
        assert (tmp_path / "rows.part").read_bytes() == before


def loaded_without_canary(cls, path, model):
    from ebm_guard.gate.storage import read_state

    state = read_state(path, None, None)
    guard = cls(Guard(wrapped(model)).classifier)
    guard._set(state.parts, state.facts)
    return guard


def wrapped(model):
    from ebm_guard.model import EnergyClassifier

    return EnergyClassifier(model)


def test_rows_of_another_model_on_the_same_images_are_told(tmp_path):
    """The fingerprint of predictions is that of the images; their identity must not be."""
    images = np.arange(4, dtype=np.uint64)
    spec = parse_spec("predictions:rows")
    found = [
        stored_identity(spec, Predictions(logits.astype(np.float32), hashes=images))
        for logits in (np.eye(4), np.eye(4)[::-1])
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["guard", "weights", "device", "preprocessing", "versions"])
def test_who_decides_is_a_part_of_the_identity(name, place, monkeypatch):
    path = place / "guard.safetensors"
    model = load_model(f"{place / 'nets.py'}:net")
    guard = Guard.load(path, model)
    before = guard_identity(guard, path)
    assert guard_identity(Guard.load(path, model), path) == before
    if name == "guard":
        path = place / "set.npz"
    elif name == "weights":
        with torch.no_grad():
            next(model.parameters()).mul_(2)
    elif name == "device":
        monkeypatch.setattr(type(guard.classifier), "device", torch.device("meta"))
    elif name == "preprocessing":
        other = replace(guard.classifier.preprocessing, crop_pct=0.5)
        monkeypatch.setattr(guard.classifier, "preprocessing", other)
    else:
        monkeypatch.setattr(batch_source, "version", lambda package: "0")
    after = guard_identity(guard, path)
    assert [key for key in before if before[key] != after[key]] == [name]


def test_a_list_may_name_an_image_twice(place, tmp_path):
    names = ["images/00.png", "images/03.png", "images/01.png", "images/00.png", "images/03.png"]
    (place / "twice.txt").write_text("\n".join(names))
    invoke(*command_of(place, f"list:{place / 'twice.txt'}", "-o", tmp_path / "rows"))
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["id"] for row in rows] == names
    assert [row["status"] == "INVALID" for row in rows] == [False, True, False, False, True]


def test_stored_rows_that_are_all_done_are_no_rows(place):
    """As where a run was killed between its last batch and the mark of the end."""
    spec = f"logits:{place / 'z.npz'}[:10]"
    blank = {item.name: None for item in fields(ModelOptions)}
    options = ModelOptions(**blank | {"batch_size": 8, "quiet": True})
    model = load_model(f"{place / 'nets.py'}:net")
    session = Session(options, [spec])
    session.guard = Guard.load(place / "guard.safetensors", model)
    rows = predict_rows(session, spec, None)
    assert [len(part) for part in rows.behind(0)] == [10]
    assert list(rows.behind(10)) == []


# --- the review queue


@pytest.mark.parametrize("file_format", ["jsonl", "csv"])
def test_the_review_queue_holds_the_refused_rows_in_order(file_format, place, tmp_path):
    rows, queue = tmp_path / "rows", tmp_path / "queue"
    invoke(*command_of(place, SPECS[0], "-o", rows))
    # The unreadable ones have their places among the others.
    names = [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    assert names == sorted(path.name for path in (place / "images").iterdir())
    more = ["--format", file_format, "-o", tmp_path / "other", "--review", queue, "--json"]
    out, _ = invoke(*command_of(place, SPECS[0], *more))
    lines = rows.read_text().splitlines(keepends=True)
    chosen = [line for line in lines if not json.loads(line)["accept"]]
    assert queue.read_text() == "".join(chosen)
    assert {json.loads(line)["status"] for line in chosen} == {"REJECT", "INVALID"}
    summary = json.loads(out)
    assert summary["refused"] == len(chosen) == summary["REJECT"] + summary["INVALID"]
    assert summary["review"] == str(queue)


@pytest.mark.parametrize(
    ("review", "code", "words"),
    [("rows", 2, "give two"), ("./rows", 2, "give two"), (".", 3, "is a folder")],
)
def test_a_review_file_of_its_own_is_needed(review, code, words, place, tmp_path):
    more = ["-o", tmp_path / "rows", "--review", f"{tmp_path}/{review}"]
    _, err = invoke(*command_of(place, SPECS[0], *more), code=code)
    assert words in err
    assert files_of(tmp_path) == {}


# --- formats


def test_parquet_holds_what_the_lines_hold(place, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is the extra `parquet`")
    for top in ([], ["--top-k", "3"]):
        common = command_of(place, SPECS[0], *top)
        invoke(*common, "-o", tmp_path / "rows.jsonl")
        invoke(*common, "-o", tmp_path / "rows.parquet", "--format", "parquet")
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()
        table = parquet.read_table(tmp_path / "rows.parquet")
        assert table.to_pylist() == [json.loads(line) for line in lines]
        types = {field.name: str(field.type) for field in table.schema}
        assert list(types) == list(fields_of(top=bool(top)))
        assert types["accept"] == "bool"
        assert types["label"] == "int64"
        assert {types[name] for name in ("energy", "score", "confidence", "p_value")} == {"double"}


def test_batches_leave_no_trace_in_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is the extra `parquet`")
    monkeypatch.setattr(batch_formats, "ROW_GROUP", 10)
    for size in (1, 7, 10, 23, 37):
        with row_file(tmp_path / str(size), "parquet", fields_of(top=True)) as write:
            for rows in Lines(37, size)(0):
                write(rows)
    assert len(set(files_of(tmp_path).values())) == 1
    found = parquet.ParquetFile(tmp_path / "1")
    sizes = [found.metadata.row_group(n).num_rows for n in range(found.metadata.num_row_groups)]
    assert sizes == [10, 10, 10, 7]
    rows = found.read().to_pylist()
    assert rows[5]["id"] == 'image 5, "ü\n\\udcff".png'
    assert [row["energy"] for row in rows] == [Lines(37).row(n)["energy"] for n in range(37)]


def test_parquet_needs_its_extra(place, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    more = ["-o", tmp_path / "rows", "--format", "parquet"]
    _, err = invoke(*command_of(place, SPECS[0], *more), code=2)
    assert "pip install 'ebm-guard[parquet]'" in err


def test_names_that_are_no_text_are_written(tmp_path):
    import csv

    row = Lines().row(1)
    text = text_format("csv", fields_of(top=False))
    lines = io.StringIO((text.header + text.encode([row])).decode("utf-8"), newline="")
    assert next(csv.DictReader(lines))["id"] == row["id"].replace("\udcff", "\\udcff")
    line = text_format("jsonl", fields_of(top=True)).encode([row])
    assert json.loads(line) == row


# --- the rows behind a place


class Counting(StreamSource):
    """Images that come one after the other; nobody knows how many."""

    def __init__(self, total=None, n=20):
        super().__init__("stream", None, total)
        self._n = n

    def read(self):
        for number in range(self._n):
            yield Image.new("RGB", (8, 8), (number * 10, 0, 255 - number)), None


@pytest.mark.parametrize("total", [None, 20])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("done", [0, 4, 8, 12, 20])
def test_a_stream_goes_on_behind_a_place(total, limited, done):
    source = Counting(total)
    if limited:
        source = source.subset(np.arange(0, 20, 3))
    model = Pixels()
    preprocessing = Guard(wrapped(model)).classifier.preprocessing

    def inputs(source):
        parts = list(batches(source, preprocessing, batch_size=4))
        return [name for part in parts for name in part.ids], [part.inputs for part in parts]

    names, parts = inputs(source)
    rest, found = inputs(rows_behind(source, done))
    assert rest == names[done:]
    assert len(found) == len(parts[done // 4 :])
    assert all(torch.equal(*pair) for pair in zip(found, parts[done // 4 :], strict=True))


def test_rows_behind_the_end_are_none():
    source = open_source("demo:")
    assert rows_behind(source, len(source)) is None
    assert rows_behind(source, len(source) - 1).ids == (source.ids[-1],)


def test_stored_probabilities_have_labels_in_order_and_no_energies(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), size=200)
    labels = p.argmax(axis=1)
    np.savez(tmp_path / "probs.npz", probs=p, labels=labels)
    spec = f"logits:{tmp_path / 'probs.npz'}"
    guard, out = tmp_path / "guard.safetensors", tmp_path / "rows.jsonl"
    invoke("fit", "--data", spec, "--score", "msp", "-q", "-o", guard)
    invoke("predict", guard, "--data", spec, "--top-k", 2, "-q", "-o", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["energy"] is None for row in rows)
    for row, values in zip(rows, p, strict=True):
        assert [each["label"] for each in row["top"]] == np.argsort(-values)[:2].tolist()
        assert all(each["energy"] is None for each in row["top"])
