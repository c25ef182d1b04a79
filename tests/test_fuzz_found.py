"""Inputs that once hung, crashed, or ran code; each is refused now."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from export_cases import fitted, inputs
from fuzzing.bounds import bounded
from fuzzing.mutations import npy_bomb

from ebm_guard import Guard, Predictions
from ebm_guard.deploy.export_text import check_program_text, repacked
from ebm_guard.deploy.exported import check_archive
from ebm_guard.deploy.serve.refusal import RefusedError
from ebm_guard.deploy.serve.tensors import rows_of_npy
from ebm_guard.errors import ArtifactError, DataError, InvalidInputError
from ebm_guard.files import DAMAGED_NPZ, map_array, read_arrays

DEEP = "[" * 5000 + "]" * 5000


def header(shape):
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + b", }\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("blanks", [1, 10, 400])
def test_blanks_in_the_shape_of_an_array_cost_no_time(blanks):
    """The pattern tried all ways to share the blanks: 250 bytes held the process for minutes."""
    shape = b"(" + (b" " * blanks).join([b"1"] * 8) + b"x)"
    with bounded(seconds=2), pytest.raises(RefusedError):
        rows_of_npy(header(shape) + b"\0" * 4, 8)


@pytest.mark.parametrize("shape", [b"(1 1,)", b"(,)", b"(1,,1)", b"(, 1)", b"(1,1,1,1,1,1,1,1,1)"])
def test_what_is_no_shape_is_none(shape):
    with pytest.raises(RefusedError):
        rows_of_npy(header(shape) + b"\0" * 4, 8)


@pytest.mark.parametrize("junk", [b"\0", b"x", b"{}", b"'a': 1, ", b"#"])
def test_other_bytes_in_the_header_of_an_array_are_refused(junk):
    body = header(b"(1, 1)" + b", " + junk)
    with pytest.raises(RefusedError):
        rows_of_npy(body + b"\0" * 4, 8)


def test_a_shape_is_read_with_its_blanks():
    assert rows_of_npy(header(b"( 1 , 1 , )") + b"\0" * 4, 8).shape == (1, 1)


@pytest.mark.parametrize("count", [2, 33, 60_000])
def test_a_form_of_many_parts_ends_early(count):
    pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")
    from ebm_guard.deploy.serve.forms import file_of_form

    part = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nh\r\n'
    with bounded(seconds=2), pytest.raises(RefusedError, match=r"more than 32|0 fields .* among 2"):
        file_of_form("multipart/form-data; boundary=x", part * count + b"--x--\r\n")


def test_a_long_header_of_a_form_is_refused():
    pytest.importorskip("python_multipart", reason="the extra `serve` is not installed")
    from ebm_guard.deploy.serve.forms import file_of_form

    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + b"a" * 9000
    with pytest.raises(RefusedError):
        file_of_form("multipart/form-data; boundary=x", head + b'"\r\n\r\nh\r\n--x--\r\n')


# --- artefacts


def test_a_manifest_of_brackets_is_refused(tmp_path):
    from safetensors.torch import save

    from ebm_guard.gate.artifact import _digest

    path = tmp_path / "guard"
    path.write_bytes(save({}, {"ebm_guard": DEEP, "sha256": _digest(DEEP, {})}))
    with pytest.raises(ArtifactError, match="schema None"):
        Guard.load(path)


def test_predictions_of_brackets_are_refused(tmp_path):
    (tmp_path / "predictions.json").write_text(DEEP)
    with pytest.raises(DataError, match="cannot read predictions"):
        Predictions.load(tmp_path)


def test_a_baseline_of_brackets_is_refused(tmp_path):
    from ebm_guard.report.comparison import Baseline

    (tmp_path / "report.json").write_text(DEEP)
    with pytest.raises(DataError, match="cannot read the baseline report"):
        Baseline.read(tmp_path)


# --- archives of arrays


def archive(members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "content",
    [
        header(b"((") + b"\0" * 8,
        header(b"(" + b"9" * 30 + b",)") + b"\0" * 8,
        header(b"(100000000000000,)") + b"\0" * 8,
        b"no array",
        header(b"(2,)").replace(b"'<f4'", b"'|O'  ") + b"cposix\nsystem\n(S'true'\ntR.",
    ],
)
def test_damaged_arrays_raise_what_is_named(content):
    with bounded(), pytest.raises(DAMAGED_NPZ):
        read_arrays(archive([("a.npy", content)]))


def test_an_archive_that_grows_a_thousand_times_is_not_inflated(monkeypatch):
    monkeypatch.setattr("ebm_guard.files._LARGE", 1 << 20)
    bomb = archive([("a.npy", npy_bomb(3_000_000, 3_000_000)), ("b.npy", npy_bomb(9))])
    with pytest.raises(ValueError, match="would grow from"):
        read_arrays(bomb)
    bomb.seek(0)
    assert read_arrays(bomb, ["b"])["b"].shape == (9, 1, 1)
    plain = archive([("a.npy", npy_bomb(3_000_000, 3_000_000))], zipfile.ZIP_STORED)
    assert read_arrays(plain)["a"].nbytes == 3_000_000


def test_two_arrays_of_one_name_are_refused():
    with pytest.warns(UserWarning, match="Duplicate name"):
        doubled = archive([("a.npy", npy_bomb(9)), ("a.npy", npy_bomb(8))])
    with pytest.raises(ValueError, match="two arrays"):
        read_arrays(doubled)


@pytest.mark.parametrize("order", "<>")
def test_text_beyond_unicode_is_refused(order):
    text = np.array(["ab", "c"], dtype=f"{order}U2")
    buffer = io.BytesIO()
    np.savez(buffer, a=text)
    good = buffer.getvalue()
    assert read_arrays(io.BytesIO(good))["a"].tolist() == ["ab", "c"]
    wild = np.frombuffer(b"\x7f" * 16, dtype=text.dtype)
    buffer = io.BytesIO()
    np.savez(buffer, a=wild)
    buffer.seek(0)
    with pytest.raises(ValueError, match="holds no text"):
        read_arrays(buffer)


def test_arrays_are_read_as_numpy_reads_them():
    buffer = io.BytesIO()
    made = {"a": np.arange(6).reshape(2, 3), "b": np.array(["x", "yy"]), "c": np.zeros((0, 3))}
    np.savez_compressed(buffer, **made)
    buffer.seek(0)
    found = read_arrays(buffer)
    assert found.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("descr", ["[]", "'|V0'", "'|O'"])
@pytest.mark.parametrize("shape", ["(-1,)", "(2,)"])
def test_elements_without_a_size_are_not_mapped(descr, shape, tmp_path):
    """Numpy divides by their size: the process ended with SIGFPE."""
    path = tmp_path / "a.npy"
    path.write_bytes(header(shape.encode()).replace(b"'<f4'", descr.encode().ljust(5)) + b"\0" * 8)
    with pytest.raises(ValueError, match="claims an array"):
        map_array(path)


def test_a_list_with_a_label_beyond_every_integer_is_refused(tmp_path):
    from ebm_guard.data import open_source

    (tmp_path / "list.txt").write_text(f"a.png {10**30}\n")
    with pytest.raises(DataError, match="needed class numbers"):
        open_source(f"list:{tmp_path / 'list.txt'}")


# --- exported programs: torch evaluates text of the archive


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    from ebm_guard.deploy import export

    path = tmp_path_factory.mktemp("export") / "gate.pt2"
    export(fitted(), "torch", path, example=inputs(64, 9))
    return path


SIZE = "Symbol('s77', positive=True, integer=True)"
NODE = "torch.ops.aten.isfinite.default"


def model_of(path):
    with zipfile.ZipFile(path) as file:
        name = next(name for name in file.namelist() if "/models/" in name)
        return name, file.read(name).decode()


def forged(path, target, text):
    name, _ = model_of(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            new.writestr(member, text if member == name else old.read(member))
    return target


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (SIZE, "[open({mark!r}, 'w'), " + SIZE + "][1]"),
        ('"guards_code": []', '"guards_code": ["open({mark!r}, \'w\') is not None"]'),
        (NODE, "torch.os.system"),
        (NODE, "torch.ops.aten.from_file.default"),
        (NODE, "torch.load"),
        ("builtins.dict", "collections.defaultdict"),
        (SIZE, "Pow(Integer(9), Integer(99999999999))"),
        (SIZE, "9**9**9"),
        (SIZE, "Symbol('s77').__class__"),
        (SIZE, "x" * 2000),
        # Names go into source that torch runs.
        ('"name": "x"', '"name": "x=open({mark!r}, \'w\')"'),
        ('"parameter_name": "', '"parameter_name": "w\\", open({mark!r}, \'w\')) #'),
    ],
)
def test_a_program_whose_text_is_code_is_refused(written, old, new, tmp_path):
    from ebm_guard.deploy import load_exported

    mark = tmp_path / "mark"
    _, text = model_of(written)
    changed = text.replace(old, new.replace("{mark!r}", f"'{mark}'"))
    assert changed != text
    with pytest.raises(ArtifactError, match="would run as code"):
        check_program_text(changed.encode())
    with bounded(seconds=20), pytest.raises(ArtifactError, match="would run as code"):
        load_exported(forged(written, tmp_path / "forged.pt2", changed))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/model.pt",
        "models/tensor_a.json",
        "data/constants/tensor_a.pt",
        "data/Sample_Inputs/model.pt",
        "data/constants/opaque_obj_0",
        "data/Constants/tensor_0",
        "data/weights/weight_\u0663",
    ],
)
def test_members_that_torch_would_unpickle_are_refused(written, name, tmp_path):
    path = tmp_path / "forged.pt2"
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
        new.writestr(f"{old.namelist()[0].partition('/')[0]}/{name}", pickle.dumps({}))
    with pytest.raises(ArtifactError, match="unpickling"):
        check_archive(path.read_bytes())


@pytest.mark.parametrize("change", [{"path_name": "opaque_obj_0"}, {"use_pickle": True}])
def test_weights_that_are_no_tensors_are_refused(written, change, tmp_path):
    path = tmp_path / "forged.pt2"
    with zipfile.ZipFile(written) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            if member.endswith("weights_config.json"):
                config = json.loads(content)
                next(iter(config["config"].values())).update(change)
                content = json.dumps(config).encode()
            new.writestr(member, content)
    with pytest.raises(ArtifactError, match="pickled"):
        check_archive(path.read_bytes())


def test_the_text_of_a_sound_program_passes(written):
    _, text = model_of(written)
    check_program_text(text.encode())
    sizes = ["Mul(Integer(4), " + SIZE + ")", "Add(Mul(Integer(-2), Symbol('u0')), Integer(1))"]
    for size in (*sizes, "FloorDiv(Symbol('s0', integer=True), Integer(2))", "true"):
        check_program_text(json.dumps({"expr_str": size}).encode())


def test_torch_reads_the_members_that_were_checked(written):
    content = written.read_bytes()
    # A second directory of members behind the first: readers differ in which one they take.
    with zipfile.ZipFile(io.BytesIO(repacked(content + content))) as made:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in made.infolist())
    squeezed = archive([("archive/models/model.json", b"0" * 10**6)])
    with pytest.raises(ArtifactError, match="compressed parts"):
        repacked(squeezed.getvalue())


@pytest.mark.slow
def test_weights_outside_of_an_onnx_file_are_not_read(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    from ebm_guard.deploy import export, load_exported

    path = tmp_path / "gate.onnx"
    export(fitted(), "onnx", path, example=inputs(64, 9))
    model = onnx.load(str(path))
    weights = max(model.graph.initializer, key=lambda item: len(item.raw_data))
    size = len(weights.raw_data)
    (tmp_path / "outside.bin").write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "outside.bin"), ("offset", "0"), ("length", str(size))):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError):
        load_exported(path)


# --- paths and names


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "a\\b", "\0"])
def test_a_set_whose_name_is_a_path_is_refused(name):
    """``--save-predictions DIR`` makes a folder for each set."""
    from ebm_guard.cli.session import named_specs

    with pytest.raises(InvalidInputError, match=r"needed NAME=SPEC|would be a path"):
        named_specs((f"{name}=demo:",))


@pytest.mark.parametrize("name", ["classes", "ids"])
def test_names_that_are_tables_are_refused(name, tmp_path):
    """A million tables of one value each took minutes to be printed."""
    from ebm_guard.data import open_source
    from ebm_guard.data.specs import parse_spec
    from ebm_guard.predictions.stored import stored_predictions

    path = tmp_path / "x.npz"
    table = np.zeros((1_000_000, 1, 1), dtype=np.uint8)
    images = np.zeros((2, 8, 8), dtype=np.uint8)
    np.savez_compressed(path, logits=np.eye(2), images=images, **{name: table})
    with bounded(seconds=3), pytest.raises(DataError, match=f"`{name}` of shape"):
        stored_predictions(parse_spec(f"logits:{path}"))
    if name == "classes":
        with bounded(seconds=3), pytest.raises(DataError, match="`classes` of shape"):
            open_source(f"npz:{path}")


@pytest.mark.parametrize("name", ["features", "sample_weight", "head_weight"])
def test_text_for_numbers_is_refused(name, tmp_path):
    from ebm_guard.data.specs import parse_spec
    from ebm_guard.predictions.stored import stored_predictions

    path = tmp_path / "x.npz"
    np.savez(path, logits=np.eye(2), **{name: np.array(["a", "b"])})
    with pytest.raises(DataError, match="needed numbers"):
        stored_predictions(parse_spec(f"logits:{path}"))


def test_ranges_of_classes_over_and_over_do_not_fill_the_memory():
    from ebm_guard.data.specs import parse_spec

    with bounded(seconds=3, megabytes=400), pytest.raises(InvalidInputError, match="at most once"):
        parse_spec("npz:x?classes=" + ",".join(["0-999999"] * 500))


def test_a_journal_whose_marks_are_of_another_kind_is_refused(tmp_path):
    import zlib

    from predict_cases import IDENTITY, Lines, outputs_in, run_to_the_end

    from ebm_guard.deploy.batch_journal import SCHEMA

    identity = json.dumps(IDENTITY | {"schema": SCHEMA}).encode()
    outputs = outputs_in(tmp_path)
    for mark in ('{"files": 1}', "[]", DEEP, '{"complete": true, "files": []}'):
        lines = [identity, mark.encode()]
        text = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
        outputs.journal.write_bytes(text)
        if mark in ('{"files": 1}', '{"complete": true, "files": []}'):
            with pytest.raises(DataError, match="a mark is damaged"):
                run_to_the_end(outputs, Lines())
        else:
            assert run_to_the_end(outputs, Lines()).rows == Lines().n


def test_a_monitor_with_a_number_too_large_is_refused(tmp_path):
    from ebm_guard.gate import DriftMonitor
    from ebm_guard.gate.artifact import read_artifact, write_artifact
    from ebm_guard.gate.drift.storage import SCHEMA

    path = fitted().drift_monitor().save(tmp_path / "monitor")
    tensors, manifest = read_artifact(path, schemas=(SCHEMA,))
    manifest["monitor"]["generator"]["state"]["state"] = 10**60
    write_artifact(path, tensors, manifest)
    with pytest.raises(ArtifactError, match="start a new monitor"):
        DriftMonitor.load(path)
