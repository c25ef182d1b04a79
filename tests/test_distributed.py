"""Several processes give what one gives, fail together, and never wait for the dead."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import alone, ended, start
from safetensors.numpy import load_file

from ebm_guard.cli import run
from ebm_guard.data import open_source
from ebm_guard.data.sources import StreamSource
from ebm_guard.deploy.batch import Outputs
from ebm_guard.deploy.batch_shards import refuse_another_number
from ebm_guard.distributed import World
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.predictions.shared import block_of, share_of

# What one process and two may differ in: when, how long, and the words they were called with.
RUN = ("started", "wall_seconds", "peak_memory_mb")


def numbers_of(folder):
    report = json.loads((folder / "report.json").read_text())
    for name in RUN:
        del report["meta"]["run"][name]
    del report["meta"]["command"]
    return report


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_blocks_are_whole_disjoint_and_even(count, size):
    blocks = [block_of(count, World(rank, size)) for rank in range(size)]
    assert [place for block in blocks for place in block] == list(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


@settings(deadline=None)
@given(batch_size=st.integers(1, 500), size=st.integers(1, 9))
def test_shares_are_the_batches_of_one_process(batch_size, size):
    source = open_source("demo:")
    shares = [share_of(source, World(rank, size), batch_size) for rank in range(size)]
    kept = [share.ids for share in shares if share is not None]
    assert sum(kept, ()) == source.ids
    # All but the last row of batches end where a batch of one process ends.
    ends = np.cumsum([len(ids) for ids in kept])[:-1]
    assert not (ends % batch_size).any()


def test_a_stream_of_unknown_length_cannot_be_shared():
    source = open_source("demo:")
    source.__class__ = type("Stream", (type(source),), {"total": None})
    with pytest.raises(InvalidInputError, match=r"2 processes for demo:.*Run one process"):
        share_of(source, World(0, 2), 8)
    assert share_of(source, World(), 8) is source


class Stream(StreamSource):
    """Declares fewer images than it has."""

    def read(self):
        for number in range(25):
            yield Image.new("L", (8, 8), number * 9), None


def test_the_last_process_reads_a_stream_to_its_end():
    found = [
        [name for name, _, _ in share_of(Stream("wds/x", None, 20), World(rank, 3), 4).rows()]
        for rank in range(3)
    ]
    assert [len(names) for names in found] == [4, 8, 13]
    assert [name for names in found for name in names] == [str(row) for row in range(25)]
    # A subset of a subset counts in the latter.
    chosen = Stream("wds/x", None, 20).subset(np.arange(10, 20)).subset(np.array([0, 9]))
    assert [name for name, _, _ in chosen.rows()] == ["10", "19"]


def test_one_process_does_not_begin_anew_beside_the_rows_of_several(tmp_path):
    (tmp_path / "out.shard-0-of-3.part.journal").write_text("")
    outputs = Outputs(tmp_path / "out", "jsonl", ("id",))
    with pytest.raises(DataError, match="go on with 3 processes"):
        refuse_another_number(outputs, World())


def test_one_process_alone_talks_to_nobody():
    world = World()
    assert world.texts("ä") == ["ä"]
    with pytest.raises(KeyError), world.together("trying"):
        raise KeyError("own")


def test_commands_that_cannot_be_shared_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert run(["attack", "--data", "demo:", "-o", "x"]) == 2
    assert "attack runs in one process" in capsys.readouterr().err
    assert run(["list", "--json"]) == 0


EXCHANGE = """
import numpy as np, torch
from torch import nn
from ebm_guard.data.batches import Batch
from ebm_guard.data import open_source
from ebm_guard.data.demo import demo_classifier
from ebm_guard.distributed import working_together
from ebm_guard.errors import DataError, EbmGuardError
from ebm_guard.model import EnergyClassifier
from ebm_guard.data import batches
from ebm_guard.predictions import predict
from ebm_guard.predictions import shared

