"""``ebm-guard sample --inpaint --denoise --morph``: figures, pictures, GIFs, bad input."""

import base64
import io
import itertools
import json
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from scipy import stats
from test_cli_sample import EVIL, SCHEMA, built, hand_made, invoke

from ebm_guard.cli.sample_editing import EditOptions, run_edits
from ebm_guard.data.demo import demo_classifier, load_demo
from ebm_guard.model import EnergyClassifier
from ebm_guard.report import editing_images as pictures
from ebm_guard.report import editing_report as sections
from ebm_guard.report import figures
from ebm_guard.report.render import (
    editing_view,
    output,
    render_sample_html,
    render_sample_markdown,
    write_sample_outputs,
)
from ebm_guard.report.sample_images import eight_bit, picture
from ebm_guard.sampling import Denoised, Inpainted, Morph, Trace, centre_mask, make_sampler

ARGS = ("sample", "--data", "demo:", "--classes", "3", "--per-class", 3, "--steps", 5, "-q")
EDITS = ("--inpaint", 14, "--denoise", 9, "--morph", "3,7")


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited") / "out"
    code, out, err = invoke(*ARGS, *EDITS, "--json", "-o", folder)
    assert code == 0, err
    return folder, json.loads(out)


def uris(page, kind):
    return re.findall(rf"data:image/{kind};base64,([A-Za-z0-9+/=]+)", page)


def test_everything_is_written_and_fits_the_schema(edited):
    folder, content = edited
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    assert json.loads((folder / "samples.json").read_text("utf-8")) == content
    written = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    ours = {*output.SAMPLE_OURS, *output.EDIT_OURS}
    assert {str(path) for path in ours - written} == {"samples.npz"}
    assert written <= ours
    assert (content["inpainting"]["n"], content["denoising"]["n"]) == (14, 9)
    assert content["morphing"]["names"] == ["3", "7"]
    assert content["inpainting"]["settings"]["hidden_share"] == 0.25
    assert content["inpainting"]["settings"]["conditional"] is False


def test_the_page_holds_every_picture_once_and_respects_reduced_motion(edited):
    folder, content = edited
    page = (folder / "samples.html").read_text("utf-8")
    for name in ("inpainting", "denoising", "morphing"):
        assert f'<section id="{name}">' in page
        assert f'<a href="#{name}">' in page
        gif = (folder / f"{name}.gif").read_bytes()
        assert len(gif) < 300_000
        assert base64.b64encode(gif).decode() in uris(page, "gif")
        assert content[name]["sentence"][:30] in page
    assert len(uris(page, "gif")) == 3
    assert page.count('media="(prefers-reduced-motion: reduce)"') == 3
    # 3 samples, 12 + 9 strips, 3 chains of the morph, 3 still pictures.
    assert len(uris(page, "png")) == 3 + 12 + 9 + 3 + 3
    text = (folder / "samples.md").read_text("utf-8")
    for name in ("inpainting", "denoising", "morphing"):
        assert f"figures/sample_{name}_sheet.png" in text
        assert content[name]["sentence"][:40] in text


def test_the_figures_equal_naive_ones(edited):
    _, content = edited
    for name, sign in (("inpainting", -1), ("denoising", 1)):
        section = content[name]
        rows = section["rows"]
        by_stage = {
            stage: np.array([row["errors"][stage] for row in rows])
            for stage in ("trivial", "chains")
        }
        for stage, values in by_stage.items():
            assert section["errors"][stage]["value"] == pytest.approx(values.mean())
        gaps = by_stage["chains"] - by_stage["trivial"]
        exact = stats.ttest_1samp(gaps, 0)
        ends = exact.confidence_interval(0.95)
        assert section["difference"]["low"] == pytest.approx(ends.low)
        assert section["difference"]["high"] == pytest.approx(ends.high)
        shown = sign * gaps.mean() > 0 if exact.pvalue < 0.05 else None
        assert section["better"] == shown
        named = np.mean([row["predicted"]["chains"] == row["label"] for row in rows])
        assert section["named"]["chains"]["value"] == pytest.approx(named)
        below = np.mean([row["energy"]["chains"] < row["energy"]["truth"] for row in rows])
        assert section["below_truth"]["value"] == pytest.approx(below)


