"""Compare exported programs with the guard they were made of, row by row, on real nets and data.

    OMP_NUM_THREADS=1 python reports/export/parity.py --data DIR [--nets NAME ...]

CIFAR-10: guards fitted on the first 2,000 test images, compared on all 10,000 (so on the rows that
set the cut, too), 1,200 textures and 3,000 images of CIFAR-100. ImageNet: fitted on every second of
1,000 images, compared on half of the others and on every fourth of 250 textures. Each net has one
guard for each score or gate, exported as a torch and as an ONNX program. Writes results.json and
README.md beside this file after each program, and goes on where an earlier run was stopped
(``--anew`` does not). Exits with 1 where a decision differs with the score away from its cut.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_guard import Guard, Predictions, wrap
from ebm_guard.data import batches, open_source
from ebm_guard.deploy import Exported, ExportedOutput, export, load_exported
from ebm_guard.deploy.export_parity import ROWS
from ebm_guard.errors import EbmGuardError, EbmGuardWarning
from ebm_guard.gate import INVALID, Decision
from ebm_guard.model.loading import load_model
from ebm_guard.predictions import LinearHead

HERE = Path(__file__).parent
NETS = Path(__file__).parents[2] / "examples" / "published_nets.py"
FORMATS = ("torch", "onnx")
GATES: dict[str, dict[str, Any]] = {
    "energy": {},
    "msp": {"score": "msp"},
    "knn": {"score": "knn"},
    "vim": {"score": "vim"},
    "mahalanobis": {"score": "mahalanobis"},
    "energy, cuts by class": {"per_class": True},
    "energy, certified risk 0.1": {"risk": 0.1},
    "energy, certified risk 0.3": {"risk": 0.3},
}
KEY = ("net", "gate", "input", "format")
# Net, gate, kind of input, format.
Key = tuple[str, str, str, str]
OUTPUTS = ("logits", "probabilities", "energy", "score", "p_value")


@dataclass(frozen=True)
class Net:
    """A published network and the data of its comparison.

    Args:
        name: factory in examples/published_nets.py.
        weights: file.
        known: spec of the labelled rows.
        fit: which of these rows fit the guards.
        compared: which of these rows are compared, and of other sets.
        others: specs of further rows.
        batch: rows of one pass.
        gates: names of those that are compared.
    """

    name: str
    weights: str
    known: str
    fit: slice
    compared: tuple[slice, slice]
    others: tuple[str, ...]
    batch: int
    gates: tuple[str, ...]


ALL = (
    Net(
        "cifar10_resnet20",
        "cifar10_resnet20.safetensors",
        "npz:{}/cifar10_test.npz",
        slice(2000),
        (slice(None), slice(None)),
        ("npz:{}/dtd_1200_32x32.npz", "npz:{}/cifar100_test3k.npz"),
        250,
        tuple(GATES)[:-1],
    ),
    Net(
        "imagenet_tf_efficientnet_lite0",
        "imagenet_tf_efficientnet_lite0_fp16.safetensors",
        "folder:{}/imagenet_sample",
        slice(0, None, 2),
        (slice(1, None, 4), slice(0, None, 4)),
        ("folder:{}/dtd_sample",),
        50,
        # One image a class: scores that fit classes need more.
        ("energy", "msp", "vim", "energy, certified risk 0.3"),
    ),
)


class Rows:
    """All inputs of one net, and what the net itself says about them."""

    def __init__(self, net: Net, data: Path) -> None:
        self.batch = net.batch
        model = load_model(f"{NETS}:{net.name}", checkpoint=data / net.weights)
        self.classifier = wrap(model).classifier
        known, labels = self._read(net.known.format(data))
        self.sets = [known[net.compared[0]]]
        self.sets += [self._read(spec.format(data))[0][net.compared[1]] for spec in net.others]
        self.classifier.probe_head(known[:8])
        logits, features = zip(*map(self._run, known[net.fit].split(self.batch)), strict=True)
        self.fit_rows = Predictions(
            torch.cat(logits).numpy(),
            features=torch.cat(features).numpy(),
            labels=labels[net.fit].numpy(),
            head=LinearHead.of_model(self.classifier.head),
        )
        self.outputs = [self._run(x) for x in self.batches()]
        # Of each set a part, for the comparison at the export.
        share = ROWS // len(self.sets) + 1
        self.example = torch.cat([x[:: max(1, len(x) // share)][:share] for x in self.sets])[:ROWS]

    def fitted(self, settings: dict[str, Any]) -> Guard:
        """Return a new guard around the net."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EbmGuardWarning)
            return wrap(self.classifier.model).fit(self.fit_rows, canary=False, **settings)

    def batches(self) -> Iterator[Tensor]:
        """Yield all rows, a batch at a time; the last row of each set comes alone."""
        for x in self.sets:
            yield from x[:-1].split(self.batch)
            yield x[-1:]

    def pixels(self, x: Tensor) -> Tensor:
        """Undo the normalisation."""
        return self.classifier.preprocessing.denormalize(x).clamp(0, 1)

    def _read(self, spec: str) -> tuple[Tensor, Tensor]:
        source = open_source(spec)
        read = list(batches(source, self.classifier.preprocessing, batch_size=self.batch))
        return (
            torch.cat([batch.inputs for batch in read]),
            torch.cat([torch.as_tensor(batch.labels) for batch in read]),
        )

    @torch.no_grad()
    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.classifier.forward(x, features=True)
        return found.logits, found.features


