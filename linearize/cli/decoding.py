"""The options of decoding, which `generate` and `chat` share."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.errors import DataError
from linearize.generation.decoding import Decoding

if TYPE_CHECKING:
    from collections.abc import Callable

SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="The system prompt, in the chat template.")
]


def _options(
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Maximum number of new tokens; 0 only reads.")
    ] = 200,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample among this many most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample among the most likely, up to this mass.")] = 1.0,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Sample among tokens with this share of the most likely one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            help="Above 1, tokens of PROMPT and the new text become less likely. Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Lowers the logits of tokens that were written; -2 to 2.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float,
        typer.Option("--frequency-penalty", help="Lowers a token's logit for each time it was written; -2 to 2."),
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
) -> None:
    """The options, as Typer reads them from a signature."""


def decodes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the parameter `decoding` of `command` by the options of decoding.

    Raises:
        BadParameter: when the command is called, if a value is out of range.
    """
    options = inspect.signature(_options, eval_str=True).parameters

    @functools.wraps(command)
    def run(*arguments: Any, **given: Any) -> Any:
        chosen = {name: given.pop(name) for name in options}
        try:
            decoding = Decoding(**{**chosen, "stop": tuple(chosen["stop"] or ())})
        except DataError as error:
            name, space, reason = str(error).partition(" ")
            raise typer.BadParameter(f"--{name.replace('_', '-')}{space}{reason}") from error
        return command(*arguments, decoding=decoding, **given)

    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += options.values() if name == "decoding" else [parameter]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    del run.__wrapped__  # `build_app` takes a command with it for one that has --quiet already
    return run
