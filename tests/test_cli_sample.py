"""``ebm-guard sample`` as a user runs it: pictures, figures, the data set, bad input."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ebm_guard.cli import cli
from ebm_guard.data import batches, open_source
from ebm_guard.data.demo import demo_classifier
from ebm_guard.model import EnergyClassifier
from ebm_guard.predictions import Predictions, predict
from ebm_guard.report import figures
from ebm_guard.report.render import (
    output,
    render_sample_html,
    render_sample_markdown,
    sample_view,
    write_sample_outputs,
)
from ebm_guard.report.sample_images import eight_bit, picture
from ebm_guard.report.sample_report import sample_report

SCHEMA = json.loads((Path(output.__file__).parents[1] / "sample_schema.json").read_text("utf-8"))
EVIL = "<script>alert('x')</script> `a` [/red] | 犬"


def invoke(*args):
    """Run a command; return (exit code, stdout, stderr)."""
    result = CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)
    if result.exception is not None:
        code = getattr(result.exception, "exit_code", 2)
        return code, result.output, str(result.exception)
    code = result.return_value if isinstance(result.return_value, int) else 0
    return code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "out"
    code, out, err = invoke(
        "sample", "--data", "demo:", "--classes", "0,3", "--per-class", 3, "--steps", 5,
        "--save-samples", "--json", "--quiet", "-o", folder,
    )  # fmt: skip
    assert code == 0, err
    return folder, json.loads(out)


def test_everything_is_written_and_fits_the_schema(sampled):
    folder, content = sampled
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert json.loads((folder / "samples.json").read_text("utf-8")) == content
    written = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    assert written == set(output.SAMPLE_OURS)
    assert [row["name"] for row in content["classes"]] == ["0", "3"]
    assert content["samples"] == 6
    assert len(content["trace"]["energy"]["median"]) == 6, "five steps, and the end"
    assert content["trace"]["acceptance"] is None


def test_the_data_set_reads_back_with_its_energies(sampled):
    folder, _ = sampled
    source = open_source(f"npz:{folder / 'samples.npz'}")
    assert source.labels.tolist() == [0, 0, 0, 3, 3, 3], "the model's own class numbers"
    classifier = EnergyClassifier(demo_classifier())
    part = predict(classifier, batches(source, classifier.preprocessing))
    energies = -np.log(np.exp(part.logits.astype(np.float64)).sum(axis=1))
    # Files hold 8 bits, so the energies of the images read back are near, not equal.
    stored = np.load(folder / "samples.npz")["energies"]
    np.testing.assert_allclose(energies, stored, atol=0.1)


def test_the_page_shows_every_sample_once(sampled):
    folder, content = sampled
    page = (folder / "samples.html").read_text("utf-8")
    assert page.count('<img src="data:image/png;base64,') == 6
    for name in ("sample_energies", "sample_traces_energy", "sample_traces_saturation"):
        assert f"{name}-" in page
    images = np.load(folder / "samples.npz")["images"]
    assert picture(images[0][..., None]) in page
    text = (folder / "samples.md").read_text("utf-8")
    assert "figures/sample_sheet.png" in text
    assert content["sentence"][:40] in text


def test_the_sheet_has_a_row_for_each_class(sampled):
    folder, _ = sampled
    images = np.load(folder / "samples.npz")["images"][..., None]
    figure = figures.sample_sheet(images, [0, 0, 0, 3, 3, 3], {0: "zero", 3: "three"})
    assert [text.get_text() for text in figure.texts] == ["zero", "three"]
    shown = [ax.images[0].get_array() for ax in figure.axes]
    np.testing.assert_array_equal(shown, images[..., 0])
    with Image.open(folder / "figures" / "sample_sheet.png") as sheet:
        assert sheet.width > 100


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--data demo:"),
        (["--start", "data", "--model", "x.py:net"], "without --data"),
        (["--data", "demo:near_ood"], "without labels"),
        (["--data", "demo:", "--classes", "8"], "0..7"),
        (["--data", "demo:", "--classes", "1,1"], "none twice"),
        (["--data", "demo:", "--sampler", "gibbs"], "hmc"),
    ],
)
def test_bad_usage_is_explained_and_leaves_nothing(tmp_path, args, words):
    code, _, err = invoke("sample", *args, "-q", "-o", tmp_path / "out")
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["sgld:langevin", "mala", "hmc"])
def test_every_sampler_can_be_named(tmp_path, sampler):
    code, out, err = invoke(
        "sample", "--data", "demo:", "--classes", "1", "--per-class", 2, "--steps", 3,
        "--sampler", sampler, "--start", "data", "--json", "-q", "-o", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(out)
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert (content["trace"]["acceptance"] is None) == sampler.startswith("sgld")


def test_a_model_alone_starts_from_noise(tmp_path):
    code, out, err = invoke(
        "sample", "--model", "ebm_guard.data.demo:demo_classifier", "--classes", "2",
        "--per-class", 2, "--steps", 2, "--json", "-q", "-o", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(out)
    assert content["reference"] is None
    assert content["meta"]["settings"]["start"] == "uniform"
    assert not (tmp_path / "samples.npz").exists(), "only where it was asked for"


# --- the report by itself


def hand_made(name="cat", channels=3):
    """Four samples of two classes, one of them named as the other."""
    from types import SimpleNamespace

    import torch

    from ebm_guard.sampling.sampler import Trace

    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(4, 4, generator=generator)
    return SimpleNamespace(
        pixels=torch.rand(4, channels, 2, 2, generator=generator),
        labels=torch.tensor([0, 0, 1, 1]),
        predicted=torch.tensor([0, 1, 1, 1]),
        energy=torch.tensor([-9.0, -1.0, -3.0, -2.0]),
        joint_energy=torch.tensor([-8.0, 0.5, -2.0, -1.0]),
        trace=Trace(steps, steps[1:].abs(), None, torch.tensor([1.0, 0.5, 0.25])),
        classes=(0, 1),
        names=(name, "dog"),
        settings={"sampler": "mala", "seed": 3, "conditional": True},
    )


def built(sheet, known=None):
    from torch import nn

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    logits = np.zeros((4, 2))
    return sample_report(
        sheet, EnergyClassifier(net), said=Predictions(logits), known=known
    ).to_dict()


def test_figures_of_the_report_equal_naive_ones():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (200, 2))
    known = Predictions(logits)
    sheet = hand_made()
    content = built(sheet, known)
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert content["agreement"]["value"] == 0.75
    energies = -np.log(np.exp(logits).sum(axis=1))
    ends = np.quantile(energies, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose(content["reference"]["quantiles"], ends, rtol=1e-6)
    low = (sheet.energy.numpy() < ends[0]).mean()
    assert content["below"]["value"] == low
    median = np.median(sheet.trace.energy.numpy(), axis=1)
    np.testing.assert_allclose(content["trace"]["energy"]["median"], median, rtol=1e-6)
    assert content["trace"]["saturation"] is None
    assert content["classes"][0]["agrees"] == [True, False]


def test_hostile_names_are_text():
    content = built(hand_made(EVIL))
    images = eight_bit(hand_made().pixels)
    page = render_sample_html(content, figures.inline_svgs(content), list(map(picture, images)))
    assert "<script" not in page
    table = [line for line in render_sample_markdown(content).splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


def test_each_class_gets_its_own_pictures():
    content = built(hand_made())
    rows = sample_view.rows(content, ["a", "b", "c", "d"])
    assert [[item["picture"] for item in samples] for _, samples in rows] == [
        ["a", "b"],
        ["c", "d"],
    ]


def test_colour_images_are_kept(tmp_path):
    sheet = hand_made()
    images = eight_bit(sheet.pixels)
    write_sample_outputs(built(sheet), tmp_path / "out", images, keep=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["images"], images)
    back = np.asarray(open_source(f"npz:{tmp_path / 'out' / 'samples.npz'}").load(2))
    np.testing.assert_array_equal(back, images[2])
