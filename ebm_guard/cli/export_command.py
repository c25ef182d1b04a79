"""``ebm-guard export``: the model and its gate as one program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options

if TYPE_CHECKING:
    from torch import Tensor

    from ebm_guard.cli.session import Session


@click.command("export")
@click.argument("guard_path", metavar="GUARD")
@click.option(
    "--format",
    "file_format",
    required=True,
    type=click.Choice(["torch", "onnx"]),
    help="A torch.export program (.pt2), or ONNX.",
)
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the program goes.")
@click.option(
    "--input",
    "input_kind",
    type=click.Choice(["model", "pixels"]),
    default="model",
    show_default=True,
    help="What the program takes: the model's input, or [0, 1] pixels (normalised inside).",
)
@click.option("--opset", type=click.IntRange(min=18), help="ONNX opset; default: the exporter's.")
@click.option(
    "--data",
    metavar="SPEC",
    help="Images to compare the program with the guard on (256 are used); default: the guard's "
    f"8 canary inputs and mixes of them: {SPEC_HELP}.",
)
@json_option
@model_options
def command(
    options: ModelOptions,
    guard_path: str,
    file_format: str,
    output: str,
    input_kind: str,
    opset: int | None,
    data: str | None,
    as_json: bool,
) -> None:
    r"""Write model, calibrator and gate as one program, checked against the guard row by row.

    \b
    ebm-guard export guard.safetensors --model resnet50.tv_in1k --checkpoint w.safetensors \\
        --format onnx --output gate.onnx
    """
    import json

    from ebm_guard.cli.demo_guard import demo_specs
    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.deploy import export
    from ebm_guard.errors import InvalidInputError, NotFittedError
    from ebm_guard.files import check_writable

    if options.amp:
        raise InvalidInputError(
            "got --amp, and a program computes without autocast; leave it out, and fit the guard "
            "without it too"
        )
    check_writable(output)
    with warnings_as_lines():
        specs = [] if data is None else [data]
        if options.model is None and not specs:
            specs = demo_specs(guard_path)
        session = Session(options, specs, guard_path)
        session.require_classifier()
        if session.guard is None:
            raise NotFittedError(f"{guard_path} holds no guard")
        example = None if data is None else _example(session, data, pixels=input_kind == "pixels")
        program = export(
            session.guard, file_format, output, input=input_kind, example=example, opset=opset
        )
    if as_json:
        click.echo(json.dumps({"output": output, **program.facts}, allow_nan=False))
        return
    parity = program.facts["parity"]
    same = parity["rows"] - parity["decisions_that_differ"]
    click.echo(
        f"{output}: takes {_shape(program.facts['input'])}; {same} of {parity['rows']} decisions "
        f"equal the guard's ({parity['accepted']} accepted, {parity['near_the_cut']} too near a "
        "cut to tell)"
    )


def _example(session: Session, data: str, *, pixels: bool) -> Tensor:
    """Return the first 256 images of a spec as the program takes them."""
    import torch

    from ebm_guard.data import parse_spec
    from ebm_guard.data.specs import STORED_KINDS
    from ebm_guard.deploy.export_parity import ROWS
    from ebm_guard.errors import DataError, InvalidInputError

    spec = parse_spec(data)
    if spec.kind in STORED_KINDS:
        raise InvalidInputError(
            f"got --data {data}, which holds no images; a program is compared on images"
        )
    found: list[Tensor] = []
    for batch in session.batches(session.open(spec, "evaluation", "data")):
        found.append(batch.inputs)
        if sum(map(len, found)) >= ROWS:
            break
    if not found:
        raise DataError(f"{data} holds no image that can be read")
    inputs = torch.cat(found)[:ROWS]
    preprocessing = session.require_classifier().preprocessing
    if not pixels or preprocessing is None:
        return inputs
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    # Bicubic resizing overshoots by design.
    return (inputs * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


def _shape(wanted: dict[str, Any]) -> str:
    sides = ", ".join(map(str, wanted["shape"]))
    kind = "[0, 1] pixels" if wanted["kind"] == "pixels" else "the model's input"
    return f"{kind} (B, {sides})"
