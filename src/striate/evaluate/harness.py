"""The tasks of two public harnesses, lm-eval (text) and lmms-eval (images): their data, prompts and metrics.

Every number is the harness's own, computed by its own code for a task; here its questions are only answered.
lm-eval's own class for Hugging Face models asks the decoder, as it would any language model. lmms-eval has no class
for every vision-language model, so a thin one hands its conversations to `evaluate.answers`.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import metadata
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PaliGemmaProcessor

from striate.data import Record, RecordError, Skipped
from striate.errors import UserError
from striate.evaluate.answers import answer
from striate.run import check_place, place
from striate.vlm import Vlm, first_line, load

SEED = 1234
"""Both harnesses' own seed for the choice of examples that stand before a question."""

MAX_NEW_TOKENS = 1024
"""Most tokens of an answer where a task of lmms-eval sets no limit: that of its classes for LLaVA."""

PACKAGES = {"lm": "lm_eval", "lmms": "lmms_eval"}


@dataclass(frozen=True)
class Tasks:
    """Names of tasks, by harness, and the `missing` benchmarks of a suite, which neither harness has."""

    lm: tuple[str, ...] = ()
    lmms: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __add__(self, other: Tasks) -> Tasks:
        """Both, in order, each task once."""
        joined = ((*getattr(self, field.name), *getattr(other, field.name)) for field in fields(self))
        return Tasks(*(tuple(dict.fromkeys(names)) for names in joined))


SUITES = {
    "paper-visual": Tasks(
        lmms=(
            "docvqa_val", "gqa", "mmbench_en_dev_static", "mmmu_val", "scienceqa_img", "seedbench", "textvqa_val",
        ),
        missing=("OCR-VQA", "TDIUC"),
    ),
    "paper-text": Tasks(lm=("mmlu", "bbh", "ceval-valid", "cmmlu")),
}  # fmt: skip
"""The benchmarks of Wang et al. 2025, on the splits whose answers are public and which no other model has to judge."""

MEANS = ("acc", "acc_norm", "anls", "exact_match")
"""Metrics that are means of scores from 0 to 1 where a task does not say how it aggregates."""

SHARES = {
    ("mmbench_en_dev_static", "gpt_eval_score"): 0.01,
    ("mmmu_val", "mmmu_acc"): 1.0,
    ("seedbench", "seed_image"): 1.0,
}
"""What makes a share from 0 to 1 of a metric that the task aggregates in its own way."""


def tasks(names: str | Sequence[str]) -> Tasks:
    """What to run: `lm:mmlu,bbh`, `lmms:gqa,textvqa_val`, or a suite (`paper-visual`, `paper-text`).

    A prefix holds for all names up to the next space or item.

    Raises:
        UserError: neither a known prefix nor a suite.
    """
    found = Tasks()
    for item in " ".join([names] if isinstance(names, str) else names).split():
        prefix, _, rest = item.partition(":")
        listed = tuple(name for name in rest.split(",") if name)
        if prefix in PACKAGES and listed:
            found += Tasks(**{prefix: listed})
        elif item in SUITES:
            found += SUITES[item]
        else:
            raise UserError(f"no tasks {item!r}: expected lm:NAME,NAME, lmms:NAME,NAME, or {', '.join(SUITES)}")
    if not (found.lm or found.lmms):
        raise UserError(f"no tasks given: expected lm:NAME,NAME, lmms:NAME,NAME, or {', '.join(SUITES)}")
    return found


