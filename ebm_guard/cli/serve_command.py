"""``ebm-guard serve``: answer requests over HTTP with a guard."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ebm_guard.cli.live_options import live_model_options
from ebm_guard.cli.options import ModelOptions, json_option

if TYPE_CHECKING:
    from ebm_guard.gate import Guard


@click.command("serve")
@click.argument("guard_path", metavar="GUARD")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; 0.0.0.0 for all, behind a proxy that asks who calls.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port; 0 takes a free one.",
)
@click.option(
    "--shadow",
    metavar="GUARD2",
    help="A second artefact of the same model: it is counted in /metrics and never answers.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Rows of one forward pass, and the most rows of one request.",
)
@click.option(
    "--max-delay",
    type=click.FloatRange(min=0, max=60_000),
    default=5.0,
    show_default=True,
    help="Milliseconds that a request waits for others that are in the server already.",
)
@click.option(
    "--queue-size",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Requests in the server at once; the next one is told 503 with Retry-After.",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=10 * 2**20,
    show_default=True,
    help="Longest body of a request.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=32_000_000,
    show_default=True,
    help="Largest image, as its header says, before a pixel is decoded.",
)
@click.option(
    "--body-timeout",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    default=30.0,
    show_default=True,
    help="Seconds that a client has to send its body in.",
)
@click.option(
    "--on-error",
    type=click.Choice(["invalid", "raise"]),
    default="invalid",
    show_default=True,
    help="Where the model raises: answer with the status INVALID, or with HTTP 500.",
)
@click.option(
    "--model-timeout",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    default=60.0,
    show_default=True,
    help="Seconds that one forward pass may take; longer, and /health answers 503.",
)
@click.option(
    "--shutdown-timeout",
    type=click.FloatRange(min=1, max=86_400),
    default=30.0,
    show_default=True,
    help="Seconds to answer what is queued in, after SIGTERM or Ctrl-C; then it ends anyway.",
)
@json_option
@live_model_options
def command(
    options: ModelOptions,
    guard_path: str,
    host: str,
    port: int,
    shadow: str | None,
    max_batch: int,
    max_delay: float,
    queue_size: int,
    max_bytes: int,
    max_pixels: int,
    body_timeout: float,
    on_error: str,
    model_timeout: float,
    shutdown_timeout: float,
    as_json: bool,
) -> None:
    r"""Answer POST /predict with the guard's decision; also /health, /ready and /metrics.

    A request is an image file (the body, or the field `file` of a form), or an array of rows
    written by numpy.save (Content-Type application/x-npy). To go back to an older guard, start
    with the older file. Needs the extra: pip install 'ebm-guard[serve]'.

    \b
    ebm-guard serve guard.safetensors --model resnet50.tv_in1k --port 8000
    curl -F file=@cat.jpg http://127.0.0.1:8000/predict
    """
    from ebm_guard.cli.session import warnings_as_lines
    from ebm_guard.deploy.serve import ServeSettings, make_app, run_server

    settings = ServeSettings(
        max_batch=max_batch,
        max_delay=max_delay / 1000,
        queue_size=queue_size,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        body_timeout=body_timeout,
        on_error=on_error,
        model_timeout=model_timeout,
        autocast=options.amp,
    )
    with warnings_as_lines():
        live, hidden = _guards(options, guard_path, shadow)
        app = make_app(live, shadow=hidden, settings=settings)
    sha256 = app.state.service.identity.sha256

    def started(url: str) -> None:
        if as_json:
            click.echo(json.dumps({"url": url, "sha256": sha256}))
        click.echo(f"serving {guard_path} (sha256:{sha256[:12]}) on {url}", err=True)

    run_server(app, host=host, port=port, shutdown_timeout=shutdown_timeout, started=started)
    click.echo("stopped", err=True)


def _guards(options: ModelOptions, path: str, shadow: str | None) -> tuple[Guard, Guard | None]:
    from ebm_guard.cli.demo_guard import demo_specs
    from ebm_guard.cli.session import Session
    from ebm_guard.errors import InvalidInputError, NotFittedError
    from ebm_guard.gate import Guard

    specs = [] if options.model else demo_specs(path)
    if options.model is None and not specs:
        raise InvalidInputError(
            "no --model was given; needed the model that the guard was fitted on (a timm name, "
            "module:factory or file.py:factory)"
        )
    session = Session(options, specs, path)
    if session.guard is None:
        raise NotFittedError(f"{path} holds no guard")
    if shadow is None:
        return session.guard, None
    with session.autocast():
        return session.guard, Guard.load(shadow, session.require_classifier().model)
