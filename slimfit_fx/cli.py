"""The command line: ``slimfit-fx plan``, ``fit``, ``front`` and ``demo``.

The answer goes to stdout, everything else to stderr; a wrong option or setting exits with status 2, a budget that
nothing fits with status 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
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


Preset = Annotated[str, typer.Option(help="exact, paper, balanced or max.")]
Picture = Annotated[Path | None, typer.Option(help="Write the timeline of the step as a .png or .html file.")]
Option = tuple[Any, Any]
"""(type with its help, default)."""
_MODEL: dict[str, Option] = {
    "model": (
        Annotated[str, typer.Argument(help="Hugging Face config name, or path of a config.json or its folder.")],
        Parameter.empty,
    ),
    "task": (
        Annotated[str, typer.Option(help="auto, sequence-classification, image-classification, causal-lm...")],
        "auto",
    ),
    "batch": (Annotated[int, typer.Option(help="Examples per step (fit: the batch that is tried first).")], 8),
    "length": (Annotated[int, typer.Option(help="Tokens per example (text models).")], 128),
    "resolution": (Annotated[int | None, typer.Option(help="Pixels per side (image models) [config's own].")], None),
    "attention": (Annotated[str | None, typer.Option(help="sdpa or eager [the library's choice].")], None),
}
"""What describes a model and the size of its step: arguments of ``from_config.build``."""
_SETTINGS: dict[str, Option] = {
    "freeze_rate": (Annotated[float, typer.Option(help="Share of the units frozen in each step.")], 0.9),
    "max_gradient_error": (
        Annotated[float | None, typer.Option(help="Milder codecs where more error is to be expected, e.g. 0.05.")],
        None,
    ),
    "outputs": (
        Annotated[str | None, typer.Option(help="loss: outputs beside it are left out, such as logits [all].")],
        None,
    ),
}
"""Settings that all commands know. ``preset`` and ``budget`` are checked with them where a command has them."""
_ANSWER: dict[str, Option] = {
    "json": (Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")], False)
}


@dataclass(frozen=True)
class Step:
    """The training step that a command is about: a model without weights, what its forward takes, and settings."""

    network: Any
    inputs: dict[str, Any]
    settings: dict[str, Any]


def _about_a_step(*pictures: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a command of ``answer(step, ...)``: with the options above, clean errors, and its answer printed.

    Settings, the kind of picture (one of ``pictures``) and the model are checked before ``answer`` is called.
    """

    def command(answer: Callable[..., Any]) -> Callable[..., None]:
        own = list(signature(answer, eval_str=True).parameters.values())[1:]
        shared = {**_MODEL, **_SETTINGS, **_ANSWER}
        parameters = [Parameter(n, Parameter.KEYWORD_ONLY, annotation=a, default=d) for n, (a, d) in shared.items()]
        parameters = [*parameters[:-1], *own, parameters[-1]]

        def run(**given: Any) -> None:
            json = given.pop("json")
            with _user_errors():
                _check_picture(given["picture"], pictures)
                found = answer(_build(given), **{p.name: given[p.name] for p in own})
            typer.echo(dumps(found.to_dict()) if json else str(found))

        run.__name__, run.__doc__ = answer.__name__, answer.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return run

    return command


def _build(given: Mapping[str, Any]) -> Step:
    """Check the settings among the options, then build the model."""
    from slimfit_fx import from_config
    from slimfit_fx.config import Config

    names = {"preset": "preset", "budget": "memory_budget", **{name: name for name in _SETTINGS}}
    settings = {names[option]: value for option, value in given.items() if option in names and value is not None}
    Config(**settings)
    network, inputs = from_config.build(given["model"], **{name: given[name] for name in _MODEL if name != "model"})
    sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    typer.echo(f"{type(network).__name__}: {sizes}", err=True)
    return Step(network, inputs, settings)


def _check_picture(path: Path | None, kinds: Sequence[str]) -> None:
    from slimfit_fx.planning.picture import check_picture

    if path is not None:
        check_picture(path, kinds)


def _save_timeline(plan: Any, path: Path | None) -> None:
    from slimfit_fx.planning.picture import save_picture

    if path is not None:
        save_picture(plan, path)


@app.command()
@_about_a_step(".png", ".html")
def plan(
    step: Step,
    *,
    preset: Preset = "balanced",
    peak: Annotated[bool, typer.Option("--peak", help="Tell the physical peak of the step, too (slower).")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="And that of plain torch.compile.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="Take the plan whose peak fits, e.g. 32GiB; status 1 if none does.")
    ] = None,
    picture: Picture = None,
) -> Any:
    """Print the memory plan of one training step, built from the model's config alone: no weights, no network."""
    import slimfit_fx

    asked: dict[str, Any] = {"peak": peak or picture is not None, "compare": compare}
    found = slimfit_fx.plan(step.network, **step.settings, **asked, **step.inputs)
    _save_timeline(found, picture)
    return found


@app.command()
@_about_a_step(".png", ".html")
def fit(
    step: Step,
    *,
    budget: Annotated[str, typer.Option(help="All that training may hold on the device, e.g. 32GiB.")],
    preset: Preset = "balanced",
    picture: Picture = None,
) -> Any:
    """Find the largest batch whose training step fits the budget; status 1 if not even one example does."""
    import slimfit_fx

    settings = {name: value for name, value in step.settings.items() if name != "memory_budget"}
    found = slimfit_fx.max_batch(step.network, step.inputs, budget, **settings)
    _save_timeline(found.plan, picture)
    return found


@app.command()
@_about_a_step(".png")
def front(
    step: Step,
    *,
    picture: Annotated[Path | None, typer.Option(help="Draw memory against time as a .png file.")] = None,
) -> Any:
    """Predict memory against step time: presets and levels of recomputation, torch.compile and its rivals."""
    import slimfit_fx

    found = slimfit_fx.front(step.network, step.inputs, say=lambda name: typer.echo(name, err=True), **step.settings)
    if picture is not None:
        found.save_picture(picture)
    return found


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
