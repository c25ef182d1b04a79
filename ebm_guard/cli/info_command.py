"""``ebm-guard info``: what is inside a saved guard."""

from __future__ import annotations

import json

import click

from ebm_guard.cli.options import json_option


@click.command("info")
@click.argument("guard_path", metavar="GUARD")
@json_option
def command(guard_path: str, as_json: bool) -> None:
    """Verify a saved guard and say what it was fitted on and what it promises."""
    from ebm_guard.deploy.serve.identity import saved_sha256
    from ebm_guard.errors import ArtifactError, EbmGuardError
    from ebm_guard.gate.artifact import read_artifact
    from ebm_guard.gate.storage import describe_manifest

    _, manifest = read_artifact(guard_path)
    try:
        identity = f"sha256:{saved_sha256(guard_path)}"
    except EbmGuardError as error:
        identity = f"not known: {error}"
    if as_json:
        click.echo(json.dumps({**manifest, "identity": identity}, indent=1, allow_nan=False))
        return
    try:
        rows = describe_manifest(manifest)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{guard_path} lacks what this version describes ({error}); fit the guard again"
        ) from None
    for word, sentence in rows:
        served = f"; served as {identity}" if word == "created" else ""
        click.echo(f"{word:>12}  {sentence}{served}")
