"""Data specs and sources: what is read, in which order, and what is refused in which words."""

import contextlib
import string
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ebm_guard import Preprocessing
from ebm_guard.data import batches, match_classes, open_source, parse_spec
from ebm_guard.data.demo import DEMO_ROLES, load_demo
from ebm_guard.data.images import to_input
from ebm_guard.errors import DataError, EbmGuardError, InvalidInputError
from ebm_guard.predictions import stored_predictions

RGB8 = Preprocessing((0.5,) * 3, (0.25,) * 3, image_size=(8, 8), interpolation="bilinear")
GREY8 = Preprocessing((0.5,), (0.25,), image_size=(8, 8), interpolation="bilinear")


def refused(call, *words, error=DataError, code=3):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == code


def pixels_of(seed, shape=(9, 9, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path, seed=0, shape=(9, 9, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(seed, shape)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("dog/2.png", "dog/1.png", "cat/b.jpg", "cat/a/x.PNG")):
        write(tmp_path / "images" / name, number)
    (tmp_path / "images" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden").mkdir()
    return tmp_path / "images"


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(
        path,
        images=pixels_of(0, (20, 8, 8, 3)),
        labels=np.arange(20) % 5,
        classes=np.array(list("abcde")),
        test_images=pixels_of(1, (6, 8, 8)),
        test_labels=np.array([4, 3, 2, 1, 0, 4]),
    )
    return path


# --- the parser


@pytest.mark.parametrize(
    ("text", "kind", "path", "split", "rows", "classes"),
    [
        ("val", "folder", "val", "", None, None),
        ("val/[odd]?", "folder", "val/[odd]?", "", None, None),
        ("folder:val", "folder", "val", "", None, None),
        ("C:/val", "folder", "C:/val", "", None, None),
        ("./a:b", "folder", "./a:b", "", None, None),
        ("list:f.txt", "list", "f.txt", "", None, None),
        ("npz:a.npz", "npz", "a.npz", "", None, None),
        ("npz:a.npz#test", "npz", "a.npz", "test", None, None),
        ("npz:a.npz[:5000]", "npz", "a.npz", "", slice(None, 5000), None),
        ("npz:a.npz[-10:]", "npz", "a.npz", "", slice(-10, None), None),
        ("npz:a.npz[::2]", "npz", "a.npz", "", slice(None, None, 2), None),
        ("npz:a.npz[1::3]", "npz", "a.npz", "", slice(1, None, 3), None),
        ("npz:a.npz[:]", "npz", "a.npz", "", slice(None, None), None),
        ("npz:a.npz[::-1]", "npz", "a.npz", "", slice(None, None, -1), None),
        ("npz:a.npz?classes=0-3", "npz", "a.npz", "", None, (0, 1, 2, 3)),
        ("npz:a.npz?classes=5,0-1", "npz", "a.npz", "", None, (5, 0, 1)),
        ("npz:a#t[1:9]?classes=7", "npz", "a", "t", slice(1, 9), (7,)),
        ("logits:v.npz", "logits", "v.npz", "", None, None),
        ("logits:v.npz[:3]", "logits", "v.npz", "", slice(None, 3), None),
        ("predictions:out[5:]", "predictions", "out", "", slice(5, None), None),
        ("demo:", "demo", "", "", None, None),
        ("demo:near_ood", "demo", "near_ood", "", None, None),
    ],
)
def test_parser(text, kind, path, split, rows, classes):
    spec = parse_spec(text)
    assert (spec.text, spec.kind, spec.path, spec.split) == (text, kind, path, split)
    assert (spec.rows, spec.classes) == (rows, classes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["a spec is"]),
        ("npy:a.npz", ["'npy'", "did you mean 'npz'"]),
        ("logit:a.npz", ["did you mean 'logits'"]),
        ("prediction:a", ["did you mean 'predictions'"]),
        ("tfds/cifar10", ["timm's readers", "tfds/ is not read"]),
        ("hfds/", ["without the name of a data set", "timm's readers"]),
        ("npz:", ["empty path"]),
        ("list:", ["empty path"]),
        ("logits:[:5]", ["empty path"]),
        ("npz:a.npz[5]", ["[START:STOP]"]),
        ("npz:a.npz[a:b]", ["[START:STOP]"]),
        ("npz:a.npz[::0]", ["step", "cannot be 0"]),
        ("npz:a.npz[-:]", ["[START:STOP]"]),
        ("npz:a.npz[:--3]", ["[START:STOP]"]),
        ("npz:a.npz?class=3", ["?classes="]),
        ("npz:a.npz?classes=x", ["?classes=0-7"]),
        ("npz:a.npz?classes=", ["?classes=0-7"]),
        ("npz:a.npz?classes=3-1", ["classes '3-1'"]),
        ("npz:a.npz?classes=1,1", ["at most once"]),
        ("npz:a.npz?classes=0-3,2", ["at most once"]),
    ],
)
def test_parser_refuses(text, words):
    refused(lambda: parse_spec(text), repr(text), *words, error=InvalidInputError, code=2)


PIECES = st.sampled_from(
    [
        "npz:",
        "folder:",
        "list:",
        "logits:",
        "predictions:",
        "demo:",
        "x:",
        "a.npz",
        "#",
        "test",
        "[",
        "]",
        ":",
        "-",
        "5",
        "0",
        "?",
        "classes=",
        ",",
        "..",
        "/",
        " ",
        "\0",
        "é",
        "²",
        "٣",
        "~",
        "near_ood",
    ]
)


@example("logits:~\0")
@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=9).map("".join)))
@example("npz:a[-:]")
@example("abc:" + "x" * 300)
@example("npz:a[" + "9" * 5000 + ":]")
@example("npz:a?classes=" + "9" * 5000)
@example("npz:a?classes=0-" + "9" * 12)
@example("npz:a[²:]")
@example("demo:\0")
def test_any_text_is_a_spec_or_an_error_of_ours(text):
    try:
        spec = parse_spec(text)
    except EbmGuardError:
        return
    assert spec.text == text
    # Opening it finds nothing by these names, or the folder we are in.
    with contextlib.suppress(EbmGuardError):
        if spec.kind in ("logits", "predictions"):
            stored_predictions(spec)
        elif not spec.path.startswith((".", "/", "~")):
            open_source(spec)


