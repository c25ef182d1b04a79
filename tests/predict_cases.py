"""Rows, and a write that dies, for the tests of long runs of predict."""

import math
from contextlib import contextmanager
from pathlib import Path

from ebm_guard.deploy import batch, batch_journal
from ebm_guard.deploy.batch import Outputs, Tally, write_once, write_resumable
from ebm_guard.deploy.batch_formats import FORMATS, fields_of

__all__ = ["FORMATS", "IDENTITY", "Killed", "Lines", "dying", "files_of", "once", "outputs_in"]
IDENTITY = {"data": "some", "guard": "one"}
_STATUS = ("ACCEPT", "REJECT", "INVALID", "ACCEPT")


class Killed(BaseException):
    """The process ends here: nothing may catch it."""


class Lines:
    """Rows of all kinds in batches; counts which were made."""

    def __init__(self, n=23, batch=4):
        self.n, self.batch, self.made = n, batch, []

    def row(self, number):
        status = _STATUS[number % 4]
        valid = status != "INVALID"
        energy = -math.pi * number / 7
        return {
            "id": f'image {number}, "ü\n\udcff".png',
            "status": status,
            "accept": status == "ACCEPT",
            "label": number % 3 if valid else -1,
            "class": "a;b" if number % 3 else None,
            "confidence": 1 / (number + 1),
            "energy": energy if valid else None,
            "score": energy if valid else None,
            "p_value": number / (3 * self.n),
            "reason": "" if status == "ACCEPT" else "unreadable: x" if number % 8 < 4 else "why",
            "top": [{"label": 1, "class": "\udcff", "energy": energy}] if valid else [],
        }

    def __call__(self, done):
        assert done % self.batch == 0 or done == self.n
        for start in range(done, self.n, self.batch):
            numbers = range(start, min(self.n, start + self.batch))
            self.made += numbers
            yield [self.row(number) for number in numbers]


def outputs_in(folder, file_format="jsonl", *, review=True):
    folder.mkdir(exist_ok=True)
    queue = folder / "review.jsonl" if review else None
    return Outputs(folder / "rows", file_format, fields_of(top=True), queue)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def once(folder, file_format, lines):
    """Files of a run that nobody stopped, without a journal."""
    tally = Tally()
    write_once(outputs_in(folder, file_format), lines(0), tally)
    return files_of(folder), tally


@contextmanager
def dying(monkeypatch, step, share):
    """Die at the given step: a write of some bytes, a cut, a new name, or a file's end."""
    left = [step]
    write, replace, unlink = batch_journal.write_all, Path.replace, Path.unlink
    sync = batch.os.fsync

    def count():
        left[0] -= 1
        return left[0] < 0

    def dying_write(file, data):
        if count():
            write(file, data[: int(share * len(data))])
            raise Killed
        write(file, data)

    def around(plain):
        def call(*args, **kwargs):
            # Before, or right behind it.
            if count():
                if share > 0.5:
                    plain(*args, **kwargs)
                raise Killed
            return plain(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(batch_journal, "write_all", dying_write)
        patch.setattr(batch, "write_all", dying_write)
        patch.setattr(Path, "replace", around(replace))
        patch.setattr(Path, "unlink", around(unlink))
        patch.setattr(batch.os, "fsync", around(sync))
        patch.setattr(batch, "parquet_of_lines", around(batch.parquet_of_lines))
        yield left


def run_to_the_end(outputs, lines, identity=IDENTITY):
    tally = Tally()
    write_resumable(outputs, identity, lines, tally)
    return tally
