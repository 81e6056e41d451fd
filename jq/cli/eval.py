"""`jaxq eval`: perplexity, and how far a model is from its reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jq.cli.devices import HELP, METAVAR, load_model, model_mesh
from jq.cli.models import demo_text, made_of_demo, model_folder
from jq.cli.options import parse
from jq.cli.output import note, print_facts, print_json
from jq.cli.progress import Meter
from jq.errors import CalibrationError, ModelError

ABOUT = """Measure token-level perplexity, on non-overlapping windows (the GPTQ paper's protocol).

With --reference also the KL divergence from it, and how often both models' first choices agree.
With --tasks, tasks of lm-evaluation-harness instead (they need the extra "tasks").
What follows a +- is one standard error."""

_LONGEST = 2048


@dataclasses.dataclass(frozen=True)
class Eval:
    """Options of the command."""

    model: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(
            metavar="MODEL", help='a checkpoint or model folder, or "demo" for the embedded model'
        ),
    ]
    text: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="FILE|NAME",
            help="a .txt, .jsonl or .npy file, or wikitext2 or c4, which are downloaded; "
            "models made of the embedded one have their own",
        ),
    ] = None
    reference: Annotated[
        str | None, tyro.conf.arg(metavar="MODEL", help="the model before quantization")
    ] = None
    seq_len: Annotated[
        int | None,
        tyro.conf.arg(metavar="N", help=f"tokens of a window; {_LONGEST}, or the model's context"),
    ] = None
    max_windows: Annotated[
        int | None, tyro.conf.arg(metavar="N", help="take the first ones only")
    ] = None
    batch_size: Annotated[int, tyro.conf.arg(help="windows or requests that run at once")] = 1
    tasks: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="NAME,...",
            help="tasks, groups or patterns of lm-evaluation-harness, such as arc_easy,hellaswag",
        ),
    ] = ()
    num_fewshot: Annotated[
        int | None,
        tyro.conf.arg(metavar="N", help="solved examples in a task's prompts; the task's own"),
    ] = None
    limit: Annotated[
        int | None, tyro.conf.arg(metavar="N", help="take the first items of each task only")
    ] = None
    include_path: Annotated[
        str | None, tyro.conf.arg(metavar="DIR", help="further tasks, as YAML files")
    ] = None
    devices: Annotated[str | None, tyro.conf.arg(metavar=METAVAR, help=HELP)] = None
    json: Annotated[
        bool,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.arg(help="print JSON, with every window or item"),
    ] = False


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Eval, "eval", ABOUT, arguments)
    folder = model_folder(args.model)
    if _about_tasks(args):
        from jq.cli.tasks import run_eval

        return run_eval(args, folder)
    reference_folder = None if args.reference is None else model_folder(args.reference)
    text = _text(args.text, folder)
    mesh = model_mesh(args.devices)

    from jq.evaluate import evaluate
    from jq.models import ModelConfig

    config = ModelConfig.from_folder(folder)
    context = config.max_position_embeddings
    seq_len = min(_LONGEST if args.seq_len is None else args.seq_len, context)
    most = None if args.max_windows is None else max(args.max_windows, 1) * max(seq_len, 1)
    tokens = _tokens(text, folder, config.vocab_size, most)
    if args.seq_len is not None and args.seq_len > context:
        note(f"seq_len {args.seq_len} is cut to the model's context of {context} tokens")
    model, params = load_model(folder, mesh)
    reference_model = reference_params = None
    if reference_folder is not None:
        _check_tokenizer(tokens, text, reference_folder, config.vocab_size, most)
        reference_model, reference_params = load_model(reference_folder, mesh)
    with Meter("eval", every=5.0) as meter:
        result = evaluate(
            model,
            params,
            tokens,
            reference_params=reference_params,
            reference_model=reference_model,
            seq_len=seq_len,
            max_windows=args.max_windows,
            batch_size=args.batch_size,
            progress=meter.show,
        )
    facts = {"model": args.model, "reference": args.reference, "text": Path(text).name}
    if args.json:
        print_json({**facts, **result.to_dict()})
    else:
        print_facts(_lines(result, Path(text).name))
    return 0


def _about_tasks(args: Eval) -> bool:
    """Whether tasks are asked for; ModelError for options of the other measurement."""
    windows = ("text", "reference", "seq_len", "max_windows")
    tasks = ("num_fewshot", "limit", "include_path")
    wrong = [name for name in (windows if args.tasks else tasks) if getattr(args, name) is not None]
    if wrong:
        flag = wrong[0].replace("_", "-")
        raise ModelError(
            f"--{flag} is for perplexity; leave it or --tasks out"
            if args.tasks
            else f"--{flag} is for tasks; name some with --tasks"
        )
    return bool(args.tasks)


def _text(given: str | None, folder: Path) -> str:
    if given is not None:
        return given
    if made_of_demo(folder):
        return str(demo_text("evaluation.txt"))
    raise CalibrationError(
        "perplexity of which text? give --text with a .txt, .jsonl or .npy file, or wikitext2 or "
        "c4, which are downloaded"
    )


def _tokens(text: str, folder: Path, vocab_size: int, most: int | None) -> np.ndarray:
    from jq.calib.source import token_stream
    from jq.models import Tokenizer

    encode = None
    if Path(text).suffix.lower() != ".npy":
        encode = Tokenizer(folder, vocab_size).encode
    return token_stream(text, vocab_size=vocab_size, encode=encode, max_tokens=most)


def _check_tokenizer(
    tokens: np.ndarray, text: str, reference: Path, vocab_size: int, most: int | None
) -> None:
    """Two models that read a text as different tokens cannot be compared token by token."""
    if not (reference / "tokenizer.json").is_file():
        return
    if not np.array_equal(tokens, _tokens(text, reference, vocab_size, most)):
        raise ModelError(
            f"{reference} makes other tokens of {Path(text).name}: a reference must have the "
            "model's own tokenizer"
        )


def _lines(result: Any, text: str) -> list[tuple[str, str]]:
    windows = f"{result.num_windows} windows of {result.seq_len} tokens of {text}, token level"
    lines = [("perplexity", _estimate(result.perplexity)), ("measured on", windows)]
    if result.kl is not None:
        agreement = result.top1_agreement
        lines[1:1] = [
            ("reference", _estimate(result.reference_perplexity)),
            ("increase", _estimate(result.perplexity_increase, sign="+")),
            ("KL", f"{_estimate(result.kl, digits=5)} nats per token"),
            ("top-1 agreement", f"{100 * agreement.value:.2f} +- {100 * agreement.stderr:.2f} %"),
        ]
    return lines


def _estimate(estimate: Any, digits: int = 4, sign: str = "") -> str:
    return f"{estimate.value:{sign}.{digits}f} +- {estimate.stderr:.{digits}f}"
