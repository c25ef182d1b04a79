"""A Hugging Face model card of a report: the `model-index` block, and what it means."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ebm_guard.data import parse_spec
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.files import replace_file
from ebm_guard.report.render import finetune_view
from ebm_guard.report.render import format as fmt

_MARKER = re.compile(r"<!-- ebm_guard\.model_card/1 sha256:([0-9a-f]{64}) -->\n?\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNPRINTED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
# (key, the Hub's metric id, name, how it is written)
_CALIBRATION = (
    ("accuracy", "accuracy", "Accuracy", "percent"),
    ("ece", "ece", "ECE (15 bins, top label)", "percent"),
    ("nll", "nll", "NLL", "fixed"),
    ("brier", "brier_score", "Brier score (multiclass)", "fixed"),
)
_OOD = (
    ("auroc", "roc_auc", "AUROC", "score"),
    ("fpr95", "fpr95", "FPR at 95 % of ID accepted", "percent"),
)


def render_model_card(report: Mapping[str, Any]) -> str:
    """Render a Markdown file that begins with the Hub's YAML block.

    ``model-index`` holds the point values: accuracy, ECE, NLL and Brier of the deployed calibrator
    (of the plain model where none was fitted), AUROC and FPR95 of the gate's score per OOD set, and
    the gate's coverage. The text below has the intervals and the guarantee. ``dataset.type`` is
    the Hub's id for ``hfds/`` and ``hfids/`` specs, else a name made from the last part of the
    path, so no folder of yours is published. ``source`` is left out: the Hub wants a URL there.

    Args:
        report: the report as JSON types.

    Returns:
        The card. Its last line carries a hash of the rest, which tells an untouched card from one
        that somebody has edited.

    References:
        Hugging Face Hub documentation, model card metadata, `model-index`.
    """
    body = "\n".join([*_front_matter(report), "", *_text(report), ""])
    return f"{body}\n<!-- ebm_guard.model_card/1 sha256:{_digest(body)} -->\n"


def check_model_card(path: str | Path) -> None:
    """Refuse to overwrite a file that is no untouched model card of ours.

    Raises:
        DataError: the file exists, and was written or edited by somebody else.
    """
    path = Path(path)
    if not path.exists():
        return
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        content = ""
    content = content.replace("\r\n", "\n")
    match = _MARKER.search(content)
    # The line feed before the marker belongs to the marker.
    if match is None or _digest(content[: match.start() - 1]) != match[1]:
        raise DataError(
            f"{path} exists and is not a model card as --model-card wrote it, or was edited since; "
            "it was not touched. Name a new file, and copy what you need from there"
        )


def write_model_card(report: Mapping[str, Any], path: str | Path) -> None:
    """Write :func:`render_model_card` to a file, whole or not at all.

    Raises:
        DataError: the file cannot be written, or is one that :func:`check_model_card` refuses.
    """
    check_model_card(path)
    content = render_model_card(report).encode("utf-8", "backslashreplace")
    with replace_file(path) as new:
        new.write_bytes(content)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("utf-8", "backslashreplace")).hexdigest()


# --- the YAML block: strings are JSON strings, which YAML reads as they are


def _front_matter(report: Mapping[str, Any]) -> list[str]:
    kind, name, split = _data_set(report["data"]["evaluation"]["spec"])
    lines = [
        "---",
        "model-index:",
        f"- name: {_quoted(report['meta']['model']['name'])}",
        "  results:",
        "  - task:",
        '      type: "image-classification"',
        '      name: "Image Classification"',
        "    dataset:",
        f"      type: {_quoted(kind)}",
        f"      name: {_quoted(name)}",
        *([f"      split: {_quoted(split)}"] if split else []),
    ]
    found = list(_results(report))
    lines.append("    metrics:" if found else "    metrics: []")
    for metric, title, value in found:
        lines += [
            f"    - type: {_quoted(metric)}",
            f"      value: {_number(value)}",
            f"      name: {_quoted(title)}",
        ]
    return [*lines, "---"]


def _results(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Yield (metric id, name, value) of everything measured."""
    side, when = _deployed(report)
    for key, metric, title, _ in _CALIBRATION:
        if _value(side.get(key)) is not None:
            yield metric, f"{title}, {when}", side[key]["value"]
    for name, score, part in _ood(report):
        for key, metric, title, _ in _OOD:
            if _value(part.get(key)) is not None:
                yield metric, f"{title}, {score}, against {name}", part[key]["value"]
    coverage = report["gate"].get("coverage")
    if _value(coverage) is not None:
        yield "coverage", "Coverage of the gate", coverage["value"]


