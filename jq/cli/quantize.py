"""`jaxq quantize`: a model in, a quantized checkpoint out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jq.calib.config import CalibrationConfig
from jq.calib.report import Progress
from jq.calib.tokens import CalibrationData
from jq.cli.devices import METAVAR, device_count
from jq.cli.export_options import FORMATS, Export
from jq.cli.hosts import Hosts, joined
from jq.cli.models import DEMO_NAME, demo_text, made_of_demo, model_folder
from jq.cli.options import options_class, parse, peek, rebuild
from jq.cli.output import note, print_facts, size_text, time_text, warn
from jq.cli.progress import Meter
from jq.errors import CalibrationError, SpecError
from jq.methods.gptq import GPTQ
from jq.methods.rtn import RTN
from jq.presets import ACTIVATIONS, DEFAULT, GPTQ_ROUNDING, PRESETS, find_preset, preset
from jq.recipe import Method, Recipe, Rule, needs_calibration

ABOUT = """Quantize a Hugging Face model folder into a jaxq checkpoint, or for other tools.

The options below are those of the method: `jaxq quantize --method NAME --help` shows another's,
`jaxq methods` lists the names."""

# What may round the weights that AWQ or SmoothQuant has moved; AWQ's own is RTN with clipping.
ROUNDINGS: dict[str, RTN | GPTQ] = {"rtn": RTN(), "gptq": GPTQ_ROUNDING}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Number format and method.

    Attributes:
        method: what chooses the quantized weights.
        bits: per weight.
        group_size: inputs that share a scale; -1: one scale per output.
        symmetric: no zero points.
        activation: quantize activations too; the products then run in 8 bits.
        skip: a regular expression; linears whose path ("layers_0/mlp/down_proj") matches stay in
            full precision. May be given again.
    """

    method: Literal[tuple(PRESETS)] = DEFAULT  # pyright: ignore[reportInvalidTypeForm]
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activation: Literal[tuple(ACTIVATIONS)] = "none"  # pyright: ignore[reportInvalidTypeForm]
    skip: tuple[str, ...] = ()


def run(arguments: Sequence[str]) -> int:
    """The command."""
    args, base = _parse(arguments)
    with joined(args.hosts):
        return _run(args, base)


def _run(args: Any, base: Method) -> int:
    from jq.data_mesh import data_mesh
    from jq.pipeline import check_run, quantize_checkpoint  # what --help need not wait for
    from jq.preflight import check_gpu

    spec, _ = preset(
        args.numbers.method,
        bits=args.numbers.bits,
        group_size=args.numbers.group_size,
        symmetric=args.numbers.symmetric,
        activation=args.numbers.activation,
    )
    if args.format in ("gptq", "awq"):
        spec = dataclasses.replace(spec, scale_dtype=args.export.scale_dtype)
    method = rebuild(base, args.options)
    recipe = (*(Rule(p, None, None) for p in args.numbers.skip), Rule(".*", spec, method))
    calibration_config = _calibration_config(args.calibration)
    if args.hosts.distributed and args.devices not in (None, "all"):
        raise SpecError(
            f"--devices {args.devices}: a distributed run uses all devices; leave it out"
        )
    mesh = None if args.hosts.distributed else data_mesh(device_count(args.devices))
    folder = model_folder(args.model)
    target = {"target": args.format, "options": args.export.format_options()}
    shard_bytes = args.export.shard_bytes()
    gpu = {"target_gpu": args.target_gpu, "allow_reference": args.allow_reference}
    check_gpu(
        recipe,
        args.target_gpu,
        local=args.format == "orbax",
        allow_reference=args.allow_reference,
    )
    source = check_run(folder, args.out, recipe, overwrite=args.overwrite, **target)
    calibration = _calibration(source, recipe, calibration_config, args)
    if args.dry_run:
        return _dry_run(source, recipe, calibration, calibration_config, args, mesh)
    with Meter("quantize") as meter, _told_how_to_go_on(args.out):
        report = quantize_checkpoint(
            folder,
            args.out,
            recipe,
            calibration,
            batch_size=calibration_config.batch_size,
            offload=calibration_config.offload,
            overwrite=args.overwrite,
            restart=args.restart,
            unchecked=args.unchecked,
            mesh=mesh,
            progress=lambda step: meter.show(step.done, step.total, _step_text(step)),
            meta={"model": DEMO_NAME} if made_of_demo(folder) else None,
            shard_bytes=shard_bytes,
            **target,
            **gpu,
        )
    if report.resumed:
        note(f"{report.resumed} of {len(report.blocks)} blocks were finished by an earlier run")
    for text in dict.fromkeys(text for linear in report.linears for text in linear.warnings):
        count = sum(text in linear.warnings for linear in report.linears)
        warn(f"{text} ({count} linears)")
    _summarize(report)
    return 0


