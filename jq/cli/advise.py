"""`jaxq advise`: which method to choose, and what fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from jq.advise import Advice, Fit, Situation, advise, find_gpu, find_model
from jq.advise.situation import Accuracy, Activations, Engine, Goal
from jq.cli.models import DEMO, model_folder
from jq.cli.options import parse
from jq.cli.output import print_facts, print_json, print_table, size_text

ABOUT = """Say which method and format suit a model, a GPU and a goal, and what fits beside it.

Sizes are exact; rates are ceilings of data sheets. Nothing is measured, loaded or downloaded:
compare and bench do that on the machine itself."""


@dataclasses.dataclass(frozen=True)
class Advise:
    """Options of the command.

    Attributes:
        gpu: such as a100-40gb, h100, l40s, t4; an unknown one lists them.
        model: such as llama-3-8b, or a folder with config.json, or "demo" for the embedded model;
            an unknown one lists them.
        goal: what matters most.
        batch: sequences at once.
        context: tokens of each, prompt and answer together; 4096, or the model's positions.
        gpus: how many share the model.
        accuracy: strict keeps 8 bits, normal 4 or more, loose 3 or more.
        bits: of the weights, 3, 4 or 8; overrides accuracy.
        activations: of the products; 8-bit is what a backend for W8A8 wants.
        engine: what serves the model.
        requantize_often: after every fine-tuning, say.
        instruction_tuned: the model follows instructions or chats.
        widest_tooling: many tools have to read the result.
        existing: the preset of a pipeline that works already (jaxq methods lists them).
        reserve_gb: per GPU, for all but weights and cache; a guess.
        json: print JSON.
    """

    gpu: Annotated[str, tyro.conf.arg(metavar="GPU")]
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    goal: Goal = "memory"
    batch: int = 1
    context: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    gpus: int = 1
    accuracy: Accuracy = "normal"
    bits: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    activations: Activations = "any"
    engine: Engine = "jaxq"
    requantize_often: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    instruction_tuned: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    widest_tooling: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    existing: Annotated[str | None, tyro.conf.arg(metavar="METHOD")] = None
    reserve_gb: float = 1.0
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = parse(Advise, "advise", ABOUT, arguments)
    gpu = find_gpu(args.gpu)
    name, config = find_model(str(model_folder(DEMO)) if args.model == DEMO else args.model)
    context = args.context
    if context is None:
        context = min(Situation.context, config.max_position_embeddings)
    same = ("goal", "batch", "gpus", "accuracy", "bits", "activations", "engine", "existing")
    flags = ("requantize_often", "instruction_tuned", "widest_tooling")
    situation = Situation(
        gpu,
        config,
        context=context,
        reserve=1e9 * args.reserve_gb,
        **{key: getattr(args, key) for key in (*same, *flags)},
    )
    advice = advise(situation)
    if args.json:
        print_json({"model": name, "gpu": dataclasses.asdict(gpu), **advice.to_dict()})
    else:
        _print(advice, name, situation)
    return 0


def _print(advice: Advice, name: str, s: Situation) -> None:
    where = s.gpu.name if s.gpus == 1 else f"{s.gpus} x {s.gpu.name}"
    print(f"{name} on {where}: {advice.method}{'' if advice.fits else ', but nothing fits'}\n")
    _print_list("because", advice.reasons)
    _print_list("mind", advice.warnings)
    print_facts([(f"or {other.method}", other.why) for other in advice.alternatives])
    print()
    # The choice itself may take a few bytes more or less than its format as such.
    rows = [_row(advice.fit if f.format == advice.fit.format else f) for f in advice.considered]
    headers = ("format", "weights", "cache tokens", "sequences", "step", "tokens/s", "out because")
    print_table(headers, [*rows, _row(advice.full_precision)], "lrrrrrl")
    print(
        f"\nsequences of {s.context} tokens that fit at once; step and tokens/s at batch {s.batch} "
        f"are ceilings, by the {s.gpu.source}"
    )
    folder = name if Path(name).exists() else f"path/to/{name}"
    print(f"\n  {advice.command(folder)}")


def _print_list(title: str, lines: Sequence[str]) -> None:
    print_facts([("" if i else title, line) for i, line in enumerate(lines)])
    print()


def _row(fit: Fit) -> tuple[str, ...]:
    size = size_text(fit.weights)
    name = "unquantized" if fit.format is None else fit.format.name
    if fit.left < 0:
        return (name, size, "", "", "", "", fit.against or "")
    return (
        name,
        size,
        f"{fit.tokens:,}",
        str(fit.sequences),
        f"{1e3 * fit.step_seconds:.1f} ms",
        f"{fit.batch / fit.step_seconds:,.0f}",
        fit.against or "",
    )
