"""Groups, lists, folders, class maps and class names: from the file to the predictions."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from ebm_guard import EnergyClassifier, Predictions, Preprocessing, predict
from ebm_guard.cli import run
from ebm_guard.data import batches, match_classes, open_source, parse_spec
from ebm_guard.data.splits import natural_key
from ebm_guard.errors import DataError, EbmGuardWarning, InvalidInputError
from ebm_guard.predictions import stored_predictions

GREY8 = Preprocessing((0.5,), (0.25,), image_size=(8, 8), interpolation="bilinear")


def refused(call, *words, error=DataError, code=3):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == code


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8), dtype=np.uint8)


def put(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path, format="PNG")


class Two(torch.nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.fc = torch.nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


def passed(source, batch_size=4, workers=0, classes=2):
    classifier = EnergyClassifier(Two(classes).eval(), preprocessing=GREY8)
    return predict(classifier, batches(source, GREY8, batch_size=batch_size, workers=workers))


FACTORY = """
import torch

def make(classes, **cfg):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = torch.nn.Linear(64, classes)
            self.pretrained_cfg = {
                "input_size": (1, 8, 8), "mean": (0.5,), "std": (0.25,), **cfg
            }

        def forward(self, x):
            return self.fc(x.flatten(1))

    return Net().eval()

def three():
    return make(3)

def twelve():
    return make(12)

def thousand():
    return make(1000)
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    return lambda name: f"{tmp_path / 'nets.py'}:{name}"


# --- groups


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (np.arange(10) % 3, (np.arange(10) % 3).astype(np.int64)),
        ((np.arange(10) % 3).astype(np.uint8), (np.arange(10) % 3).astype(np.int64)),
        (np.arange(10) % 2 == 0, (np.arange(10) % 2 == 0).astype(np.int64)),
        (np.array(list("abcdefghij")), np.array(list("abcdefghij"))),
        (np.array([b"x", "é".encode()] * 5), np.array(["x", "é"] * 5)),
    ],
    ids=["int64", "uint8", "bool", "text", "bytes"],
)
def test_groups_of_an_npz_file_reach_the_predictions(tmp_path, groups, expected):
    path = tmp_path / "set.npz"
    np.savez(path, images=noise(10), labels=np.arange(10) % 2, groups=groups)
    source = open_source(f"npz:{path}[1:8]")
    assert source.groups.dtype.kind in "iU"
    assert np.array_equal(source.groups, expected[1:8])
    part = passed(source.subset(np.array([0, 2, 5, 6])), batch_size=3)
    assert part.groups.tolist() == expected[[1, 3, 6, 7]].tolist()
    part.save(tmp_path / "out")
    again = Predictions.load(tmp_path / "out")
    assert again.groups.tolist() == part.groups.tolist()
    assert again.groups.dtype == part.groups.dtype
    assert part.select(slice(1, 3)).groups.tolist() == expected[[3, 6]].tolist()


def test_groups_belong_to_their_split_and_classes(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(
        path,
        images=noise(4),
        groups=np.array([9, 9, 9, 9]),
        test_images=noise(6),
        test_labels=np.arange(6) % 3,
        test_groups=np.arange(6),
    )
    assert open_source(f"npz:{path}#test").groups.tolist() == list(range(6))
    assert open_source(f"npz:{path}#test?classes=2,0").groups.tolist() == [0, 2, 3, 5]
    assert open_source(f"npz:{path}").groups.tolist() == [9] * 4
    np.savez(path, images=noise(4))
    assert open_source(f"npz:{path}").groups is None
    assert passed(open_source(f"npz:{path}")).groups is None
    assert open_source("demo:").groups is None


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (np.arange(9), ["10 rows", "groups of shape (9,)"]),
        (np.zeros((10, 1), int), ["groups of shape (10, 1)"]),
        (np.zeros(10), ["float64 groups", "integers or text"]),
        (np.array([b"\xff"] * 10), ["not UTF-8"]),
        (np.array([{}] * 10, dtype=object), ["cannot read"]),
    ],
)
def test_groups_that_are_none(tmp_path, groups, words):
    path = tmp_path / "set.npz"
    np.savez(path, images=noise(10), groups=groups)
    refused(lambda: open_source(f"npz:{path}"), str(path), *words)
    np.savez(path, logits=np.random.default_rng(0).normal(size=(10, 3)) * 3, groups=groups)
    spec = parse_spec(f"logits:{path}")
    refused(lambda: stored_predictions(spec), str(path), *words)