def run(
    model: str | Path,
    names: str | Sequence[str],
    *,
    out: Path | None = None,
    task_path: Path | None = None,
    samples: int | None = None,
    batch: int = 16,
    seed: int = SEED,
    device: str | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Evaluate a model on tasks of lm-eval and lmms-eval.

    Args:
        model: a model folder, a run folder or a hub id.
        names: tasks as `tasks` reads them.
        out: the run folder to write; default: the results go into the run that `model` is.
        task_path: a folder of your own YAML tasks, which come before the harness's of the same name.
        samples: the first so many questions of each task; default: all.
        batch: questions answered together.
        seed: of the choice of examples that stand before a question.
        device: cpu to stay off a GPU.
        dtype: auto (as saved), float32, bfloat16 or float16.

    Returns:
        The content of results.json, as `ask` gives it.

    Raises:
        UserError: nowhere to write, a harness that is not installed or stops, an unknown task.
    """
    options = dict(locals())
    check_place(model, out)  # refused now, not after the work
    asked = tasks(names)
    managers = {prefix: _manager(prefix, task_path, getattr(asked, prefix)) for prefix in _chosen(asked)}
    vlm = load(model, device=device, dtype=dtype)
    with place(model, out, verb="eval", options=options) as folder:
        found = _ask(vlm, asked, managers, folder.path, samples=samples, batch=batch, seed=seed)
        folder.write_predictions(())  # those of an earlier evaluation are not of these tasks
        folder.write_results(found)
    return found


def ask(
    vlm: Vlm,
    asked: Tasks,
    *,
    folder: Path,
    task_path: Path | None = None,
    samples: int | None = None,
    batch: int = 16,
    seed: int = SEED,
) -> dict[str, Any]:
    """The results of a model in memory, which is left in evaluation mode.

    `folder` is where tasks without public answers leave their submissions.

    Returns:
        `{"tasks": {name: {"metric", "modality", "value", "stderr", "n"}}, "visual", "text"}`, like
        `prediction.summary`, with "seconds", "data" (what was asked), "missing" (see `Tasks`) and, by harness,
        all that it measured: `"harness": {name: {"version", "tasks": {name: {"version", "shots", "metrics"}}}}`.

    A task counts with the first metric of its own list that is a share from 0 to 1, the higher the better; one
    without such a metric stands under "harness" alone. A group counts as one task where the harness averages it.
    A task of lmms-eval is visual when any of its questions has an image.

    Raises:
        UserError: see `run`.
    """
    managers = {prefix: _manager(prefix, task_path, getattr(asked, prefix)) for prefix in _chosen(asked)}
    return _ask(vlm, asked, managers, folder, samples=samples, batch=batch, seed=seed)


def _chosen(asked: Tasks) -> list[str]:
    return [prefix for prefix in PACKAGES if getattr(asked, prefix)]


def _ask(
    vlm: Vlm, asked: Tasks, managers: dict[str, Any], folder: Path, *, samples: int | None, batch: int, seed: int
) -> dict[str, Any]:
    vlm.model.eval()
    began, data, measured = time.monotonic(), [], {}
    results: dict[str, dict[str, Any]] = {}
    for prefix, manager in managers.items():
        names = list(getattr(asked, prefix))
        options = {"task_manager": manager, "limit": samples, "fewshot_random_seed": seed}
        with _running(prefix, names):
            found, seeing = (_lm if prefix == "lm" else _lmms)(vlm, names, batch, folder, options)
        results |= _results(found, seeing)
        version = metadata.version(PACKAGES[prefix])
        measured[_title(prefix)] = {"version": version, "tasks": _measured(found)}
        data.append(f"{_title(prefix)} {version}: {', '.join(names)}")
    cut = "" if samples is None else f" (the first {samples} of each)"
    return {
        "tasks": results,
        **{modality: _average(results, modality) for modality in ("visual", "text")},
        "seconds": round(time.monotonic() - began, 3),
        "data": "; ".join(data) + cut,
        "skipped": 0,
        **({"missing": list(asked.missing)} if asked.missing else {}),
        "harness": measured,
    }


def _average(results: dict[str, dict[str, Any]], modality: str) -> float | None:
    values = [task["value"] for task in results.values() if task["modality"] == modality]
    return fmean(values) if values else None


# The harnesses: each is looked up, asked, and heard out.


def _title(prefix: str) -> str:
    return PACKAGES[prefix].replace("_", "-")


@contextmanager
def _running(prefix: str, names: Sequence[str]) -> Iterator[None]:
    """What a harness prints goes to standard error, and what it raises becomes one line."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{_title(prefix)} lacks a package: {first_line(error)}; pip install it") from error
    except Exception as error:  # tasks are others' programs, and data come from elsewhere
        # lmms-eval tries downloads again, and then says no more than that it has.
        cause = error.__cause__ or error if type(error).__name__ == "RetryError" else error
        stopped = f"{_title(prefix)} stopped in {', '.join(names)}"
        raise UserError(f"{stopped}: {type(cause).__name__}: {first_line(cause)}") from error


