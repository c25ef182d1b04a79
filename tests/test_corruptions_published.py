"""CIFAR-10-C and ImageNet-C: read in their order, wrong layouts refused."""

import numpy as np
import pytest
from corruption_cases import (
    SEVERITIES,
    write_cifar,
    write_imagenet,
)
from PIL import Image

from ebm_guard.data.images import to_input
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.model import Preprocessing
from ebm_guard.robustness import corruptions


def test_cifar10_c_is_read_in_its_order(tmp_path):
    found = list(corruptions.open_cifar10_c(write_cifar(tmp_path / "c"), ["snow", "fog"]))
    assert [(name, severity) for name, severity, _ in found] == [
        (name, severity) for name in ("snow", "fog") for severity in SEVERITIES
    ]
    for name, severity, source in found:
        assert len(source) == 10_000
        assert source.ids[:2] == ("0", "1")
        assert source.labels.tolist() == [row % 10 for row in range(10_000)]
        base = 100 * (name == "snow") + 10 * severity
        assert [np.asarray(source.load(row)).max() for row in range(4)] == [
            base,
            base + 1,
            base + 2,
            0,
        ]


def test_cifar10_c_by_severity(tmp_path):
    some = corruptions.open_cifar10_c(write_cifar(tmp_path / "c"), ["fog"], [5, 2])
    assert [item.severity for item in some] == [2, 5]
    assert len(some) == 2
    assert some.title == "CIFAR-10-C"


def test_cifar100_c_is_called_so(tmp_path):
    folder = write_cifar(tmp_path / "c", ["fog"])
    np.save(folder / "labels.npy", np.tile(np.arange(10_000) % 100, 5))
    assert corruptions.open_cifar10_c(folder, ["fog"]).title == "CIFAR-100-C"


def spoil(folder, what):
    if what == "short":
        write_cifar(folder, ["fog"], rows=49_999)
    elif what == "float":
        write_cifar(folder, ["fog"], rows=5, dtype=np.float32)
    elif what == "no labels":
        (folder / "labels.npy").unlink()
    elif what == "other labels":
        np.save(folder / "labels.npy", np.arange(50_000) % 9)
    elif what == "float labels":
        np.save(folder / "labels.npy", np.zeros(50_000))
    elif what == "few labels":
        np.save(folder / "labels.npy", np.zeros(10_000, np.int64))
    elif what == "objects":
        np.save(folder / "fog.npy", np.array([{}], dtype=object), allow_pickle=True)
    elif what == "damaged":
        (folder / "fog.npy").write_bytes(b"\x93NUMPY")
    elif what == "archive":
        np.savez(folder / "a.npz", images=np.zeros(3))
        (folder / "a.npz").rename(folder / "fog.npy")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", r"uint8 \(49999, 32, 32, 3\); needed uint8 \(50000, 32, 32, 3\)"),
        ("float", "is float32"),
        ("no labels", "has no labels.npy"),
        ("other labels", "does not repeat the same 10,000 labels five times"),
        ("float labels", "needed integer class numbers"),
        ("few labels", "50000 rows of data and labels of shape"),
        ("objects", "cannot read .*fog.npy"),
        ("damaged", "cannot read .*fog.npy"),
        ("archive", "is an archive of arrays"),
    ],
)
def test_wrong_cifar10_c_is_refused(tmp_path, what, message):
    folder = write_cifar(tmp_path / "c", ["fog"])
    spoil(folder, what)
    with pytest.raises(DataError, match=message):
        corruptions.open_cifar10_c(folder, ["fog"])


def test_missing_files_and_wrong_names(tmp_path):
    folder = write_cifar(tmp_path / "c", ["fog"])
    with pytest.raises(DataError, match=r"has no snow\.npy"):
        corruptions.open_cifar10_c(folder, ["fog", "snow"])
    with pytest.raises(DataError, match="is not a folder"):
        corruptions.open_cifar10_c(tmp_path / "none")
    with pytest.raises(InvalidInputError, match="did you mean 'frost'"):
        corruptions.open_cifar10_c(folder, ["frozt"])
    with pytest.raises(InvalidInputError, match="severity 6"):
        corruptions.open_cifar10_c(folder, ["fog"], [6])
    with pytest.raises(InvalidInputError, match="at least one"):
        corruptions.open_cifar10_c(folder, [])


@pytest.mark.parametrize("group", ["", "weather"])
def test_imagenet_c_is_read_by_folders(tmp_path, group):
    found = list(
        corruptions.open_imagenet_c(
            write_imagenet(tmp_path, ["snow", "fog"], group), ["fog", "snow"]
        )
    )
    assert [(name, severity) for name, severity, _ in found] == [
        (name, severity) for name in ("fog", "snow") for severity in SEVERITIES
    ]
    for name, severity, source in found:
        assert source.labels.tolist() == [0, 1]
        assert source.classes == ("n01440764", "n01443537")
        assert source.ids[1].endswith("ILSVRC2012_val_1.JPEG")
        values = [int(np.asarray(source.load(row))[0, 0, 0]) for row in (0, 1)]
        wanted = 15 * severity + (name == "fog")
        assert values == pytest.approx([wanted, wanted + 80], abs=1)


def test_imagenet_c_is_not_cropped_again(tmp_path):
    _, _, source = next(
        iter(corruptions.open_imagenet_c(write_imagenet(tmp_path, ["fog"]), ["fog"]))
    )
    cropping = Preprocessing((0.0,) * 3, (1.0,) * 3, image_size=(8, 8), crop_pct=0.5)
    image = source.load(0).copy()
    image.putpixel((0, 0), (255, 0, 0))
    kept = to_input(image, cropping, is_array=source.is_array)
    assert np.array_equal(kept, np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255)


def test_wrong_imagenet_c_is_refused(tmp_path):
    folder = write_imagenet(tmp_path, ["fog", "snow"])
    with pytest.raises(DataError, match="has no folder frost"):
        corruptions.open_imagenet_c(folder, ["frost"])
    (folder / "fog" / "4").rename(folder / "fog" / "four")
    with pytest.raises(DataError, match="has no folder 4"):
        corruptions.open_imagenet_c(folder, ["fog"])
    assert len(list(corruptions.open_imagenet_c(folder, ["fog"], [1, 5]))) == 2
    (folder / "snow" / "2" / "n01440764" / "ILSVRC2012_val_0.JPEG").unlink()
    with pytest.raises(DataError, match="does not hold the same images"):
        list(corruptions.open_imagenet_c(folder, ["snow"]))
    flat = tmp_path / "flat" / "fog" / "1"
    flat.mkdir(parents=True)
    Image.new("L", (8, 8)).save(flat / "a.JPEG")
    with pytest.raises(DataError, match="has no folders of classes"):
        list(corruptions.open_imagenet_c(tmp_path / "flat", ["fog"], [1]))