def test_groups_of_stored_logits(tmp_path):
    path = tmp_path / "set.npz"
    logits = np.random.default_rng(0).normal(size=(4, 3)) * 3
    np.savez(path, logits=logits, groups=np.array([b"a", b"b", b"a", b"c"]))
    part = stored_predictions(parse_spec(f"logits:{path}[1:]"))
    assert part.groups.tolist() == ["b", "a", "c"]
    assert part.groups.dtype.kind == "U"


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_rows_keep_the_groups_in_place(tmp_path, workers):
    names = ["a", "b", "c", "d", "e"]
    for number, name in enumerate(names):
        put(tmp_path / f"{name}.png", number)
    for name in "bd":
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    lines = [f"{name}.png {number % 2} site {name}" for number, name in enumerate(names)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    part = passed(open_source(f"list:{tmp_path / 'list.txt'}"), batch_size=2, workers=workers)
    assert part.ids == ("a.png", "c.png", "e.png")
    assert part.groups.tolist() == ["site a", "site c", "site e"]
    assert part.labels.tolist() == [0, 0, 0]
    assert [name for name, _ in part.skipped] == ["b.png", "d.png"]


def test_groups_of_unequal_length_and_beyond_the_memory_limit():
    from ebm_guard.data import Batch

    def rows():
        for text in ("a", "longer", "b"):
            x = torch.zeros(2, 64)
            yield Batch(x, None, (), np.zeros(2, np.uint64), groups=np.array([text] * 2))

    classifier = EnergyClassifier(Two().eval(), preprocessing=GREY8)
    part = predict(classifier, rows(), memory_limit=1)
    assert part.groups.tolist() == ["a", "a", "longer", "longer", "b", "b"]


# --- lists


@pytest.mark.parametrize(
    ("line", "path", "label", "group"),
    [
        ("a.png 3 north", "a.png", 3, "north"),
        ("a.png 3 site B", "a.png", 3, "site B"),
        ("my cat.PNG 3 4", "my cat.PNG", 3, 4),
        ('"my cat.png" 3', "my cat.png", 3, None),
        ('"my 1 cat" -1 x y', "my 1 cat", -1, "x y"),
        ('"say ""hi"".png" 0', 'say "hi".png', 0, None),
        ('"quoted only.png"', "quoted only.png", None, None),
        ("my 1 cat.png\t3\tsite B", "my 1 cat.png", 3, "site B"),
        ("my 1 cat.png\t3", "my 1 cat.png", 3, None),
        ("a.png\t\tsite B", "a.png", None, "site B"),
        ('"a 1.png"\t3', "a 1.png", 3, None),
        ("my 2 cats.png", "my 2 cats.png", None, None),
        ("x.png 1 y.png 2", "x.png 1 y.png", 2, None),
        ("a.png  7", "a.png", 7, None),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_line_of_a_list(tmp_path, line, path, label, group, ending, start):
    listed = tmp_path / "list.txt"
    listed.write_bytes((start + line + ending).encode())
    source = open_source(f"list:{listed}")
    assert source.ids == (path,)
    assert (None if source.labels is None else source.labels.tolist()) == (
        None if label is None else [label]
    )
    assert (None if source.groups is None else source.groups.tolist()) == (
        None if group is None else [group]
    )


def test_groups_are_numbers_only_where_all_are(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("a.png 0 1\nb.png 0 2\n")
    assert open_source(f"list:{listed}").groups.dtype == np.int64
    listed.write_text("a.png 0 1\nb.png 0 x\n")
    assert open_source(f"list:{listed}").groups.tolist() == ["1", "x"]


def test_paths_of_a_list_are_relative_to_it(tmp_path, monkeypatch):
    put(tmp_path / "lists" / "sub dir" / "x.png", 7)
    put(tmp_path / "other" / "y.png", 9)
    listed = tmp_path / "lists" / "list.txt"
    # U+2028 in a name is no line break.
    put(tmp_path / "lists" / "a\u2028b.png", 5)
    listed.write_text(
        f"sub dir/x.png\r\n../other/y.png\r\n{tmp_path}/other/y.png\r\na\u2028b.png\r\n", newline=""
    )
    monkeypatch.chdir(tmp_path)
    source = open_source("list:lists/list.txt")
    assert [source.load(row).getpixel((0, 0)) for row in range(4)] == [7, 9, 9, 5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png 1 x\nb.png 2\n", ["line 2", "some lines have a group"]),
        ("a.png 1\nb.png\n", ["line 2", "some lines have a label"]),
        ('"a.png 1\n', ["line 1", "double quotes"]),
        ('"a.png" one\n', ["line 1", "double quotes"]),
        ("a.png\tone\n", ["line 1", "integer label"]),
        ("a.png\t1\tx\ty\n", ["line 1", "separated by tabs"]),
        ("\t1\n", ["line 1", "needed a path"]),
    ],
)
def test_lines_that_cannot_be_read(tmp_path, text, words):
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    refused(lambda: open_source(f"list:{listed}"), str(listed), *words)


# --- folders


def test_flat_folder_of_mixed_names(tmp_path):
    for name in ("b.JPG", "a.Jpeg", "c.TIFF", "d.png", "e.WebP"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in (".hidden.png", "._mac.png"):
        put(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / ".cache").mkdir()
    put(tmp_path / ".cache" / "z.png")
    source = open_source(str(tmp_path))
    assert source.ids == ("a.Jpeg", "b.JPG", "c.TIFF", "d.png", "e.WebP")
    assert source.labels is None
    for row in range(5):
        source.load(row)


def test_hidden_names_inside_class_folders(tmp_path):
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "cat" / ".ipynb_checkpoints" / "1.png")
    put(tmp_path / "cat" / "._1.png")
    assert open_source(str(tmp_path)).ids == ("cat/1.png",)


def test_links_are_followed_once(tmp_path):
    store, root = tmp_path / "store", tmp_path / "set"
    put(store / "one.png", 1)
    put(store / "deep" / "two.png", 2)
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "linked").symlink_to(store)
    (root / "dog").symlink_to(store / "deep")
    (root / "cat" / "again.png").symlink_to(store / "one.png")
    (root / "cat" / "loop").symlink_to(root / "cat")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(str(root))
    assert source.ids == (
        "cat/again.png",
        "cat/gone.png",
        "cat/linked/deep/two.png",
        "cat/linked/one.png",
        "dog/two.png",
    )
    assert source.labels.tolist() == [0, 0, 0, 0, 1]
    # A link to nothing is counted as unreadable.
    (batch,) = batches(source, GREY8)
    assert [name for name, _ in batch.skipped] == ["cat/gone.png"]
    linked = tmp_path / "link"
    linked.symlink_to(root)
    assert len(open_source(str(linked))) == 5


@pytest.mark.parametrize("blocked", ["cat", "cat/deep"])
def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, capsys, blocked, factory):
    root = tmp_path / "set"
    put(root / "cat" / "deep" / "1.png")
    put(root / "dog" / "1.png")
    real = os.scandir

    def scandir(path="."):
        # Not by permissions: an administrator may read everything.
        if os.fspath(path) == str(root / blocked):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(lambda: open_source(str(root)), str(root / blocked), "Permission denied", "permissions")
    code = run(
        ["report", "--model", factory("three"), "--data", str(root), "-o", str(tmp_path / "out")]
    )
    assert code == 3
    assert "Permission denied" in capsys.readouterr().err


def test_images_beside_class_folders_are_told(tmp_path):
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "stray.png")
    with pytest.warns(EbmGuardWarning, match="1 images lie directly in"):
        assert open_source(str(tmp_path)).ids == ("cat/1.png",)
    # Without images in them, sub-folders are no classes.
    (tmp_path / "cat" / "1.png").unlink()
    assert open_source(str(tmp_path)).ids == ("stray.png",)


