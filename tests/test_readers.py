"""timm's readers of torchvision sets, written here in torchvision's own formats."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from ebm_guard import EnergyClassifier, Preprocessing, predict
from ebm_guard.cli import run
from ebm_guard.data import batches, open_source, parse_spec
from ebm_guard.data.sources import StreamSource
from ebm_guard.errors import DataError, InvalidInputError

pytest.importorskip("timm")
GREY = Preprocessing((0.5,), (0.25,), image_size=(28, 28), crop_pct=0.875)


def refused(call, *words, error=DataError, code=3):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == code


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(values):
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder ROOT with MNIST and Fashion-MNIST in idx files: train 30, test 20 images."""
    for name in ("MNIST", "FashionMNIST"):
        raw = tmp_path / "root" / name / "raw"
        raw.mkdir(parents=True)
        for part, n, seed in (("train", 30, 1), ("t10k", 20, 2)):
            labels = (np.arange(n) % 10).astype(np.uint8)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(noise((n, 28, 28), seed)))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
            # torchvision's check of presence in some versions looks for the archives.
            (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    return tmp_path / "root"


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """CIFAR-10's own pickle format, with the checksums of these files."""
    base = tmp_path / "root" / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def put(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(n, seed):
        return {"data": noise((n, 3072), seed), "labels": [k % 10 for k in range(n)]}

    names = [f"class {k}" for k in range(10)]
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "train_list", [put("data_batch_1", batch(8, 1))])
    monkeypatch.setattr(cls, "test_list", [put("test_batch", batch(6, 2))])
    meta = put("batches.meta", {"label_names": names})
    monkeypatch.setattr(cls, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path / "root"


@pytest.fixture
def folder(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, n in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ape", "bee")):
            path = tmp_path / "root" / split / name
            path.mkdir(parents=True)
            for number in range(n):
                image = Image.fromarray(noise((20, 30, 3), 10 * label + number))
                image.save(path / f"{number}.png", exif=exif)
    return tmp_path / "root"


# --- the parser


@pytest.mark.parametrize(
    ("text", "path", "split", "rows", "keys"),
    [
        ("torch/cifar10", "torch/cifar10", "", None, ("", "")),
        ("torch/mnist#test", "torch/mnist", "test", None, ("", "")),
        ("torch/mnist#test[5:]", "torch/mnist", "test", slice(5, None), ("", "")),
        ("torch/mnist[::2]", "torch/mnist", "", slice(None, None, 2), ("", "")),
        ("hfds/uoft-cs/cifar10#test", "hfds/uoft-cs/cifar10", "test", None, ("", "")),
        # Hugging Face has slices of its own.
        ("hfds/a/b#test[:10%]", "hfds/a/b", "test[:10%]", None, ("", "")),
        ("hfds/a?input_key=img", "hfds/a", "", None, ("img", "")),
        ("hfds/a#t?target_key=y&input_key=x", "hfds/a", "t", None, ("x", "y")),
        ("hfids/a/b", "hfids/a/b", "", None, ("", "")),
        ("wds/#v-{0..3}.tar|40", "wds/", "v-{0..3}.tar|40", None, ("", "")),
        ("wds/imagenet#validation", "wds/imagenet", "validation", None, ("", "")),
    ],
)
def test_specs_of_readers(text, path, split, rows, keys):
    spec = parse_spec(text)
    assert (spec.kind, spec.path, spec.split, spec.rows) == ("timm", path, split, rows)
    assert (spec.input_key, spec.target_key) == keys
    # A folder of this name is still at hand.
    assert parse_spec(f"folder:{path}").kind == "folder"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torch/", ["without the name"]),
        ("hfds/#test", ["without the name"]),
        ("torch/mnist#test[a]", ["[START:STOP]"]),
        ("torch/mnist?input_key=x", ["behind hfds/"]),
        ("hfds/a?image=x", ["input_key=COLUMN"]),
        ("hfds/a?input_key=", ["input_key=COLUMN"]),
        ("tfds/mnist", ["tfds/ is not read"]),
    ],
)
def test_wrong_specs_of_readers(text, words):
    refused(lambda: parse_spec(text), repr(text), *words, error=InvalidInputError, code=2)


# --- sets in memory


@pytest.mark.parametrize(
    ("split", "option", "part"),
    [
        ("", None, "test"),
        ("#test", None, "test"),
        ("#train", None, "train"),
        ("", "train", "train"),
        ("#test", "train", "test"),
        ("#validation", "train", "test"),
    ],
)
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(mnist, split, option, part, name):
    source = open_source(f"torch/{name}{split}", data_dir=str(mnist), split=option)
    n, seed = (30, 1) if part == "train" else (20, 2)
    images = noise((n, 28, 28), seed)
    assert len(source) == source.total == n
    assert source.ids == tuple(map(str, range(n)))
    assert source.labels.tolist() == (np.arange(n) % 10).tolist()
    assert source.labels.dtype == np.int64
    assert len(source.classes) == 10
    assert source.groups is None
    for row in (0, n - 1):
        assert np.array_equal(np.asarray(source.load(row)), images[row])
    # In memory, like npz: at the input size it is never cropped.
    (batch,) = batches(source, GREY)
    assert np.allclose(batch.inputs[:, 0].numpy(), (images / 255 - 0.5) / 0.25, atol=1e-6)


def test_slices(mnist):
    source = open_source("torch/mnist#test[5:9]", data_dir=str(mnist))
    assert source.labels.tolist() == [5, 6, 7, 8]
    assert source.ids == ("5", "6", "7", "8")
    assert source.is_array
    assert np.array_equal(np.asarray(source.load(1)), noise((20, 28, 28), 2)[6])
    refused(
        lambda: open_source("torch/mnist#test[50:]", data_dir=str(mnist)),
        "selects none of 20 rows",
    )


def test_cifar10(cifar10):
    source = open_source("torch/cifar10#train", data_dir=str(cifar10))
    assert source.classes == tuple(f"class {k}" for k in range(10))
    assert source.labels.tolist() == list(range(8))
    assert source.is_array
    image = noise((8, 3072), 1)[3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(source.load(3)), image)
    assert len(open_source("torch/cifar10", data_dir=str(cifar10))) == 6


def test_root_is_expanded(mnist, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(mnist))
    assert len(open_source("torch/mnist", data_dir="$DATA_ROOT")) == 20
    monkeypatch.setenv("HOME", str(mnist.parent))
    assert len(open_source("torch/mnist", data_dir="~/root")) == 20


def test_worker_processes_read_the_same(mnist):
    one, two = (
        list(batches(open_source("torch/mnist", data_dir=str(mnist)), GREY, workers=n))
        for n in (0, 2)
    )
    assert torch.equal(one[0].inputs, two[0].inputs)
    assert torch.equal(one[0].labels, two[0].labels)


# --- image folders


@pytest.mark.parametrize(("split", "n"), [("#train", 6), ("#val", 4), ("#validation", 4)])
def test_image_folder(folder, split, n):
    source = open_source(f"torch/image_folder{split}", data_dir=str(folder))
    assert len(source) == n
    assert source.classes == ("ape", "bee")
    assert source.sorted_classes
    assert not source.is_array
    assert source.labels.tolist() == [0] * (n // 2) + [1] * (n // 2)
    assert source.ids[0] == "ape/0.png"
    # Read by our loader, so it stands upright; torchvision's own leaves it lying.
    assert source.load(0).size == (20, 30)
    part = "train" if split == "#train" else "val"
    assert torchvision.datasets.ImageFolder(folder / part)[0][0].size == (30, 20)


def test_unreadable_files_of_an_image_folder_are_skipped(folder):
    (folder / "val" / "ape" / "1.png").write_bytes(b"broken")
    pre = Preprocessing((0.5,) * 3, (0.5,) * 3, image_size=(8, 8))
    (batch,) = batches(open_source("torch/image_folder#val", data_dir=str(folder)), pre)
    assert batch.ids == ("ape/0.png", "bee/0.png", "bee/1.png")
    assert batch.labels.tolist() == [0, 1, 1]
    assert [name for name, _ in batch.skipped] == ["ape/1.png"]


def test_class_map_of_an_image_folder(folder, tmp_path):
    (tmp_path / "map.txt").write_text("bee\nape\n")
    source = open_source(
        "torch/image_folder#val", data_dir=str(folder), class_map=str(tmp_path / "map.txt")
    )
    assert source.labels.tolist() == [1, 1, 0, 0]
    assert source.classes == ("bee", "ape")
    assert "map.txt numbered 2 classes" in source.class_map


# --- what is missing


def test_what_cannot_be_opened(mnist, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("mnist", "cifar10", "qmnist", "imagenet", "inaturalist", "places365"):
        refused(
            lambda: open_source(f"torch/{name}", data_dir=str(tmp_path / "empty")),  # noqa: B023
            f"'torch/{name}'",
            "could not open split 'validation'",
            "Nothing is downloaded",
            "--data-dir ROOT",
        )
    assert list((tmp_path / "empty").rglob("*-ubyte*")) == []
    refused(
        lambda: open_source("torch/mnist", data_dir=str(tmp_path / "none")), "none", "not a folder"
    )
    refused(
        lambda: open_source("torch/image_folder#tset", data_dir=str(folder)),
        "no such sub-folder",
        "train, val",
    )
    raw = mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:100])
    refused(lambda: open_source("torch/mnist", data_dir=str(mnist)), "could not open split")


def test_wrong_use(mnist):
    for spec, settings, words in (
        ("torch/mnist", {}, ["without --data-dir", "data_dir="]),
        ("wds/x", {}, []),
        ("torch/mnsit", {"data_dir": str(mnist)}, ["did you mean 'mnist'"]),
        ("torch/mnist#tset", {"data_dir": str(mnist)}, ["'tset'", "did you mean 'test'"]),
        ("torch/mnist", {"data_dir": str(mnist), "split": "tset"}, ["'tset'"]),
    ):
        refused(
            lambda: open_source(spec, **settings),  # noqa: B023
            spec,
            *words,
            error=InvalidInputError,
            code=2,
        )


@pytest.mark.parametrize(
    ("spec", "library"), [("hfds/x", "datasets"), ("hfids/x", "datasets"), ("wds/x", "webdataset")]
)
def test_missing_libraries_are_named(monkeypatch, tmp_path, spec, library):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == library else real(name, *a)
    )
    refused(
        lambda: open_source(spec, data_dir=str(tmp_path)),
        repr(library),
        "pip install 'ebm-guard[data]'",
        error=InvalidInputError,
        code=2,
    )