def _manager(prefix: str, task_path: Path | None, names: Sequence[str]) -> Any:
    """The harness's index of tasks. Its own thousands are read only when a name is not in `task_path`."""
    if find_spec(PACKAGES[prefix]) is None:
        raise UserError(f"{_title(prefix)} is not installed: pip install 'striate[eval]'")
    if task_path is not None and not task_path.is_dir():
        raise UserError(f"{task_path} is no folder; --task-path expects one with YAML tasks")
    own = None if task_path is None else str(task_path)
    with _running(prefix, names):
        if prefix == "lm":
            from lm_eval.tasks import TaskManager
        else:
            import lmms_eval.models  # noqa: F401  before its tasks: sets how much is logged
            from lmms_eval.tasks import TaskManager
        manager = TaskManager(include_path=own, include_defaults=False) if own else None
        if manager is None or not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=own)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = ", ".join(get_close_matches(name, known))
            command = "lm-eval ls tasks" if prefix == "lm" else "python -m lmms_eval --tasks list"
            raise UserError(f"{_title(prefix)} has no task {name!r}; " + (f"nearest: {near}" if near else command))
    return manager


Answered = tuple[dict[str, Any], set[str]]
"""What a harness found, and the tasks with an image in any question."""


def _lm(vlm: Vlm, names: list[str], batch: int, folder: Path, options: dict[str, Any]) -> Answered:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if isinstance(vlm.processor, PaliGemmaProcessor):
        raise UserError(
            "PaliGemma's tokens see those behind them, answers too: lm-eval's likelihoods mean nothing there"
        )
    model = HFLM(pretrained=vlm.model, tokenizer=vlm.tokenizer, backend="causal", batch_size=batch)
    return simple_evaluate(model=model, tasks=names, **options), set()


def _lmms(vlm: Vlm, names: list[str], batch: int, folder: Path, options: dict[str, Any]) -> Answered:
    from lmms_eval.evaluator import simple_evaluate

    model, seeing = _lmms_model(vlm, batch)
    arguments = Namespace(output_path=str(folder), process_with_media=True)
    return simple_evaluate(model=model, tasks=names, cli_args=arguments, **options), seeing


def _lmms_model(vlm: Vlm, batch: int) -> tuple[Any, set[str]]:
    """lmms-eval's view of the model, and a set that the tasks whose questions have images are put into."""
    from lmms_eval.api.model import lmms

    seeing: set[str] = set()

    class Model(lmms):
        is_simple = False  # asked by conversations

        def __init__(self) -> None:
            super().__init__()
            self.accelerator = None  # one process

        def generate_until(self, requests: list[Any]) -> list[str]:
            asked = [_question(*one.args, documents=self.task_dict) for one in requests]
            return _answers(vlm, asked, batch, seeing)

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise _unasked(requests[0].task_name, "compares likelihoods")

        def generate_until_multi_round(self, requests: list[Any]) -> Any:
            raise _unasked(requests[0].task_name, "asks in rounds")

    return Model(), seeing


def _unasked(task: str, reason: str) -> UserError:
    return UserError(
        f"lmms-eval's task {task} {reason}; striate gives it one greedy answer to a question, about images"
    )


@dataclass(frozen=True)
class _Question:
    """A question of lmms-eval. Its images are only opened by `record`."""

    task: str
    max_new_tokens: int
    until: tuple[str, ...]
    record: Callable[[], Record]


def _question(
    context: str,
    doc_to_messages: Callable[[Any], list[dict[str, Any]]],
    options: dict[str, Any],
    number: int,
    task: str,
    split: str,
    *,
    documents: dict[str, Any],
) -> _Question:
    """One request: the chat template and the conversation say all that `context` does."""
    if options.get("do_sample") or (options.get("temperature") or 0) > 0 or (options.get("num_beams") or 1) > 1:
        raise _unasked(task, "wants sampled answers or beams")
    until = options.get("until") or ()
    return _Question(
        task,
        options.get("max_new_tokens") or options.get("max_gen_toks") or MAX_NEW_TOKENS,
        (until,) if isinstance(until, str) else tuple(until),
        lambda: _record(doc_to_messages(documents[task][split][number]), task, f"{task}:{number + 1}"),
    )


