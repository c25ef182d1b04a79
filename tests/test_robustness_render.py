"""The views of robustness: pages, figures, terminal and files of every kind of evaluation."""

import copy
import io
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from ebm_guard.errors import DataError
from ebm_guard.intervals import proportion
from ebm_guard.report import figures
from ebm_guard.report.figures import corruption_map, style
from ebm_guard.report.figures.robustness import curve_lines
from ebm_guard.report.render import (
    corruption_view,
    output,
    render_attack_html,
    render_attack_markdown,
    render_attack_terminal,
    render_html,
    render_markdown,
    render_terminal,
    robustness_facts,
    robustness_view,
    view,
    write_attack_outputs,
    write_outputs,
)
from ebm_guard.report.render import format as fmt
from ebm_guard.robustness.masking import NAMES

FIXTURES = Path(__file__).parent / "fixtures"
REPORT = json.loads((FIXTURES / "report_example.json").read_text(encoding="utf-8"))
# `ebm-guard attack --attacks standard --time-budget 15m` on the CIFAR-10 ResNet-20.
SECTION = json.loads((FIXTURES / "robustness_standard.json").read_text(encoding="utf-8"))
SCHEMAS = {
    name: json.loads((Path(figures.__file__).parents[1] / name).read_text(encoding="utf-8"))
    for name in ("schema.json", "attack_schema.json")
}
EVIL = "<script>alert('x')</script> `a` $b$ [/red] _c_ | 犬"
BUDGET = robustness_view.BUDGET


def share(value, n=128):
    return proportion(round(value * n), n).to_dict()


# --- kinds of evaluations


def standard(section):
    return section


def no_gate(section):
    """A classifier alone: no gate, so nothing accepted and no unknown images under attack."""
    section["gate"] = {"not_run": "no fitted guard was given"}
    section["clean_gated"] = section["gated_accuracy"] = None
    section["ood"] = {}
    for norm in section["norms"]:
        for row in norm["epsilons"]:
            row["gated"] = None
    path = section["energy_path"]
    path["gate_aware"] = None
    for way in ("plain", "stop_at_flip"):
        path[way]["fooled_and_accepted"] = None
    table = section["corruptions"]
    for cell in (table["clean"], *table["cells"], table["summary"]):
        cell["coverage"] = cell["score_auroc"] = None
        cell.pop("accuracy_accepted", None)
    for cell in (table["clean"], *table["cells"]):
        cell["accuracy_accepted"] = None
    table["score"] = None
    return section


def cut(row, *, gate=True):
    """Leave the last attack of a row out, and with it every sum."""
    last = row["attacks"][-1]
    last.update(robust_accuracy=None, fooled=0, gradients=0, forwards=0, reason=BUDGET)
    row.update(worst_case=None, success_rate=None, rounded=None)
    row["gated"].update(plain=None, rejected=None, reason=BUDGET)
    if not gate:
        row["gated"].update(aware=None, success_rate=None, forced_rejection=None)


def budget(section):
    """The largest budgets were cut short."""
    rows = section["norms"][0]["epsilons"]
    cut(rows[-1], gate=False)
    cut(rows[-2])
    section["corruptions"] = section["corrupted_accuracy"] = section["energy_path"] = None
    section["left_out"].append({"name": "24 corruptions, 200 images", "reason": BUDGET})
    return section


def nothing_whole(section):
    """No epsilon of any norm got all attacks."""
    for norm in section["norms"]:
        norm["minimal"] = None
        for row in norm["epsilons"]:
            cut(row, gate=False)
    section["robust_accuracy"] = section["gated_accuracy"] = None
    section["verdict"].update(status="unclear", headline="The time budget allowed no whole attack")
    return section