def decided(guard: Guard, rows: Rows) -> Decision:
    """Let the guard decide on all rows.

    The net runs once for all guards; that ``guard(x)`` says the same is checked on the first batch.
    """
    found = [guard.decide(logits, features) for logits, features in rows.outputs]
    first = guard(next(rows.batches()))
    for name in ("logits", "score", "accept", "p_value", "confidence"):
        if not torch.equal(getattr(first, name), getattr(found[0], name)):
            raise SystemExit(f"guard(x) and guard.decide give another {name}")
    return Decision.concatenate(found)


def run(program: Exported, rows: Rows) -> ExportedOutput:
    """Let the program decide on all rows."""
    pixels = program.facts["input"]["kind"] == "pixels"
    parts = [program(rows.pixels(x) if pixels else x) for x in rows.batches()]
    names = (*OUTPUTS, "accept")
    joined = tuple(torch.cat([getattr(part, name) for part in parts]) for name in names)
    return ExportedOutput.of(joined, parts[0].keeps_prediction)


def compared(guard: Guard, program: Exported, eager: Decision, found: ExportedOutput) -> Any:
    """Count what agrees."""
    tolerance = program.facts["parity"]["tolerance"]["score"]
    distance = (eager.score - eager.cut).abs()
    differ = eager.accept != found.accept
    near = distance <= tolerance
    if guard.rule is not None:
        low, high = guard.rule.cuts.cpu().unbind()
        near |= (eager.score - high).abs() <= tolerance
        near |= (eager.confidence - low).abs() <= 1e-4
    calibrated = guard.calibrator
    log_p = torch.log_softmax(eager.logits, dim=1)
    if calibrated is not None:
        log_p = calibrated.log_probabilities(eager.logits)
    valid = eager.status != INVALID
    wanted = {
        "logits": eager.logits,
        "probabilities": log_p.exp(),
        "energy": eager.energy,
        "score": eager.score,
        "p_value": eager.p_value,
    }
    return {
        "decisions": len(eager),
        "accepted": int(eager.accept.sum()),
        "invalid": int((~valid).sum()),
        "ties": int((distance == 0).sum()),
        "near_the_cut": int(near.sum()),
        "differing": int(differ.sum()),
        "differing_away_from_the_cut": int((differ & ~near).sum()),
        "differing_status": int((eager.status != found.status).sum()),
        "differing_label": int((eager.label != found.label).sum()),
        "largest_distance_of_a_differing_score": float(distance[differ].max())
        if bool(differ.any())
        else None,
        "largest_difference": {
            name: float((wanted[name] - getattr(found, name))[valid].double().abs().max())
            for name in OUTPUTS
        },
        "score_tolerance": tolerance,
        "score_range": [float(eager.score[valid].min()), float(eager.score[valid].max())],
    }


