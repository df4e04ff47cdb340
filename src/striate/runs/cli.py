"""The command line: a verb is a function, its signature the options, its docstring the help.

The fields of option dataclasses (`TrainOptions`) are options, too. A YAML file with the same names (`--config`) sets
any of them; the command line overrides it.
"""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from rich.text import Text

from striate.console import console
from striate.distributed import environment_rank
from striate.errors import UserError, flag, nearest
from striate.runs.options import call_arguments, help_of, kind_of, options_of, signature_of
from striate.runs.run import SKIPPED, Run

# The function and the purpose of each verb. Its module is imported only when the verb runs.
VERBS = {
    "inspect": (
        "striate.runs.inspecting:inspect",
        "the parts of a model, the parameters that a region trains, an encoded example",
    ),
    "cost": (
        "striate.studies.cost:cost",
        "parameters, FLOPs, memory and time of tuning a region, from the config",
    ),
    "assemble": (
        "striate.studies.assemble:assemble",
        "a new VLM from a vision encoder and a language model",
    ),
    "align": ("striate.runs.training:align", "stage 1: train the projector"),
    "tune": ("striate.runs.training:tune", "stage 2: train a region of the decoder's layers"),
    "score": (
        "striate.runs.scoring:score",
        "layer scores, to choose a region by",
    ),
    "revert": ("striate.runs.scoring:revert", "perplexity with groups of layers reverted to the backbone"),
    "choose": (
        "striate.studies.choose:choose",
        "region, modules, method and route for a model, data and budget, as a recipe",
    ),
    "prune": (
        "striate.runs.pruning:prune",
        "remove layers outside the region from a checkpoint, verified",
    ),
    "eval": ("striate.runs.evaluating:evaluate", "accuracy on visual and text tasks"),
    "ask": ("striate.runs.asking:ask", "one question about images, to one model or two"),
    "card": ("striate.runs.card:card", "the model card of a run, with its results"),
    "sweep": (
        "striate.studies.sweep:sweep",
        "a grid of options: tune, evaluate and prune each combination; resumable",
    ),
    "report": ("striate.studies.report:report", "one HTML file about any number of runs"),
    "explore": (
        "striate.studies.explore:explore",
        "one HTML page: where each layer looks, its nearest words, the answer without it",
    ),
    "demo": ("striate.studies.demo:demo", "the whole pipeline on a small generated world, in minutes on a CPU"),
}
# The option that the words after a verb belong to: `striate tune MODEL` is `striate tune --model MODEL`.
SUBJECTS = ("model", "runs", "run", "file")
QUESTION = "question"
"""The option of the word after the model, or else of the last one after `--image`: `ask MODEL --image X.png QUESTION`.
"""

NO_RECIPE = "--config: a YAML file was expected, with a line OPTION: VALUE for each option"

output, errors = console(), console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Returns the exit status: 0 done, 1 cells of a sweep failed, 2 a `UserError`, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot encode must not raise
            stream.reconfigure(errors="backslashreplace")
    # Read by torch when it is imported. Threads that wait for each other busily take the cores from other programs, and
    # from each other: beside busy programs two threads were 2 to 2.5 times slower, alone no faster (research/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        rank = environment_rank()  # every process prints its error: it may be the only one
        process = "" if rank.first else f" (process {rank.rank})"
        errors.print(f"striate {words[0]}{process}: ", style="red", end="")
        errors.print(f"{error} ({error.link})" if error.see else str(error))
        return 2
    except KeyboardInterrupt as stop:
        errors.print(f"\nstriate {words[0]}: {str(stop) or 'interrupted'}")
        return 130


def usage() -> Text:
    """The help of the program itself."""
    verbs = "\n".join(f"  [bold]{name:9}[/] {purpose}" for name, (_, purpose) in VERBS.items())
    return Text.from_markup(
        "[bold]striate[/]: train the visual region of a vision-language model, and compare it honestly\n\n"
        f"usage: striate VERB ... [--config FILE] [--debug]\n\n{verbs}\n\n"
        "Options of a verb: striate VERB --help"
    )


def run_verb(name: str, words: list[str], *, debug: bool) -> int:
    """Parse the arguments of one verb, call its function, and print its result."""
    if name not in VERBS:
        near = get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        raise UserError(f"no such verb: {hint}", see="unknown-name")
    signature = signature_of(VERBS[name][0])
    if {"-h", "--help", "--help-all"} & {*words}:
        output.print(help_of(name, signature, subject=_subject(signature), everything="--help-all" in words).rstrip())
        return 0
    parse_call(name, signature, words)  # a wrong option is reported before anything slow is imported
    if not debug:
        quiet()
    module, _, attribute = VERBS[name][0].partition(":")
    function = getattr(importlib.import_module(module), attribute)
    call = parse_call(name, function, words)
    result = function(**call)
    _print_result(name, result, call)
    return 1 if name == "sweep" and _unfinished(result) else 0


def parse_call(name: str, function: Callable[..., Any], words: list[str]) -> dict[str, Any]:
    """The keyword arguments that a command line asks for; the first word may be the subject, without its option."""
    subject = _subject(function)
    if QUESTION in inspect.signature(function).parameters and flag(QUESTION) not in words:
        pairs = enumerate(pairwise(words), 1)
        if loose := [at for at, pair in pairs if not any(word.startswith("-") for word in pair)]:
            at = loose[0] if loose[0] == 1 else loose[-1]
            words = [*words[:at], *words[at + 1 :], flag(QUESTION), words[at]]
    if subject and words and not words[0].startswith("-"):
        words = [flag(subject), *words]
    try:
        return call_arguments(function, parser_of(name, function).parse_args(words))
    except UnicodeDecodeError:
        raise UserError(NO_RECIPE) from None