def test_folder_order_is_torchvisions(tmp_path):
    for name in ("b2/10.png", "b2/9.png", "b10/x.png", "A/y.png", "a/z.png"):
        put(tmp_path / name)
    source, theirs = open_source(str(tmp_path)), ImageFolder(tmp_path)
    assert source.classes == tuple(theirs.classes)
    assert source.labels.tolist() == theirs.targets
    assert [str(tmp_path / name) for name in source.ids] == [path for path, _ in theirs.samples]


# --- class maps


@pytest.fixture
def pets(tmp_path):
    for name in ("dog/1.png", "cat/1.png", "cat/2.png", "red fox/1.png"):
        put(tmp_path / "pets" / name)
    return tmp_path / "pets"


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("red fox\ndog\ncat\n", [2, 2, 1, 0], ("red fox", "dog", "cat")),
        ("red fox\r\ndog\r\ncat", [2, 2, 1, 0], ("red fox", "dog", "cat")),
        ("\ufeffdog\nowl\ncat\nred fox\n", [2, 2, 0, 3], ("dog", "owl", "cat", "red fox")),
        ("cat 2\ndog 0\nred fox 1\n", [2, 2, 0, 1], ("dog", "red fox", "cat")),
        ("cat 5\ndog\t0\nred fox   1\n", [5, 5, 0, 1], None),
        ("cat 0\ndog 0\nred fox 1\n", [0, 0, 0, 1], None),
        # A blank line has a number, as in timm.
        ("dog\n\ncat\nred fox\n", [2, 2, 0, 3], None),
    ],
)
def test_class_map(pets, tmp_path, text, labels, classes):
    file = tmp_path / "map.txt"
    file.write_bytes(text.encode())
    source = open_source(str(pets), class_map=str(file))
    assert source.labels.tolist() == labels
    assert source.classes == classes
    assert "map.txt numbered 3 classes" in source.class_map
    # Labels of OOD sets are of other classes.
    assert open_source(str(pets), "ood", class_map=str(file)).labels.tolist() == [0, 0, 1, 2]
    assert open_source(str(pets), class_map=str(file)).subset(np.array([3])).class_map