def robust(section):
    """A net that withstands: two norms, tenths, a median distance that was not found."""
    section["clean"], section["clean_gated"] = share(0.98), share(0.99)
    for norm in section["norms"]:
        for number, row in enumerate(norm["epsilons"]):
            left = share(0.97 - 0.01 * number)
            row.update(worst_case=left, rounded=left, success_rate=share(0.02))
            row["gated"].update(plain=share(0.98), aware=left, rejected=None)
            for item in row["attacks"]:
                item["robust_accuracy"] = left
        norm["minimal"].update(found=3, median=None, quantiles=[0.0, None, None, None, None])
    for row, text in zip(
        section["norms"][0]["epsilons"], ("0.05", "0.1", "0.15", "0.2", "0.3"), strict=True
    ):
        row.update(text=text, epsilon=float(text))
    section["norms"][0]["reference"] = "0.3"
    section["ood"] = {}
    section["verdict"].update(status="good", headline="It withstands the attacks that were tried")
    section["robust_accuracy"] = section["norms"][0]["epsilons"][-1]["worst_case"]
    section["reference"] = {
        "label": "pyautoattack standard",
        "epsilon": "0.3",
        "attacked": 119,
        "fooled": 2,
        "robust_accuracy": share(0.91),
        "version": "pyautoattack 0.2.0",
        "messages": ["there are fewer than 10 classes"],
    }
    return section


def raised(section):
    for flag in section["flags"][:2]:
        flag.update(status="raised", advice="look for rounding; compare with `square`")
    section["verdict"].update(status="attention", headline="The attacks may be blinded")
    return section


def one_severity(section):
    table = section["corruptions"]
    table["severities"] = [3]
    table["cells"] = [cell for cell in table["cells"] if cell["severity"] == 3]
    table["summary"]["worst"]["severity"] = 3
    return section


def published(section):
    """Two published sets beside the built-in one, and ImageNet-C's own number."""
    one = copy.deepcopy(section["corruptions"])
    one["source"] = "ImageNet-C"
    one["summary"].update(mce={**one["summary"]["accuracy"], "value": 1.123}, mce_note="")
    two = copy.deepcopy(one)
    two["source"] = EVIL
    section["published"] = [one, two]
    return section


def corruptions_elsewhere(section):
    section = published(section)
    section["corruptions"] = section["corrupted_accuracy"] = None
    return section


def random_model(section):
    section["settings"].update(random_inference=True, eot_samples=20, success_draws=11)
    section["settings"].update(images_cut=False, time_budget=None)
    section["label_source"] = "predicted labels"
    section["norms"][0]["epsilons"][-1]["outside"] = 3
    return section


def quiet_path(section):
    """Images that never flip, and energies that are not finite."""
    path = section["energy_path"]
    path["energy"]["first_flip"] = [None] * len(path["energy"]["first_flip"])
    path["median"].update(first_flip=None, end=None)
    path["quantiles"][3] = [None] * 5
    path["gate_aware"] = None
    path["plain"]["median_energy"] = None
    return section


def evil(section):
    """The same hostile text wherever a text may come from outside."""
    found = section["ood"].pop("c100")
    section["ood"] = {EVIL: found, "_hidden_" + "x" * 90: copy.deepcopy(found)}
    section["verdict"].update(headline=EVIL, sentence=EVIL)
    for norm in section["norms"]:
        for row in norm["epsilons"]:
            row["attacks"][0]["label"] = EVIL
    section["flags"][0].update(status="raised", sentence=EVIL, advice=EVIL)
    section["left_out"][0].update(name=EVIL, reason=EVIL)
    section["gate"].update(score=EVIL, guarantee=EVIL, rule=EVIL)
    section["settings"]["attacks"]["linf"][EVIL] = {EVIL: EVIL}
    section["settings"]["versions"][EVIL] = EVIL
    section["run"]["stages"][EVIL] = 1.0
    table = section["corruptions"]
    table["source"] = EVIL
    table["facts"][EVIL] = EVIL
    return section


VARIANTS = [
    standard,
    no_gate,
    budget,
    nothing_whole,
    robust,
    raised,
    one_severity,
    published,
    corruptions_elsewhere,
    random_model,
    quiet_path,
    evil,
]


