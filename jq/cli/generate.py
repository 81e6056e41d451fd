"""`jaxq generate`: continue prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from jq.cli.devices import HELP, METAVAR, load_model, model_mesh
from jq.cli.models import model_folder
from jq.cli.options import parse
from jq.cli.output import note
from jq.errors import ModelError

ABOUT = """Continue prompts.

One is written as it comes; several run as one batch and are written at the end, a blank line
between them."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Options of the command."""

    model: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="MODEL", help='a checkpoint or model folder, or "demo" for the embedded model'
        ),
    ]
    prompt: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="TEXT", help="may be given again, for a batch")
    ] = ()
    max_new_tokens: Annotated[int, tyro.conf.arg(help="per prompt")] = 64
    temperature: Annotated[float, tyro.conf.arg(help="0 takes the most likely token each time")] = (
        0.0
    )
    top_k: Annotated[
        int | None, tyro.conf.arg(metavar="K", help="draw from the K most likely tokens only")
    ] = None
    top_p: Annotated[
        float | None,
        tyro.conf.arg(metavar="P", help="draw from the most likely tokens that make up P only"),
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of the drawing")] = 0
    echo: Annotated[bool, tyro.conf.arg(help="write the prompt first")] = True
    devices: Annotated[str | None, tyro.conf.arg(metavar=METAVAR, help=HELP)] = None


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Generate, "generate", ABOUT, arguments)
    if not args.prompt:
        raise ModelError('nothing to continue: give --prompt "..."')
    folder = model_folder(args.model)

    import jax

    from jq.models import ModelConfig, Sampling, Tokenizer

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    tokenizer = Tokenizer(folder, ModelConfig.from_folder(folder).vocab_size)
    model, params = load_model(folder, model_mesh(args.devices))
    if args.temperature == 0 and (args.top_k or args.top_p):
        note("temperature 0 takes the most likely token: --top-k and --top-p change nothing")
    key = jax.random.key(args.seed)
    start = time.perf_counter()
    one = len(args.prompt) == 1
    count = (_stream_one if one else _batch)(args, model, params, tokenizer, sampling, key)
    seconds = time.perf_counter() - start
    note(f"{count} tokens in {seconds:.1f} s, compilation included")
    return 0


def _stream_one(
    args: Generate, model: Any, params: Any, tokenizer: Any, sampling: Any, key: Any
) -> int:
    """Write one continuation as it comes; returns the number of new tokens."""
    rows = _Rows(tokenizer, 1)
    steps = _steps(args, model, params, tokenizer, sampling, key)
    if args.echo:
        print(args.prompt[0], end="", flush=True)
    for tokens in steps:
        print(rows.push(tokens)[0], end="", flush=True)
    print(rows.flush()[0], flush=True)
    return rows.count


def _batch(args: Generate, model: Any, params: Any, tokenizer: Any, sampling: Any, key: Any) -> int:
    rows = _Rows(tokenizer, len(args.prompt))
    texts = [prompt if args.echo else "" for prompt in args.prompt]
    for tokens in _steps(args, model, params, tokenizer, sampling, key):
        texts = [text + piece for text, piece in zip(texts, rows.push(tokens), strict=True)]
    texts = [text + piece for text, piece in zip(texts, rows.flush(), strict=True)]
    print("\n\n".join(texts))
    return rows.count


def _steps(args: Generate, model: Any, params: Any, tokenizer: Any, sampling: Any, key: Any) -> Any:
    from jq.models import stream

    prompts = [tokenizer.encode(prompt) for prompt in args.prompt]
    return stream(
        model, params, prompts, args.max_new_tokens, sampling, key, tokenizer.eos_token_ids
    )


class _Rows:
    """Text of a batch's rows, as it becomes complete; end-of-sequence tokens have none."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        from jq.models.tokenizer import TextStream

        self._silent = {-1, *tokenizer.eos_token_ids}
        self._streams = [TextStream(tokenizer) for _ in range(rows)]
        self.count = 0

    def push(self, tokens: Any) -> list[str]:
        """The text of each row that one more step completes."""
        pieces = []
        for stream, token in zip(self._streams, tokens.tolist(), strict=True):
            silent = token in self._silent
            self.count += not silent
            pieces.append("" if silent else stream.push(token))
        return pieces

    def flush(self) -> list[str]:
        """The rest of each row."""
        return [stream.flush() for stream in self._streams]