def test_class_map_is_timms(pets, tmp_path):
    data = pytest.importorskip("timm.data")
    file = pets / "map.txt"
    file.write_text("red fox\ndog\ncat\n")
    theirs = data.create_dataset("", root=str(pets), class_map="map.txt")
    # Also by its name in the data's folder.
    ours = open_source(str(pets), class_map="map.txt")
    assert dict(zip(ours.ids, ours.labels.tolist(), strict=True)) == {
        os.path.relpath(path, pets): label for path, label in theirs.reader.samples
    }


def test_names_that_end_in_numbers_are_names_where_folders_have_them(tmp_path):
    for name in ("class 1", "class 2"):
        put(tmp_path / "set" / name / "a.png")
    file = tmp_path / "map.txt"
    file.write_text("class 2\nclass 1\n")
    assert open_source(str(tmp_path / "set"), class_map=str(file)).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\ndog\n", ["map.txt does not name 'red fox'", "1 of 3", "add a line"]),
        ("cat\ndog\nred fix\n", ["'red fox'", "did you mean 'red fix'"]),
        ("cat\ndog\ncat\nred fox\n", ["names 'cat' twice"]),
        ("cat 1\ndog 0\n", ["does not name", "'red fox'"]),
        ("\n\n", ["empty"]),
        ("\xff", ["does not name"]),
    ],
)
def test_class_maps_that_do_not_fit(pets, tmp_path, text, words):
    file = tmp_path / "map.txt"
    file.write_text(text)
    refused(lambda: open_source(str(pets), class_map=str(file)), *words)


