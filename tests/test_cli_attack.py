"""``ebm-guard attack`` and ``report --attacks``: as a user runs them, with bad input too."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ebm_guard.cli import cli, run
from ebm_guard.cli.attack_options import STATE, Duration

QUICK = ["--epsilon", "0.1", "--epsilon", "0.3", "--attack-images", "12", "--quiet"]


def invoke(*args):
    """Run a command; return (exit code, stdout, stderr)."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        code = getattr(result.exception, "exit_code", 2)
        return code, result.output, str(result.exception)
    code = result.return_value if isinstance(result.return_value, int) else 0
    return code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked") / "out"
    code, out, err = invoke("attack", "--data", "demo:", "-o", folder, "--json", *QUICK)
    assert code == 0, err
    return folder, json.loads(out)


def test_attack_writes_its_files_and_forgets_its_stages(attacked):
    folder, content = attacked
    assert content["schema"] == "ebm_guard.attack/1"
    assert json.loads((folder / "robustness.json").read_text()) == content
    for name in ("robustness.html", "robustness.md"):
        assert (folder / name).stat().st_size > 1000
    assert not (folder / STATE).exists()
    assert list((folder / "figures").glob("*.svg"))


def test_the_gate_is_fitted_on_images_that_are_not_attacked(attacked):
    section = attacked[1]["robustness"]
    n = attacked[1]["data"]["n"]
    assert section["n"] == 12
    # Those drawn for attacks and corruptions are kept apart.
    assert f"{n - 128:,} calibration rows" in section["gate"]["guarantee"]
    assert section["gate"]["score"] == "energy"
    assert section["of"] == n


def test_report_with_attacks_has_the_section_and_its_requirements(tmp_path):
    code, out, err = invoke(
        "report", "--data", "demo:", "--no-synthetic", "--attacks", "quick", *QUICK,
        "--require", "robust_accuracy>=0.99", "--require", "robust_accuracy>=0@value",
        "--json", "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 1, err
    content = json.loads(out)
    section = content["robustness"]
    assert section["robust_accuracy"]["n"] == 12
    assert [item["status"] for item in content["requirements"]] == ["failed", "met"]
    assert content["requirements"][0]["path"] == "robustness.robust_accuracy"
    assert "Robust accuracy at linf 0.3" in section["verdict"]["sentence"]


def test_report_without_attacks_says_so_and_a_bound_on_it_fails(tmp_path):
    code, out, _ = invoke(
        "report", "--data", "demo:", "--no-synthetic", "--require", "robust_accuracy>=0.1",
        "--quiet", "--json", "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 1
    content = json.loads(out)
    assert "--attacks" in content["robustness"]["not_run"]
    assert content["requirements"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["report", "--data", "demo:", "--time-budget", "2m"], "without --attacks"),
        (["attack", "--data", "demo:", "--epsilon", "8"], "8/255"),
        (["attack", "--data", "demo:", "--norm", "l7"], "linf"),
        (["attack", "--data", "demo:", "--time-budget", "soon"], "120s"),
        (["attack", "--data", "demo:", "--attacks", "quik"], "quick"),
        (["attack", "--data", "demo:", "--attacker", "mine"], "NAME=FILE.py:CALL"),
        (["attack", "--data", "demo:", "--attacker", "a=no_such.py:f"], "does not exist"),
        (["report", "--data", "demo:", "--corruptions", "none"], "without --attacks"),
        (["attack", "--data", "demo:", "--guard", "g", "--fit-data", "demo:fit"], "leave one out"),
        (["attack", "--data", "demo:", "--guard", "g", "--score", "msp"], "leave one out"),
    ],
)
def test_bad_usage_is_explained_and_leaves_nothing(tmp_path, args, words):
    code, _, err = invoke(*args, "-o", tmp_path / "out")
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


