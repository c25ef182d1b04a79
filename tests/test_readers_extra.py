"""timm's readers of Hugging Face and web datasets, on data written here; no network."""

import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_guard import EnergyClassifier, Preprocessing, predict
from ebm_guard.cli import run
from ebm_guard.data import batches, open_source
from ebm_guard.errors import DataError, EbmGuardWarning

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings(
    # Of the libraries behind the readers, not ours.
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
GREY = Preprocessing((0.0,), (1.0,), image_size=(8, 8))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def webdataset():
    return pytest.importorskip("webdataset", reason="the extra `data` is not installed")


def refused(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def png(value, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = np.full((8, 12), value, np.uint8)
    image[:, 6:] = 255 - value
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def image_folder(root, n=3):
    for split in ("train", "validation"):
        for label, name in enumerate(("ape", "bee")):
            (root / split / name).mkdir(parents=True)
            for number in range(n):
                content = png(10 * label + number, 6)
                (root / split / name / f"{number}.png").write_bytes(content)
    return root


def parquet(datasets, path, names=("image", "label"), labels=(0, 1, 2, 1)):
    features = datasets.Features(
        {
            names[0]: datasets.Image(),
            names[1]: datasets.ClassLabel(names=["ape", "bee", "cow"]),
        }
    )
    images = [{"bytes": png(k), "path": None} for k in range(len(labels))]
    table = datasets.Dataset.from_dict({names[0]: images, names[1]: list(labels)}, features)
    path.mkdir(parents=True)
    table.to_parquet(path / "validation.parquet")
    return path


# --- hfds


def test_hfds_local_folder(hub, tmp_path):
    root = image_folder(tmp_path / "set")
    source = open_source(f"hfds/{root}", data_dir=str(tmp_path / "cache"))
    assert len(source) == 6
    assert source.classes == ("ape", "bee")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    # Undecoded bytes come from timm's reader, so the orientation is ours to apply.
    assert source.load(0).size == (8, 12)
    assert open_source(f"hfds/{root}#train[:2]").labels.tolist() == [0, 0]
    assert len(open_source(f"hfds/{root}", split="train")) == 6


def test_hfds_columns(hub, tmp_path):
    path = parquet(hub, tmp_path / "set")
    source = open_source(f"hfds/{path}")
    assert source.classes == ("ape", "bee", "cow")
    assert source.labels.tolist() == [0, 1, 2, 1]
    (batch,) = batches(source, GREY)
    assert [round(float(row.max() * 255)) for row in batch.inputs] == [255, 254, 253, 252]
    assert batch.labels.tolist() == [0, 1, 2, 1]
    other = parquet(hub, tmp_path / "other", ("img", "fine"))
    source = open_source(f"hfds/{other}?input_key=img&target_key=fine")
    assert source.labels.tolist() == [0, 1, 2, 1]
    # No label column: no labels. No image column, or a wrong name: an error.
    assert open_source(f"hfds/{other}?input_key=img").labels is None
    refused(lambda: open_source(f"hfds/{other}"), "no column 'image'", "img, fine", "input_key")
    refused(
        lambda: open_source(f"hfds/{other}?input_key=img&target_key=fien"),
        "no column 'fien'",
        "did you mean 'fine'",
    )
    secret = parquet(hub, tmp_path / "secret", labels=(-1, -1))
    assert open_source(f"hfds/{secret}").labels is None


def test_hfds_class_map(hub, tmp_path):
    path = parquet(hub, tmp_path / "set")
    (tmp_path / "map.txt").write_text("cow\nbee\nape\n")
    source = open_source(f"hfds/{path}", class_map=str(tmp_path / "map.txt"))
    assert source.labels.tolist() == [2, 1, 0, 1]
    (tmp_path / "map.txt").write_text("cow\nbee\n")
    refused(
        lambda: open_source(f"hfds/{path}", class_map=str(tmp_path / "map.txt")),
        "does not name 'ape'",
    )


def test_hfds_saved_to_disk_is_told(hub, tmp_path):
    hub.Dataset.from_dict({"label": [0]}).save_to_disk(tmp_path / "saved")
    refused(lambda: open_source(f"hfds/{tmp_path / 'saved'}"), "could not open split", "load_data")


@pytest.mark.slow
def test_missing_sets_offline(hub, tmp_path):
    for reader in ("hfds", "hfids"):
        args = ["-o", str(tmp_path / "out"), "--model", "ebm_guard.data.demo:demo_classifier"]
        args += ["--data", f"{reader}/no-such-owner/no-such-set#test"]
        done = subprocess.run(
            [sys.executable, "-m", "ebm_guard", "report", *args],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3, done.stderr
        assert "could not open split 'test'" in done.stderr
        assert "Hugging Face Hub" in done.stderr
        assert "Traceback" not in done.stderr


# --- streams


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,)}

    def forward(self, x):
        mean = x.amax(dim=(1, 2, 3))
        return torch.stack([mean, -mean, mean * 0], dim=1)


def passed(source, batch_size=2):
    classifier = EnergyClassifier(Mean().eval())
    return predict(classifier, batches(source, GREY, batch_size=batch_size), total=source.total)


def test_hfids(hub, tmp_path):
    path = parquet(hub, tmp_path / "set")
    source = open_source(f"hfids/{path}")
    assert source.total is None
    assert source.classes == ("ape", "bee", "cow")
    for _ in range(2):
        part = passed(source)
        assert part.labels.tolist() == [0, 1, 2, 1]
        assert part.ids == ("0", "1", "2", "3")
        assert np.allclose(part.logits[:, 0] * 255, [255, 254, 253, 252], atol=1e-3)
    (tmp_path / "map.txt").write_text("cow\nbee\nape\n")
    source = open_source(f"hfids/{path}", class_map=str(tmp_path / "map.txt"))
    assert passed(source).labels.tolist() == [2, 1, 0, 1]


def test_hfids_orientation_is_applied_once(hub, tmp_path):
    root = image_folder(tmp_path / "set")
    sizes = {image.size for _, image, _ in open_source(f"hfids/{root}#train").rows()}
    assert sizes == {(8, 12)}


def test_hfids_without_the_columns(hub, tmp_path):
    path = parquet(hub, tmp_path / "set", ("img", "fine"))
    refused(lambda: passed(open_source(f"hfids/{path}")), "cannot read image 0", "input_key")
    good = open_source(f"hfids/{path}?input_key=img&target_key=fine")
    assert passed(good).labels.tolist() == [0, 1, 2, 1]
    refused(lambda: passed(open_source(f"hfids/{path}#test")), f"hfids/{path}#test", "split")


def shards(root, broken=(), labels=True):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"val-{shard:03d}.tar", "w") as file:
            for row in range(shard * 3, shard * 3 + 3):
                content = b"broken" if row in broken else png(row, 6)
                members = {"png": content}
                if labels:
                    members["cls"] = str(row % 3).encode()
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{row:04d}.{ending}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return root


def test_wds(webdataset, tmp_path):
    root = shards(tmp_path / "set")
    for split, total in (("val-{000..001}.tar|6", 6), ("val-{000..001}.tar", None)):
        source = open_source(f"wds/#{split}", data_dir=str(root))
        assert source.total == total
        for _ in range(2):
            part = passed(source)
            assert part.labels.tolist() == [0, 1, 2, 0, 1, 2]
            assert np.allclose(part.logits[:, 0] * 255, 255 - np.arange(6), atol=1e-3)
        assert {image.size for _, image, _ in source.rows()} == {(8, 12)}
    assert passed(open_source("wds/", data_dir=str(root), split="val-000.tar|3")).labels.size == 3


def test_wds_by_its_info(webdataset, tmp_path):
    root = shards(tmp_path / "set")
    names = ["val-000.tar", "val-001.tar"]
    split = {
        "name": "validation",
        "num_samples": 6,
        "filenames": names,
        "shard_lengths": [3, 3],
    }
    (root / "_info.json").write_text(json.dumps({"splits": {"validation": split}}))
    source = open_source("wds/", data_dir=str(root))
    assert source.total == 6
    assert len(passed(source)) == 6
    refused(lambda: open_source("wds/#tset", data_dir=str(root)), "could not open split 'tset'")


def test_wds_says_what_is_left_out(webdataset, tmp_path):
    root = shards(tmp_path / "set", broken=(1, 4))
    with pytest.warns(EbmGuardWarning, match="gave 4 of 6 declared images"):
        part = passed(open_source("wds/#val-{000..001}.tar|6", data_dir=str(root)))
    assert part.labels.tolist() == [0, 2, 0, 2]
    bare = shards(tmp_path / "bare", labels=False)
    refused(
        lambda: passed(open_source("wds/#val-000.tar|3", data_dir=str(bare))),
        "no images",
        ".cls",
    )
    refused(
        lambda: passed(open_source("wds/#none-000.tar|3", data_dir=str(root))), "wds/#none-000.tar"
    )


@pytest.mark.slow
def test_streams_on_the_command_line(webdataset, tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "val.tar", "w") as file:
        for row in range(60):
            for ending, data in {"png": png(row * 2), "cls": str(row % 3).encode()}.items():
                info = tarfile.TarInfo(f"{row:04d}.{ending}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    (tmp_path / "nets.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()\n"
        "    model.pretrained_cfg = {'input_size': (1, 8, 8), 'mean': (0.0,), 'std': (1.0,)}\n"
        "    return model\n"
    )

    def command(*args):
        model = ["--model", f"{tmp_path / 'nets.py'}:make", "--data-dir", str(root), "-q"]
        code = run([*args, *model])
        return code, capsys.readouterr().err

    out = ["-o", str(tmp_path / "out")]
    code, err = command("report", "--data", "wds/#val.tar", *out)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "thumbnails are off, or the images are not at hand" in json.dumps(report)
    code, err = command("report", "--data", "wds/#val.tar", "--limit", "30", *out)
    assert code == 2
    assert "wds/#val-{000..003}.tar|4000" in err
    kept = tmp_path / "kept"
    extra = ["--limit", "30", "--save-predictions", str(kept)]
    code, err = command("report", "--data", "wds/#val.tar|60", *extra, *out)
    assert code == 0, err
    header = json.loads((kept / "evaluation" / "predictions.json").read_text())
    assert header["n"] == 30
    assert header["notes"]["limit"] == 30
    assert sorted(header["ids"], key=int) == header["ids"] != [str(k) for k in range(30)]
    guard = str(tmp_path / "guard.safetensors")
    code, err = command("fit", "--data", "wds/#val.tar", "--false-reject-rate", "0.2", "-o", guard)
    assert code == 0, err
    rows = tmp_path / "rows.jsonl"
    code, err = command("predict", guard, "--data", "wds/#val.tar", "-o", str(rows))
    assert code == 0, err
    assert [json.loads(line)["id"] for line in rows.read_text().splitlines()] == [
        str(k) for k in range(60)
    ]