shared._MESSAGE = 999  # many messages
classifier, source = EnergyClassifier(demo_classifier()), open_source("demo:")
source.groups = np.array([f"g{row // 200}" * (1 + row // 200) for row in range(len(source))])
read = lambda part: batches(part, classifier.preprocessing, batch_size=100)
whole = predict(EnergyClassifier(demo_classifier()), read(source), features=True, source="demo:")
with working_together(torch.device("cpu")) as world:
    assert world.texts("a" * world.rank) == ["a" * rank for rank in range(world.size)]
    for limit in (1 << 30, 2000):
        classifier = EnergyClassifier(demo_classifier())
        part = shared.predict_shared(classifier, source, read, world, batch_size=100,
                                     features=True, memory_limit=limit, text="demo:")
        assert len(part) == len(whole) and part.num_classes in (1, whole.num_classes)
        if world.first:
            for name in ("logits", "features", "labels", "groups", "hashes"):
                mine, theirs = getattr(part, name), getattr(whole, name)
                assert mine.dtype == theirs.dtype and (mine == theirs).all(), name
            assert part.ids == whole.ids and part.fingerprint == whole.fingerprint
            assert (part.head.weight == whole.head.weight).all()
            assert isinstance(part.logits, np.memmap) == (limit == 2000)
    try:
        with world.together("reading"):
            if world.rank == 1:
                raise DataError("no such file: \\udcff")
    except DataError as error:
        assert ("process 1 of 3" in str(error)) == (world.rank != 1), error
    try:
        with world.together("counting"):
            if world.rank == 1:
                raise KeyError("one of its own")
    except KeyError:
        print("failed")
    except EbmGuardError as error:
        print(error)
"""


@pytest.mark.slow
def test_rows_of_three_processes_are_those_of_one_and_errors_are_shared(tmp_path):
    found = ended(start([], 3, cwd=tmp_path, code=EXCHANGE))
    assert [code for code, _, _ in found] == [0, 0, 0], found
    said = [out.strip() for _, out, _ in found]
    assert said[1] == "failed"
    for words in (said[0], said[2]):
        assert words.startswith("process 1 of 3 failed while counting, so all stop: KeyError")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [100, 512])
def test_the_report_of_two_processes_is_that_of_one(tmp_path, batch_size):
    # Five batches, which cannot be shared evenly, and one, which leaves none for the first process.
    command = ["report", "--data", "demo:", "--fit-data", "demo:", "--ood", "near=demo:near_ood"]
    command += ["-b", batch_size, "--synthetic", "-q"]
    alone(*command, "-o", "one", cwd=tmp_path)
    found = ended(start([*command, "-o", "two", "--require", "accuracy>=0.999"], 2, cwd=tmp_path))
    assert [code for code, _, _ in found] == [1, 0], found
    one, two = numbers_of(tmp_path / "one"), numbers_of(tmp_path / "two")
    assert one.pop("requirements") == []
    assert two.pop("requirements")[0]["status"] != "met"
    assert one == two
    # One of them prints.
    assert "Reliability report" in found[0][1]
    assert found[1][1:] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("score", ["vim", "auto"])
def test_the_guard_of_two_processes_is_that_of_one(tmp_path, score):
    command = ["fit", "--data", "demo:", "--score", score, "-b", 64]
    command += ["--fit-data", "demo:"] if score == "vim" else []
    alone(*command, "-o", "one", cwd=tmp_path)
    found = ended(start([*command, "-o", "two"], 2, cwd=tmp_path))
    assert [code for code, _, _ in found] == [0, 0], found
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert np.array_equal(value, two[name]), name


FAILING = """
import os, signal, sys
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 8)
        self.pretrained_cfg = dict(mean=(0.,), std=(1.,), input_size=(1, 8, 8))
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if os.environ.get("RANK") == "1" and self.calls > 2:
            if os.environ["HOW"] == "raise":
                raise ValueError("no such thing")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.fc(x.flatten(1))

def net():
    torch.manual_seed(0)
    return Net().eval()
"""


@pytest.fixture
def failing(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FAILING)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "how"),
    [("report", "raise"), ("fit", "die"), ("predict", "die"), ("resumed", "raise")],
)
def test_a_process_that_fails_stops_all_of_them(failing, monkeypatch, how, command):
    monkeypatch.setenv("HOW", how)
    words = ["--model", "net.py:net", "--data", "demo:", "-b", 32, "-q", "-o", "out"]
    name = "predict" if command == "resumed" else command
    if name == "predict":
        alone("fit", *words[:-1], "guard", "--no-canary", cwd=failing)
        words = ["guard", *words]
    before = {path.name for path in failing.iterdir()} | {"__pycache__"}
    words += ["--resume"] if command == "resumed" else []
    found = ended(start([name, *words], 2, cwd=failing))
    assert found[0][0] == 3, found[0]
    if how == "raise":
        assert found[1][0] == 4
        assert "the model failed on demo:: ValueError: no such thing" in found[1][2]
        assert "process 1 of 2 failed while" in found[0][2]
    else:
        assert found[1][0] == -signal.SIGKILL
        assert "lost the connection to another process of this run" in found[0][2]
    left = {path.name for path in failing.iterdir()} - before
    if command == "resumed":
        # What was done is kept, and goes on to the rows of one process.
        assert any(name.endswith(".part.journal") for name in left)
        monkeypatch.setenv("HOW", "not")
        (failing / "net.py").write_text(FAILING.replace("self.calls > 2", "False"))
        found = ended(start([name, *words], 2, cwd=failing))
        assert [code for code, _, _ in found] == [0, 0], found
        assert "rows of an earlier run" in found[0][1]
        alone(name, *words[:-2], "expected", cwd=failing)
        assert (failing / "out").read_bytes() == (failing / "expected").read_bytes()
        left = {path.name for path in failing.iterdir()} - before - {"out", "expected"}
    elif how == "die":
        # Killed outright, a process leaves its scratch file; no result is there.
        left = {name for name in left if "shard-1" not in name}
    assert left == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_format", "size", "resumed"),
    [("csv", 2, []), ("parquet", 2, ["--resume"]), ("jsonl", 5, ["--resume"])],
)
def test_the_rows_of_several_processes_are_those_of_one(tmp_path, file_format, size, resumed):
    # Five processes for three batches: some have none.
    alone("fit", "--data", "demo:", "-o", "guard", "-q", cwd=tmp_path)
    command = ["predict", "guard", "--data", "demo:", "--format", file_format, "-q", "--top-k", 2]
    command += ["-b", 150]
    alone(*command, "-o", "one", "--review", "queue-one", cwd=tmp_path)
    command += ["-o", "many", "--review", "queue-many", *resumed]
    found = ended(start(command, size, cwd=tmp_path))
    assert {code for code, _, _ in found} == {0}, found
    assert found[0][1].endswith(" REJECT: many; 14 for review: queue-many\n")
    for one, many in (("one", "many"), ("queue-one", "queue-many")):
        assert (tmp_path / many).read_bytes() == (tmp_path / one).read_bytes()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"guard", "one", "queue-one", "many", "queue-many"}


@pytest.mark.slow
def test_another_number_of_processes_does_not_begin_anew(tmp_path):
    alone("fit", "--data", "demo:", "-o", "guard", "-q", cwd=tmp_path)
    command = ["predict", "guard", "--data", "demo:", "-o", "out", "--resume", "-q"]
    (tmp_path / "out.shard-0-of-3.part.journal").write_text("")
    found = ended(start(command, 2, cwd=tmp_path))
    assert [code for code, _, _ in found] == [3, 3]
    assert "with 2 process(es)" in found[0][2]
    assert "of a run with 3; go on with 3 processes" in found[0][2]


@pytest.mark.slow
def test_torchrun_itself(tmp_path):
    """The command of the README, and torchrun's own way with a process that is killed."""
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    begin += ["-m", "ebm_guard"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HOW": "die"}
    words = ["fit", "--data", "demo:", "-o", "guard", "-q"]
    done = subprocess.run(
        [*begin, *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "guard").is_file()
    (tmp_path / "net.py").write_text(FAILING)
    words = ["report", "--model", "net.py:net", "--data", "demo:", "-b", "32", "-q", "-o", "out"]
    dead = subprocess.run(
        [*begin, *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert dead.returncode == 1
    assert not (tmp_path / "out").exists()