def attacked(section):
    """What ``ebm-guard attack`` found, with its facts."""
    meta = copy.deepcopy(REPORT["meta"])
    meta.update(title="Robustness of ResNet-20", settings=section["settings"], protocol=[])
    data = copy.deepcopy(REPORT["data"]["evaluation"])
    return {"schema": "ebm_guard.attack/1", "meta": meta, "data": data, "robustness": section}


def reported(section):
    return {**copy.deepcopy(REPORT), "robustness": section}


@pytest.fixture
def section():
    return copy.deepcopy(SECTION)


def terminal_of(report, render=render_attack_terminal, width=110):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    render(report, console)
    return console.file.getvalue()


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " "))


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- every kind is valid and renders


def test_the_schemas_are_schemas_and_share_their_definitions():
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    whole, own = (SCHEMAS[name]["$defs"] for name in ("schema.json", "attack_schema.json"))
    assert own == {name: whole[name] for name in own}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_valid_and_renders(variant, section):
    section = variant(section)
    alone, whole = attacked(section), reported(section)
    jsonschema.Draft202012Validator(SCHEMAS["attack_schema.json"]).validate(alone)
    jsonschema.Draft202012Validator(SCHEMAS["schema.json"]).validate(whole)
    before = copy.deepcopy(alone)
    svgs = figures.inline_svgs(alone)
    pages = [
        render_attack_html(alone, svgs),
        render_attack_html(alone, {}),
        render_html(whole, svgs),
        render_attack_markdown(alone),
        render_markdown(whole),
        terminal_of(alone),
        terminal_of(whole, render_terminal),
    ]
    assert alone == before
    for page in pages:
        assert not re.search(r"\bNone\b|\bnan\b|Undefined", page)
    for page in pages[:3]:
        check_page(page)
    for text in pages[3:5]:
        check_tables(text)


def check_page(page):
    """Self-contained, ids once, links with targets, text as text."""
    sources = re.findall(r"""(?:src|href|data|srcset|poster|action)\s*=\s*["']([^"']*)""", page)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert not re.search(r"https?:|<script|<link|<iframe|@import|javascript:", page)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert set(targets) <= set(ids)
    assert 'id="robustness"' in page


def check_tables(text):
    """Every row of a Markdown table has as many cells as its head."""
    columns = None
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        columns = columns or cells
        assert cells == columns, line


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("norms", 0, "epsilons", 0, "worst_case", "value"), "48 %"),
        (("norms", 0, "epsilons", 0, "gated"), {}),
        (("norms", 0, "epsilons", 0, "attacks", 0, "extra"), 1),
        (("norms",), []),
        (("flags", 0, "status"), "fine"),
        (("energy_path", "quantiles", 0), [1.0, 2.0]),
        (("corruptions", "cells", 0, "severity"), "3"),
        (("gate",), None),
        (("left_out", 0, "reason"), ""),
    ],
)
def test_the_schemas_refuse(section, path, wrong):
    node = section
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = wrong
    assert not jsonschema.Draft202012Validator(SCHEMAS["schema.json"]).is_valid(reported(section))
    alone = attacked(section)
    assert not jsonschema.Draft202012Validator(SCHEMAS["attack_schema.json"]).is_valid(alone)


def test_a_report_draws_the_figures_of_robustness_too(section):
    names = set(figures.inline_svgs(reported(section)))
    assert names >= {"reliability_before", "robustness_curve_l2", "robustness_ood"}
    assert names >= {"robustness_energy_steps", "robustness_corruptions_0_coverage"}


def test_an_attack_report_without_attacks_is_refused():
    alone = attacked(copy.deepcopy(SECTION)) | {"robustness": {"not_run": "why"}}
    assert not jsonschema.Draft202012Validator(SCHEMAS["attack_schema.json"]).is_valid(alone)


# --- what the pages say