# --- what does not exist


def test_near_names_are_suggested(folder, npz):
    for spec, near in {
        f"npz:{npz.parent}/sett.npz": "did you mean 'set.npz'",
        f"{folder.parent}/image": "did you mean 'images'",
        f"{folder.parent}/imagse/dog": "did you mean 'images'",
        f"logits:{npz.parent}/sat.npz": "did you mean 'set.npz'",
    }.items():
        opened = stored_predictions if spec.startswith("logits") else open_source
        refused(lambda: opened(parse_spec(spec)), spec, "does not exist", near)  # noqa: B023
    refused(lambda: open_source(f"npz:{npz}#tst"), "tst_images", "did you mean 'test_images'")
    refused(lambda: open_source("demo:near"), "'near'", "use one of", "near_ood")


def test_home_folder_is_expanded(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(open_source("folder:~/images")) == 4


# --- folders and lists


def test_folder_of_classes(folder):
    source = open_source(str(folder))
    assert source.ids == ("cat/a/x.PNG", "cat/b.jpg", "dog/1.png", "dog/2.png")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.classes == ("cat", "dog")
    assert not source.is_array
    assert np.array_equal(np.asarray(source.load(2)), pixels_of(1))


def test_flat_folder_has_no_labels(tmp_path):
    for name in ("b.png", "a.png"):
        write(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    assert source.ids == ("a.png", "b.png")
    assert source.labels is None
    assert source.classes is None


def test_empty_folders(tmp_path):
    refused(lambda: open_source(str(tmp_path)), "folder without images", ".jpg")
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    refused(lambda: open_source(str(tmp_path)), "2 sub-folders hold no images")


def test_a_class_without_images_keeps_its_number(folder):
    (folder / "bird").mkdir()
    source = open_source(str(folder))
    assert source.classes == ("bird", "cat", "dog")
    assert source.labels.tolist() == [1, 1, 2, 2]


def test_a_file_is_no_folder(npz):
    refused(lambda: open_source(str(npz)), "a file; a folder was needed", f"npz:{npz}", "list:")


def test_list(folder, tmp_path):
    listed = tmp_path / "files.txt"
    listed.write_text(f"images/dog/1.png 7\n\n{folder}/cat/b.jpg   0\n")
    source = open_source(f"list:{listed}")
    assert source.labels.tolist() == [7, 0]
    assert np.array_equal(np.asarray(source.load(0)), pixels_of(1))
    listed.write_text("images/dog/1.png\nimages/dog/2.png\n")
    source = open_source(f"list:{listed}")
    assert source.labels is None
    assert source.ids == ("images/dog/1.png", "images/dog/2.png")


def test_list_with_blanks_in_names(tmp_path):
    write(tmp_path / "my cat.png", 3)
    listed = tmp_path / "files.txt"
    listed.write_text("my cat.png 1\n")
    source = open_source(f"list:{listed}")
    assert source.labels.tolist() == [1]
    assert np.array_equal(np.asarray(source.load(0)), pixels_of(3))


def test_wrong_lists(tmp_path):
    listed = tmp_path / "files.txt"
    listed.write_text("")
    refused(lambda: open_source(f"list:{listed}"), "no images", "at least one")
    listed.write_text("a.png 3\nb.png\n")
    refused(lambda: open_source(f"list:{listed}"), "line 2", "some have none")
    listed.write_text("missing.png\n")
    refused(lambda: open_source(f"list:{listed}").load(0), "cannot read image", "missing.png")
    refused(lambda: open_source(f"list:{tmp_path}"), str(tmp_path))
    listed.write_bytes(b"\xff\xfe\x00a.png")
    refused(lambda: open_source(f"list:{listed}"), str(listed))


@pytest.mark.parametrize("last", ["²", "--5", "1²"])
def test_a_last_word_that_is_no_number_belongs_to_the_name(tmp_path, last):
    listed = tmp_path / "files.txt"
    listed.write_text(f"a.png {last}\n")
    source = open_source(f"list:{listed}")
    assert source.labels is None
    assert source.ids == (f"a.png {last}",)


# --- arrays


def test_npz(npz):
    source = open_source(f"npz:{npz}")
    assert (len(source), source.is_array) == (20, True)
    assert source.ids == tuple(map(str, range(20)))
    assert source.labels.tolist() == (np.arange(20) % 5).tolist()
    assert source.classes == tuple("abcde")
    assert np.array_equal(np.asarray(source.load(3)), pixels_of(0, (20, 8, 8, 3))[3])


def test_npz_split(npz):
    source = open_source(f"npz:{npz}#test")
    assert source.labels.tolist() == [4, 3, 2, 1, 0, 4]
    assert np.array_equal(np.asarray(source.load(5)), pixels_of(1, (6, 8, 8))[5])


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [
        ("[:3]", [0, 1, 2]),
        ("[-2:]", [18, 19]),
        ("[::7]", [0, 7, 14]),
        ("[3:1:-1]", [3, 2]),
        ("[:999]", list(range(20))),
        ("?classes=2", [2, 7, 12, 17]),
        ("?classes=3,1", [1, 3, 6, 8, 11, 13, 16, 18]),
        # As the spec reads: the slice is of the file, the classes are picked from it.
        ("[:9]?classes=3,1", [1, 3, 6, 8]),
    ],
)
def test_npz_rows_keep_their_numbers(npz, suffix, rows):
    source = open_source(f"npz:{npz}{suffix}")
    assert source.ids == tuple(map(str, rows))
    images = pixels_of(0, (20, 8, 8, 3))
    for index, row in enumerate(rows):
        assert np.array_equal(np.asarray(source.load(index)), images[row])


def test_classes_are_renumbered_in_their_order(npz):
    source = open_source(f"npz:{npz}?classes=3,1")
    assert source.classes == ("d", "b")
    assert source.labels.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]