def _subject(function: Callable[..., Any]) -> str | None:
    return next((key for key in SUBJECTS if key in inspect.signature(function).parameters), None)


class Parser(ArgumentParser):
    """A parser whose errors are a `UserError` of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error; for an unknown option with the nearest ones, for an invalid value with the expected type."""
        options = {action.dest: action for action in self._actions if action.option_strings}
        unknown = re.match(r"unrecognized arguments: (\S+)|Option '(.+)' is not accepted", message)
        if unknown and (unknown[2] or unknown[1].startswith("-")):
            word = unknown[2] or unknown[1].partition("=")[0]
            known = options if unknown[2] else map(flag, options)
            raise UserError(f"no option {nearest(word, known)}", see="unknown-name") from None
        if unknown:
            raise UserError(f"{unknown[1]!r} is in no option's place: options are --NAME VALUE") from None
        if required := re.match(r"the following arguments are required: (.+)", message):
            raise UserError(f"required: {', '.join(map(flag, required[1].split(', ')))}") from None
        if message.startswith("Unexpected config"):  # with the whole file behind it
            raise UserError(NO_RECIPE) from None
        value = re.match(r'Parser key "(\w+)":.*\b(?:Got|Given) value: (.*)', message, flags=re.DOTALL)
        if value and value[1] in options:
            kind = kind_of(getattr(options[value[1]], "_typehint", str))
            raise UserError(f"{flag(value[1])}: {value[2].strip()!r} is not {kind}") from None
        raise UserError(" ".join(re.sub(r'Parser key "(\w+)"', lambda key: flag(key[1]), message).split())) from None


def parser_of(name: str, function: Callable[..., Any]) -> Parser:
    """A parser with one argument per option of the function."""
    parser = Parser(prog=f"striate {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    for option in options_of(function):
        settings: dict[str, Any] = {"required": True} if option.required else {"default": option.default}
        if option.several:  # `--data a.json b.json`
            settings["nargs"] = "+"
        elif option.hint is bool:
            settings["action"] = "store_true"
        else:
            settings["type"] = option.hint
            settings |= {"nargs": "?", "const": True} if option.switch else {}
        parser.add_argument(option.flag, **settings)
    return parser


def quiet() -> None:
    """Silence the progress bars and notes of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about missing kernels when it is imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _print_result(verb: str, result: Any, call: Mapping[str, Any]) -> None:
    """Print the result of a verb; of several processes only the first does."""
    if not environment_rank().first:
        return

    if verb == "prune" and not call["dry_run"]:
        result = Run.open(call["out"])
    if isinstance(result, Run):
        _print_run(verb, result)
    elif isinstance(result, Path):
        output.print(f"wrote {result}")
    elif verb == "eval":
        _print_results(result, Path(call["out"] or call["model"]))
    elif result is not None:
        output.print(result)


def _print_results(results: dict[str, Any], run: Path) -> None:
    for task, found in results["tasks"].items():
        spread = f" ± {found['stderr']:.3f}" if found.get("stderr") is not None else ""
        output.print(f"{task:16} {found['metric']:16} {found['value']:.3f}{spread}  n {found['n']}")
    measured = {name: task for one in results.get("harness", {}).values() for name, task in one["tasks"].items()}
    for name, task in measured.items():
        if name not in results["tasks"]:  # without a main metric, or part of a group
            output.print(f"{name:16} {', '.join(f'{key} {value:.3f}' for key, value in task['metrics'].items())}")
    for name in results.get("missing", ()):
        output.print(f"{name:16} is in neither harness")
    if results.get("empty"):
        output.print(
            f"{results['empty']} answers are empty: a model that reasons before it answers may need a larger "
            "--max-new-tokens"
        )
    total = results["skipped"] + sum(task["n"] for task in results["tasks"].values())
    _print_skipped(results["skipped"], total, run, results.get("left_out"))


def _print_skipped(number: int, total: int | None, run: Path, reasons: Mapping[str, int] | None = None) -> None:
    """Print the number of skipped records in the last line, where it is seen."""
    if number:
        of = f" of {total}" if total else ""
        why = "".join(f"; {count} {reason}" for reason, count in (reasons or {}).items())
        output.print(f"{number}{of} records left out, listed in {run / SKIPPED}{why}", style="yellow")


def _unfinished(result: Any) -> bool:
    """Whether cells of a sweep failed or were stopped; prints which, and why."""
    cells = getattr(result, "unfinished", ())
    for cell in cells:
        why = f": {cell.error}" if cell.error else ""
        errors.print(f"{cell.name} {cell.status}{why} (see {cell.log})")
    return bool(cells)


def _print_run(verb: str, run: Run) -> None:
    if verb in ("score", "revert"):
        from striate.runs.terminal import render

        output.print(render(run, verb))
    elif training := run.info.get("training"):
        output.print(
            f"trained {training['trainable_parameters']:,} of {training['total_parameters']:,} parameters "
            f"in {training['seconds']:.1f} s ({training['samples_per_second']:.1f} records/s, "
            f"{training['peak_memory_gb']:.2f} GB)"
        )
    for warning in run.info.get("warnings", ()):
        output.print(f"warning: {warning}", style="yellow")
    if verb in ("score", "revert"):
        output.print(f"wrote {run.path}; figures are in {run.figures}")
    else:
        output.print(f"{run.info['status']}: {run.path}; the model is in {run.checkpoint}")
    _print_skipped(len(run.skipped()), (run.info.get("training") or {}).get("records"), run.path)