def test_no_robust_accuracy_without_attack_and_budget(section):
    names = [name for name, *_ in robustness_view.key_metrics(section)]
    labels = "PGD-20, APGD-CE 100, APGD-T 100 x 9 targets, Square 1000"
    on_gate = "selective PGD-20, orthogonal PGD-20, joint PGD-20, run on PGD-20"
    assert names == [
        f"Robust accuracy at linf 8/255 ({labels})",
        f"Wrong and accepted at linf 8/255, gate known ({on_gate})",
        "Accuracy on corrupted images (built-in set, not ImageNet-C)",
    ]
    for norm in section["norms"]:
        caption = robustness_view.curve_caption(section, norm)
        assert f"At {norm['norm']} {norm['reference']} the attacks ({labels}) leave" in caption
    assert names[0] in [name for name, *_ in view.key_numbers(reported(section))]


def test_the_reference_row_is_the_largest_whole_one_where_the_budget_cut(section):
    section = budget(section)
    norm, row = robustness_view.reference(section)
    assert (norm["reference"], row["text"]) == ("8/255", "2/255")
    notes = {row["text"]: row["note"] for row in robustness_view.norm_table(section, norm)}
    assert notes["2/255"] == "the verdict's budget"
    assert notes["8/255"] == "reference"
    assert robustness_view.reference(nothing_whole(section))[1] is None
    names = [name for name, *_ in robustness_view.key_metrics(section)]
    assert not any("Robust accuracy" in name for name in names)


def test_what_the_budget_cut_is_words_and_not_a_weaker_number(section):
    section = budget(section)
    last = robustness_view.norm_table(section, section["norms"][0])[-1]
    assert last["attacks"][-1] == {"metric": None, "words": BUDGET}
    assert last["worst"]["words"] == last["rounded"]["words"] == BUDGET
    gated = robustness_view.gate_table(section, section["norms"][0])[-1]
    assert {gated[key]["words"] for key in ("known", "unknown", "success", "forced")} == {BUDGET}
    for page in (
        render_attack_html(attacked(section), {}),
        render_attack_markdown(attacked(section)),
        terminal_of(attacked(section)),
    ):
        assert BUDGET in text_of(page)
    rows = robustness_view.ood_rows(section, section["ood"]["c100"])
    assert rows[-1]["text"] == "8/255"
    assert rows[-1]["accepted"]["words"] == BUDGET


def test_every_number_of_the_tables_is_in_the_page(section):
    page = text_of(render_attack_html(attacked(section), {}))
    for norm in section["norms"]:
        for row in norm["epsilons"]:
            gated = row["gated"]
            shown = [row["worst_case"], row["success_rate"], row["rounded"]]
            shown += [gated["success_rate"], gated["rejected"], gated["forced_rejection"]]
            shown += [robustness_view.complement(gated[key]) for key in ("aware", "plain")]
            shown += [item["robust_accuracy"] for item in row["attacks"]]
            assert all(fmt.metric(item) in page for item in shown)
    table = section["corruptions"]
    for cell in (table["clean"], *table["cells"]):
        assert fmt.metric(cell["accuracy"]) in page
    for row in section["ood"]["c100"]["rows"]:
        assert fmt.metric(row["auroc"], "score") in page
    assert "share of all 55" in page
    assert "of the 49 images right at first" in page
    assert "of the 47 right and accepted at first" in page
    assert "median 0.00207 (0.527/255)" in page


def test_complement_turns_the_interval():
    turned = robustness_view.complement(share(0.25))
    assert turned["value"] == 0.75
    assert turned["low"] < turned["value"] < turned["high"]
    assert turned["n"] == 128


def test_columns_without_numbers_are_left_out(section):
    page = render_attack_html(attacked(no_gate(copy.deepcopy(section))), {})
    assert "No fitted guard was given." in page
    assert "Wrong and accepted" not in page
    assert "Accepted by the gate" not in page
    for norm in section["norms"]:
        for row in norm["epsilons"]:
            row["gated"]["forced_rejection"] = None
    page = render_attack_html(attacked(section), {})
    assert 'data-label="Forced rejection"' not in page
    said = dict(robustness_facts.left_out(section))
    assert said["Forced rejection of right images"] == "not a part of this run (preset standard)"