def test_selections_that_cannot_be(npz, tmp_path):
    refused(lambda: open_source(f"npz:{npz}[50:]"), "selects none of 20 rows")
    refused(lambda: open_source(f"npz:{npz}?classes=0,9"), "no row has label 9", "0..4")
    bare = tmp_path / "bare.npz"
    np.savez(bare, images=pixels_of(0, (4, 8, 8)))
    refused(lambda: open_source(f"npz:{bare}?classes=0"), "needs labels", "the file has none")
    empty = tmp_path / "empty.npz"
    np.savez(empty, images=np.zeros((0, 8, 8), np.uint8), labels=np.zeros(0, np.int64))
    refused(lambda: open_source(f"npz:{empty}"), "none of 0 rows")
    refused(lambda: open_source(f"npz:{empty}?classes=0"), str(empty))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            (pixels_of(0, (3, 8, 8, 3)) / 255 - 0.5).astype(np.float32),
            ["float32", "look normalised already", "uint8 pixels 0..255"],
        ),
        (pixels_of(0, (3, 8, 8, 3)) / 255, ["float64", "[0, 1]", "uint8"]),
        (pixels_of(0, (3, 8, 8, 3)).astype(np.int64), ["int64", "uint8"]),
        (pixels_of(0, (3, 3, 8, 8)), ["(3, 3, 8, 8)", "(N, H, W, C)"]),
        (pixels_of(0, (8, 8)), ["(8, 8)", "(N, H, W)"]),
        (pixels_of(0, (3, 8, 8, 4)), ["1 or 3 channels"]),
    ],
    ids=["normalised", "floats", "int64", "NCHW", "one image", "RGBA"],
)
def test_images_that_are_no_pixels(tmp_path, images, words):
    path = tmp_path / "set.npz"
    np.savez(path, images=images, labels=np.zeros(len(images), np.int64))
    refused(lambda: open_source(f"npz:{path}"), str(path), *words)


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros(3, np.int64),
        np.zeros((4, 2), np.int64),
        np.array(["cat", "dog", "cat", "dog"]),
        np.array([0.5, 1.0, 0.0, 1.0]),
        np.array([0.0, 1.0, np.nan, 1.0]),
    ],
    ids=["length", "one-hot", "names", "fractions", "nan"],
)
def test_labels_that_are_no_class_numbers(tmp_path, labels):
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels_of(0, (4, 8, 8)), labels=labels)
    refused(lambda: open_source(f"npz:{path}"), str(path), "label")