def test_chains_can_be_told_the_class_and_choose_steps_that_fit_the_noise():
    demo = load_demo("evaluation")
    given = {
        "images": torch.from_numpy(demo.images)[:40, None].float() / 255,
        "labels": torch.from_numpy(demo.labels)[:40],
    }
    options = EditOptions(4, 4, None, 0.3, 0.2, conditional=True)
    classifier = EnergyClassifier(demo_classifier())
    more = {"num_chains": 2, "seed": 0}
    for name, size, wanted in (
        ("sgld", None, 0.02),
        ("sgld", 0.01, 0.01),
        ("mala", None, 1e-4),
    ):
        settings = {"num_steps": 2} | ({} if size is None else {"step_size": size})
        sampler = make_sampler(name, **settings)
        found, shown = run_edits(
            options, classifier, given, sampler=sampler, name=name, step_size=size, **more
        )
        assert found["inpainting"].settings["conditional"] is True
        assert found["inpainting"].settings["hidden_share"] == pytest.approx(4 / 64)
        assert found["denoising"].settings["sampler"] == name
        assert found["denoising"].settings["step_size"] == pytest.approx(wanted)
        assert found["denoising"].settings["num_steps"] == 2
        assert "y the true class" in editing_view.how("denoising", found["denoising"].to_dict())
    first = shown["inpainting"].names[0].partition(", named ")
    assert int(first[0]) == found["inpainting"].rows[0]["label"]
    assert int(first[2]) == found["inpainting"].rows[0]["predicted"]["chains"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "ebm_guard.data.demo:demo_classifier", "--inpaint", "2"], "without --data"),
        (["--data", "demo:", "--morph", "3"], "two classes"),
        (["--data", "demo:", "--morph", "3,3"], "none twice"),
        (["--data", "demo:", "--morph", "3,9"], "0..7"),
        (["--data", "demo:", "--inpaint", "5000"], "450 images"),
        (["--data", "demo:", "--denoise", "451"], "450 images"),
        (["--data", "demo:", "--inpaint", "2", "--hole", "1"], "0<x<1"),
        (["--data", "demo:", "--denoise", "2", "--hole", "0.3"], "--hole without --inpaint"),
        (["--data", "demo:", "--inpaint", "2", "--noise-std", "1"], "without --denoise"),
        (["--data", "demo:", "--conditional"], "--conditional without"),
        (["--data", "demo:", "--denoise", "2", "--noise-std", "0"], "x>0"),
    ],
)
def test_bad_usage_is_explained_and_leaves_nothing(tmp_path, args, words):
    more = ("--classes", "1", "--per-class", 1, "--steps", 1, "-q", "-o", tmp_path / "out")
    code, _, err = invoke("sample", *args, *more)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()


# --- sections by themselves


def trace_of(n):
    return Trace(torch.zeros(2, n), torch.zeros(1, n))


def made_of(kind, gaps, labels=True, channels=3, size=4):
    """Gray truths; the trivial method is off by .2, the chains by .2 + gap."""
    n = len(gaps)
    truth = torch.full((n, channels, size, size), 0.5)
    off = torch.tensor(gaps).view(n, 1, 1, 1) + 0.2
    known = centre_mask(size, size).expand_as(truth)
    stages = {"truth": truth, "given": truth + 0.25, "trivial": truth + 0.2, "chains": truth + off}
    if kind is Inpainted:
        stages = {name: torch.where(known, truth, part) for name, part in stages.items()}
        more = {"known": known, "settings": {"hidden_share": 0.25, "start": "noise"}}
    else:
        more = {"noise_std": 0.1, "settings": {"noise_std": 0.1}}
    more["settings"] |= {"num_steps": 1, "sampler": "sgld", "conditional": False}
    return kind(
        pixels=stages,
        energy={name: torch.arange(n) - len(name) * 1.0 for name in stages},
        predicted={name: torch.arange(n) % 2 for name in stages},
        labels=torch.zeros(n, dtype=torch.int64) if labels else None,
        trace=trace_of(n),
        frames=None,
        frame_steps=(),
        **more,
    )


@pytest.mark.parametrize(
    ("gaps", "better", "words"),
    [
        ([0.1, 0.11, 0.12, 0.1], False, "nothing of the net, is nearer"),
        ([-0.1, -0.11, -0.12, -0.1], True, "chains are nearer"),
        ([-0.1, 0.1, -0.1, 0.1], None, "no difference"),
        ([-0.1], None, "no difference"),
    ],
)
@pytest.mark.parametrize("kind", [Inpainted, Denoised])
def test_the_page_says_which_is_nearer(kind, gaps, better, words):
    build = sections.inpainting_section if kind is Inpainted else sections.denoising_section
    section = build(made_of(kind, gaps))
    assert section.better is better
    assert words in section.sentence
    if kind is Inpainted:
        assert section.errors["chains"].value == pytest.approx(0.2 + np.mean(gaps), abs=1e-6)
        assert section.errors["given"].value == pytest.approx(0.25)
    else:
        exact = np.mean(-20 * np.log10(0.2 + np.array(gaps)))
        assert section.errors["chains"].value == pytest.approx(exact, abs=1e-4)
    # E of the chains is one below that of the truth, by their names' lengths.
    assert section.below_truth.value == 1.0
    assert "more familiar than the truth" in section.sentence
    assert build(made_of(kind, gaps, labels=False)).named is None


