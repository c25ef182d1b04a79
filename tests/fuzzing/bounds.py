"""What every parser must keep to: time, memory, and no file that was not asked for."""

import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ebm_guard.deploy.serve.refusal import STATUS, RefusedError
from ebm_guard.errors import EbmGuardError

SECONDS = 5
MEGABYTES = 300
LINUX = sys.platform == "linux"


@dataclass(frozen=True)
class Target:
    """A parser under test.

    Args:
        name: of what is parsed.
        make: (Random) -> input, as bytes, text, or {file name: bytes}.
        run: (input, folder of its own) -> whether it was taken; asserts that it was read rightly.
    """

    name: str
    make: Callable
    run: Callable


class BrokenError(AssertionError):
    """An input that was neither taken nor refused, or that broke a bound."""


@dataclass
class Outcomes:
    """Counts of one parser, the dearest input, and what broke."""

    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    megabytes: float = 0.0
    broken: list = field(default_factory=list)

    @property
    def inputs(self):
        return self.taken + self.refused + len(self.broken)


def input_of(target, seed):
    """The input of a seed."""
    return target.make(random.Random(f"{target.name} {seed}"))


def try_one(target, seed, root, outcomes):
    """Parse one input in a fresh folder under the bounds.

    Raises:
        BrokenError: with the seed, from which the input can be made again.
    """
    given = input_of(target, seed)
    place = root / "here"
    place.mkdir(parents=True)
    before, base = listing(root), peak_from_here()
    start = time.perf_counter()
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taken = bool(target.run(given, place))
    except EbmGuardError as error:
        taken = False
        if len(str(error)) < 15:
            raise BrokenError(f"{target.name} {seed}: no message: {error}") from error
    except RefusedError as error:
        taken = False
        if error.reason not in STATUS or error.status >= 500:
            raise BrokenError(f"{target.name} {seed}: {error.reason}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise BrokenError(
            f"{target.name} {seed}: {type(error).__name__}: {str(error)[:200]} "
            f"({last.filename.rpartition('/')[2]}:{last.lineno})"
        ) from error
    finally:
        seconds = time.perf_counter() - start
        used = (peak_from_here(reset=False) - base) / 2**20
        outcomes.seconds += seconds
        outcomes.slowest = max(outcomes.slowest, seconds)
        outcomes.megabytes = max(outcomes.megabytes, used)
        after = listing(root)
        shutil.rmtree(place, ignore_errors=True)
    if taken:
        outcomes.taken += 1
    else:
        outcomes.refused += 1
    if used > MEGABYTES:
        raise BrokenError(f"{target.name} {seed}: {used:.0f} MiB")
    if before != after:
        raise BrokenError(f"{target.name} {seed}: wrote {sorted(after ^ before)}")


def listing(root):
    """All that lies beside the input's own folder."""
    return {path for path in root.parent.rglob("*") if root / "here" not in path.parents}


@contextlib.contextmanager
def bounded(seconds=SECONDS, megabytes=2000):
    """Stop what takes too long, and let no allocation succeed that is far too large."""
    if not LINUX:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # The processor's time, not the clock's: a busy machine is no fault of a parser.
    old = signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (virtual + megabytes * 2**20, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class TooSlowError(BaseException):
    """Not an Exception: no handler of a parser may take it for damage."""


def _too_slow(*_):
    raise TooSlowError("more CPU time than allowed")


def peak_from_here(*, reset=True):
    """Bytes of the highest resident memory, counted from now on where it is reset."""
    if not LINUX:
        return 0
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024
