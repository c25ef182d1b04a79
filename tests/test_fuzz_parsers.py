"""Every parser of files and requests: a right answer or a refusal, in bounded time and memory.

reports/security/fuzz.py runs the same targets at length.
"""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for extra in ("fastapi", "httpx", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

from fuzzing.bounds import BrokenError, Outcomes, Target, bounded, try_one  # noqa: E402
from fuzzing.files import file_targets  # noqa: E402
from fuzzing.requests import request_targets  # noqa: E402

NAMES = (
    "guard",
    "monitor",
    "npz",
    "predictions",
    "list",
    "spec",
    "journal",
    "checkpoint",
    "weights",
    "history",
    "requirements",
    "array",
    "image",
    "form",
    "request",
)
DEAR = ("torch program", "ONNX program", "baseline report")


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return {target.name: target for target in (*file_targets(folder), *request_targets())}


def test_no_parser_is_left_out(targets):
    assert set(targets) == {*NAMES, *DEAR}


def tried(targets, name, tmp_path_factory, tries):
    if name == "ONNX program":
        pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    target, outcomes = targets[name], Outcomes()
    root = tmp_path_factory.mktemp("fuzz") / "root"
    root.mkdir()
    # Sound files are made before anything is measured.
    target.make(random.Random(0))

    @settings(
        deadline=None,
        max_examples=tries,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        try_one(target, seed, root, outcomes)

    run()
    print(f"{name}: {outcomes.taken} taken, {outcomes.refused} refused")
    return outcomes


@pytest.mark.parametrize("name", NAMES)
def test_right_or_refused(targets, name, tmp_path_factory):
    assert tried(targets, name, tmp_path_factory, 15).inputs >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *DEAR])
def test_right_or_refused_at_length(targets, name, tmp_path_factory):
    tries = 40 if name in DEAR else 250
    outcomes = tried(targets, name, tmp_path_factory, tries)
    # A fuzzer that makes nothing but garbage tests the first line of a parser alone.
    assert outcomes.refused > outcomes.inputs // 20
    assert outcomes.taken > 0


# --- the harness sees what it is there for


def grows(given, place):
    data = bytearray(500 * 2**20)
    data[::4096] = b"x" * len(data[::4096])
    return bool(data)


def loops(given, place):
    while True:
        pass


def writes(given, place):
    (place.parents[1] / "elsewhere").write_text("x")
    return True


def crashes(given, place):
    raise KeyError("x")


@pytest.mark.parametrize(
    ("run", "words"),
    [(grows, "MiB"), (loops, "TooSlow"), (writes, "wrote"), (crashes, "KeyError")],
)
def test_what_breaks_a_bound_is_seen(run, words, tmp_path, monkeypatch):
    if not Path("/proc/self/clear_refs").exists() and run in (grows, loops):
        pytest.skip("the bounds on time and memory are measured on Linux")
    if run is loops:
        monkeypatch.setattr("fuzzing.bounds.bounded", lambda: bounded(seconds=0.2))
    with pytest.raises(BrokenError, match=words):
        try_one(Target("x", lambda rng: b"", run), 0, tmp_path / "root", Outcomes())
