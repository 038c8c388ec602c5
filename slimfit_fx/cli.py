"""The command line: ``slimfit-fx plan``, ``slimfit-fx fit`` and ``slimfit-fx demo``.

The answer goes to stdout, everything else to stderr; a wrong option or setting exits with status 2, a budget that
nothing fits with status 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
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


Model = Annotated[str, typer.Argument(help="Hugging Face config name, or path of a config.json or its folder.")]
Task = Annotated[str, typer.Option(help="auto, sequence-classification, image-classification, causal-lm...")]
Length = Annotated[int, typer.Option(help="Tokens per example (text models).")]
Resolution = Annotated[int | None, typer.Option(help="Pixels per side (image models) [config's own].")]
Attention = Annotated[str | None, typer.Option(help="sdpa or eager [the library's choice].")]
Preset = Annotated[str, typer.Option(help="exact, paper, balanced or max.")]
FreezeRate = Annotated[float, typer.Option(help="Share of the units frozen in each step.")]
Picture = Annotated[Path | None, typer.Option(help="Write the timeline of the step as a .png or .html file.")]


@app.command()
def plan(
    model: Model,
    task: Task = "auto",
    batch: Annotated[int, typer.Option(help="Examples per step.")] = 8,
    length: Length = 128,
    resolution: Resolution = None,
    attention: Attention = None,
    preset: Preset = "balanced",
    freeze_rate: FreezeRate = 0.9,
    peak: Annotated[bool, typer.Option("--peak", help="Tell the physical peak of the step, too (slower).")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="And that of plain torch.compile.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="Take the plan whose peak fits, e.g. 32GiB; status 1 if none does.")
    ] = None,
    picture: Picture = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print the memory plan of one training step, built from the model's config alone: no weights, no network."""
    import slimfit_fx
    from slimfit_fx.config import Config

    with _user_errors():
        Config(preset=preset, freeze_rate=freeze_rate, memory_budget=budget)
        _check_picture(picture)
        network, inputs = _build(model, task, batch, length, resolution, attention)
        settings: dict[str, Any] = {"preset": preset, "freeze_rate": freeze_rate, **inputs}
        settings |= {"peak": True} if peak or picture is not None else {}
        settings |= {"compare": True} if compare else {}
        settings |= {} if budget is None else {"memory_budget": budget}
        found = slimfit_fx.plan(network, **settings)
        _save_picture(found, picture)
    typer.echo(found.to_json() if json else str(found))


@app.command()
def fit(
    model: Model,
    budget: Annotated[str, typer.Option(help="All that training may hold on the device, e.g. 32GiB.")],
    task: Task = "auto",
    batch: Annotated[int, typer.Option(help="The batch that is tried first.")] = 8,
    length: Length = 128,
    resolution: Resolution = None,
    attention: Attention = None,
    preset: Preset = "balanced",
    freeze_rate: FreezeRate = 0.9,
    picture: Picture = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Find the largest batch whose training step fits the budget; status 1 if not even one example does."""
    import slimfit_fx
    from slimfit_fx.config import Config

    with _user_errors():
        Config(preset=preset, freeze_rate=freeze_rate, memory_budget=budget)
        _check_picture(picture)
        network, inputs = _build(model, task, batch, length, resolution, attention)
        found = slimfit_fx.max_batch(network, inputs, budget, preset=preset, freeze_rate=freeze_rate)
        _save_picture(found.plan, picture)
    typer.echo(dumps(found.to_dict()) if json else str(found))


def _build(
    model: str, task: str, batch: int, length: int, resolution: int | None, attention: str | None
) -> tuple[Any, dict[str, Any]]:
    from slimfit_fx import from_config

    network, inputs = from_config.build(
        model, task=task, batch=batch, length=length, resolution=resolution, attention=attention
    )
    sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    typer.echo(f"{type(network).__name__}: {sizes}", err=True)
    return network, inputs


def _check_picture(path: Path | None) -> None:
    from slimfit_fx.planning.picture import check_picture

    if path is not None:
        check_picture(path)


def _save_picture(plan: Any, path: Path | None) -> None:
    from slimfit_fx.planning.picture import save_picture

    if path is not None:
        save_picture(plan, path)


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
    """Turn the errors that the user can mend into a message and status 2; a budget that nothing fits, status 1."""
    from slimfit_fx.planning.budget import MemoryBudgetError

    try:
        yield
    except MemoryBudgetError as error:
        typer.echo(f"slimfit-fx: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        typer.echo(f"slimfit-fx: {error}", err=True)
        raise typer.Exit(2) from error
