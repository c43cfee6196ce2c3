"""``vera-fx chat``: talk with a language model and its adapters."""

from typing import Annotated

import typer

from vera_fx.cli.arguments import Device, Model, Threads
from vera_fx.cli.devices import device_of, use_threads
from vera_fx.cli.main import reported
from vera_fx.config import check_choice
from vera_fx.errors import ConfigError

Adapters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="ADAPTER",
        help="folders of adapters or runs, or NAME=FOLDER; the first answers",
    ),
]
System = Annotated[str | None, typer.Option(help="the system's text")]
NewTokens = Annotated[int, typer.Option(min=1, help="of an answer")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="of sampling; 0 or none: the likeliest tokens")
]
TopP = Annotated[float | None, typer.Option(max=1, help="share of the probability to sample from")]
Seed = Annotated[int | None, typer.Option(min=0, help="of sampling")]
Raw = Annotated[bool, typer.Option("--raw", help="go on from bare texts: no template, no history")]
Static = Annotated[
    bool, typer.Option("--static-cache", help="a cache of fixed size for each answer")
]
Compiled = Annotated[bool, typer.Option("--compile", help="compile the model")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16")]
Lines = Annotated[bool, typer.Option("--json", help="a JSON line for each turn")]


@reported
def chat(
    model: Model,
    adapters: Adapters = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    raw: Raw = False,
    static_cache: Static = False,
    compiled: Compiled = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = 0,
    json: Lines = False,
) -> None:
    """Talk with a causal language model, line by line; answers appear as they are made.

    /adapter NAME switches among the adapters (off: the base alone), /clear begins anew, /exit ends.
    What comes by a pipe is answered line by line.
    """
    from vera_fx.cli.chat.conversation import Answering, Conversation
    from vera_fx.cli.chat.models import DTYPES, load_speaker
    from vera_fx.cli.chat.session import talk

    check_choice("dtype", dtype, DTYPES)
    _check_sampling(temperature, top_p)
    how = Answering(max_new_tokens, temperature or None, top_p, static_cache, raw)
    use_threads(threads)
    _seed(seed)
    speaker = load_speaker(model, adapters or (), device=device_of(device), dtype=dtype)
    conversation = Conversation(speaker, how, system)
    if compiled:
        speaker.model.compile()
    talk(conversation, as_json=json)


def _check_sampling(temperature: float | None, top_p: float | None) -> None:
    if top_p is not None and not top_p > 0:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {top_p:g}")
    if temperature == 0 and top_p is not None:
        raise ConfigError(
            "temperature 0 takes the likeliest tokens; top_p has nothing to choose from"
        )


def _seed(seed: int | None) -> None:
    if seed is not None:
        import transformers

        transformers.set_seed(seed)
