"""The command `jaxq`.  Each subcommand is a module of this package, imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from jq.cli.output import complain
from jq.cli.signals import Terminated, terminable
from jq.errors import JaxqError

COMMANDS = {
    "quantize": "quantize a model into a checkpoint, or for other tools",
    "convert": "convert a quantized model into another format",
    "eval": "measure perplexity and tasks, and what quantization cost",
    "compare": "try every method on a model, and say which to take",
    "generate": "continue prompts",
    "inspect": "list a checkpoint's tensors, their sizes and errors",
    "methods": "list the methods that quantize knows",
    "bench": "time prefill, decode and each linear, against what the device can do",
    "doctor": "say what this machine's devices run, and try it",
    "advise": "say which method suits a model, a GPU and a goal, and what fits",
}

_USAGE = "usage: jaxq COMMAND ... (jaxq COMMAND --help tells more)"
_EXAMPLES = """\
Try it on the embedded model:
  jaxq quantize demo --out demo-int4
  jaxq eval demo-int4 --reference demo
  jaxq generate demo-int4 --prompt "The list is"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: the arguments without the program's name; None takes the process's own.
    Returns: the exit code: 0; 2 for bad input, said in one line on stderr; 130 and 143 after SIGINT
      and SIGTERM; 1 where a device ran out of memory.
    """
    code = _run(list(sys.argv[1:] if argv is None else argv))
    if code and (hosts := sys.modules.get("jq.cli.hosts")) is not None:
        hosts.leave(code)
    return code


def _run(arguments: list[str]) -> int:
    """The command's exit code, with all that a user meets said in one line."""
    try:
        with terminable():
            return _dispatch(arguments)
    except JaxqError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:  # the reader of our output has left: `jaxq inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        complain(f"{error.filename or 'the system'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted; nothing half-written was left")
        return 130
    except Terminated:
        complain("terminated; nothing half-written was left")
        return 143
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        complain("the device is out of memory; lower --batch-size, --calib-samples or --seq-len")
        return 1


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(f"jaxq {version('jaxq')}")
        return 0
    if name not in COMMANDS:
        complain(f"{name!r} is no command; commands: {', '.join(COMMANDS)}")
        return 2
    try:
        return import_module(f"jq.cli.{name}").run(arguments[1:])
    except SystemExit as end:  # of the parser, after --help or a usage error
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    about = "Quantize large language models in JAX, measure them and run them."
    return "\n".join([_USAGE, "", about, "", *lines, "", _EXAMPLES.rstrip()])
