"""The report's page in a real browser, opened from disk: nothing missing, nothing beyond its edge.

The browser is the system's Chromium, driven by Playwright's client (in the `test` extra). Without a
Chromium the tests skip; in CI a skip fails, and ``.ci/run`` sees to one. All of them are slow.
"""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from finetune_examples import pair, report, robustness, sides

from ebm_guard import EnergyClassifier, Predictions, build_report, predict
from ebm_guard.cli import cli
from ebm_guard.data import batches, open_source
from ebm_guard.data.demo import demo_classifier
from ebm_guard.report import Settings
from ebm_guard.report.comparison import Baseline
from ebm_guard.report.finetune_section import Finetuned
from ebm_guard.report.render import (
    write_attack_outputs,
    write_finetune_outputs,
    write_outputs,
    write_sample_outputs,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome")
EVIL = "<script>alert('x')</script> & \"b\""
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
PAGES = ("demo", "hostile", "unlabelled", "attack", "finetune", "samples", "editing")
ATTACKED = Path(__file__).parent / "fixtures" / "robustness_standard.json"


def chromium():
    path = os.environ.get("EBM_GUARD_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} on PATH, no EBM_GUARD_CHROMIUM")
    return path


# --- the pages


def demo_report():
    """All sections: pictures, two OOD sets, requirements of each verdict, a comparison."""
    classifier = EnergyClassifier(demo_classifier())
    sources = {
        name: open_source(f"demo:{name}")
        for name in ("evaluation", "calibration", "near_ood", "far_ood")
    }
    parts = {
        name: predict(classifier, batches(source, classifier.preprocessing), source=f"demo:{name}")
        for name, source in sources.items()
    }
    chosen = {
        "calibration": parts["calibration"],
        "ood": {"near_digits": parts["near_ood"], "far_photos": parts["far_ood"]},
        "classifier": classifier,
    }
    names = {"evaluation": "evaluation", "near_digits": "near_ood", "far_photos": "far_ood"}
    old = build_report(parts["evaluation"], **chosen)
    return build_report(
        parts["evaluation"],
        **chosen,
        baseline=Baseline(old.to_dict(), old.rows, "the demo, an hour ago"),
        requirements=["accuracy>=0.5", "ece<=0.002", "auroc>=0.9999@lower", "max-regression ece=0"],
        settings=Settings(title="Demo", command="ebm-guard report --data demo:"),
        picture=lambda name, row: sources[names[name]].load(row),
    )


def hostile_report():
    """Stored logits whose names try to break out of the page, or to push it wide."""
    generator = np.random.default_rng(0)
    n = 300
    labels = generator.integers(0, 4, n)
    logits = generator.normal(size=(n, 4)) * 2 + 4 * np.eye(4)[labels]
    long = "a_set_with_a_very_long_name_" * 4
    evaluation = Predictions(
        logits,
        labels=labels,
        classes=[EVIL, "x" * 90, "</style><img src=x onerror=alert(1)>", "犬 " * 20],
        groups=np.array([EVIL, "g" * 80, "plain"])[generator.integers(0, 3, n)],
        ids=[f"{'folder/' * 12}{EVIL}/{row}.png" for row in range(n)],
        source="logits:" + "very/deep/folder/" * 10 + EVIL,
    )
    ood = {
        name: Predictions(generator.normal(size=(n, 4)), source=f"logits:{EVIL}")
        for name in (long, "near_" + "x" * 60, "far")
    }
    settings = Settings(title=EVIL * 3, command=f"ebm-guard report --title '{EVIL * 6}'")
    return build_report(
        evaluation, ood=ood, settings=settings, requirements=[f"ood.{long}.scores.msp.auroc>=0.9"]
    )


def unlabelled_report():
    rows = Predictions(np.random.default_rng(1).normal(size=(200, 5)), source="logits:rows.npz")
    return build_report(rows)


def save_attack(found, folder):
    """The page of the attack command, with a hostile name, under the name of the others."""
    section = json.loads(ATTACKED.read_text(encoding="utf-8"))
    section["ood"]["x" * 80 + EVIL] = copy.deepcopy(section["ood"]["c100"])
    section["published"] = [copy.deepcopy(section["corruptions"])]
    section["flags"][0].update(status="raised", advice="look for rounding in the model")
    whole = {
        "schema": "ebm_guard.attack/1",
        "meta": found["meta"],
        "data": found["data"]["evaluation"],
        "robustness": section,
    }
    write_attack_outputs(whole, folder)
    (folder / "robustness.html").rename(folder / "report.html")


def save_finetune(folder):
    """The page of the fine-tuning command, with hostile names and every section."""
    names = {EVIL: "unseen", "x" * 80: "validation", "very_long_name_" * 6: "trained_on"}
    ood = {
        name: (role, pair(number, labels=False, shift=number - 9.0))
        for number, (name, role) in enumerate(names.items(), start=8)
    }
    both, attacks = sides(ood={**sides().ood, **ood}), (robustness(0), robustness(1, lost=3))
    write_finetune_outputs(report(both=both, robustness=attacks, title=EVIL * 3), folder)
    (folder / "finetune_report.html").rename(folder / "report.html")


def save_samples(folder):
    """The page of the sample command, a class of it with a hostile name."""
    args = ["sample", "--data", "demo:", "--classes", "0,3", "--per-class", "9", "--steps", "6",
            "--save-samples", "-q", "-o", str(folder)]  # fmt: skip
    result = CliRunner().invoke(cli, args, standalone_mode=False)
    assert result.exception is None
    found = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    images = np.load(folder / "samples.npz")["images"]
    found["classes"][1]["name"] = "x" * 80 + EVIL
    found["classes"][1].update(predicted=[2] * 9, agrees=[False] * 9)
    write_sample_outputs(found, folder, images if images.ndim == 4 else images[..., None])
    (folder / "samples.html").rename(folder / "report.html")


def save_editing(folder):
    """The page of the sample command with all three edits, its moving pictures included."""
    args = ["sample", "--data", "demo:", "--classes", "0,3", "--per-class", "2", "--steps", "6",
            "--inpaint", "14", "--denoise", "5", "--morph", "3,5",
            "-q", "-o", str(folder)]  # fmt: skip
    result = CliRunner().invoke(cli, args, standalone_mode=False)
    assert result.exception is None
    (folder / "samples.html").rename(folder / "report.html")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The folders of the reports, by name."""
    made = {"demo": demo_report, "hostile": hostile_report, "unlabelled": unlabelled_report}
    folders = {}
    for name, make in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        found = make()
        found.save(folders[name])
    folders["attack"] = tmp_path_factory.mktemp("attack")
    save_attack(found.to_dict(), folders["attack"])
    written = {"finetune": save_finetune, "samples": save_samples, "editing": save_editing}
    for name, save in written.items():
        save(folders.setdefault(name, tmp_path_factory.mktemp(name)))
    # The last report once more, with the sections of both commands inside it.
    tuned = Finetuned.read(folders["finetune"]).section.to_dict()
    sections = {"robustness": json.loads(ATTACKED.read_text("utf-8")), "finetune": tuned}
    write_outputs({**found.to_dict(), **sections}, folders["unlabelled"])
    return folders


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    # Chromium's own sandbox cannot run as root.
    args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as client:
        running = client.chromium.launch(executable_path=path, args=args)
        yield running
        running.close()


@pytest.fixture
def opened(browser, pages):
    """Open a page; whatever the browser complains of, or asks the network for, fails the test."""
    complaints, contexts = [], []

    def watch(page):
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("file://", "data:"))
                or complaints.append(f"request: {request.url}")
            ),
        )

    def open_page(name, *, size=DESK, scheme="light", media="screen"):
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        watch(page)
        page.emulate_media(media=media, color_scheme=scheme)
        page.goto((pages[name] / "report.html").as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(item => { item.open = true })")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


# Boxes in page coordinates; of an inner scroller only its own box has to fit.
PROBLEMS = """() => {
  const found = [], wide = document.documentElement.scrollWidth, room = window.innerWidth;
  const say = (item, what) => found.push(
    `${what}: <${item.tagName.toLowerCase()} class="${item.getAttribute('class') || ''}"> ` +
    (item.textContent || '').trim().slice(0, 60));
  if (wide > room) found.push(`the page is ${wide} px wide, the window ${room}`);
  const scrolled = item => {
    for (let up = item.parentElement; up && up !== document.body; up = up.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(up).overflowX)) return true;
    return false;
  };
  const shown = item => item.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  for (const item of document.querySelectorAll('figure, figure svg, img, svg.icon')) {
    if (item.closest('nav, .skip') || !item.getClientRects().length && !item.closest('figure'))
      continue;
    const box = item.getBoundingClientRect();
    if (!shown(item) || box.width < 8 || box.height < 8) say(item, 'not visible');
    else if ((box.left < -1 || box.right > room + 1) && !scrolled(item))
      say(item, 'beyond the edge');
    if (item.tagName === 'IMG' && (!item.complete || !item.naturalWidth)) say(item, 'not loaded');
  }
  for (const item of document.querySelectorAll('body *')) {
    const box = item.getBoundingClientRect();
    if (!box.width || item.closest('svg') || item.closest('.skip') || scrolled(item)) continue;
    if (box.right > room + 1) say(item, 'beyond the edge');
  }
  for (const item of document.querySelectorAll('figure svg text')) {
    const box = item.getBoundingClientRect(), fig = item.closest('figure').getBoundingClientRect();
    const out = box.left < fig.left - 2 || box.right > fig.right + 2;
    if (out && !scrolled(item)) say(item, 'beyond its figure');
  }
  return found;
}"""

NAMELESS = """() => {
  const found = [];
  for (const item of document.querySelectorAll('img'))
    if (!item.alt.trim()) found.push('img without alt');
  for (const item of document.querySelectorAll('figure')) {
    const named = [...item.querySelectorAll('[role=img][aria-label]')];
    if (item.querySelector('svg') && !named.some(plot => plot.ariaLabel.trim().length > 20))
      found.push('figure without a description: ' + item.textContent.trim().slice(0, 60));
  }
  for (const item of document.querySelectorAll('svg'))
    if (!item.closest('[role=img]') && item.getAttribute('aria-hidden') !== 'true')
      found.push('svg that is neither described nor hidden');
  for (const item of document.querySelectorAll('a[href^="#"]'))
    if (!document.getElementById(item.getAttribute('href').slice(1)))
      found.push('link to nowhere: ' + item.getAttribute('href'));
  const ids = [...document.querySelectorAll('[id]')].map(item => item.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push('id twice: ' + id);
  if (document.querySelectorAll('h1').length !== 1) found.push('not exactly one h1');
  return found;
}"""

# WCAG 2.1, contrast ratio (success criterion 1.4.3): the canvas turns every CSS colour into RGBA.
CONTRAST = """() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', { willReadFrequently: true });
  const known = new Map();
  const rgba = colour => {
    if (!known.has(colour)) {
      pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const luminance = colour => {
    const [r, g, b] = colour.map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const dark = matchMedia('(prefers-color-scheme: dark)').matches && !matchMedia('print').matches;
  const behind = item => {
    const layers = [];
    for (let up = item; up; up = up.parentElement) {
      const colour = rgba(getComputedStyle(up).backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
    }
    const base = dark ? [18, 18, 18] : [255, 255, 255];
    return layers.reverse().reduce((below, layer) => over(layer, below), base);
  };
  const found = new Map();
  let checked = 0;
  for (const item of document.querySelectorAll('body, body *')) {
    const own = [...item.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || item.closest('style, script, .skip') || !item.getClientRects().length) continue;
    checked += 1;
    const style = getComputedStyle(item), ground = behind(item);
    const ink = over(rgba(item.closest('svg') ? style.fill : style.color), ground);
    const [high, low] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    const name = `<${item.tagName.toLowerCase()} class="${item.getAttribute('class') || ''}">`;
    if (ratio < 4.5)
      found.set(`${ratio.toFixed(2)}: ${name} ${item.textContent.trim().slice(0, 40)}`, true);
  }
  return { checked, low: [...found.keys()] };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_everything_is_visible_and_inside_the_page(opened, name, size, scheme):
    page = opened(name, size=size, scheme=scheme)
    assert page.evaluate(PROBLEMS) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_can_be_read(opened, name, scheme):
    found = opened(name, scheme=scheme).evaluate(CONTRAST)
    assert found["checked"] > 100
    assert found["low"] == []


@pytest.mark.parametrize("name", PAGES)
def test_figures_have_descriptions_and_links_have_targets(opened, name):
    assert opened(name).evaluate(NAMELESS) == []


@pytest.mark.parametrize("name", PAGES)
def test_print(opened, name):
    page = opened(name, media="print", scheme="dark")
    assert page.evaluate(CONTRAST)["low"] == []
    figures = page.locator("figure svg")
    assert all(figures.nth(number).is_visible() for number in range(figures.count()))
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_demo_has_its_figures(opened):
    page = opened("demo")
    assert page.locator("figure svg").count() >= 5
    assert page.locator(".gallery img").count() >= 10


def test_dark_is_dark(opened):
    def ground(scheme):
        page = opened("demo", scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]

    assert sum(ground("dark")) < 150 < 600 < sum(ground("light"))


def test_hostile_names_stay_text(opened):
    page = opened("hostile")
    assert page.evaluate("document.querySelectorAll('script, [onerror]').length") == 0
    assert page.locator("h1").inner_text() == EVIL * 3


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_below_a_megabyte_without_its_pictures(pages, name):
    text = (pages[name] / "report.html").read_text(encoding="utf-8")
    assert len(re.sub(r'"data:image/[^"]*"', "", text).encode()) < 1_000_000


@pytest.mark.parametrize(
    "harm",
    [
        "document.querySelector('figure svg').style.display = 'none'",
        "document.querySelector('figure svg').style.marginLeft = '2000px'",
        "document.querySelector('figure svg text').setAttribute('x', '-90')",
        "document.querySelector('h2').style.cssText = 'width: 3000px'",
    ],
)
def test_the_check_of_the_layout_sees_harm(opened, harm):
    page = opened("demo")
    page.evaluate(harm)
    assert page.evaluate(PROBLEMS) != []


@pytest.mark.parametrize("colour", ["#888", "rgb(0 0 0 / 40%)", "transparent"])
def test_the_check_of_contrast_sees_pale_text(opened, colour):
    page = opened("demo")
    page.evaluate(f"document.querySelector('h2').style.color = '{colour}'")
    assert page.evaluate(CONTRAST)["low"] != []