def test_files_that_are_no_npz(tmp_path, npz):
    path = tmp_path / "other.npz"
    path.write_bytes(b"hello")
    refused(lambda: open_source(f"npz:{path}"), "cannot read", str(path))
    path.write_bytes(b"")
    refused(lambda: open_source(f"npz:{path}"), "cannot read")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    refused(lambda: open_source(f"npz:{path}"), "single array", "np.savez")
    refused(lambda: open_source(f"npz:{tmp_path}"), "cannot read")
    np.savez(path, logits=np.zeros((3, 3)))
    refused(lambda: open_source(f"npz:{path}"), "holds logits", "needed 'images'", "logits:FILE")


def test_objects_are_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "set.npz"
    images = np.empty(2, dtype=object)
    images[:] = [Bomb(), Bomb()]
    for name in ("images", "logits"):
        np.savez(path, **{name: images})
        opened = stored_predictions if name == "logits" else open_source
        kind = "logits" if name == "logits" else "npz"
        refused(lambda: opened(parse_spec(f"{kind}:{path}")), "cannot read")  # noqa: B023
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz_files(tmp_path, compressed, capsys):
    """Any damage is an error of ours, or is not in what is read (npz members have a checksum)."""
    path = tmp_path / "set.npz"
    images, labels = pixels_of(0, (6, 8, 8)), np.arange(6)
    (np.savez_compressed if compressed else np.savez)(path, images=images, labels=labels)
    good = path.read_bytes()
    generator = np.random.default_rng(0)
    contents = [good[: int(length)] for length in generator.integers(0, len(good), 60)]
    for place in generator.integers(0, len(good), 300):
        content = bytearray(good)
        content[place] ^= 1 << int(generator.integers(8))
        contents.append(bytes(content))
    refusals = 0
    for content in contents:
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = open_source(f"npz:{path}")
        except DataError:
            refusals += 1
            continue
        for index in range(len(source)):
            assert np.array_equal(np.asarray(source.load(index)), images[index])
    with capsys.disabled():
        print(f"\n[fuzz] {len(contents)} damaged npz files, {refusals} refused", end="")
    assert refusals > 60