def of_net(net: Net, data: Path, folder: Path, done: Set[Key]) -> Iterator[dict[str, Any]]:
    """Yield one row for each gate, input kind and format that is not done."""
    left = [key for key in keys(net) if key not in done]
    if not left:
        return
    rows = Rows(net, data)
    for gate in dict.fromkeys(key[1] for key in left):
        start = dict(zip(KEY, (net.name, gate), strict=False))
        try:
            guard = rows.fitted(GATES[gate])
        except EbmGuardError as error:
            for _, _, kind, form in (key for key in left if key[1] == gate):
                yield start | {"input": kind, "format": form, "refused": str(error)}
            continue
        eager = decided(guard, rows)
        for _, _, kind, form in (key for key in left if key[1] == gate):
            path = folder / ("gate.pt2" if form == "torch" else "gate.onnx")
            example = rows.pixels(rows.example) if kind == "pixels" else rows.example
            export(guard, form, path, input=kind, example=example)
            program = load_exported(path)
            found = run(program, rows)
            yield start | {
                "input": kind,
                "format": form,
                **compared(guard, program, eager, found),
                "bytes": path.stat().st_size,
            }


def keys(net: Net) -> Iterator[Key]:
    """Yield what tells the rows of a net apart."""
    for gate in net.gates:
        for kind in ("model", "pixels") if gate == "energy" else ("model",):
            for form in FORMATS:
                yield net.name, gate, kind, form


def table(rows: list[dict[str, Any]]) -> str:
    """Return the page's table."""
    head = (
        "| net | gate | program | input | decisions | accepted | ties | near the cut | differing | "
        "of those away from the cut | labels differing | logits | probabilities | energy | score | "
        "p-value |"
    )
    lines = [head, "| --- " * 4 + "| ---: " * 12 + "|"]
    for row in rows:
        start = f"| {row['net']} | {row['gate']} |"
        if "refused" in row:
            refused = f"refused: {row['refused']}"
            lines.append(f"{start} {row['format']} | {row['input']} | {refused} |" + " |" * 11)
            continue
        gaps = " | ".join(f"{row['largest_difference'][name]:.1e}" for name in OUTPUTS)
        lines.append(
            f"{start} {row['format']} | {row['input']} | {row['decisions']:,} | "
            f"{row['accepted']:,} | {row['ties']} | {row['near_the_cut']} | {row['differing']} | "
            f"{row['differing_away_from_the_cut']} | {row['differing_label']} | {gaps} |"
        )
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """Return README.md."""
    rows = [row for row in results["rows"] if "refused" not in row]
    total, differ = (sum(row[name] for row in rows) for name in ("decisions", "differing"))
    away = sum(row["differing_away_from_the_cut"] for row in rows)
    words = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"""# Exported programs against the guard

Made by `OMP_NUM_THREADS=1 python reports/export/parity.py --data DIR` ({words};
{results["cpu_seconds"]:,} s of CPU). All figures are in `results.json`.

Of {total:,} decisions by exported programs, {differ} differ from the guard's own, {away} of them with
the score away from its cut. The guards' calibration rows are among the CIFAR-10 rows, so that ties with the cut
occur (column `ties`: score equal to the cut); a row is `near the cut` where its score lies within the
tolerance that the export measured by (1e-4 of the largest score), or a confidence within 1e-4 of a
certified cut. The last five columns are the largest absolute differences of the outputs. A program
from pixels gets pixels that were made of the normalised input again, so a rounding is added.

{table(results["rows"])}
"""


def write(folder: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    """Write both files, the rows in the order of the script."""
    order = [key for net in ALL for key in keys(net)]
    rows.sort(key=lambda row: order.index(key_of(row)))
    results = {
        "versions": versions(),
        "python": platform.python_version(),
        "cpu_seconds": round(seconds),
        "rows": rows,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "README.md").write_text(page(results))


def key_of(row: dict[str, Any]) -> Key:
    """Return what tells a row from the others."""
    net, gate, kind, form = (str(row[name]) for name in KEY)
    return net, gate, kind, form


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of real data and weights")
    names = [net.name for net in ALL]
    parser.add_argument("--nets", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--anew", action="store_true", help="take nothing over")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, seconds = [], 0.0
    stored = given.output / "results.json"
    if stored.exists() and not given.anew:
        older = json.loads(stored.read_text())
        if older["versions"] != versions():
            raise SystemExit(f"{stored} is of other versions; give --anew")
        rows, seconds = older["rows"], older["cpu_seconds"]
    with tempfile.TemporaryDirectory() as folder:
        for net in (net for net in ALL if net.name in given.nets):
            for row in of_net(net, given.data, Path(folder), set(map(key_of, rows))):
                rows.append(row)
                write(given.output, rows, seconds + time.process_time())
                print(json.dumps(row), file=sys.stderr, flush=True)
    sys.exit(any(row.get("differing_away_from_the_cut") for row in rows))


if __name__ == "__main__":
    main()