def test_what_was_not_run_is_said_once_and_with_its_reason(section):
    said = robustness_facts.left_out(section)
    assert [(item["name"], item["reason"]) for item in section["left_out"]] == said[:2]
    names = [name for name, _ in said]
    # Some unknown images were attacked, and the corruptions ran.
    assert "Unknown images made accepted" not in names
    assert "Corruptions" not in names
    assert "pyautoattack on the images left" in names
    names = [name for name, _ in robustness_facts.left_out(budget(section))]
    assert [name for name in names if "orruptions" in name] == ["24 corruptions, 200 images"]


def test_every_flag_has_words(section):
    assert set(robustness_facts.FLAG_NAMES) == set(NAMES)
    calm = robustness_facts.flags_sentence(section)
    assert calm == "No flag was raised by the 7 checks that ran. 2 did not run."
    report = attacked(raised(section))
    page = text_of(render_attack_html(report, {}))
    assert "2 of 9 checks raised a flag" in page
    assert "Look for rounding" in page
    assert page.count("Raised") == 2
    for text in (render_attack_markdown(report), terminal_of(report)):
        assert "2 of 9 checks raised a flag" in text
        assert "rounding; compare with" in text.replace("\n", " ")


def test_the_page_says_that_the_number_is_an_upper_bound(section):
    report = attacked(section)
    for page in (render_attack_html(report, {}), render_attack_markdown(report)):
        assert text_of(page).count("is an upper bound, not a certificate") == 2
    assert "upper bound, not a certificate" in terminal_of(report)
    said = view.limits(reported(section))
    assert any("upper bound" in line for line in said)
    assert any("linf and l2" in line for line in said)
    assert not any("No deliberate attack" in line for line in said)
    assert any("No deliberate attack" in line for line in view.limits(REPORT))


def test_the_card_leads_to_the_section(section):
    card = next(card for card in view.pillars(reported(section)) if card["name"] == "Robustness")
    assert card["anchor"] == "robustness"
    assert card["headline"] == section["verdict"]["headline"]
    card = next(card for card in view.pillars(REPORT) if card["name"] == "Robustness")
    assert card["anchor"] == "not-run"
    assert 'href="#robustness"' not in render_html(REPORT, {})


def test_the_sign_of_the_energy_is_ours(section):
    caption = robustness_view.energy_caption(section["energy_path"], gated=True)
    assert "looks more familiar than the images were" in caption
    path = section["energy_path"]
    path["median"]["end"] = path["median"]["clean"] + 5
    assert "looks less familiar" in robustness_view.energy_caption(path, gated=True)
    assert "lower: looks more familiar" in figures.robustness_energy(path).axes[0].get_ylabel()


def test_corruptions_name_their_source_and_mce_only_where_given(section):
    assert "mCE" not in corruption_view.sentence(section["corruptions"])
    section = published(section)
    sentence = corruption_view.sentence(section["published"][0])
    assert sentence.startswith("ImageNet-C: 8 types at severities 1, 3, 5")
    assert "mCE 112.30 %" in sentence
    page = text_of(render_attack_html(attacked(section), {}))
    assert "built-in set, not ImageNet-C" in page
    names = [name for name, *_ in robustness_view.key_metrics(section)]
    assert sum("corrupted images" in name for name in names) == 3


def test_names_from_outside_are_text_everywhere(section):
    report = attacked(evil(section))
    page = render_attack_html(report, {})
    assert page.count("&lt;script&gt;") > 15
    assert "<script" not in re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", render_attack_markdown(report))
    assert "<script>alert('x')</script>" in terminal_of(report, width=400)
    assert "[/red]" in terminal_of(report, width=400)


