"""The views of a report: what they show, what they escape, and that they are written as a whole."""

import copy
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from rich.console import Console

from ebm_guard.calibration import row_statistics
from ebm_guard.errors import DataError
from ebm_guard.report import figures
from ebm_guard.report.render import (
    format as fmt,
)
from ebm_guard.report.render import (
    output,
    render_html,
    render_markdown,
    render_terminal,
    write_outputs,
)
from ebm_guard.report.rows import ReportRows, SetRows

SCHEMA = Path(figures.__file__).parents[1] / "schema.json"
EXAMPLE = json.loads(
    (Path(__file__).parent / "fixtures" / "report_example.json").read_text(encoding="utf-8")
)
ROBUSTNESS = Path(__file__).parent / "fixtures" / "robustness_standard.json"
COMMITTED = Path(__file__).parents[1] / "reports" / "cifar10_resnet20" / "report.json"
EVIL = "<script>alert('x')</script> `a` $b$ [/red] _c_ | 犬"


@pytest.fixture
def report():
    return copy.deepcopy(EXAMPLE)


@pytest.fixture
def quick(monkeypatch):
    """Files in place of figures, where a test is about files."""

    def save(report, folder):
        folder.mkdir()
        pairs = {}
        for name in output.FIGURES if report["ood"] else ():
            pairs[name] = (folder / f"{name}.png", folder / f"{name}.svg")
            for path in pairs[name]:
                path.write_text(report["meta"]["title"])
        return pairs

    monkeypatch.setattr(figures, "save_figures", save)
    monkeypatch.setattr(figures, "inline_svgs", lambda report: {})


def bare(report):
    """A report in which nothing that may be left out was run."""
    report["meta"].update(command=None, preprocessing=None, protocol=[])
    report["meta"]["model"].update(num_parameters=None, weights_sha256=None, head=None)
    report["data"]["ood"] = {}
    report["ood"] = {}
    report["requirements"], report["warnings"] = [], []
    for key in ("calibration", "energy", "gate", "gallery"):
        report[key] = {"not_run": f"no {key} for a reason"}
    return report


def no_ood(report):
    report["data"]["ood"], report["ood"] = {}, {}
    energy = report["energy"]
    energy["sets"] = {"evaluation": energy["sets"]["evaluation"]}
    counts = energy["histogram"]["counts"]
    energy["histogram"]["counts"] = {"evaluation": counts["evaluation"]}
    energy["ranking"] = None
    report["gate"]["accepted_ood"] = {}
    report["gallery"]["lowest_energy_ood"] = []
    return report


def no_labels(report):
    report["data"]["evaluation"]["labelled"] = False
    report["calibration"] = {"not_run": "the evaluation images have no labels"}
    report["gate"].update(accuracy_accepted=None, accuracy_rejected=None)
    report["gallery"]["confident_errors"] = []
    for item in report["gallery"]["highest_energy"]:
        item["label"] = None
    return report


def after_not_run(report):
    report["calibration"]["after"] = {"not_run": "too few rows to fit a temperature"}
    return report


def probabilities(report):
    """Stored probabilities: no energy, and of the scores those that need logits did not run."""
    report["energy"] = {"not_run": "needs logits, not probabilities"}
    report["gate"] = {"not_run": "needs logits, not probabilities"}
    report["gallery"]["images"] = False
    for key in ("confident_errors", "highest_energy", "lowest_energy_ood"):
        for item in report["gallery"][key]:
            item.update(thumbnail=None, energy=None)
    for entry in report["ood"].values():
        for score in ("energy", "maxlogit"):
            entry["scores"][score] = {"not_run": "needs logits"}
            del entry["roc"][score]
    return report


def unknown_numbers(report):
    """Every interval, and some values, missing."""

    def walk(node):
        if isinstance(node, dict):
            if "null95" in node:
                node["low"] = node["high"] = None
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(report)
    report["calibration"]["before"]["nll"]["value"] = None
    report["ood"]["svhn"]["scores"]["gen"]["auroc"]["value"] = None
    report["calibration"]["after"]["calibrator"].update(temperature=None, standard_error=None)
    report["gate"]["assurance"], report["gate"]["method"] = None, "marginal"
    report["energy"]["threshold"] = None
    for item in report["requirements"]:
        item.update(value=None, low=None, high=None, status="unclear")
    return report


