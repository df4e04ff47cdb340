"""The command line: a verb is a function, its signature the options, its docstring the help.

Options of small dataclasses (`TrainOptions`) stand beside the function's own. A YAML file with the same names
(`--config`) sets any of them; the command line wins.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docstring_parser
from jsonargparse import ArgumentParser
from rich.console import Console

from striate.errors import UserError
from striate.options import call_arguments, flag, options_of

if TYPE_CHECKING:
    from striate.run import Run

# Each verb: where its function is and what it is for. Modules are imported only for the verb that runs.
VERBS = {
    "inspect": ("striate.cli.anatomy:inspect", "the parts of a model, what a region would train, an encoded example"),
    "cost": ("striate.cost:cost", "what tuning a region takes: parameters, FLOPs, memory, time; from the config alone"),
    "assemble": ("striate.assemble:assemble", "a new LVLM from a vision encoder and a language model"),
    "align": ("striate.train:align", "stage 1: train the projector"),
    "tune": ("striate.train:tune", "stage 2: train a region of the decoder's layers"),
    "score": ("striate.score:score", "which layers look, change, matter: layer scores, to choose a region by"),
    "revert": ("striate.score:revert", "perplexity with groups of layers put back to the backbone"),
    "prune": ("striate.prune:prune", "cut layers outside the region out of a checkpoint, with proof"),
    "eval": ("striate.evaluate:evaluate", "accuracy on visual and text tasks"),
    "sweep": ("striate.sweep:sweep", "a grid of choices, each tuned, evaluated, pruned; goes on where it stopped"),
    "report": ("striate.report:report", "any number of runs as one HTML file"),
    "demo": ("striate.demo:demo", "the whole pipeline on a small generated world, in minutes on a CPU"),
}
# What the bare words behind a verb mean: `striate tune MODEL` is `striate tune --model MODEL`; a recipe can name it.
SUBJECTS = ("model", "runs", "file")

output = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Returns the exit status: 0 done, 1 cells of a sweep failed, 2 something the user can put right, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        output.print(usage())
        return 0
    if words[0] == "--version":
        from striate import __version__

        output.print(f"striate {__version__}")
        return 0
    try:
        return run_verb(words[0], words[1:], debug=debug)
    except UserError as error:
        if debug:
            raise
        process = os.environ.get("RANK", "0")  # of several, each says it: only one may have it
        errors.print(f"[red]striate {words[0]}{f' (process {process})' if process != '0' else ''}:[/] ", end="")
        errors.print(str(error), markup=False)
        return 2
    except KeyboardInterrupt as stop:
        errors.print(f"\nstriate {words[0]}: {stop or 'interrupted'}", markup=False)
        return 130


def usage() -> str:
    """The help of the program itself."""
    verbs = "\n".join(f"  [bold]{name:9}[/] {purpose}" for name, (_, purpose) in VERBS.items())
    return (
        "[bold]striate[/]: train the visual region of a vision-language model, and compare it honestly\n\n"
        f"usage: striate VERB ... [--config FILE] [--debug]\n\n{verbs}\n\n"
        "striate VERB --help tells its options."
    )


def run_verb(name: str, words: list[str], *, debug: bool) -> int:
    """Parse the words of one verb, call its function, and say what came of it."""
    if name not in VERBS:
        near = get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise UserError(f"no such verb: {hint}")
    module, _, attribute = VERBS[name][0].partition(":")
    if not debug:
        _quiet()
    function = getattr(importlib.import_module(module), attribute)
    parser = parser_of(name, function)
    result = function(**call_arguments(function, parser.parse_args(spelt_out(function, words))))
    _tell(name, result)
    return 1 if name == "sweep" and _unfinished(result) else 0


def parser_of(name: str, function: Callable[..., Any]) -> ArgumentParser:
    """A parser with one argument for every parameter of the function and every field of its option dataclasses."""
    text = docstring_parser.parse(inspect.getdoc(function) or "")
    subject = next((f" {key.upper()}" for key in SUBJECTS if key in inspect.signature(function).parameters), "")
    usage = f"striate {name}{subject} [--OPTION VALUE ...]"
    parser = ArgumentParser(prog=f"striate {name}", usage=usage, description=text.description)
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    for option in options_of(function):
        settings: dict[str, Any] = {"help": option.description}
        if option.several:  # `--data a.json b.json`
            fallback = None if option.required else option.default
            parser.add_argument(option.flag, nargs="+", required=option.required, default=fallback, **settings)
        elif option.hint is bool:
            parser.add_argument(option.flag, action="store_true", default=option.default, **settings)
        elif option.switch:
            parser.add_argument(
                option.flag, nargs="?", const=True, type=option.hint, default=option.default, **settings
            )
        elif option.required:
            parser.add_argument(option.flag, type=option.hint, required=True, **settings)
        else:
            parser.add_argument(option.flag, type=option.hint, default=option.default, **settings)
    return parser


def spelt_out(function: Callable[..., Any], words: list[str]) -> list[str]:
    """The words of a verb with the name of its subject put before the bare ones that come first."""
    bare = list(takewhile(lambda word: not word.startswith("-"), words))
    subject = next((key for key in SUBJECTS if key in inspect.signature(function).parameters), None)
    return [flag(subject), *words] if bare and subject else words


def _quiet() -> None:
    """Our own words only: libraries' bars and notes stay away."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it lacks when it is imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _tell(verb: str, result: Any) -> None:
    """What came of it, and what to do next; of several processes, the first says it."""
    from striate.run import Run

    if os.environ.get("RANK", "0") != "0":
        return

    if isinstance(result, Run):
        _tell_run(verb, result)
    elif isinstance(result, Path):
        if verb == "demo":
            from striate.report import table

            runs = [Run.open(file.parent) for file in result.parent.glob("*/run.json")]
            output.print(table([run.path for run in sorted(runs, key=lambda run: run.info["started"])]))
        output.print(f"wrote {result}")
    elif verb == "eval":
        _tell_results(result)
    elif isinstance(result, list):
        output.print("\n".join(result), markup=False)
    elif result is not None:
        output.print(result)


