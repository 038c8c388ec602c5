"""The command line: ``slimfit-fx plan`` and ``slimfit-fx demo``.

The plan goes to stdout, everything else to stderr; a wrong option or setting exits with status 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="slimfit-fx",
    help="Fine-tune in a fraction of the memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from slimfit_fx._version import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Hugging Face config name, or path of a config.json or its folder.")],
    task: Annotated[
        str, typer.Option(help="auto, sequence-classification, image-classification, causal-lm...")
    ] = "auto",
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per example (text models).")] = 128,
    resolution: Annotated[int | None, typer.Option(help="Pixels per side (image models) [config's own].")] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa or eager [the library's choice].")] = None,
    preset: Annotated[str, typer.Option(help="exact, paper, balanced or max.")] = "balanced",
    freeze_rate: Annotated[float, typer.Option(help="Share of the units frozen in each step.")] = 0.9,
    peak: Annotated[bool, typer.Option("--peak", help="Tell the physical peak of the step, too (slower).")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print the memory plan of one training step, built from the model's config alone: no weights, no network."""
    import slimfit_fx
    from slimfit_fx import from_config
    from slimfit_fx.config import Config

    with _user_errors():
        Config(preset=preset, freeze_rate=freeze_rate)
        network, inputs = from_config.build(
            model, task=task, batch=batch, length=length, resolution=resolution, attention=attention
        )
        sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        typer.echo(f"{type(network).__name__}: {sizes}", err=True)
        settings: dict[str, Any] = {"preset": preset, "freeze_rate": freeze_rate, **inputs}
        if peak:
            settings["peak"] = True
        found = slimfit_fx.plan(network, **settings)
    typer.echo(found.to_json() if json else str(found))


@app.command()
def demo(
    text: Annotated[bool, typer.Option("--text", help="Fine-tune a pretrained MiniLM on docstrings instead.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo_output"),
) -> None:
    """Fine-tune a small model with plain torch.compile and with slimfit_fx, and compare the two."""
    with _user_errors():
        from slimfit_fx.demo import run

        run(text=text, out=out)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn the errors that the user can mend into a message and status 2."""
    try:
        yield
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        typer.echo(f"slimfit-fx: {error}", err=True)
        raise typer.Exit(2) from error