def test_missing_timm_is_named(monkeypatch, mnist):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    refused(
        lambda: open_source("torch/mnist", data_dir=str(mnist)),
        "timm cannot be imported",
        "pip install timm",
        error=InvalidInputError,
        code=2,
    )


# --- streams


class Counting(StreamSource):
    def __init__(self, n, total, broken=()):
        super().__init__("stream/x", None, total)
        self.n, self.broken = n, broken

    def read(self):
        for row in range(self.n):
            dtype = np.float32 if row in self.broken else np.uint8
            yield Image.fromarray(np.full((28, 28), row).astype(dtype)), row % 2


class Half(torch.nn.Module):
    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_streams_of_unknown_length(batch_size):
    source = Counting(7, None, broken=(2, 6))
    assert source.total is None
    with pytest.raises(TypeError, match="unknown length"):
        len(source)
    refused(lambda: source.load(0), "cannot be asked for alone")
    classifier = EnergyClassifier(Half().eval(), preprocessing=GREY)
    for _ in range(2):
        rows = batches(source, GREY, batch_size=batch_size, workers=3)
        part = predict(classifier, rows, total=source.total)
        assert part.ids == ("0", "1", "3", "4", "5")
        assert part.labels.tolist() == [0, 1, 1, 0, 1]
        assert np.allclose((part.logits[:, 0] * 0.25 + 0.5) * 255, [0, 1, 3, 4, 5], atol=1e-3)
        assert [name for name, _ in part.skipped] == ["2", "6"]
    assert predict(classifier, batches(source.without_labels(), GREY)).labels is None
    assert source.labelled