def _deployed(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the calibrator's figures, or the plain model's, and what to call them."""
    calibration = report["calibration"]
    after = calibration.get("after", {})
    if "accuracy" in after:
        return after, f"after {after['calibrator']['name']} calibration"
    return calibration.get("before", {}), "not calibrated"


def _ood(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (set, score, metrics) of the gate's score, or of energy where there is no gate."""
    score = report["gate"].get("score", "energy")
    for name, part in report["ood"].items():
        yield name, score, part["scores"].get(score, {})


def _data_set(text: str) -> tuple[str, str, str]:
    """Return the Hub's id or a name like it, the name to show, and the split."""
    try:
        spec = parse_spec(text)
    except InvalidInputError:
        return _slug(text), text, ""
    last = Path(spec.path).name or spec.kind
    if spec.kind == "timm" and spec.path.startswith(("hfds/", "hfids/")):
        last = spec.path.partition("/")[2]
        # The Hub takes one owner and one name.
        identity = "/".join(_slug(part) for part in last.strip("/").split("/")[-2:])
        return identity, last, spec.split
    return _slug(Path(last).stem), last, spec.split


def _slug(text: str) -> str:
    """Keep what the Hub allows in an id: ASCII letters, digits, _, - and dots."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "unnamed"


def _quoted(text: object) -> str:
    """Write a JSON string in which everything that YAML does not print is escaped."""
    line = json.dumps(str(text), ensure_ascii=False)
    return _UNPRINTED.sub(lambda match: f"\\u{ord(match[0]):04x}", _SURROGATE.sub("\ufffd", line))


def _number(value: float) -> str:
    """Write a number that YAML 1.1 reads as one: 1e-07 without a point would be a string."""
    text = f"{value:.6g}"
    return f"{value:.12f}" if "e" in text else text


def _value(metric: Mapping[str, Any] | None) -> float | None:
    value = None if metric is None else metric.get("value")
    return value if value is not None and math.isfinite(value) else None


# --- the text


def _text(report: Mapping[str, Any]) -> list[str]:
    evaluation = report["data"]["evaluation"]
    name = fmt.markdown(_data_set(evaluation["spec"])[1])
    package = report["meta"]["package"]
    measured = (
        f"Measured by {package['name']} {package['version']} on {fmt.count(evaluation['n'])} "
        f"images of {name}; brackets are 95 % intervals."
    )
    return [
        "## Calibration, unknown images and the gate",
        "",
        measured,
        "",
        *_calibration_text(report["calibration"]),
        "",
        *_ood_text(report),
        "",
        *_gate_text(report["gate"]),
        *_finetune_text(report["finetune"]),
    ]


def _calibration_text(calibration: Mapping[str, Any]) -> list[str]:
    if "not_run" in calibration:
        return [f"**Calibration** was not measured: {fmt.prose_markdown(calibration['not_run'])}."]
    before, after = calibration["before"], calibration["after"]
    done = "accuracy" in after
    lines = [
        f"**Calibration.** {fmt.prose_markdown(calibration['verdict']['sentence'])}",
        "",
        f"| metric | before |{' after |' if done else ''}",
        f"| --- | ---: |{' ---: |' if done else ''}",
    ]
    for key, _, title, kind in _CALIBRATION:
        cells = [fmt.metric(side.get(key), kind) for side in (before, *([after] if done else []))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _ood_text(report: Mapping[str, Any]) -> list[str]:
    sets = list(_ood(report))
    if not sets:
        return ["**Unknown images.** No out-of-distribution set was given, so nothing is known."]
    accepted = report["gate"].get("accepted_ood", {})
    lead = (
        f"**Unknown images**, by the score `{sets[0][1]}`. FPR95 is the share of them that passes "
        "when 95 % of the familiar images do."
    )
    lines = [
        lead,
        "",
        "| set | AUROC | FPR95 | accepted by the gate |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, _, part in sets:
        cells = [fmt.metric(part.get(key), kind) for key, _, _, kind in _OOD]
        cells.append(fmt.metric(accepted.get(name)))
        lines.append(f"| {fmt.markdown(name)} | {' | '.join(cells)} |")
    return lines


def _gate_text(gate: Mapping[str, Any]) -> list[str]:
    if "not_run" in gate:
        return [f"**Gate.** There is none: {fmt.prose_markdown(gate['not_run'])}."]
    sentence = (
        f"**Gate.** A prediction is accepted when its score `{gate['score']}` is at most "
        f"{fmt.energy(gate['threshold'])}. It accepted {fmt.metric(gate['coverage'])} of the "
        f"familiar images. {fmt.prose_markdown(gate['guarantee'])} The promise is void when "
        "inputs, weights or preprocessing change."
    )
    return [sentence]


def _finetune_text(section: Mapping[str, Any]) -> list[str]:
    """Tell how a fine-tuned model came to be; of any other model there is nothing to tell."""
    if not finetune_view.ran(section):
        return []
    said = (section["verdict"]["sentence"], finetune_view.run_sentence(section))
    lines = ["", f"**Fine-tuning.** {' '.join(map(fmt.prose_markdown, said))}"]
    means = finetune_view.section_means(section)
    if means:
        lines += ["", "| mean AUROC of the energy | start | candidate | difference |"]
        lines.append("| --- | ---: | ---: | ---: |")
    for name, note, item in means:
        cells = [fmt.metric(item[side], "score") for side in ("start", "candidate")]
        cells.append(finetune_view.whole_difference(item, "score"))
        lines.append(f"| {name.lower()} ({note}) | {' | '.join(cells)} |")
    lines += ["", *(f"- Worse: {fmt.markdown(line)}" for line in section["losses"])]
    return lines if section["losses"] else [*lines, finetune_view.no_loss(section)]