def test_stored_predictions_cannot_be_attacked(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "rows.npz"
    np.savez(path, logits=rng.normal(size=(300, 3)).astype(np.float32), labels=np.zeros(300, int))
    code, _, err = invoke("attack", "--data", f"logits:{path}", "-o", tmp_path / "out")
    assert code == 2
    assert "need a model and images" in err


def test_interrupted_attacks_go_on_with_resume(tmp_path, monkeypatch, attacked):
    import ebm_guard.cli.attacking as attacking

    shown = []

    def stop(line):
        shown.append(line)
        if len(shown) == 3:
            raise KeyboardInterrupt

    loud = [item for item in QUICK if item != "--quiet"]
    args = ["attack", "--data", "demo:", "-o", str(tmp_path / "out"), *loud]
    with monkeypatch.context() as patch:
        patch.setattr(attacking, "say", stop)
        assert run(args) == 130
    assert (tmp_path / "out" / STATE).is_dir()
    assert run([*args, "--resume"]) == 0
    content = json.loads((tmp_path / "out" / "robustness.json").read_text())
    mine, other = content["robustness"], attacked[1]["robustness"]
    assert {key: mine[key] for key in mine if key != "run"} == {
        key: other[key] for key in other if key != "run"
    }
    assert not (tmp_path / "out" / STATE).exists()


def test_a_given_attack_of_a_file_is_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def darker(model, x, y, epsilon):\n    return (x - epsilon).clamp(0, 1)\n")
    code, out, err = invoke(
        "attack", "--data", "demo:", "--attacker", f"darker={file}:darker", "--corruptions",
        "none", "--json", "-o", tmp_path / "out", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    row = json.loads(out)["robustness"]["norms"][0]["epsilons"][0]
    assert [item["label"] for item in row["attacks"]][-1] == "darker"


@pytest.mark.parametrize(
    ("text", "seconds"), [("120", 120), ("120s", 120), ("2m", 120), ("1.5h", 5400)]
)
def test_times(text, seconds):
    assert Duration().convert(text, None, None) == seconds


def test_published_corruptions_are_measured(tmp_path):
    """A tiny CIFAR-10-C of the demo's own images cannot be made: the layout is checked first."""
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "fog.npy", np.zeros((10, 8, 8, 3), np.uint8))
    code, _, err = invoke(
        "attack", "--data", "demo:", "--corrupted", tmp_path / "c", "-o", tmp_path / "out", *QUICK
    )
    assert code == 3
    assert "npy" in err


def test_a_part_of_imagenet_c_is_measured_with_the_gate(tmp_path):
    """Two types in ImageNet-C's layout: snow takes away what the classes differ in."""
    rng = np.random.default_rng(0)
    for kind in (
        "clean",
        *(f"c/{name}/{level}" for name in ("fog", "snow") for level in range(1, 6)),
    ):
        for label in range(3):
            folder = tmp_path / kind / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(40):
                pixels = rng.integers(0, 80, (8, 8, 3))
                # One of forty looks like the next class: perfect rows have no temperature.
                shown = (label + (number == 0)) % 3
                pixels[..., shown] += 0 if kind.startswith("c/snow") else 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    pretrained_cfg = dict(mean=(0.0,) * 3, std=(1.0,) * 3, input_size=(3, 8, 8))\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(3, 3)\n"
        "        self.fc.weight.data = 20 * torch.eye(3)\n"
        "    def forward(self, x):\n"
        "        return self.fc(x.mean(dim=(2, 3)))\n"
        "def net():\n"
        "    return Net().eval()\n"
    )
    code, out, err = invoke(
        "attack", "--model", f"{tmp_path / 'net.py'}:net", "--data", tmp_path / "clean",
        "--corrupted", tmp_path / "c", "--corruptions", "none", "--epsilon", "0.1",
        "--false-reject-rate", "0.2", "--attack-images", "8", "--quiet", "--json",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    (table,) = json.loads(out)["robustness"]["published"]
    assert table["source"] == "ImageNet-C"
    assert table["names"] == ["snow", "fog"]
    cells = {(cell["name"], cell["severity"]): cell for cell in table["cells"]}
    assert len(cells) == 10
    assert cells["fog", 1]["accuracy"]["value"] == pytest.approx(39 / 40)
    assert cells["snow", 5]["accuracy"]["value"] < 0.7
    assert cells["snow", 5]["coverage"] is not None
    assert table["summary"]["mce"] is None