def evil(report):
    """The same hostile text wherever a text of the user comes in."""
    report["meta"].update(title=EVIL, command=EVIL, settings={EVIL: EVIL})
    report["meta"]["model"].update(name=EVIL, source=EVIL)
    report["data"]["evaluation"].update(spec=EVIL, classes=[EVIL], skipped_examples=[])
    report["data"]["ood"] = {EVIL: report["data"]["ood"]["svhn"]}
    entry = report["ood"]["svhn"]
    entry["scores"][EVIL] = entry["scores"].pop("gen")
    entry["roc"][EVIL] = entry["roc"].pop("gen")
    report["ood"] = {EVIL: entry, "_hidden": entry}
    energy = report["energy"]
    for part in (energy["sets"], energy["histogram"]["counts"]):
        part[EVIL] = part.pop("svhn")
    energy["ranking"]["sentence"] = EVIL
    report["gate"]["accepted_ood"] = {EVIL: report["gate"]["coverage"]}
    report["warnings"] = [{"code": EVIL, "message": EVIL}]
    report["requirements"][0].update(text=EVIL, message=EVIL)
    report["gallery"]["confident_errors"][0].update(label=EVIL, predicted=EVIL, id=EVIL)
    report["robustness"] = {"not_run": EVIL}
    return report


VARIANTS = [
    copy.deepcopy,
    bare,
    no_ood,
    no_labels,
    after_not_run,
    probabilities,
    unknown_numbers,
    evil,
]


def html_of(report):
    return render_html(report, figures.inline_svgs(report))


@pytest.fixture(scope="module")
def page():
    """The page of the unchanged example."""
    return html_of(EXAMPLE)


def terminal_of(report, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render_terminal(report, console)
    return console.file.getvalue()


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_valid_and_renders(variant, report, tmp_path):
    report = variant(report)
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(report)
    before = copy.deepcopy(report)
    paths = write_outputs(report, tmp_path / "out")
    assert {path.name for path in paths} >= {"report.json", "report.html", "report.md"}
    assert all(path.stat().st_size for path in paths)
    assert sorted(paths) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert report == before
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (page, render_markdown(report), terminal_of(report)):
        assert not re.search(r"\bNone\b|\bnan\b|Undefined", text)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("gate", "coverage", "value"), "95 %"),
        (("energy", "verdict", "status"), "fine"),
        (("extra",), 1),
        (("robustness",), {}),
        (("gallery", "highest_energy", 0, "thumbnail"), "https://example.org/a.png"),
    ],
)
def test_schema_refuses(report, path, wrong):
    node = report
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = wrong
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert not jsonschema.Draft202012Validator(schema).is_valid(report)


@pytest.mark.slow
def test_same_bytes_twice_even_in_another_process(report, tmp_path):
    write_outputs(report, tmp_path / "a")
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        write_outputs(report, tmp_path / "b")
    code = (
        "import json, pathlib, sys\n"
        "from ebm_guard.report.render import write_outputs\n"
        "write_outputs(json.load(open(sys.argv[1], encoding='utf-8')), pathlib.Path(sys.argv[2]))"
    )
    arguments = [str(tmp_path / "a" / "report.json"), str(tmp_path / "c")]
    root = Path(figures.__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=root)
    assert len(tree(tmp_path / "a")) == 11
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == tree(tmp_path / "c")


