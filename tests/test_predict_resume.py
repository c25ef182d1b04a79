"""Runs of predict that are stopped anywhere end with the files of a run that nobody stopped."""

import contextlib
import itertools
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from predict_cases import (
    FORMATS,
    IDENTITY,
    Killed,
    Lines,
    dying,
    files_of,
    once,
    outputs_in,
    run_to_the_end,
)

from ebm_guard.deploy import batch
from ebm_guard.deploy.batch import Tally, write_once, write_resumable
from ebm_guard.deploy.batch_journal import Journal
from ebm_guard.errors import DataError

pytest.importorskip("pyarrow", reason="pyarrow is the extra `parquet`")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files and counts of the run that nobody stopped, by format."""
    found = {name: once(tmp_path_factory.mktemp(name) / "whole", name, Lines()) for name in FORMATS}
    # A function, because hypothesis would print a whole dict of files.
    return lambda name: found[name]


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_run_that_is_killed_at_every_step_ends_with_the_same_files(
    file_format, whole, tmp_path, monkeypatch
):
    files, counts = whole(file_format)
    for step in itertools.count():
        folder = tmp_path / str(step)
        outputs, lines = outputs_in(folder, file_format), Lines()
        death = dying(monkeypatch, step, share=(step % 3) / 2)
        with death as left, contextlib.suppress(Killed):
            run_to_the_end(outputs, lines)
        if left[0] >= 0:
            assert step > 20, "too few steps to have died at each"
            break
        # It died behind its very last step: a run that came to its end is forgotten.
        over = files_of(folder) == files
        again = Lines()
        tally = run_to_the_end(outputs, again)
        assert files_of(folder) == files, step
        assert (tally.counts, tally.broken) == (counts.counts, counts.broken)
        # At most the batch that was not written is made twice, and no row is lost.
        assert over or len({*lines.made} & {*again.made}) <= lines.batch
        assert sorted({*lines.made, *again.made}) == list(range(23))
        assert tally.taken_over + len(again.made) == 23


@given(
    deaths=st.lists(st.tuples(st.integers(0, 25), st.floats(0, 1)), max_size=6),
    file_format=st.sampled_from(FORMATS),
)
@settings(max_examples=40, deadline=None)
def test_a_run_that_is_killed_again_and_again(deaths, file_format, whole):
    files, counts = whole(file_format)
    folder = Path(tempfile.mkdtemp())
    outputs, kept = outputs_in(folder, file_format), 0
    for step, share in deaths:
        tally = Tally()
        with (
            pytest.MonkeyPatch.context() as patch,
            dying(patch, step, share),
            contextlib.suppress(Killed),
        ):
            write_resumable(outputs, IDENTITY, Lines(), tally)
        # Either it died before it knew the rows of the run before it, or it has them all.
        # (And a batch more, where it died right behind the mark.)
        assert tally.rows == 0 or kept <= tally.taken_over <= kept + Lines().batch
        # A run that came to its end is forgotten; the next one is a new run.
        over = not outputs.journal.exists()
        kept = 0 if over else max(kept, tally.kept)
        assert not over or tally.rows in {0, 23}
    tally = run_to_the_end(outputs, Lines())
    assert files_of(folder) == files
    assert tally.counts == counts.counts
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Files of a run that died before its last batch, by format."""
    found = {}
    for name in FORMATS:
        folder = tmp_path_factory.mktemp(name) / "stopped"
        outputs, lines = outputs_in(folder, name), Lines()

        def read(done, lines=lines):
            yield from itertools.islice(lines(done), 5)
            raise Killed

        with pytest.raises(Killed):
            write_resumable(outputs, IDENTITY, read, Tally())
        found[name] = files_of(folder)
    return lambda name: found[name]


PARTS = ("rows.part", "review.jsonl.part", "rows.part.journal")


@given(
    file_format=st.sampled_from(FORMATS),
    cuts=st.fixed_dictionaries({}, optional={name: st.floats(0, 1) for name in PARTS[:2]}),
    journal=st.none() | st.floats(0, 1),
    longer=st.sampled_from(PARTS),
    more=st.binary(max_size=40),
    times=st.sampled_from([1, 500]),
)
@settings(max_examples=80, deadline=None)
def test_files_that_lost_their_end_are_gone_on_with(
    file_format, cuts, journal, longer, more, times, whole, stopped
):
    """As after a power cut, where any of the files may be shorter, or end in garbage."""
    folder = Path(tempfile.mkdtemp())
    held = dict(stopped(file_format))
    for name, share in {**cuts, **({} if journal is None else {PARTS[2]: journal})}.items():
        held[name] = held[name][: round(share * len(held[name]))]
    # A journal's first line is whole before there is anything else.
    if b"\n" in held[PARTS[2]] or longer != PARTS[2]:
        held[longer] += more * times
    for name, content in held.items():
        (folder / name).write_bytes(content)
    run_to_the_end(outputs_in(folder, file_format), Lines())
    assert files_of(folder) == whole(file_format)[0]
    shutil.rmtree(folder)