def way_of(near, after, moved, names=("cat", "dog"), predicted=1):
    n = len(near)
    start = torch.zeros(n, 3, 2, 2)
    frames = torch.stack([start, start + torch.tensor(moved).view(n, 1, 1, 1)])
    values = torch.zeros(2, n)
    return Morph(
        frames, torch.tensor([0.0, 1.0]), start, *[values] * 5, torch.full((2, n), predicted),
        None if near[0] is None else torch.tensor(near),
        None if near[0] is None else torch.tensor(after),
        (trace_of(n),) * 2, 0, 1, names, {"num_steps": 1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("near", "after", "moved", "words"),
    [
        ([0.3, 0.31], [0.1, 0.12], [0.4, 0.4], ["came nearer", "2 of 2 chains from cat"]),
        ([0.3, 0.31], [0.5, 0.52], [0.4, 0.4], ["went away", "0.305", "0.510"]),
        ([0.3, 0.31], [0.2, 0.42], [0.4, 0.4], ["is not shown"]),
        ([0.3, 0.31], [0.3, 0.31], [0.02, 0.02], ["as adversarial examples do"]),
        ([None, None], [None, None], [0.4, 0.4], ["No real images"]),
    ],
)
def test_a_morph_is_told_in_words(near, after, moved, words):
    section = sections.morph_section(way_of(near, after, moved))
    for each in words:
        assert each in section.sentence
    assert section.moved_end.value == pytest.approx(np.mean(moved))
    assert section.arrived.value == 1.0
    none_arrived = sections.morph_section(way_of(near, after, moved, predicted=0))
    assert none_arrived.arrived.value == 0.0
    assert "adversarial" not in none_arrived.sentence


def test_chains_that_stand_still_say_nothing_of_the_energy():
    made = replace(
        made_of(Denoised, [0.1, 0.11, 0.12]),
        trace=replace(trace_of(3), acceptance=torch.tensor([0.0, 0.01])),
    )
    section = sections.denoising_section(made)
    assert section.acceptance == pytest.approx(0.005)
    assert "hardly moved" in section.sentence
    assert "nearer" not in section.sentence


# --- pictures


def frames_of(count=4, chains=3, size=8, *, grey=True):
    rng = np.random.default_rng(0)
    shape = (count, chains, size, size, 1 if grey else 3)
    return rng.integers(0, 256, shape, dtype=np.uint8).repeat(3 if grey else 1, axis=-1)


def test_a_gif_holds_every_frame_and_stops():
    frames = frames_of()
    data = pictures.animation(frames)
    assert data == pictures.animation(frames)
    with Image.open(io.BytesIO(data)) as found:
        assert found.n_frames == 4
        assert found.info["loop"] == 1
        read = [np.asarray(part.convert("RGB")) for part in ImageSequence.Iterator(found)]
    for frame, image in zip(frames, read, strict=True):
        np.testing.assert_array_equal(image, pictures.tiled(frame))
    smooth = np.linspace(0, 255, 64).astype(np.uint8).reshape(1, 1, 8, 8, 1)
    colour = np.concatenate([smooth, smooth[..., ::-1, :, :], smooth // 2], axis=-1)
    with Image.open(io.BytesIO(pictures.animation(colour))) as found:
        image = np.asarray(found.convert("RGB")).astype(int)
    assert np.abs(image - pictures.tiled(colour[0])).mean() < 8


def test_tiles_stand_in_their_places():
    frame = frames_of(1, 6)[0]
    grid = pictures.tiled(frame)
    np.testing.assert_array_equal(grid[:64:8, :64:8], frame[0])
    np.testing.assert_array_equal(grid[68:132:8, 68:132:8], frame[5])
    assert (grid[68:, 140:] == 255).all()


def test_large_images_are_averaged_down():
    image = np.random.default_rng(1).integers(0, 256, (2, 200, 230, 3), dtype=np.uint8)
    found = pictures.reduced(image)
    assert found.shape == (2, 66, 76, 3)
    block = image[1, 3 * 5 : 3 * 6, 3 * 7 : 3 * 8].reshape(9, 3).mean(axis=0)
    assert np.abs(found[1, 5, 7] - block).max() <= 0.5 + 1e-3
    assert pictures.tiled(image).shape == (66, 2 * 76 + 4, 3)
    assert pictures.reduced(found) is found


def test_a_strip_shows_the_stages_and_the_hole():
    made = made_of(Inpainted, [0.1, 0.1])
    shown = pictures.inpainting_pictures(made, ("a", "b"))
    assert shown.sheet.shape == (2, 4, 4, 4, 3)
    np.testing.assert_array_equal(shown.sheet[:, 0], eight_bit(made.pixels["truth"]))
    np.testing.assert_array_equal(shown.sheet[:, 3], eight_bit(made.pixels["chains"]))
    coloured = (shown.sheet[0, 1] == pictures._HOLE).all(axis=-1)
    np.testing.assert_array_equal(coloured, ~made.known[0, 0].numpy())
    raw = base64.b64decode(shown.strips()[0].partition(",")[2])
    with Image.open(io.BytesIO(raw)) as found:
        image = np.asarray(found)
    assert image.shape == (4, 4 * 4 + 3, 4)
    np.testing.assert_array_equal(image[:, 5:9, :3], shown.sheet[0, 1])
    assert (image[:, 4, 3] == 0).all()
    assert (image[..., 3] == 0).sum() == 3 * 4


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pictures_of_any_channel_count(channels):
    for kind, show in (
        (Inpainted, pictures.inpainting_pictures),
        (Denoised, pictures.denoising_pictures),
    ):
        shown = show(made_of(kind, [0.1] * 15, channels=channels), ("x",) * 15)
        assert shown.sheet.shape == (12, 4, 4, 4, 3)
        assert shown.frames.shape == (1, 8, 4, 4, 3)
        assert shown.gif().startswith(b"GIF89a")


def test_figures_show_every_image_and_both_classes():
    section = sections.inpainting_section(made_of(Inpainted, [0.1, -0.05, 0.02])).to_dict()
    axes = figures.edit_errors(section).axes[0]
    dots = [tuple(map(len, line.get_data())) for line in axes.lines[1:]]
    assert dots == [(1, 1), (2, 2)], "one image is nearer by the chains"
    path = figures.morph_path(sections.morph_section(way_of([0.3], [0.2], [0.4])).to_dict())
    assert [text.get_text() for text in path.axes[0].texts] == ["p(cat)", "p(dog)"]
    sheet = figures.edit_sheet(frames_of(2, 4), ("a", "b", "c", "d"), ("first", "second"))
    tiles = sheet.axes[0].images[0].get_array()
    # Square cells of 68 are widened to .95 / .62, for the words above.
    left = 3 * 104 + (104 - 4 - 64) // 2
    np.testing.assert_array_equal(tiles[68:132:8, left : left + 64 : 8], frames_of(2, 4)[1, 3])
    assert [text.get_text() for text in sheet.texts] == ["a", "b", "c", "d", "first", "second"]


def test_hostile_names_are_text():
    content = built(hand_made())
    morph = way_of([0.3, 0.2], [0.2, 0.2], [0.4, 0.4], names=(EVIL, EVIL))
    filled = made_of(Inpainted, [0.1, 0.1])
    content |= {
        "inpainting": sections.inpainting_section(filled).to_dict(),
        "morphing": sections.morph_section(morph).to_dict(),
    }
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    edits = {
        "inpainting": pictures.inpainting_pictures(filled, (EVIL, EVIL)),
        "morphing": pictures.morph_pictures(morph),
    }
    shown = list(map(picture, eight_bit(hand_made().pixels)))
    for each, svgs in ((edits, figures.inline_svgs(content)), (None, {})):
        page = render_sample_html(content, svgs, shown, each)
        assert "<script" not in page
        assert "Noise in the hole" in page
    lines = render_sample_markdown(content).splitlines()
    for above, line in itertools.pairwise(lines):
        if line.startswith("|") and above.startswith("|"):
            assert line.replace("\\|", "").count("|") == above.replace("\\|", "").count("|")


def test_what_nobody_asked_for_the_second_time_is_taken_away(tmp_path):
    (tmp_path / "figures").mkdir()
    for path in (*output.EDIT_OURS, "mine.gif"):
        (tmp_path / path).write_bytes(b"old")
    plain = built(hand_made())
    assert not {"inpainting", "denoising", "morphing"} & set(plain)
    write_sample_outputs(plain, tmp_path, eight_bit(hand_made().pixels))
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert not left & set(output.EDIT_OURS)
    assert {str(path) for path in left if path.suffix == ".gif"} == {"mine.gif"}
