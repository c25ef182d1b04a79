"""``ebm-guard shadow``: two guards of one model on the same traffic."""

from __future__ import annotations

import click

from ebm_guard.cli.options import SPEC_HELP, ModelOptions, json_option, model_options


@click.command("shadow")
@click.argument("old_path", metavar="OLD_GUARD")
@click.argument("new_path", metavar="NEW_GUARD")
@click.option("--data", required=True, metavar="SPEC", help=f"The traffic: {SPEC_HELP}.")
@json_option
@model_options
def command(options: ModelOptions, old_path: str, new_path: str, data: str, as_json: bool) -> None:
    r"""Say where a new guard decides otherwise than the old one; no labels are needed.

    \b
    ebm-guard shadow guard.safetensors june.safetensors --model resnet50.tv_in1k --data today/
    """
    import json

    from ebm_guard.cli.session import Session, warnings_as_lines
    from ebm_guard.errors import NotFittedError
    from ebm_guard.gate import Guard, compare

    with warnings_as_lines():
        session = Session(options, [data], old_path)
        old = session.guard
        if old is None:
            raise NotFittedError(f"{old_path} holds no guard")
        model = None if session.classifier is None else session.classifier.model
        with session.autocast():
            new = Guard.load(new_path, model)
        features = old.score.needs_features or new.score.needs_features
        found = compare(
            old, new, session.predictions(data, "evaluation", "data", features=features)
        )
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return
    click.echo(found.sentence)
    for row in found.changed:
        facts = row.to_dict()
        click.echo("  " + ", ".join(f"{key} {value}" for key, value in facts.items()))