def test_class_maps_that_are_none(pets, tmp_path):
    (tmp_path / "map.txt").write_bytes(b"\xff\xfe\0")
    for name in ("map.txt", "missing.txt", "map.pkl"):
        refused(lambda: open_source(str(pets), class_map=str(tmp_path / name)), name)  # noqa: B023
    put(tmp_path / "flat" / "a.png")
    (tmp_path / "map.txt").write_text("a")
    refused(
        lambda: open_source(str(tmp_path / "flat"), class_map=str(tmp_path / "map.txt")),
        "flat folder",
    )


def report(tmp_path, *args):
    code = run(["report", "--no-synthetic", "-o", str(tmp_path / "out"), "-q", *args])
    file = tmp_path / "out" / "report.json"
    return code, json.loads(file.read_text()) if code == 0 else None


def texts(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_class_map_on_the_command_line(tmp_path, factory, capsys):
    root = tmp_path / "set"
    for number in range(60):
        put(root / "abc"[number % 3] / f"{number}.png", number)
    (tmp_path / "map.txt").write_text("c\nb\na\n")
    base = ["--model", factory("three"), "--data", str(root)]
    code, done = report(tmp_path, *base, "--class-map", str(tmp_path / "map.txt"))
    assert code == 0, capsys.readouterr().err
    assert any("map.txt numbered 3 classes" in text for text in texts(done))
    (tmp_path / "map.txt").write_text("c\nb\n")
    code, _ = report(tmp_path, *base, "--class-map", str(tmp_path / "map.txt"))
    assert code == 3
    assert "does not name 'a'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--class-map", "m.txt"], ["--class-map without a folder"]),
        (["--split", "test"], ["--split without a timm reader", "npz:FILE#test"]),
        (["--data-dir", "x"], ["--data-dir", "without a timm reader"]),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, capsys, args, words):
    code, _ = report(tmp_path, "--data", "demo:", *args)
    assert code == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err


# --- class names


def test_natural_order_is_timms():
    misc = pytest.importorskip("timm.utils.misc")
    names = ["class10", "Class2", "class1", "a", "B", "10", "9", "x1y10", "x1y9", "é", "x"]
    names += [f"{k}" for k in range(25)] + [f"n{k}" for k in range(25)]
    assert sorted(names, key=natural_key) == sorted(names, key=misc.natural_key)
    # timm's own key fails on this digit.
    assert sorted(["a²", "a1"], key=natural_key)


@pytest.mark.filterwarnings("default::ebm_guard.errors.EbmGuardWarning")
def test_other_orders_are_told_where_nothing_can_be_compared(tmp_path, factory, capsys):
    names = sorted(f"class{k}" for k in range(12))
    for model in (None, [f"label {k}" for k in range(12)]):
        with pytest.warns(EbmGuardWarning, match="sorted as text"):
            mapping, words = match_classes(names, model, 12, sorted_names=True)
        assert mapping is None
        for word in ("class 2 is 'class10'", "class 2 is 'class2'", "--class-map"):
            assert word in words
    # Not for names that were given in an order, nor where both orders are one, nor with names.
    assert "sorted" not in match_classes(names, None, 12)[1]
    assert "sorted" not in match_classes(["a1", "b2"], None, 2, sorted_names=True)[1]
    assert (
        match_classes(names, names[::-1], 12, sorted_names=True)[0].tolist() == [*range(12)][::-1]
    )
    root = tmp_path / "set"
    for number in range(120):
        put(root / f"class{number % 12}" / f"{number}.png", number)
    code, done = report(tmp_path, "--model", factory("twelve"), "--data", str(root))
    err = capsys.readouterr().err
    assert code == 0, err
    assert "warning: folders are numbered by their names sorted as text" in err
    assert any("class 2 is 'class10'" in text for text in texts(done))