def test_the_terminal_has_the_numbers(section):
    text = terminal_of(attacked(section), width=80)
    row = section["norms"][0]["epsilons"][-1]
    for metric in (row["worst_case"], robustness_view.complement(row["gated"]["aware"])):
        assert fmt.metric(metric) in text
    longest = fmt.metric(robustness_view.complement(section["clean_gated"]))
    assert len(longest) == 20
    assert text.count(longest) == 4
    assert "PGD-20, APGD-CE 100" in text
    assert "0.5/255" in text
    assert re.search(r"^l2 ", text, re.MULTILINE)
    assert "Built-in set, not ImageNet-C" in text


# --- figures


def ydata(ax, name):
    return next(list(line.get_ydata()) for line in ax.lines if line.get_label() == name)


def test_the_curve_draws_the_numbers_of_the_json(section):
    figure = figures.robustness_curve(section)
    assert len(figure.axes) == len(section["norms"]) == 2
    for ax, norm in zip(figure.axes, section["norms"], strict=True):
        rows = norm["epsilons"]
        worst = [section["clean"], *(row["worst_case"] for row in rows)]
        assert ydata(ax, "no gate") == [item["value"] for item in worst]
        for key, name in (
            ("plain", "gate, attacker unaware of it"),
            ("aware", "gate, attacker knows it"),
        ):
            found = [section["clean_gated"], *(row["gated"][key] for row in rows)]
            assert ydata(ax, name) == [item["value"] for item in found]
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        plain = [section["clean_gated"], *(row["gated"]["plain"] for row in rows)]
        ends = [item[end] for item in plain for end in ("low", "high")]
        assert {round(float(value), 9) for value in band} == {round(end, 9) for end in ends}


def test_epsilons_are_labelled_by_their_text(section):
    ax = figures.robustness_curve(section, "linf").axes[0]
    labels = {
        float(place): text.get_text()
        for place, text in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
    }
    assert [labels[place] for place in sorted(labels)] == ["0", "0.5", "1", "2", "4", "8"]
    assert ax.get_xlabel().endswith("in 1/255")
    assert "linf 8/255" in [text.get_text() for text in ax.texts]
    ax = figures.robustness_curve(robust(section), "linf").axes[0]
    assert sorted(text.get_text() for text in ax.get_xticklabels()) == [
        "0",
        "0.05",
        "0.1",
        "0.15",
        "0.2",
        "0.3",
    ]
    assert sorted(ax.get_xticks()) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.3])
    assert "1/255" not in ax.get_xlabel()


def test_crowded_epsilons_keep_the_last_label(section):
    norm = section["norms"][0]
    first = norm["epsilons"][0]
    norm["epsilons"] = [
        copy.deepcopy(first) | {"epsilon": number / 255, "text": f"{number}/255"}
        for number in (*range(1, 40), 64)
    ]
    norm["reference"] = "8/255"
    ax = figures.robustness_curve(section, "linf").axes[0]
    shown = [text.get_text() for text in ax.get_xticklabels() if text.get_text()]
    assert "64" in shown
    assert len(shown) < 16


def test_lines_without_numbers_are_left_out(section):
    def names(found, norm=0):
        return [line.name.replace("\n", " ") for line in curve_lines(found, found["norms"][norm])]

    assert len(names(section)) == 3
    cut_short = budget(copy.deepcopy(section))
    lines = {line.name: line for line in curve_lines(cut_short, cut_short["norms"][0])}
    assert len(lines["no gate"].points) == 4
    assert len(lines["gate, attacker\nknows it"].points) == 5
    assert names(no_gate(copy.deepcopy(section))) == ["no gate"]
    assert names(nothing_whole(copy.deepcopy(section))) == []
    svgs = figures.inline_svgs(attacked(nothing_whole(section)))
    assert not any(name.startswith("robustness_curve") for name in svgs)