def test_json_holds_the_report_at_full_precision_and_in_order(report, quick, tmp_path):
    write_outputs(report, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert list(json.loads(text)) == list(report)
    assert text.startswith('{\n "schema"')


def test_html_is_self_contained_and_small(report, page):
    sources = re.findall(r"""(?:src|href|data|srcset|poster|action)\s*=\s*["']([^"']*)""", page)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert all(url.startswith("#") for url in re.findall(r"url\(\s*([^)]*)\)", page))
    assert not re.search(r"https?:|<script|<link|<iframe|@import|javascript:", page)
    del report["gallery"]
    report["gallery"] = {"not_run": "--no-images"}
    assert len(html_of(report).encode()) < 1_000_000


def test_html_ids_are_unique_and_every_reference_has_a_target(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert set(targets) <= set(ids)


def test_names_from_the_user_are_text_everywhere(report):
    report = evil(report)
    page = html_of(report)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 15
    assert "<script" not in re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", render_markdown(report))
    assert "<script>alert('x')</script>" in terminal_of(report, width=300)
    assert "[/red]" in terminal_of(report, width=300)


def test_a_thumbnail_is_never_loaded_from_elsewhere(report):
    report["gallery"]["highest_energy"][0]["thumbnail"] = "https://example.org/a.png"
    assert "example.org" not in render_html(report, {})


def test_html_says_what_did_not_run(report):
    page = html_of(bare(report))
    for key in ("calibration", "energy", "gate", "gallery"):
        assert f"No {key} for a reason." in page
    assert "No unknown images were given" in page
    assert page.count("Not run") > 8


def test_requirements_are_summed_up(report):
    assert "1 of 3 met" in render_html(report, {})
    for row in report["requirements"]:
        row["status"] = "met"
    assert "3 of 3 met" in render_html(report, {})


def test_every_view_has_the_numbers(report, page):
    ece = fmt.metric(report["calibration"]["after"]["ece"])
    auroc = fmt.metric(report["ood"]["cifar100"]["scores"]["energy"]["auroc"], "score")
    coverage = fmt.metric(report["gate"]["coverage"])
    fpr = fmt.metric(report["ood"]["svhn"]["scores"]["energy"]["fpr95_ood_positive"])
    tables = re.sub(r"<[^>]+>", "", page).replace("\u00a0", " ")
    markdown = render_markdown(report)
    for number in (ece, auroc, coverage, fpr, "0.556"):
        assert number in tables
        assert number in markdown
    for number in (ece, auroc, coverage):
        assert number in terminal_of(report)


def test_markdown_tables_hold_together(report):
    for variant in (copy.deepcopy, evil, probabilities, no_ood):
        columns = None
        for line in render_markdown(variant(copy.deepcopy(report))).splitlines():
            if not line.startswith("|"):
                columns = None
                continue
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            columns = columns or cells
            assert cells == columns, line


def test_user_files_stay_and_an_older_report_goes(report, quick, tmp_path):
    folder = tmp_path / "out"
    write_outputs(report, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "figures" / "mine.svg").write_text("mine")
    report["meta"]["title"] = "A newer report"
    write_outputs(bare(report), folder)
    left = tree(folder)
    assert sorted(left) == [
        "figures/mine.svg",
        "notes.txt",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert b"A newer report" in left["report.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_empty_figures_folder_is_left(report, quick, tmp_path):
    write_outputs(report, tmp_path)
    write_outputs(bare(report), tmp_path)
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("moves", range(0, 22, 3))
def test_a_failure_half_way_changes_nothing(report, quick, tmp_path, monkeypatch, old, moves):
    folder = tmp_path / "deep" / "out"
    if old:
        write_outputs(report, folder)
    before = tree(tmp_path)
    count = 0
    rename = Path.rename

    def full(self, target):
        nonlocal count
        count += 1
        if count == moves + 1:
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    report["meta"]["title"] = "newer"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        if not old and moves:
            write_outputs(report, folder)  # a new folder appears in a single move
            return
        with pytest.raises(DataError, match="No space left on device"):
            write_outputs(report, folder)
    assert tree(tmp_path) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".ebm")]
    assert folder.exists() == old


def test_a_failing_figure_leaves_nothing(report, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(DataError, match=r"not written .*No space left.*--output"):
        write_outputs(report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nan_is_refused_before_anything_is_written(report, quick, tmp_path):
    report["gate"]["threshold"] = float("nan")
    with pytest.raises(DataError, match="JSON"):
        write_outputs(report, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["out", "out/report.json", "out/figures"])
def test_what_is_in_the_way_is_named_and_kept(report, quick, tmp_path, place):
    blocked = tmp_path / place
    blocked.parent.mkdir(exist_ok=True)
    if place.endswith("json"):
        blocked.mkdir()
        (blocked / "mine").write_text("mine")
    else:
        blocked.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=re.escape(str(blocked))):
        write_outputs(report, tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_a_data_error(report, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match="Permission denied") as caught:
        write_outputs(report, tmp_path / "out")
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_every_file_that_is_written_is_known_as_ours(report, tmp_path):
    statistics = row_statistics(np.eye(2), np.array([0, 1]))
    one = SetRows(np.zeros(2, np.uint64), None)
    rows = ReportRows({"evaluation": one}, np.array([0, 1]), statistics, None)
    # The example has neither part; a committed report and an evaluation of robustness have them.
    whole = json.loads(COMMITTED.read_text(encoding="utf-8"))
    report["selective"] = whole["selective"]
    report["robustness"] = json.loads(ROBUSTNESS.read_text(encoding="utf-8"))
    paths = {path.relative_to(tmp_path) for path in write_outputs(report, tmp_path, rows)}
    assert paths == set(output.OURS)


def test_figures_are_figures_and_leave_the_settings_alone(report):
    settings = dict(mpl.rcParams)
    calibration = report["calibration"]
    drawn = [
        figures.reliability(calibration["before"], calibration["after"]),
        figures.reliability(calibration["before"]["curve"]),
        figures.energy_histogram(report["energy"]),
        figures.roc(report["ood"]),
        figures.score_ranking(report),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)
    assert dict(mpl.rcParams) == settings


def test_reliability_draws_each_full_bin_once_at_its_means(report):
    curve = report["calibration"]["before"]["curve"]
    axes = figures.reliability(curve).axes[0]
    scatters = [item for item in axes.collections if isinstance(item, PathCollection)]
    dots = [tuple(map(float, dot.get_offsets()[0])) for dot in scatters]
    full = [row for row in curve["bins"] if row["count"]]
    assert len(full) < len(curve["bins"])
    assert dots == [(row["confidence"], row["accuracy"]) for row in full]


def test_many_sets_and_scores_can_be_drawn(report):
    energy, ood = report["energy"], report["ood"]
    for number in range(12):
        name = f"set {number} with quite a long name for a data set"
        energy["sets"][name] = energy["sets"]["svhn"]
        energy["histogram"]["counts"][name] = energy["histogram"]["counts"]["svhn"]
        ood[name] = copy.deepcopy(ood["svhn"])
    for entry in ood.values():
        for number in range(12):
            entry["scores"][f"score {number}"] = entry["scores"]["gen"]
            entry["roc"][f"score {number}"] = entry["roc"]["gen"]
    page = html_of(report)
    assert len(page.encode()) < 1_500_000
    assert "11 other scores" not in page
    assert "other scores" in page


def test_pages_load_matplotlib_only_to_draw():
    code = "import sys, ebm_guard.report.render as r; assert 'matplotlib' not in sys.modules"
    root = Path(figures.__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01052, "1.05 %"),
        (0.9134, "91.3 %"),
        (1.0, "100 %"),
        (0.0, "0 %"),
        (0.99999, "> 99.99 %"),
        (0.99961, "99.96 %"),
        (None, "n/a"),
    ],
)
def test_percent(value, text):
    assert fmt.percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.89912, "0.899"), (0.99996, "0.99996"), (1.0, "1.000"), (-0.0031, "−0.003"), (None, "n/a")],
)
def test_score(value, text):
    assert fmt.score(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (-4.88391, "−4.884"), (272474, "272,474"), (1.5e-7, "1.500e−07")],
)
def test_number(value, text):
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ece<=0.05 is 0.01 [0.00, 0.02]", "ece<=0.05 is 0.01 [0.00, 0.02]"),
        ("[a](http://x) [1](http://x)", r"\[a](http://x) \[1](http://x)"),
        ("<b> a|b *c* _d_ e_f", r"&lt;b> a\|b \*c\* \_d\_ e_f"),
    ],
)
def test_markdown_escapes_what_would_act_and_no_more(text, shown):
    assert fmt.markdown(text) == shown
