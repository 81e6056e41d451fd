"""`jaxq compare`: every method on one model, measured alike, and which to take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from jq.calib.config import CalibrationConfig
from jq.cli.devices import METAVAR, device_count
from jq.cli.models import DEMO_NAME, demo_text, made_of_demo, model_folder
from jq.cli.options import options_class, parse, rebuild, split_counts, split_names
from jq.cli.output import complain, note, print_json, print_table, warn
from jq.cli.progress import Meter
from jq.cli.tasks import quiet_bars
from jq.errors import CalibrationError, SpecError

ABOUT = """Quantize a model with every method, measure each, and say which to take.

Each method runs in a process of its own. What is finished is kept in the folder: the same call
goes on where it was stopped, and further --methods join. What all methods share (model, texts,
number format, timing, versions, machine) must stay the same, or the call is refused. The folder
gets report.html, report.md, results.csv and results.json.
Exit code 1 tells that a method FAILED; the others are reported."""

_LONGEST = 2048
_DEVICES = "devices that share the making, and have each model cut over them; one unless given"
_METHODS = "rtn,awq,gptq-no-act,gptq,gptq-act-order,smoothquant-int8,fp8"


def _help(text: str, metavar: str | None = None) -> Any:
    return tyro.conf.arg(help=text, metavar=metavar)


@dataclasses.dataclass(frozen=True)
class Format:
    """Number format of the weight-only methods; 8-bit ones have their own.

    Attributes:
        bits: per weight.
        group_size: inputs that share a scale; -1: one scale per output.
        symmetric: no zero points.
        skip: a regular expression; linears whose path ("layers_0/mlp/down_proj") matches stay in
            full precision. May be given again.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    skip: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What quality is measured on.

    Attributes:
        text: a .txt, .jsonl or .npy file, or wikitext2 or c4, which are downloaded; the embedded
            model has its own.
        seq_len: tokens of a window; 2048, or the model's context.
        max_windows: take the first ones only.
        tasks: names of lm-evaluation-harness's tasks, between commas, and "module:object" of
            tasks of yours; may be given again.
        num_fewshot: solved examples in the prompts of the harness's; each task's own number.
        limit: take the first items of each of them only.
        include_path: a folder with further tasks of the harness's form.
    """

    text: str | None = None
    seq_len: int | None = None
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None


@dataclasses.dataclass(frozen=True)
class Speed:
    """What is timed.

    Attributes:
        timing: time prefill and decode.
        batch_sizes: sequences that run at once; the first one decides.
        prompt_tokens: of each sequence.
        decode_steps: to time, per batch size.
    """

    timing: bool = True
    batch_sizes: str = "1,8"
    prompt_tokens: int = 128
    decode_steps: int = 200


@dataclasses.dataclass(frozen=True)
class Choice:
    """How to choose.

    Attributes:
        max_ppl_increase: of the perplexity over the original's: 0.2, or 1% of it.
        max_task_drop: of any task's mean score: 0.01 is one point in a hundred.
        objective: what should be small: the time of a decode step or of a prefill, or the size;
            decode where it is timed, else size.
        current: the method in use today, which is kept where another is not clearly better.
    """

    max_ppl_increase: str = "1%"
    max_task_drop: float | None = None
    objective: Literal["decode", "prefill", "size"] | None = None
    current: str = "original"


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args = _parse(arguments)
    if args.evaluation.tasks:
        quiet_bars()
    folder = model_folder(args.model)

    from jq.compare import Budget, compare, decide, write_reports

    budget = Budget.parse(args.choice.max_ppl_increase, args.choice.max_task_drop)
    objective = _objective(args)
    plan = _plan(args, folder)
    names = [arm.name for arm in plan.arms]
    if args.choice.current not in names:
        raise SpecError(f"--current {args.choice.current} is not among {', '.join(names)}")
    with _Watch(len(plan.arms)) as watch:
        comparison = compare(plan, progress=watch.step, finished=watch.finished)
    seed = args.calibration.seed
    decision = decide(
        comparison, budget, objective=objective, current=args.choice.current, seed=seed
    )
    written = write_reports(args.out, comparison, decision, budget)
    if args.json:
        from jq.compare.report import results_json

        print_json(results_json(comparison, decision, budget))
    else:
        _print(comparison, decision, written)
    for result in comparison.failed:
        complain(f"{result.name} FAILED: {result.error}")
    return 1 if comparison.failed else 0


def _parse(arguments: Sequence[str]) -> Any:
    dataset = (str | None, None, "FILE|NAME")
    calibration = options_class(CalibrationConfig(), {"calib_dataset": dataset})
    what = 'a model folder, or "demo" for the embedded model'
    fields: list[Any] = [
        ("model", Annotated[tyro.conf.Positional[str], _help(what, "MODEL")]),
        ("out", Annotated[Path, _help("the folder for everything", "DIR")]),
        ("methods", Annotated[str, _help(f"of {_known()}", "NAME,NAME,...")], _METHODS),
        ("keep_checkpoints", Annotated[bool, _help("keep the quantized models")], True),
        ("devices", Annotated[str | None, _help(_DEVICES, METAVAR)], None),
        ("apart", Annotated[bool, _help("run every stage in a process of its own")], True),
        ("json", _switch("print JSON, with every window"), False),
        ("format", Format, Format()),
        ("evaluation", Evaluation, Evaluation()),
        ("speed", Speed, Speed()),
        ("choice", Choice, Choice()),
        ("calibration", calibration, calibration()),
    ]
    kind = dataclasses.make_dataclass("Compare", fields, frozen=True, namespace={"__doc__": ""})
    return parse(kind, "compare", ABOUT, arguments)


def _known() -> str:
    from jq.compare.arms import ARMS

    return ", ".join(ARMS)


def _switch(text: str) -> Any:
    return Annotated[bool, tyro.conf.FlagCreatePairsOff, _help(text)]


def _objective(args: Any) -> Literal["decode", "prefill", "size"]:
    timed = args.speed.timing
    objective = args.choice.objective or ("decode" if timed else "size")
    if objective != "size" and not timed:
        raise SpecError(f"--objective {objective} needs times; leave --no-timing out")
    if args.choice.max_task_drop is not None and not args.evaluation.tasks:
        raise SpecError("--max-task-drop needs --tasks")
    return objective


def _plan(args: Any, folder: Path) -> Any:
    from jq.calib.source import token_stream
    from jq.compare import Numbers, Plan, find_arms
    from jq.models import ModelConfig, Tokenizer

    devices = device_count(args.devices)
    numbers = Numbers(**{f.name: getattr(args.format, f.name) for f in dataclasses.fields(Numbers)})
    arms = find_arms(split_names([args.methods]), numbers)
    config = ModelConfig.from_folder(folder)
    text, seq_len = _text(args, folder), _seq_len(args, config)
    has_text = Path(text).suffix.lower() != ".npy"
    tokenizer = Tokenizer(folder, config.vocab_size) if has_text else None
    most = args.evaluation.max_windows
    tokens = token_stream(
        text,
        vocab_size=config.vocab_size,
        encode=None if tokenizer is None else tokenizer.encode,
        max_tokens=None if most is None else max(most, 1) * max(seq_len, 1),
    )
    calibration = _calibration(args, folder, arms, config.max_position_embeddings)
    return Plan(
        folder,
        args.out,
        arms,
        numbers,
        tokens,
        seq_len,
        Path(text).name,
        max_windows=most,
        words_per_token=None if tokenizer is None else _words(tokenizer, tokens, seq_len),
        calibration=calibration,
        batch_size=args.calibration.batch_size,
        timing=_timing(args.speed),
        tasks=split_names(args.evaluation.tasks),
        task_options=_task_options(args.evaluation),
        meta={"model": DEMO_NAME} if made_of_demo(folder) else None,
        keep_checkpoints=args.keep_checkpoints,
        apart=args.apart,
        devices=devices,
    )


def _text(args: Any, folder: Path) -> str:
    if args.evaluation.text is not None:
        return args.evaluation.text
    if made_of_demo(folder):
        return str(demo_text("evaluation.txt"))
    raise CalibrationError(
        "quality on which text? give --text with a .txt, .jsonl or .npy file, or wikitext2 or c4, "
        "which are downloaded"
    )


def _seq_len(args: Any, config: Any) -> int:
    asked, context = args.evaluation.seq_len, config.max_position_embeddings
    if asked is not None and asked > context:
        note(f"seq_len {asked} is cut to the model's context of {context} tokens")
    return min(_LONGEST if asked is None else asked, context)


def _timing(speed: Speed) -> Any:
    from jq.compare import Timing

    if not speed.timing:
        return None
    sizes = split_counts(speed.batch_sizes, "--batch-sizes")
    return Timing(sizes, speed.prompt_tokens, speed.decode_steps)


def _task_options(evaluation: Evaluation) -> Any:
    from jq.tasks.harness import TaskOptions

    options = {f.name: getattr(evaluation, f.name, None) for f in dataclasses.fields(TaskOptions)}
    given = {name: value for name, value in options.items() if value is not None}
    if given and not evaluation.tasks:
        flag = next(iter(given)).replace("_", "-")
        raise SpecError(f"--{flag} is for tasks; name some with --tasks")
    return TaskOptions(**given)


def _words(tokenizer: Any, tokens: np.ndarray, seq_len: int) -> float | None:
    """Words between spaces, per token of the windows."""
    used = tokens[: len(tokens) // seq_len * seq_len]
    return len(tokenizer.decode(used.tolist()).split()) / len(used) if len(used) else None


def _calibration(args: Any, folder: Path, arms: Sequence[Any], context: int) -> Any:
    from jq.cli.quantize import read_calibration
    from jq.models import HFCheckpoint

    options = args.calibration
    if options.calib_dataset is None and not made_of_demo(folder):
        learning = [arm.name for arm in arms if arm.calibrated]
        if not learning:
            return None
        raise CalibrationError(
            f"{', '.join(learning)} learn from calibration text: give --calib-dataset with a .txt, "
            ".jsonl or .npy file, or wikitext2, c4 or pile, which are downloaded"
        )
    # Read even if no method learns: it is part of the spec, and methods that do may join later.
    dataset = options.calib_dataset or str(demo_text("calibration.txt"))
    config = rebuild(CalibrationConfig(), dataclasses.replace(options, calib_dataset=dataset))
    if config.calib_seqlen > context:
        note(f"calib_seqlen {config.calib_seqlen} is cut to the model's context of {context}")
        config = dataclasses.replace(config, calib_seqlen=context)
    data = read_calibration(HFCheckpoint(folder), config)
    for text in data.warnings:
        warn(text)
    return data


class _Watch:
    """A meter per stage, and a line per finished arm."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, 0
        self._stage: tuple[str, str] | None = None
        self._meter: Meter | None = None

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def step(self, step: Any) -> None:
        """Show progress of a stage."""
        if self._stage != (step.arm, step.stage):
            self._close()
            self._stage = (step.arm, step.stage)
            title = f"[{step.index + 1}/{step.count}] {step.arm}: {step.stage}"
            self._meter = Meter(title, every=10.0).__enter__()
        assert self._meter is not None
        self._meter.show(step.done, step.total, step.text)

    def finished(self, result: Any) -> None:
        """Tell of an arm."""
        self._close()
        self._done += 1
        how = "FAILED" if not result.done else "was there" if result.reused else "done"
        note(f"[{self._done}/{self._count}] {result.name}: {how}")

    def _close(self) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
        self._stage = self._meter = None


def _print(comparison: Any, decision: Any, written: Sequence[Path]) -> None:
    from jq.compare import unfair_pairs
    from jq.compare.report import summary_table, task_table

    for table in (summary_table(comparison), task_table(comparison)):
        if table is not None:
            print_table(table.headers, table.rows, table.align)
            print(f"\n{table.note}" if table.note else "")
    for a, b, why in unfair_pairs([r.arm for r in comparison.results]):
        print(f"unfair pair: {a} against {b}: {why}")
    print("± is one standard error; the increase is over the original, window by window\n")
    print(decision.verdict)
    for line in (decision.bound, *decision.reasons):
        if line:
            print(line)
    print(f"\n{', '.join(path.name for path in written)} are in {written[0].parent}")