def test_names_beside_the_lines_do_not_overlap(section):
    for values in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.52, 0.49), (0.0, 0.5, 1.0)):
        row = section["norms"][0]["epsilons"][-1]
        row["worst_case"] = share(values[0])
        row["gated"].update(plain=share(values[1]), aware=share(values[2]))
        figure = figures.robustness_curve(section, "linf")
        figure.canvas.draw()
        ax = figure.axes[0]
        boxes = [
            text.get_window_extent()
            for text in ax.texts
            if text.get_text().startswith(("no gate", "gate,"))
        ]
        assert len(boxes) == 3
        for place, one in enumerate(boxes):
            assert figure.bbox.containsx(one.x1)
            assert figure.bbox.y0 <= one.y0 <= one.y1 <= figure.bbox.y1
            assert not any(one.overlaps(other) for other in boxes[place + 1 :])


def test_the_energy_figure_draws_the_quantiles_and_every_image(section):
    path = section["energy_path"]
    fan, moments = figures.robustness_energy(path).axes
    assert ydata(fan, "median") == [row[2] for row in path["quantiles"]]
    outer = fan.collections[0].get_paths()[0].vertices[:, 1]
    assert outer.min() == min(row[0] for row in path["quantiles"])
    assert outer.max() == max(row[4] for row in path["quantiles"])
    for dots in moments.collections:
        drawn = sorted(float(y) for _, y in dots.get_offsets())
        assert drawn == sorted(v for v in path["energy"][dots.get_label()] if v is not None)
    assert fan.get_ylim() == moments.get_ylim()


def test_the_heat_map_has_a_number_in_every_cell(section):
    for variant in (standard, one_severity, no_gate):
        found = variant(copy.deepcopy(section))
        table = found["corruptions"]
        axes = figures.robustness_corruptions([table]).axes
        metrics = corruption_map.shown_metrics(table)
        assert len(axes) == len(metrics) == (2 if variant is no_gate else 3)
        for ax, metric in zip(axes, metrics, strict=True):
            cells = [table["clean"], *table["cells"]]
            wanted = [f"{100 * cell[metric]['value']:.0f} %" for cell in cells]
            shown = [text.get_text() for text in ax.texts if text.get_text().endswith("%")]
            assert shown == wanted
            columns = [text.get_text() for text in ax.get_xticklabels()]
            assert columns == [str(item) for item in table["severities"]]


def test_every_set_of_corruptions_has_its_map(section):
    report = attacked(published(section))
    svgs = figures.inline_svgs(report)
    assert {name for name in svgs if name.endswith("_accuracy")} == {
        f"robustness_corruptions_{number}_accuracy" for number in range(3)
    }
    figure = figures.robustness_corruptions(corruption_map.corruption_tables(report["robustness"]))
    assert len(figure.axes) == 9
    assert [text.get_text() for text in figure.texts] == [
        "built-in set, not ImageNet-C",
        "ImageNet-C",
        EVIL,
    ]