def imagenet():
    info = pytest.importorskip("timm.data").ImageNetInfo()
    return info.label_names(), info.label_descriptions()


def test_wordnet_folders_of_a_subset(tmp_path):
    ids, _ = imagenet()
    chosen = [ids[k] for k in (5, 77, 999)]
    mapping, sentence = match_classes(chosen, None, 1000, sorted_names=True)
    assert mapping.tolist() == [5, 77, 999]
    for word in ("3 WordNet ids", "imagenet-1k", "ImageNetInfo", "names no classes"):
        assert word in sentence
    for name in ("tench", "goldfish, Carassius auratus", "TENCH, Tinca_tinca"):
        assert match_classes([name], None, 1000)[0].tolist() == [int("gold" in name)]
    # Two classes are called crane; a word that is no class; another count of classes.
    for wrong in (["crane", "tench"], ["tench", "unicorn"]):
        assert match_classes(wrong, None, 1000)[0] is None
    assert match_classes(chosen, None, 10)[0] is None
    assert match_classes(["tench", "goldfish"], None, 999)[0] is None


def test_wordnet_folders_against_a_models_names():
    ids, words = imagenet()
    chosen = [ids[k] for k in (5, 77, 999)]
    # As timm and Hugging Face give them: ids, descriptions, and some in their own way.
    own = [text if k % 20 else f"something else {k}" for k, text in enumerate(words)]
    for names in (ids, words, own):
        mapping, sentence = match_classes(chosen, names, 1000)
        assert mapping.tolist() == [5, 77, 999], names[:3]
    assert "so are the model's names" in sentence
    # A model with another order.
    mapping, _ = match_classes(chosen, words[::-1], 1000)
    assert mapping is None or mapping.tolist() == [994, 922, 0]
    turned = [f"{name}" for name in ids[::-1]]
    assert match_classes(["tench"], turned, 1000)[0].tolist() == [999]
    # Other names: by order, as before.
    assert match_classes(chosen, [f"thing {k}" for k in range(1000)], 1000)[0] is None


def test_wordnet_folders_on_the_command_line(tmp_path, factory, capsys):
    ids, _ = imagenet()
    root = tmp_path / "set"
    for number in range(90):
        put(root / ids[(3, 500, 999)[number % 3]] / f"{number}.png", number)
    folder = tmp_path / "kept"
    code, done = report(
        tmp_path,
        "--model",
        factory("thousand"),
        "--data",
        str(root),
        "--save-predictions",
        str(folder),
    )
    assert code == 0, capsys.readouterr().err
    assert any("3 WordNet ids of the data are imagenet-1k" in text for text in texts(done))
    part = Predictions.load(folder / "evaluation")
    assert sorted(set(part.labels.tolist())) == [3, 500, 999]


def test_wordnet_ids_without_timm():
    code = """
    import sys
    sys.modules["timm"] = None
    from ebm_guard.data import match_classes
    from ebm_guard.errors import InvalidInputError
    all_of_them = [f"n{k:08d}" for k in range(1000)]
    assert match_classes(all_of_them, None, 1000)[0] is None
    assert match_classes(["tench"], None, 1000)[0] is None
    try:
        match_classes(all_of_them[:5], None, 1000)
    except InvalidInputError as error:
        print(error)
    """
    code = "\n".join(line[4:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install timm" in done.stdout
    assert InvalidInputError.exit_code == 2
