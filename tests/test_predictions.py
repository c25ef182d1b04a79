"""One pass over the data: equal to the model, saved and loaded whole, rows in order."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toys import Pixels, inputs_of, labelled, linear, listing, logits_with, unlabelled

from ebm_guard import EnergyClassifier, Predictions, predict
from ebm_guard.data import batches, open_source
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.predictions import chunks

COLUMNS = ("logits", "features", "labels", "groups", "hashes")


def equal(first, second):
    for name in COLUMNS:
        one, two = getattr(first, name), getattr(second, name)
        assert (one is None) == (two is None), name
        if one is not None:
            assert one.dtype == two.dtype, name
            assert np.array_equal(one, two), name
    for name in ("ids", "kind", "dtype", "classes", "skipped", "source", "notes", "fingerprint"):
        assert getattr(first, name) == getattr(second, name), name


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    return torch.nn.Sequential(*layers).to(dtype).eval()


# --- the pass


def test_one_pass_equals_the_model():
    model = two_layers()
    pairs = labelled(linear(), n=70)
    got = predict(EnergyClassifier(model), pairs, features=True, source="here")
    with torch.no_grad():
        expected = torch.cat([model(x) for x, _ in pairs])
        features = torch.cat([model[1](model[0](x)) for x, _ in pairs])
    assert np.array_equal(got.logits, expected.numpy())
    assert np.array_equal(got.features, features.numpy())
    assert np.array_equal(got.labels, torch.cat([y for _, y in pairs]).numpy())
    assert len(np.unique(got.hashes)) == 70
    whole = predict(EnergyClassifier(model), [torch.cat([x for x, _ in pairs])])
    assert np.array_equal(got.hashes, whole.hashes)
    assert (len(got), got.num_classes, got.kind, got.dtype) == (70, 3, "logits", "float32")
    assert got.labels.dtype == np.int64
    assert got.source == "here"
    assert not got.invalid.any()


def test_the_model_runs_once_per_batch():
    calls = []
    model = two_layers()
    model.register_forward_hook(lambda *_: calls.append(1))
    pairs = labelled(linear(), n=96)
    predict(EnergyClassifier(model), pairs)
    assert len(calls) == 3
    calls.clear()
    predict(EnergyClassifier(model), pairs, features=True)
    # One more to find the head.
    assert len(calls) == 4


def test_features_when_the_first_batch_is_one_row():
    """One row proves no head; the rows must still fit each other."""
    model = two_layers()
    x = inputs_of(9)
    got = predict(EnergyClassifier(model), [x[:1], x[1:]], features=True)
    assert len(got) == 9
    assert got.features is None or len(got.features) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_stored_exactly(dtype):
    model = two_layers(dtype)
    x = inputs_of(20, dtype=dtype)
    got = predict(EnergyClassifier(model), [x])
    assert got.logits.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    assert got.dtype == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(got.logits).to(dtype), model(x))


def test_memory_mapped_equals_in_memory():
    model = two_layers()
    pairs = labelled(linear(), n=500)
    small = predict(EnergyClassifier(model), pairs, features=True)
    mapped = predict(EnergyClassifier(model), pairs, features=True, memory_limit=1000)
    assert isinstance(mapped.logits, np.memmap)
    assert isinstance(mapped.features, np.memmap)
    assert not isinstance(small.logits, np.memmap)
    equal(mapped, small)
    equal(mapped.select(slice(3, 400, 7)), small.select(slice(3, 400, 7)))


def test_memory_mapped_can_be_saved(tmp_path):
    mapped = predict(EnergyClassifier(two_layers()), labelled(linear()), memory_limit=0)
    equal(Predictions.load(mapped.save(tmp_path / "out")), mapped)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_autocast_scores_stay_in_float32():
    got = predict(EnergyClassifier(two_layers()), [inputs_of(20)], amp=True)
    assert got.dtype == "bfloat16"
    assert got.logits.dtype == np.float32


def test_no_rows():
    with pytest.raises(DataError, match=r"gave no rows \(0 images were unreadable\)"):
        predict(EnergyClassifier(linear()), [], source="nothing")


def test_labels_in_some_batches_only():
    pairs = labelled(linear(), n=64)
    with pytest.raises(DataError, match=r"64 rows of logits and 32 labels"):
        predict(EnergyClassifier(linear()), [pairs[0], pairs[1][0]])


def test_progress_goes_to_stderr(capsys):
    predict(EnergyClassifier(linear()), unlabelled(linear(), n=64), progress=True, total=64)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "64/64" in captured.err


# --- images: order and unreadable rows


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        for number in range(7):
            image = generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{number}.png")
    (tmp_path / "cat" / "3.png").write_bytes(b"broken")
    (tmp_path / "dog" / "0.png").write_bytes(b"")
    return tmp_path


def test_rows_keep_their_order_when_images_are_skipped(pictures):
    classifier = EnergyClassifier(Pixels(classes=2))
    source = open_source(str(pictures))
    pre = classifier.preprocessing
    got = predict(classifier, batches(source, pre, batch_size=4))
    names = [f"cat/{n}.png" for n in (0, 1, 2, 4, 5, 6)] + [f"dog/{n}.png" for n in range(1, 7)]
    assert list(got.ids) == names
    assert got.labels.tolist() == [0] * 6 + [1] * 6
    assert [name for name, _ in got.skipped] == ["cat/3.png", "dog/0.png"]
    for name, error in got.skipped:
        assert "cannot read image" in error
        assert name.rpartition("/")[2] in error
    # A row is the image of its name, whatever the batch.
    alone = predict(classifier, batches(source, pre, batch_size=1))
    assert alone.ids == got.ids
    assert np.allclose(alone.logits, got.logits, rtol=1e-5)
    assert np.array_equal(alone.hashes, got.hashes)


def test_strict_stops_at_the_first_unreadable_image(pictures):
    classifier = EnergyClassifier(Pixels(classes=2))
    source = open_source(str(pictures))
    with pytest.raises(DataError, match=r"cannot read image .*3\.png.*--strict"):
        predict(classifier, batches(source, classifier.preprocessing, strict=True))


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_batch_of_unreadable_images_only(pictures, broken):
    for number in range(7):
        if number // 3 == broken:
            (pictures / "cat" / f"{number}.png").write_bytes(b"broken")
    classifier = EnergyClassifier(Pixels(classes=2))
    source = open_source(str(pictures))
    got = predict(classifier, batches(source, classifier.preprocessing, batch_size=3))
    assert len(got) + len(got.skipped) == 14
    assert not {name for name, _ in got.skipped} & set(got.ids)


def test_nothing_but_unreadable_images(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    classifier = EnergyClassifier(Pixels(classes=2))
    with pytest.raises(DataError, match=r"gave no rows \(3 images were unreadable\)"):
        predict(classifier, batches(open_source(str(tmp_path)), classifier.preprocessing))


def test_worker_processes_change_nothing(pictures):
    classifier = EnergyClassifier(Pixels(classes=2))
    source = open_source(str(pictures))
    one, two = (
        predict(classifier, batches(source, classifier.preprocessing, batch_size=3, workers=n))
        for n in (0, 2)
    )
    equal(one, two)


# --- records


def test_columns_must_fit():
    logits = np.zeros((4, 3), dtype=np.float32)
    for name, column in {
        "labels": np.zeros(3, dtype=np.int64),
        "features": np.zeros((5, 2), dtype=np.float32),
        "groups": np.zeros(1),
        "ids": ("a",),
        "hashes": np.zeros(2, dtype=np.uint64),
    }.items():
        with pytest.raises(DataError, match=rf"4 rows of logits and {len(column)} {name}"):
            Predictions(logits, **{name: column})


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros((3, 1), np.float32),
        np.zeros(3, np.float32),
        np.zeros((0, 3), np.float32),
        np.zeros((3, 3), np.int64),
    ],
)
def test_what_cannot_be_logits(logits):
    with pytest.raises(DataError, match=r"got (logits|no rows).*needed"):
        Predictions(logits)


def test_unknown_kind():
    with pytest.raises(InvalidInputError, match=r"'odds'.*'logits' or 'probs'"):
        Predictions(np.zeros((2, 2), np.float32), kind="odds")


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range(label):
    labels = np.array([0, 1, label, 3], dtype=np.int64)
    with pytest.raises(DataError, match=rf"1 of 4 labels.*0\.\.3.*row 2 has {label}.*\?classes="):
        Predictions(np.zeros((4, 4), np.float32), labels=labels)


def test_select():
    part = logits_with(20)
    for rows in (slice(3, 9), slice(None, None, -2), np.array([5, 1, 1]), np.arange(20) % 3 == 0):
        kept = part.select(rows)
        expected = np.arange(20)[rows]
        assert np.array_equal(kept.logits, part.logits[expected])
        assert np.array_equal(kept.labels, part.labels[expected])
        assert np.array_equal(kept.hashes, part.hashes[expected])
    named = Predictions(part.logits, ids=tuple("abcdefghijklmnopqrst"))
    assert named.select(np.array([2, 0])).ids == ("c", "a")
    assert named.names([1, 3]) == ["b", "d"]
    assert part.names([1, 3]) == ["1", "3"]


def test_fingerprint_sees_content_order_and_labels():
    part = logits_with(20)
    prints = {part.fingerprint}
    changed = part.logits.copy()
    changed[3, 1] = np.nextafter(changed[3, 1], np.float32(9))
    prints.add(Predictions(changed, labels=part.labels).fingerprint)
    prints.add(part.select(np.arange(20)[::-1]).fingerprint)
    prints.add(part.select(slice(19)).fingerprint)
    labels = part.labels.copy()
    labels[0] = (labels[0] + 1) % 4
    prints.add(Predictions(part.logits, labels=labels).fingerprint)
    prints.add(Predictions(part.logits).fingerprint)
    assert len(prints) == 6
    assert logits_with(20).fingerprint == part.fingerprint


def test_invalid_rows():
    logits = np.zeros((5, 3), dtype=np.float32)
    logits[1, 0], logits[3, 2], logits[4, 1] = np.nan, np.inf, -np.inf
    assert Predictions(logits).invalid.tolist() == [False, True, False, True, True]


def test_chunks_cover_all_rows():
    array = np.arange(1000).reshape(100, 10)
    parts = list(chunks(array, elements=64))
    assert np.array_equal(np.concatenate(parts), array)
    assert max(len(part) for part in parts) == 6


def test_labels_are_asked_for():
    with pytest.raises(DataError, match="has no labels; ECE needs them"):
        Predictions(np.zeros((2, 2), np.float32)).require_labels("ECE")


# --- saved and loaded


def rich(kind="logits"):
    part = logits_with(30)
    return Predictions(
        part.logits if kind == "logits" else np.log(np.full((30, 4), 0.25)),
        features=np.arange(60, dtype=np.float32).reshape(30, 2),
        labels=part.labels,
        groups=np.array(["a", "b", "c"] * 10),
        ids=tuple(f"image {n}.png" for n in range(30)),
        kind=kind,
        dtype="bfloat16",
        classes=("å", "b", "c", "d"),
        skipped=(("x.png", "cannot read"),),
        source="npz:file[:30]",
        notes={"limit": 30},
    )


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_round_trip(kind, tmp_path):
    part = rich(kind)
    folder = part.save(tmp_path / "deep" / "out")
    again = Predictions.load(folder)
    equal(again, part)
    assert isinstance(again.logits, np.memmap)
    bare = Predictions(part.logits)
    equal(Predictions.load(bare.save(folder)), bare)
    assert "labels.npy" not in listing(folder)
    assert listing(tmp_path) == [
        "deep",
        "deep/out",
        "deep/out/hashes.npy",
        "deep/out/logits.npy",
        "deep/out/predictions.json",
    ]


def test_saving_over_what_is_being_read(tmp_path):
    folder = rich().save(tmp_path / "out")
    again = Predictions.load(folder)
    again.select(slice(10)).save(folder)
    assert len(Predictions.load(folder)) == 10
    assert np.array_equal(again.logits, rich().logits)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds other files; nothing was written.*new folder"):
        rich().save(tmp_path)
    with pytest.raises(DataError, match="holds other files"):
        rich().save(tmp_path / "mine.txt")
    assert listing(tmp_path) == ["mine.txt"]


def test_full_disk_keeps_the_older_folder(tmp_path, monkeypatch):
    folder = rich().save(tmp_path / "out")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match=r"No space left.*nothing was written.*--output"):
        rich().select(slice(5)).save(folder)
    with pytest.raises(DataError, match="No space left"):
        rich().save(tmp_path / "new")
    assert [name for name in listing(tmp_path) if "/" not in name] == ["out"]
    assert len(Predictions.load(folder)) == 30


@pytest.mark.parametrize("name", ["logits", "labels", "hashes", "features"])
def test_one_changed_byte_in_a_column_is_noticed(name, tmp_path):
    folder = rich().save(tmp_path / "out")
    file = folder / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"was edited|outside 0\.\."):
        Predictions.load(folder)


@pytest.mark.parametrize("name", ["logits", "labels", "hashes"])
def test_damaged_columns(name, tmp_path):
    folder = rich().save(tmp_path / "out")
    file = folder / f"{name}.npy"
    content = file.read_bytes()
    for length in (0, 5, 50, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="cannot read predictions"):
            Predictions.load(folder)


@pytest.mark.parametrize("name", ["labels", "features", "groups"])
def test_a_missing_column_is_noticed(name, tmp_path):
    folder = rich().save(tmp_path / "out")
    (folder / f"{name}.npy").unlink()
    with pytest.raises(DataError):
        Predictions.load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"schema": "ebm_guard.predictions/1"}', "\xff"]
)
def test_damaged_header(text, tmp_path):
    folder = rich().save(tmp_path / "out")
    (folder / "predictions.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError):
        Predictions.load(folder)


def test_another_schema(tmp_path):
    folder = rich().save(tmp_path / "out")
    header = json.loads((folder / "predictions.json").read_text())
    header["schema"] = "ebm_guard.predictions/9"
    (folder / "predictions.json").write_text(json.dumps(header))
    with pytest.raises(DataError, match=r"predictions/9.*this version reads.*predictions/1"):
        Predictions.load(folder)


def test_not_a_folder_of_predictions(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot read predictions"):
            Predictions.load(place)


def test_objects_are_not_unpickled(tmp_path):
    folder = rich().save(tmp_path / "out")
    np.save(folder / "groups.npy", np.array([{"a": 1}] * 30, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot read predictions"):
        Predictions.load(folder)