def luminance(colour):
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def theme(scheme):
    """The colours of the figures as the page has them in a colour scheme."""
    css = (Path(figures.__file__).parents[1] / "templates" / "report.css").read_text("utf-8")
    if scheme == "light":
        return {name: colour for colour, name in style.THEME.items()}
    dark = css.split("(prefers-color-scheme: dark)")[1].split("* {")[0]
    found = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{3,6})", dark))
    return found | {"--fig-paper": found["--card"]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_the_strongest_tint(scheme):
    colours = theme(scheme)
    paper, ink = (np.array(to_rgb(colours[f"--fig-{name}"])) for name in ("paper", "ink"))
    for _, colour, _ in corruption_map.METRICS.values():
        tint = np.array(to_rgb(colours[style.THEME[colour]]))
        ground = corruption_map.STRONGEST * tint + (1 - corruption_map.STRONGEST) * paper
        high, low = sorted((luminance(ground), luminance(ink)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_ood_figure_draws_the_accepted_share(section):
    ax = figures.robustness_ood(section).axes[0]
    found = section["ood"]["c100"]["rows"]
    assert ydata(ax, "c100") == [row["accepted"]["value"] for row in found]


# --- files


def test_the_files_of_the_attack_command(section, tmp_path):
    report = attacked(section)
    paths = write_attack_outputs(report, tmp_path / "out")
    assert {path.relative_to(tmp_path / "out") for path in paths} == set(output.ATTACK_OURS)
    assert all(path.stat().st_size for path in paths)
    assert json.loads((tmp_path / "out" / "robustness.json").read_text("utf-8")) == report
    text = (tmp_path / "out" / "robustness.md").read_text("utf-8")
    assert text == render_attack_markdown(report)
    write_attack_outputs(report, tmp_path / "again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


@pytest.fixture
def quick(monkeypatch):
    """Files in place of figures, where a test is about files."""

    def save(report, folder):
        folder.mkdir()
        names = [path.stem for path in output.SHARED if path.suffix == ".png"]
        if "not_run" in report["robustness"] or not report["robustness"]["ood"]:
            names = [name for name in names if name != "robustness_ood"]
        if "not_run" in report["robustness"]:
            names = []
        if "calibration" in report:
            names.append("reliability")
        pairs = {name: (folder / f"{name}.png", folder / f"{name}.svg") for name in names}
        for pair in pairs.values():
            for path in pair:
                path.write_text(report["meta"]["title"])
        return pairs

    monkeypatch.setattr(figures, "save_figures", save)
    monkeypatch.setattr(figures, "inline_svgs", lambda report: {})


def test_foreign_files_and_the_kept_state_stay(section, quick, tmp_path):
    (tmp_path / "attack-state").mkdir()
    (tmp_path / "attack-state" / "state.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    write_attack_outputs(attacked(section), tmp_path)
    assert (tmp_path / "figures" / "robustness_ood.png").exists()
    (tmp_path / "figures" / "mine.svg").write_text("mine")
    write_attack_outputs(attacked(no_gate(section)), tmp_path)
    left = set(tree(tmp_path))
    assert {"attack-state/state.json", "notes.txt", "figures/mine.svg"} <= left
    assert "figures/robustness_ood.png" not in left, "it is of an older evaluation"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".ebm")]


def test_a_report_and_an_attack_share_a_folder(section, quick, tmp_path):
    write_attack_outputs(attacked(section), tmp_path)
    before = tree(tmp_path)
    write_outputs(copy.deepcopy(REPORT), tmp_path)
    assert tree(tmp_path).items() >= before.items(), "a report without attacks takes nothing away"
    write_attack_outputs(attacked(no_gate(section)), tmp_path)
    assert (tmp_path / "report.json").exists()
    assert (tmp_path / "figures" / "reliability.png").exists()


def test_a_report_takes_its_older_figures_of_robustness_away(section, quick, tmp_path):
    write_outputs(reported(section), tmp_path)
    assert (tmp_path / "figures" / "robustness_curve.png").exists()
    write_outputs(copy.deepcopy(REPORT), tmp_path)
    assert not list((tmp_path / "figures").glob("robustness_*"))


@pytest.mark.parametrize("moves", range(0, 16, 3))
def test_a_failure_half_way_changes_nothing(section, quick, tmp_path, monkeypatch, moves):
    write_attack_outputs(attacked(section), tmp_path)
    before, count, rename = tree(tmp_path), 0, Path.rename

    def full(self, target):
        nonlocal count
        count += 1
        if count == moves + 1:
            raise OSError(28, "No space left on device", str(target))
        return rename(self, target)

    newer = attacked(no_gate(section))
    newer["meta"]["title"] = "newer"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(DataError, match="No space left on device"):
            write_attack_outputs(newer, tmp_path)
    assert tree(tmp_path) == before


def test_nan_is_refused(section, quick, tmp_path):
    section["clean"]["value"] = float("nan")
    with pytest.raises(DataError, match="JSON"):
        write_attack_outputs(attacked(section), tmp_path / "out")
    assert not list(tmp_path.iterdir())