@given(name=st.sampled_from(PARTS), place=st.floats(0, 1), flip=st.integers(1, 255))
@settings(max_examples=80, deadline=None)
def test_a_changed_byte_is_found(name, place, flip, whole, stopped):
    folder = Path(tempfile.mkdtemp())
    for each, content in stopped("jsonl").items():
        (folder / each).write_bytes(content)
    content = bytearray((folder / name).read_bytes())
    content[min(len(content) - 1, int(place * len(content)))] ^= flip
    (folder / name).write_bytes(content)
    first_line = stopped("jsonl")[PARTS[2]].index(b"\n") + 1
    if name == PARTS[2] and int(place * len(content)) < first_line:
        # Only this line says whose rows these are: without it nothing is touched.
        with pytest.raises(DataError, match=r"damaged.*start anew"):
            run_to_the_end(outputs_in(folder), Lines())
        assert (folder / PARTS[0]).read_bytes() == stopped("jsonl")[PARTS[0]]
    else:
        run_to_the_end(outputs_in(folder), Lines())
        assert files_of(folder) == whole("jsonl")[0]
    shutil.rmtree(folder)


def test_rows_of_another_run_are_not_taken(stopped, tmp_path):
    for name, content in stopped("csv").items():
        (tmp_path / name).write_bytes(content)
    outputs = outputs_in(tmp_path, "csv")
    with pytest.raises(DataError, match=r"guard was 'one', now 'two'.*start anew"):
        run_to_the_end(outputs, Lines(), IDENTITY | {"guard": "two"})
    assert files_of(tmp_path) == stopped("csv")


def test_a_part_without_its_journal_is_not_touched(tmp_path):
    (tmp_path / "rows.part").write_text("mine")
    with pytest.raises(DataError, match="without its journal"):
        run_to_the_end(outputs_in(tmp_path), Lines())
    assert files_of(tmp_path) == {"rows.part": b"mine"}


def test_two_processes_do_not_write_one_file(tmp_path):
    outputs = outputs_in(tmp_path)
    other = Journal(outputs.journal)
    with pytest.raises(DataError, match="another process writes rows at this moment"):
        run_to_the_end(outputs, Lines())
    other.close()
    assert run_to_the_end(outputs, Lines()).rows == 23


@pytest.fixture
def small_disk():
    """No file may be longer than 2,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_full_disk(file_format, whole, small_disk, tmp_path):
    """Without a journal nothing is left; with one the run goes on when there is room."""
    lines = Lines()
    with pytest.raises(DataError, match=r"cannot write .*too large.*--output"):
        write_once(outputs_in(tmp_path / "once", file_format), lines(0), Tally())
    assert files_of(tmp_path / "once") == {}
    outputs, tally = outputs_in(tmp_path / "kept", file_format), Tally()
    with pytest.raises(DataError, match=r"cannot write .*too large.*free space"):
        write_resumable(outputs, IDENTITY, Lines(), tally)
    assert 0 < tally.kept < 23
    small_disk()
    again = Lines()
    assert run_to_the_end(outputs, again).taken_over == tally.kept
    assert again.made == list(range(tally.kept, 23))
    assert files_of(tmp_path / "kept") == whole(file_format)[0]


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    outputs = outputs_in(tmp_path)
    outputs.output.write_text("older")

    def read(done):
        yield from itertools.islice(Lines()(done), 2)
        raise Killed

    with pytest.raises(Killed):
        write_resumable(outputs, IDENTITY, read, Tally())
    assert outputs.output.read_text() == "older"
    assert not outputs.review.exists()
    run_to_the_end(outputs, Lines())
    assert len(outputs.output.read_bytes().splitlines()) == 23
    assert set(files_of(tmp_path)) == {"rows", "review.jsonl"}


def test_an_older_parquet_of_as_many_rows_is_not_taken_for_the_new_one(tmp_path, whole):
    old, new = Lines(), Lines()
    old.row = lambda number: {**Lines.row(old, number), "score": 7.0}
    outputs = outputs_in(tmp_path / "rows", "parquet")
    write_once(outputs, old(0), Tally())
    # All rows are decided, and the process dies before they are turned into Parquet.
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(batch, "parquet_of_lines", killed)
        write_resumable(outputs, IDENTITY, new, Tally())
    (outputs.output.with_name("rows.part")).unlink()
    tally = run_to_the_end(outputs, Lines())
    assert tally.taken_over == 0
    assert files_of(tmp_path / "rows") == whole("parquet")[0]


def killed(*_):
    raise Killed


@pytest.mark.parametrize("resumed", [False, True])
def test_errors_of_reading_are_not_called_errors_of_writing(tmp_path, resumed):
    def read(done):
        yield from itertools.islice(Lines()(done), 2)
        raise ConnectionResetError("the share is gone")

    outputs = outputs_in(tmp_path / "rows")
    rows = (IDENTITY, read) if resumed else (read(0),)
    write = write_resumable if resumed else write_once
    with pytest.raises(DataError, match="cannot read the data: ConnectionResetError: the share"):
        write(outputs, *rows, Tally())
