"""Rows that several processes write: a file each beside the output, joined in order at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ebm_guard.deploy.batch import Outputs, Read, Tally, write_once, write_resumable
from ebm_guard.deploy.batch_formats import Row, parquet_of_lines, text_format
from ebm_guard.distributed import World
from ebm_guard.errors import DataError
from ebm_guard.files import replace_file

_BLOCK = 1 << 20


def shard_of(outputs: Outputs, world: World) -> Outputs:
    """Return where a process writes its rows; those of a Parquet file wait as JSON lines.

    Args:
        outputs: of all rows.
        world: the processes.

    Example:
        >>> shard_of(Outputs(Path("a.csv"), "csv", ("id",)), World(1, 4)).output.name
        'a.csv.shard-1-of-4'
    """

    def own(path: Path) -> Path:
        return path.with_name(f"{path.name}.shard-{world.rank}-of-{world.size}")

    return replace(
        outputs,
        output=own(outputs.output),
        file_format="jsonl" if outputs.file_format == "parquet" else outputs.file_format,
        review=None if outputs.review is None else own(outputs.review),
    )


def write_shared(
    outputs: Outputs, batches: Iterable[Sequence[Row]], tally: Tally, world: World
) -> None:
    """Write the rows of all processes into one file, or nothing.

    Args:
        outputs: where they go.
        batches: the rows of this process.
        tally: is filled with the rows of all.
        world: the processes, in the order of their rows.

    Raises:
        DataError: a place cannot be written, or is not shared by the processes.
        ProcessError: another process failed, or is gone.
    """
    own = shard_of(outputs, world)
    try:
        with world.together("deciding"):
            write_once(own, batches, tally)
        _finish(outputs, tally, world)
    finally:
        for path in own.paths:
            path.unlink(missing_ok=True)


def write_shared_resumable(
    outputs: Outputs, identity: Mapping[str, Any], read: Read, tally: Tally, world: World
) -> None:
    """Write the rows of all processes, each going on where it was stopped in an earlier run.

    Args:
        outputs: where they go.
        identity: what the rows depend on, as JSON types.
        read: gives the batches of this process behind a number of its rows.
        tally: is filled with the rows of all.
        world: the processes; as many as in the earlier run.

    Raises:
        DataError: the earlier run was another one, or a place cannot be written.
        ProcessError: another process failed, or is gone; what is written is kept.
    """
    own = shard_of(outputs, world)
    part = {"process": world.rank, "processes": world.size}
    with world.together("deciding"):
        refuse_another_number(outputs, world)
        write_resumable(own, dict(identity) | part, read, tally, keep_journal=True)
    _finish(outputs, tally, world)
    # Not before all rows have their place: until then an interruption may need them.
    for path in (own.journal, *own.paths):
        path.unlink(missing_ok=True)


def _finish(outputs: Outputs, tally: Tally, world: World) -> None:
    """Join the files on the first process, and count the rows of all on every one."""
    told = {"counts": dict(tally.counts), "broken": tally.broken, "taken_over": tally.taken_over}
    found = [json.loads(text) for text in world.texts(json.dumps(told))]
    tally.counts.clear()
    for other in found:
        tally.counts.update(other["counts"])
    tally.broken = sum(other["broken"] for other in found)
    tally.taken_over = sum(other["taken_over"] for other in found)
    with world.together("joining the rows"):
        if world.first:
            _join(
                outputs, [shard_of(outputs, World(rank, world.size)) for rank in range(world.size)]
            )


def _join(outputs: Outputs, shards: Sequence[Outputs]) -> None:
    with ExitStack() as stack:
        # All files are whole before any of them gets its name.
        new = stack.enter_context(replace_file(outputs.output))
        queue = None
        if outputs.review is not None:
            queue = stack.enter_context(replace_file(outputs.review))
        header = text_format(shards[0].file_format, shards[0].fields).header
        parts = [shard.output for shard in shards]
        if outputs.file_format == "parquet":
            with TemporaryDirectory(dir=new.parent) as folder:
                lines = Path(folder) / "lines"
                _concatenate(lines, parts, header)
                parquet_of_lines(lines, new, outputs.fields)
        else:
            _concatenate(new, parts, header)
        if queue is not None:
            _concatenate(queue, [shard.review for shard in shards if shard.review], b"")


def _concatenate(path: Path, parts: Sequence[Path], header: bytes) -> None:
    """Write files behind each other; each begins with the header, the whole has it once."""
    with path.open("wb") as new:
        new.write(header)
        for part in parts:
            try:
                file = part.open("rb")
            except FileNotFoundError:
                raise DataError(
                    f"the first process does not see {part}, which another one wrote; --output "
                    "(and --review) must lie on a disk that all machines share"
                ) from None
            with file:
                file.seek(len(header))
                shutil.copyfileobj(file, new, _BLOCK)


def refuse_another_number(outputs: Outputs, world: World) -> None:
    """Refuse to begin anew beside rows that another number of processes left.

    Raises:
        DataError: with the number.
    """
    ending = f"-of-{world.size}.part.journal"
    for path in outputs.output.parent.glob(f"{escape(outputs.output.name)}.shard-*-of-*.journal"):
        if not path.name.endswith(ending):
            number = path.name.removesuffix(".part.journal").rpartition("-")[2]
            raise DataError(
                f"got --resume with {world.size} process(es), and {path} of a run with {number}; "
                f"go on with {number} processes, or remove its files to start anew"
            )
    if world.size > 1 and outputs.journal.exists():
        raise DataError(
            f"got --resume with {world.size} processes, and {outputs.journal} of a run with one; "
            "go on with one process, or remove it and the .part files beside it to start anew"
        )