def _record(messages: list[dict[str, Any]], task: str, source: str) -> Record:
    turns, images = [], []
    for message in messages:
        content, parts = message["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                picture = part["url"]
                web = isinstance(picture, str) and picture.startswith(("http://", "https://"))
                images.append(Path(picture) if isinstance(picture, str) and not web else picture)
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise _unasked(task, f"has {part['type']} in it")
        turns.append({"role": message["role"], "content": parts})
    return Record(source, tuple(turns), tuple(images), source, task=task)


def _answers(vlm: Vlm, asked: Sequence[_Question], batch: int, seeing: set[str]) -> list[str]:
    """What the model says to each question, in their order. A few batches' images are in memory at a time."""
    said = [""] * len(asked)
    limit = getattr(vlm.model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    order = sorted(range(len(asked)), key=lambda index: asked[index].max_new_tokens)
    for num_tokens, group in groupby(order, key=lambda index: asked[index].max_new_tokens):
        indices = list(group)
        for start in range(0, len(indices), 8 * batch):
            part = indices[start : start + 8 * batch]
            records = [asked[index].record() for index in part]
            seeing |= {record.task for record in records if record.images}
            for index, text in answer(vlm, records, batch=batch, max_new_tokens=num_tokens, max_length=limit):
                if isinstance(text, Skipped):
                    raise RecordError(text.source, text.reason)
                said[part[index]] = _before(text, asked[part[index]].until)
    return said


def _before(text: str, ends: Sequence[str]) -> str:
    return text[: min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))]


# What a harness found, in striate's form.


def _results(found: dict[str, Any], seeing: set[str]) -> dict[str, dict[str, Any]]:
    """Tasks and averaged groups by name, without those that a group here counts."""
    results = {name: result for name in found["results"] if (result := _result(name, found, seeing))}
    inner = {task for group in results for task in _below(group, found)}
    return {name: result for name, result in results.items() if name not in inner}


def _result(name: str, found: dict[str, Any], seeing: set[str]) -> dict[str, Any] | None:
    entry = found["results"][name]
    leaves = [one for one in (name, *_below(name, found)) if one in found["configs"]]
    listed = found["configs"][leaves[0]].get("metric_list") or [{"metric": metric} for metric in MEANS]
    for one in listed:
        metric = one["metric"]
        usual = "mean" if metric in MEANS else None
        mean = one.get("aggregation", usual) == "mean" and one.get("higher_is_better", True)
        share = 1.0 if mean else SHARES.get((name, metric))
        for key, value in entry.items():
            if share and key.partition(",")[0] == metric and _is_number(value) and 0 <= value * share <= 1:
                stderr = entry.get(key.replace(",", "_stderr,", 1))
                return {
                    "metric": key.removesuffix(",none").replace(",", ":"),
                    "modality": "visual" if seeing & {*leaves} else "text",
                    "value": float(value) * share,
                    "stderr": float(stderr) * share if _is_number(stderr) else None,
                    "n": sum(_count(found["samples"].get(leaf, ()), metric) for leaf in leaves),
                }
    return None


def _below(name: str, found: dict[str, Any]) -> list[str]:
    """The tasks and groups inside a group, of all levels."""
    direct = found["group_subtasks"].get(name, ())
    return [one for task in direct for one in (task, *_below(task, found))]


def _count(samples: Sequence[dict[str, Any]], metric: str) -> int:
    """The number of questions that have the metric; a task with several filters logs each several times."""
    return len({sample["doc_id"] for sample in samples if metric in sample})


def _measured(found: dict[str, Any]) -> dict[str, Any]:
    """All finite numbers, and what they depend on."""
    return {
        name: {
            "version": found["versions"].get(name),
            "shots": found["n-shot"].get(name),
            "metrics": {key: float(value) for key, value in entry.items() if "," in key and _is_number(value)},
        }
        for name, entry in found["results"].items()
    }


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bool) and math.isfinite(value)
    except TypeError:
        return False