def _tell_results(results: dict[str, Any]) -> None:
    for task, found in results["tasks"].items():
        spread = f" ± {found['stderr']:.3f}" if found.get("stderr") is not None else ""
        output.print(f"{task:16} {found['metric']:16} {found['value']:.3f}{spread}  n {found['n']}")
    measured = {name: task for one in results.get("harness", {}).values() for name, task in one["tasks"].items()}
    for name, task in measured.items():
        if name not in results["tasks"]:  # a task of its own kind, or one that a group counts
            output.print(f"{name:16} {', '.join(f'{key} {value:.3f}' for key, value in task['metrics'].items())}")
    for name in results.get("missing", ()):
        output.print(f"{name:16} is in neither harness")


def _unfinished(result: Any) -> bool:
    """Whether cells of a sweep failed or were stopped; says which, and why."""
    from striate.sweep import Outcome

    cells = result.unfinished if isinstance(result, Outcome) else ()
    for cell in cells:
        why = f": {cell.error}" if cell.error else ""
        errors.print(f"{cell.name} {cell.status}{why} (see {cell.log})", markup=False)
    return bool(cells)


def _tell_run(verb: str, run: Run) -> None:
    if verb in ("score", "revert"):
        from striate.score.terminal import shown

        output.print(shown(run, verb))
    elif training := run.info.get("training"):
        output.print(
            f"trained {training['trainable_parameters']:,} of {training['total_parameters']:,} parameters "
            f"in {training['seconds']:.1f} s ({training['samples_per_second']:.1f} records/s, "
            f"{training['peak_memory_gb']:.2f} GB)"
        )
    for warning in run.info.get("warnings", ()):
        output.print(f"warning: {warning}", markup=False, style="yellow")
    if skipped := run.skipped():
        output.print(f"{len(skipped)} records left out: see {run.path}/skipped.jsonl")
    if verb in ("score", "revert"):
        output.print(f"wrote {run.path}; figures are in {run.figures}")
    else:
        output.print(f"{run.info['status']}: {run.path}; the model is in {run.checkpoint}")