def test_some_rows_of_a_stream():
    source = Counting(10, 10).subset(np.array([1, 4, 9]))
    assert source.total == len(source) == 3
    assert [name for name, _, _ in source.rows()] == ["1", "4", "9"]
    assert [name for name, _, _ in source.without_labels().rows()] == ["1", "4", "9"]


# --- the command line

FACTORY = """
import torch

def make():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).eval()
    model.pretrained_cfg = {"input_size": (1, 28, 28), "mean": (0.1307,), "std": (0.3081,)}
    return model
"""


def test_command_line(mnist, tmp_path, capsys):
    (tmp_path / "nets.py").write_text(FACTORY)
    base = ["-q", "--model", f"{tmp_path / 'nets.py'}:make", "--data-dir", str(mnist)]
    out = ["-o", str(tmp_path / "out")]
    code = run(
        ["report", *base, *out, "--data", "torch/mnist#train", "--ood", "f=torch/fashion_mnist"]
    )
    assert code == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png;base64") >= 8
    capsys.readouterr()
    for args, expected, word in (
        (["--data", "torch/cifar10"], 3, "Nothing is downloaded"),
        (["--data", "torch/mnist", "--split", "tset"], 2, "did you mean 'test'"),
        (["--data", "torch/nmist"], 2, "did you mean 'mnist'"),
    ):
        assert run(["report", *base, *out, *args]) == expected
        assert word in capsys.readouterr().err
    no_root = ["report", *out, "--model", f"{tmp_path / 'nets.py'}:make", "--data", "torch/mnist"]
    assert run(no_root) == 2
    assert "--data-dir" in capsys.readouterr().err