def test_lzma_npz(tmp_path):
    import io
    import zipfile

    path = tmp_path / "set.npz"
    buffer = io.BytesIO()
    np.save(buffer, pixels_of(0, (50, 8, 8)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("images.npy", buffer.getvalue())
    assert len(open_source(f"npz:{path}")) == 50
    content = bytearray(path.read_bytes())
    for place in range(60, len(content) - 200, 97):
        content[place] ^= 255
    path.write_bytes(content)
    refused(lambda: open_source(f"npz:{path}"), "cannot read", str(path))


# --- batches


def test_batches_hold_what_the_model_takes(npz):
    found = list(batches(open_source(f"npz:{npz}"), RGB8, batch_size=8))
    assert [len(batch.ids) for batch in found] == [8, 8, 4]
    x = torch.cat([batch.inputs for batch in found])
    images = torch.from_numpy(pixels_of(0, (20, 8, 8, 3))).float().permute(0, 3, 1, 2)
    assert x.dtype == torch.float32
    assert torch.allclose(x, (images / 255 - 0.5) / 0.25, atol=1e-6)
    assert torch.cat([batch.labels for batch in found]).tolist() == [n % 5 for n in range(20)]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.5])
def test_arrays_of_the_input_size_are_never_resized(crop_pct):
    pre = Preprocessing((0.0,) * 3, (1.0,) * 3, image_size=(8, 8), crop_pct=crop_pct)
    image = Image.fromarray(pixels_of(0, (8, 8, 3)))
    kept = to_input(image, pre, is_array=True)
    exact = pixels_of(0, (8, 8, 3)).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(kept, exact.astype(np.float32))
    cropped = to_input(image, pre)
    assert np.array_equal(cropped, kept) == (crop_pct == 1.0)
    # An array of another size is resized, like a file.
    assert to_input(Image.fromarray(pixels_of(0, (16, 12, 3))), pre, is_array=True).shape[1:] == (
        8,
        8,
    )


def test_grey_and_colour():
    grey, colour = Image.fromarray(pixels_of(0, (8, 8))), Image.fromarray(pixels_of(0, (8, 8, 3)))
    repeated = to_input(grey, RGB8)
    assert repeated.shape == (3, 8, 8)
    assert np.array_equal(repeated[0], repeated[1])
    assert np.array_equal(repeated[0], repeated[2])
    assert np.array_equal(repeated[:1], to_input(grey, GREY8))
    luma = np.asarray(colour.convert("L"), dtype=np.float32) / 255
    assert np.allclose(to_input(colour, GREY8)[0], (luma - 0.5) / 0.25)
    for mode in ("RGBA", "P", "CMYK", "LA", "1"):
        assert to_input(colour.convert(mode), RGB8).shape == (3, 8, 8)


def test_mixed_sizes_need_an_input_size(tmp_path):
    write(tmp_path / "a.png", shape=(9, 9, 3))
    write(tmp_path / "b.png", shape=(9, 12, 3))
    source = open_source(str(tmp_path))
    free = Preprocessing((0.5,) * 3, (0.25,) * 3)
    refused(
        lambda: list(batches(source, free)),
        "--img-size",
        "image_size=",
        error=InvalidInputError,
        code=2,
    )
    assert next(batches(source, RGB8)).inputs.shape == (2, 3, 8, 8)


