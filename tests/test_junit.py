"""JUnit XML of the requirements: its shape, its counts, and texts that XML cannot hold."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebm_guard.errors import DataError
from ebm_guard.report.junit import render_junit, write_junit

EXAMPLE = json.loads(
    (Path(__file__).parent / "fixtures" / "report_example.json").read_text(encoding="utf-8")
)
# What the readers of the common CI systems agree on: attributes (required, allowed), children.
SHAPE = {
    "testsuites": (
        {"name", "tests", "failures", "errors", "time"},
        {"name", "tests", "failures", "errors", "skipped", "time"},
        ["testsuite"],
    ),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
        ["properties", "testcase"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, {"name", "value"}, []),
    "testcase": (
        {"name", "classname"},
        {"name", "classname", "time"},
        ["failure", "system-out"],
    ),
    "failure": ({"message", "type"}, {"message", "type"}, []),
    "system-out": (set(), set(), []),
}  # fmt: skip
COUNTS = ("tests", "failures", "errors", "skipped")


def parsed(report, **settings):
    """Parse, and check the shape and the counts by hand."""
    root = ET.fromstring(render_junit(report, **settings))
    assert root.tag == "testsuites"
    for node in root.iter():
        required, allowed, children = SHAPE[node.tag]
        assert required <= set(node.attrib) <= allowed
        assert all(child.tag in children for child in node)
        order = [children.index(child.tag) for child in node]
        assert order == sorted(order)
    (suite,) = root
    for part in (root, suite):
        assert int(part.get("tests")) == len(suite.findall("testcase")) > 0
        assert int(part.get("failures")) == len(suite.findall("testcase/failure"))
        assert [int(part.get(name)) for name in COUNTS[2:]] == [0, 0]
        assert float(part.get("time")) >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    return suite


def verdicts(suite):
    return {
        case.get("name"): None if case.find("failure") is None else case.find("failure").get("type")
        for case in suite.findall("testcase")
    }


@pytest.mark.parametrize("allow_unclear", [False, True])
def test_one_case_per_requirement(allow_unclear):
    suite = parsed(EXAMPLE, allow_unclear=allow_unclear)
    assert verdicts(suite) == {
        "ece<=0.03": None,
        "auroc>=0.9": "failed",
        "gate.coverage>=0.95": None if allow_unclear else "unclear",
    }
    failure = suite.find("testcase/failure")
    assert failure.get("message") == failure.text == EXAMPLE["requirements"][1]["message"]
    said = {item.get("name"): item.get("value") for item in suite.find("properties")}
    assert said["model"] == EXAMPLE["meta"]["model"]["name"]
    assert said["n"] == str(EXAMPLE["data"]["evaluation"]["n"])
    assert said["requirements"] == "3"


def test_without_requirements_there_is_one_passing_case():
    suite = parsed({**EXAMPLE, "requirements": []})
    assert verdicts(suite) == {"report was made": None}
    assert "--require" in suite.find("testcase/system-out").text


@given(st.text())
def test_any_text_is_well_formed(text):
    rows = list(EXAMPLE["requirements"])
    rows[1] = {**rows[1], "text": text, "message": text}
    meta = {**EXAMPLE["meta"], "title": text, "model": {"name": text}}
    suite = parsed({**EXAMPLE, "meta": meta, "requirements": rows})
    bad = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
    expected = bad.sub("\ufffd", text)
    assert suite.findall("testcase")[1].get("name") == expected
    assert suite.find("testcase/failure").get("message") == expected


@pytest.mark.parametrize("evil", ["\x00\x1b[31m", "\ud800 lone", "]]>&<!--\"'", "\ufffe\uffff"])
def test_characters_that_xml_cannot_hold(evil):
    report = copy.deepcopy(EXAMPLE)
    report["requirements"][0]["text"] = evil
    name = parsed(report).find("testcase").get("name")
    assert len(name) == len(evil)


def test_the_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "junit.xml"
    write_junit(EXAMPLE, path)
    assert path.read_bytes() == render_junit(EXAMPLE)
    assert path.read_bytes().startswith(b"<?xml version")
    write_junit({**EXAMPLE, "requirements": []}, path)
    assert b"report was made" in path.read_bytes()
    assert [item.name for item in path.parent.iterdir()] == ["junit.xml"]
    with pytest.raises(DataError, match="cannot write"):
        write_junit(EXAMPLE, path / "below")