def _dry_run(
    source: Any,
    recipe: Recipe,
    calibration: CalibrationData | None,
    config: CalibrationConfig,
    args: Any,
    mesh: Any,
) -> int:
    """Say what the run would need; what cannot fit is refused as the run itself would be."""
    from jq.cli import dry_run
    from jq.requirements.of_checkpoint import check_resources, run_of_checkpoint

    run = run_of_checkpoint(
        source,
        recipe,
        None if calibration is None else calibration.tokens.shape,
        batch_size=config.batch_size,
        offload=config.offload,
        target=args.format,
        devices=1 if mesh is None else mesh.size,
    )
    rates = dry_run.measure_rates(run.compute_bytes)
    dry_run.show(run, args.out, rates)
    check_resources(run, args.out)
    return 0


@contextlib.contextmanager
def _told_how_to_go_on(out: Path) -> Iterator[None]:
    """Say of a run that was stopped that it can go on, if it can."""
    from jq.journal import journal_folder

    try:
        yield
    except BaseException:
        if journal_folder(out).exists():
            note(
                "finished blocks are kept: the same command goes on from there, --restart forgets "
                "them"
            )
        raise


def _parse(arguments: Sequence[str]) -> tuple[Any, Method]:
    """Options, and the method whose defaults they have."""
    name = peek(arguments, "--method") or DEFAULT
    base = find_preset(name).method
    activation = peek(arguments, "--activation")
    spec, _ = preset(name, activation=activation)
    chosen = Numbers(
        method=name,
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        activation=activation or find_preset(name).activation,
    )
    base, rounding = _with_rounding(base, peek(arguments, "--rounding"))
    options = options_class(base)
    dataset = (str | None, None, "FILE|NAME")
    calibration = options_class(CalibrationConfig(), {"calib_dataset": dataset})
    fields: list[Any] = [
        ("model", _positional("MODEL", 'a folder, or "demo" for the embedded model')),
        ("out", Annotated[Path, tyro.conf.arg(metavar="DIR", help="the folder to make")]),
        ("format", _format(), "orbax"),
        ("overwrite", _switch("replace an existing folder that jaxq has made"), False),
        ("restart", _switch("forget what an unfinished run to DIR has done"), False),
        ("dry_run", _switch("say what the run will need, and do nothing"), False),
        ("unchecked", _switch("start even where memory or disk seem too small"), False),
        ("devices", _devices(), None),
        ("target_gpu", _target_gpu(), None),
        ("allow_reference", _switch("quantize what that GPU has no kernels for"), False),
        ("numbers", Numbers, chosen),
        *rounding,
        ("options", Annotated[options, tyro.conf.arg(name=type(base).__name__)], options()),
        ("calibration", calibration, calibration()),
        ("export", Export, Export()),
        ("hosts", Hosts, Hosts()),
    ]
    kind = dataclasses.make_dataclass("Quantize", fields, frozen=True, namespace={"__doc__": ""})
    return parse(kind, "quantize", ABOUT, arguments), base


def _positional(metavar: str, text: str) -> Any:
    return Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar=metavar, help=text)]


def _switch(text: str) -> Any:
    return Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help=text)]


def _format() -> Any:
    text = "what to write: a checkpoint of jaxq's own (orbax), or a folder that other tools read"
    return Annotated[Literal[FORMATS], tyro.conf.arg(help=text)]  # pyright: ignore