def test_unreadable_images_are_counted(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "c.png")
    good = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(good[: len(good) // 2])
    source = open_source(str(tmp_path))
    (batch,) = batches(source, RGB8)
    assert batch.ids == ("a.png", "c.png")
    ((name, error),) = batch.skipped
    assert name == "b.png"
    assert "cannot read image" in error
    assert str(tmp_path / "b.png") in error
    refused(lambda: list(batches(source, RGB8, strict=True)), "b.png", "--strict", "skipped")


def test_damaged_image_files_never_crash(tmp_path):
    generator = np.random.default_rng(0)
    for ending in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        path = tmp_path / f"a.{ending}"
        write(path, shape=(16, 16, 3))
        good = path.read_bytes()
        for _ in range(25):
            content = bytearray(good)
            for place in generator.integers(0, len(good), 4):
                content[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(content[: int(generator.integers(1, len(good) + 1))])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                (batch,) = batches(open_source(f"folder:{tmp_path}"), RGB8)
            assert len(batch.ids) + len(batch.skipped) == 1
        path.unlink()


def test_wrong_batch_settings(npz):
    source = open_source(f"npz:{npz}")
    for wrong in ({"batch_size": 0}, {"workers": -1}):
        refused(
            lambda: next(batches(source, RGB8, **wrong)),  # noqa: B023
            "needed >= 1 and >= 0",
            error=InvalidInputError,
            code=2,
        )


def test_hashes_tell_images_apart(npz, tmp_path):
    again = tmp_path / "again.npz"
    np.savez(again, images=pixels_of(0, (20, 8, 8, 3)))
    one, two = (
        np.concatenate([batch.hashes for batch in batches(open_source(f"npz:{path}"), RGB8)])
        for path in (npz, again)
    )
    assert np.array_equal(one, two)
    assert len(np.unique(one)) == 20


def test_reading_leaves_global_random_state_alone(npz):
    state = torch.get_rng_state()
    list(batches(open_source(f"npz:{npz}"), RGB8))
    assert torch.equal(torch.get_rng_state(), state)


# --- the demo


def test_demo_serves_each_role_its_own_rows():
    expected = {
        "evaluation": "evaluation",
        "calibration": "calibration",
        "validation": "calibration",
        "fit": "train",
        "train": "train",
        "ood": "far_ood",
    }
    for role, part in expected.items():
        source = open_source("demo:", role)
        assert np.array_equal(np.asarray(source.load(0)), load_demo(part).images[0])
        assert len(source) == len(load_demo(part).images)
    for role in DEMO_ROLES:
        assert len(open_source(f"demo:{role}", "evaluation")) == len(load_demo(role).images)


# --- stored logits


def stored(tmp_path, suffix="", **arrays):
    path = tmp_path / "val.npz"
    np.savez(path, **arrays)
    return stored_predictions(parse_spec(f"logits:{path}{suffix}"))


def raw(n=12, classes=4, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=(n, classes)).astype(dtype) * 3


def test_stored_logits(tmp_path):
    logits, labels = raw(), np.arange(12) % 4
    part = stored(
        tmp_path,
        logits=logits,
        labels=labels.astype(np.int32),
        features=np.ones((12, 2), np.float32),
        groups=np.arange(12),
        classes=np.array(list("abcd")),
    )
    assert np.array_equal(part.logits, logits)
    assert part.labels.dtype == np.int64
    assert np.array_equal(part.labels, labels)
    assert part.classes == tuple("abcd")
    assert part.features.shape == (12, 2)
    kept = stored(tmp_path, "[::5]", logits=logits, labels=labels)
    assert np.array_equal(kept.logits, logits[::5])
    assert kept.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_of_stored_logits(tmp_path, dtype):
    part = stored(tmp_path, logits=raw(dtype=dtype))
    assert part.logits.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert part.dtype == np.dtype(dtype).name
    assert np.array_equal(part.logits.astype(dtype), raw(dtype=dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_in_a_file(tmp_path, value):
    logits = raw()
    logits[7, 1] = value
    refused(
        lambda: stored(tmp_path, logits=logits),
        "1 of 12 rows",
        "NaN or infinite",
        "first row 7",
        "remove or recompute",
    )


def test_non_finite_features_in_a_file(tmp_path):
    features = np.ones((12, 2), np.float32)
    features[5, 1] = np.nan
    refused(lambda: stored(tmp_path, logits=raw(), features=features), "features", "NaN")


def test_stored_probabilities(tmp_path):
    odds = np.exp(raw(dtype=np.float64))
    probs = odds / odds.sum(axis=1, keepdims=True)
    part = stored(tmp_path, probs=probs)
    assert part.kind == "probs"
    assert np.allclose(np.exp(part.logits), probs)
    exact = np.eye(4)[np.arange(12) % 4].astype(np.float32)
    zeros = stored(tmp_path, probs=exact)
    assert np.isfinite(zeros.logits).all()
    assert np.array_equal(np.exp(zeros.logits).round(), exact)


def test_probabilities_under_the_wrong_name(tmp_path):
    odds = np.exp(raw(dtype=np.float64))
    probs = odds / odds.sum(axis=1, keepdims=True)
    refused(lambda: stored(tmp_path, logits=probs), "probabilities", "under the name `probs`")
    refused(lambda: stored(tmp_path, logits=np.log(probs)), "log-probabilities", "`probs`")
    refused(lambda: stored(tmp_path, probs=raw()), "not probabilities", "under the name `logits`")
    probs[3, 2] = np.nan
    refused(lambda: stored(tmp_path, probs=probs), "1 of 12 rows", "row 3")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": raw()}, ["neither `logits` nor `probs`"]),
        ({"logits": raw()[:, :1]}, ["(12, 1)", "C >= 2"]),
        ({"logits": raw()[0]}, ["(4,)", "(N, C)"]),
        ({"logits": raw()[:0]}, ["no rows"]),
        ({"logits": raw().astype(np.int64)}, ["int64", "floating"]),
        ({"logits": raw().astype(str)}, ["floating"]),
        ({"probs": raw()[0]}, ["(N, C)"]),
        ({"logits": raw(), "labels": np.arange(11) % 4}, ["12 rows of data", "shape (11,)"]),
        ({"logits": raw(), "labels": np.arange(12)}, ["8 of 12 labels", "0..3", "row 4 has 4"]),
        ({"logits": raw(), "labels": np.arange(12) % 4 - 1}, ["outside 0..3", "row 0 has -1"]),
        ({"logits": raw(), "labels": np.eye(12)[:, :4]}, ["label"]),
        ({"logits": raw(), "labels": np.full(12, 0.5)}, ["label"]),
        ({"logits": raw(), "labels": np.array(["cat"] * 12)}, ["label"]),
        ({"logits": raw(), "features": np.ones((11, 2))}, ["12 rows of logits and 11 features"]),
        ({"logits": raw(), "classes": np.array(["a", "b"])}, ["classes"]),
    ],
)
def test_stored_files_that_do_not_fit(tmp_path, arrays, words):
    refused(lambda: stored(tmp_path, **arrays), str(tmp_path), *words)


def test_stored_predictions_spec(tmp_path):
    part = stored(tmp_path, logits=raw(), labels=np.arange(12) % 4)
    part.save(tmp_path / "out")
    spec = parse_spec(f"predictions:{tmp_path / 'out'}[:5]")
    assert np.array_equal(stored_predictions(spec).logits, part.logits[:5])
    spec = parse_spec(f"predictions:{tmp_path / 'out'}[50:]")
    refused(lambda: stored_predictions(spec), "selects none of 12 rows")


def test_stored_kinds_hold_no_images(npz):
    refused(
        lambda: open_source(f"logits:{npz}"), "holds no images", error=InvalidInputError, code=2
    )


# --- class names


def test_matching_of_class_names():
    mapping, words = match_classes(["cat", "Dog "], ["dog", "cat"], 2)
    assert mapping.tolist() == [1, 0]
    assert "re-ordered by name" in words
    assert match_classes(["hot_dog", "cat"], ["hot dog", "cat"], 2)[0] is None
    assert match_classes(None, ["a", "b"], 2)[0] is None
    assert "no class names" in match_classes(["a"], None, 2)[1]
    assert "share nothing" in match_classes(["x", "y"], ["a", "b"], 2)[1]
    refused(lambda: match_classes(list("abc"), None, 2), "3 classes", "a model with 2")
    refused(lambda: match_classes(["a", "z"], ["a", "b"], 2), "'z'", "does not name")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text(string.ascii_lowercase, min_size=1), min_size=2, max_size=8, unique=True),
    st.randoms(use_true_random=False),
)
def test_matching_follows_any_order(names, random):
    model = list(names)
    random.shuffle(model)
    mapping, _ = match_classes(names, model, len(names))
    mapping = np.arange(len(names)) if mapping is None else mapping
    assert [model[place] for place in mapping] == names
