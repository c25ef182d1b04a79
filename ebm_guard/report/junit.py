"""The requirements as JUnit XML, which every CI system shows as tests."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_guard.files import replace_file
from ebm_guard.report.requirements import holds

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SUITE = "ebm_guard"


def render_junit(report: Mapping[str, Any], *, allow_unclear: bool = False) -> bytes:
    """Render one test case per requirement.

    A requirement that is not met is a failure with its message; an unclear one too, unless
    ``allow_unclear``. There is no official schema: elements and attributes are those that the
    common readers share. Without requirements the suite has one passing case, "report was made":
    some CI systems fail a build whose result file holds no test at all.

    Args:
        report: the report as JSON types.
        allow_unclear: whether an unclear requirement passes.

    Returns:
        The XML in UTF-8. Characters that XML cannot hold become U+FFFD.

    Example:
        >>> run = {"started": "2026-01-01T00:00:00+00:00", "wall_seconds": 1.0}
        >>> report = {
        ...     "schema": "ebm_guard.report/1",
        ...     "meta": {"title": "T", "model": {"name": "net"}, "package": {"version": "1"},
        ...              "run": run},
        ...     "data": {"evaluation": {"spec": "demo:", "n": 9}},
        ...     "requirements": [],
        ... }
        >>> ET.fromstring(render_junit(report)).get("tests")
        '1'
    """
    rows = report["requirements"]
    failures = sum(not holds(row["status"], allow_unclear=allow_unclear) for row in rows)
    meta, data = report["meta"], report["data"]["evaluation"]
    counts = {
        "name": _SUITE,
        "tests": str(len(rows) or 1),
        "failures": str(failures),
        "errors": "0",
        "skipped": "0",
        "time": f"{meta['run'].get('wall_seconds') or 0:.3f}",
    }
    root = ET.Element("testsuites", counts)
    # Strict readers take a time without its zone.
    started = str(meta["run"].get("started", ""))[:19]
    suite = ET.SubElement(root, "testsuite", counts | ({"timestamp": started} if started else {}))
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("title", meta["title"]),
        ("model", meta["model"]["name"]),
        ("data", data["spec"]),
        ("n", data["n"]),
        ("schema", report["schema"]),
        ("version", meta["package"]["version"]),
        ("requirements", len(rows)),
    ):
        ET.SubElement(properties, "property", name=name, value=_allowed(value))
    for row in rows:
        _add_case(suite, row, allow_unclear=allow_unclear)
    if not rows:
        case = ET.SubElement(
            suite, "testcase", name="report was made", classname=f"{_SUITE}.report", time="0"
        )
        ET.SubElement(case, "system-out").text = "no requirement was set; set some with --require"
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def write_junit(
    report: Mapping[str, Any], path: str | Path, *, allow_unclear: bool = False
) -> None:
    """Write :func:`render_junit` to a file, whole or not at all; an older file is replaced.

    Raises:
        DataError: the file cannot be written.
    """
    content = render_junit(report, allow_unclear=allow_unclear)
    with replace_file(path) as new:
        new.write_bytes(content)


def _add_case(suite: ET.Element, row: Mapping[str, Any], *, allow_unclear: bool) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        name=_allowed(row["text"]),
        classname=f"{_SUITE}.requirements",
        time="0",
    )
    message = _allowed(row["message"])
    if holds(row["status"], allow_unclear=allow_unclear):
        ET.SubElement(case, "system-out").text = f"{row['status']}: {message}"
    else:
        ET.SubElement(case, "failure", message=message, type=row["status"]).text = message


def _allowed(text: object) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(text))