def _target_gpu() -> Any:
    text = "the GPU that will run the model, such as a100: what it lacks is refused; default: that "
    text += "of this machine, if it has one"
    return Annotated[str | None, tyro.conf.arg(metavar="GPU", help=text)]


def _devices() -> Any:
    text = "devices that share the work; all of an accelerator's and one CPU unless it is given"
    return Annotated[str | None, tyro.conf.arg(metavar=METAVAR, help=text)]


def _with_rounding(base: Method, name: str | None) -> tuple[Method, list[Any]]:
    """The method with the rounding asked for, and the option that asks, if the method has one."""
    if isinstance(base, RTN | GPTQ):
        return base, []
    default = "gptq" if isinstance(base.rounding, GPTQ) else "rtn"
    if name is not None and name not in ROUNDINGS:
        raise SpecError(f"rounding {name!r} is unknown; known: {', '.join(ROUNDINGS)}")
    if name is not None and name != default:
        base = dataclasses.replace(base, rounding=ROUNDINGS[name])
    text = "what rounds the weights afterwards; its options are below"
    kind = Annotated[Literal[tuple(ROUNDINGS)], tyro.conf.arg(help=text)]  # pyright: ignore
    return base, [("rounding", kind, default)]


def _calibration_config(options: Any) -> CalibrationConfig:
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return CalibrationConfig(**{**given, "calib_dataset": given["calib_dataset"] or ""})


def _calibration(
    source: Any, recipe: Recipe, config: CalibrationConfig, args: Any
) -> CalibrationData | None:
    if not any(rule.spec is not None and needs_calibration(rule) for rule in recipe):
        if config.calib_dataset:
            note(
                f"method {args.numbers.method} learns nothing from data: --calib-dataset is unused"
            )
        return None
    if not config.calib_dataset:
        if not made_of_demo(source.path):
            raise CalibrationError(
                f"method {args.numbers.method} learns from calibration text: give --calib-dataset "
                "with a .txt, .jsonl or .npy file, or wikitext2, c4 or pile, which are downloaded; "
                "or choose --method rtn, which needs none"
            )
        config = dataclasses.replace(config, calib_dataset=str(demo_text("calibration.txt")))
    asked, context = config.calib_seqlen, source.config.max_position_embeddings
    config = dataclasses.replace(config, calib_seqlen=min(asked, context))
    data = read_calibration(source, config)
    if asked > context:
        note(f"calib_seqlen {asked} is cut to the model's context of {context} tokens")
    for text in data.warnings:
        warn(text)
    return data


def read_calibration(source: Any, config: CalibrationConfig) -> CalibrationData:
    """Calibration data for a model (an HFCheckpoint), by its own tokenizer where there is text."""
    from jq.calib.source import calibration_data
    from jq.models import Tokenizer

    encode = None
    if Path(config.calib_dataset).suffix.lower() != ".npy":
        encode = Tokenizer(source.path, source.config.vocab_size).encode
    return calibration_data(config, vocab_size=source.config.vocab_size, encode=encode)


def _step_text(step: Progress) -> str:
    error = "" if step.error is None else f"  output error {step.error:.4f}"
    return f"{step.block} {step.group}{error}"


def _summarize(report: Any) -> None:
    from jq.cli.summary import quantized_totals

    totals = quantized_totals(report.path)
    facts = [
        ("checkpoint", str(report.path)),
        ("linears", f"{len(report.linears)} quantized, {totals.linear_bits:.3f} bits per weight"),
        ("model", f"{size_text(totals.file_bytes)}, {totals.model_bits:.3f} bits per weight"),
        ("time", time_text(report.seconds)),
    ]
    errors = [(r.output_error, r.rtn_output_error) for r in report.linears]
    known = [(e, r) for e, r in errors if e is not None and r is not None]
    if known:
        mean, nearest = (sum(values) / len(known) for values in zip(*known, strict=True))
        text = f"{mean:.4f} on average; rounding to nearest: {nearest:.4f}"
        facts.insert(3, ("output error", text))
    print_facts(facts)
