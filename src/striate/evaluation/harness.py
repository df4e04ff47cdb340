"""The tasks of two public harnesses, lm-eval (text) and lmms-eval (images): their data, prompts and metrics.

All values are computed by the harness's own code; this module only answers its requests. lm-eval's class for Hugging
Face models runs the decoder like any language model. lmms-eval has no class for all vision-language models, so a thin
one (`evaluation.lmms`) passes its conversations to `evaluation.answers`.

With several processes each answers its share of the requests; the harnesses do not see the other processes.
"""

from __future__ import annotations

import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PaliGemmaProcessor

from striate.distributed import Rank
from striate.errors import UserError, first_line, need
from striate.evaluation.lmms import lmms_model
from striate.vlm import Vlm

SEED = 1234
"""Both harnesses' default seed for the choice of few-shot examples."""

ALONE = Rank()
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
"""The benchmarks of Wang et al. 2025, on splits with public answers that are scored without a judge model."""

MEANS = ("acc", "acc_norm", "anls", "exact_match")
"""Metrics that are means of scores from 0 to 1 in tasks that do not name an aggregation."""

SCALES = {
    ("mmbench_en_dev_static", "gpt_eval_score"): 0.01,
    ("mmmu_val", "mmmu_acc"): 1.0,
    ("seedbench", "seed_image"): 1.0,
}
"""Factors that scale metrics with an aggregation of their own to 0..1."""


def tasks(names: str | Sequence[str]) -> Tasks:
    """The tasks of a text: `lm:mmlu,bbh`, `lmms:gqa,textvqa_val`, or a suite (`paper-visual`, `paper-text`).

    A prefix holds for all names up to the next space or item.

    Raises:
        UserError: an item has no known prefix and is not a suite.
    """
    parsed = Tasks()
    for item in " ".join([names] if isinstance(names, str) else names).split():
        prefix, _, rest = item.partition(":")
        listed = tuple(name for name in rest.split(",") if name)
        if prefix in PACKAGES and listed:
            parsed += Tasks(**{prefix: listed})
        elif item in SUITES:
            parsed += SUITES[item]
        else:
            raise UserError(f"no tasks {item!r}: expected lm:NAME,NAME, lmms:NAME,NAME, or {', '.join(SUITES)}")
    if not (parsed.lm or parsed.lmms):
        raise UserError(f"no tasks given: expected lm:NAME,NAME, lmms:NAME,NAME, or {', '.join(SUITES)}")
    return parsed


def is_task(name: str) -> bool:
    """Whether `tasks` can parse a name: it has the prefix of a harness, or is a suite."""
    return name in SUITES or name.partition(":")[0] in PACKAGES


def open_tasks(asked: Tasks, task_path: Path | None = None) -> dict[str, Any]:
    """The harnesses' task managers, by harness.

    Raises:
        UserError: a harness is not installed, or a task is unknown.
    """
    return {prefix: _manager(prefix, task_path, getattr(asked, prefix)) for prefix in _chosen(asked)}


def _chosen(asked: Tasks) -> list[str]:
    return [prefix for prefix in PACKAGES if getattr(asked, prefix)]


def ask(
    vlm: Vlm,
    asked: Tasks,
    managers: dict[str, Any],
    folder: Path,
    *,
    samples: int | None,
    batch: int,
    rank: Rank = ALONE,
) -> dict[str, Any]:
    """The results of a model in memory, which is left in evaluation mode; of several processes each asks its share.

    `folder` receives the submission files of tasks without public answers.

    Returns:
        `{"tasks": {name: {"metric", "modality", "value", "stderr", "n"}}, "visual", "text"}`, like
        `prediction.summary`, with "seconds", "data" (the tasks), "missing" (see `Tasks`) and, by harness, all of its
        metrics: `"harness": {name: {"version", "tasks": {name: {"version", "shots", "metrics"}}}}`.

    The value of a task is the first metric in its own list that is from 0 to 1, higher is better; a task without such a
    metric is listed under "harness" only. A group counts as one task where the harness averages it. A task of lmms-eval
    is visual when any of its questions has an image.

    Raises:
        UserError: a harness fails.
    """
    vlm.model.eval()
    start, data, measured = time.monotonic(), [], {}
    results: dict[str, dict[str, Any]] = {}
    for prefix, manager in managers.items():
        names = list(getattr(asked, prefix))
        options = {"task_manager": manager, "limit": samples, "fewshot_random_seed": SEED}
        with _running(prefix, names):
            output, visual = (_lm if prefix == "lm" else _lmms)(vlm, names, batch, folder, options, rank)
        results |= _results(output, visual)
        version = metadata.version(PACKAGES[prefix])
        measured[_title(prefix)] = {"version": version, "tasks": _metrics(output)}
        data.append(f"{_title(prefix)} {version}: {', '.join(names)}")
    cut = "" if samples is None else f" (the first {samples} of each)"
    return {
        "tasks": results,
        **{modality: _average(results, modality) for modality in ("visual", "text")},
        "seconds": round(time.monotonic() - start, 3),
        "data": "; ".join(data) + cut,
        "skipped": 0,
        **({"missing": list(asked.missing)} if asked.missing else {}),
        "harness": measured,
    }


def _average(results: dict[str, dict[str, Any]], modality: str) -> float | None:
    values = [task["value"] for task in results.values() if task["modality"] == modality]
    return fmean(values) if values else None


# Calls of the harnesses.


def _title(prefix: str) -> str:
    return PACKAGES[prefix].replace("_", "-")


@contextmanager
def _running(prefix: str, names: Sequence[str]) -> Iterator[None]:
    """Context in which a harness prints to standard error and its exceptions become a `UserError` of one line."""
    try:
        with redirect_stdout(sys.stderr), _alone():
            yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{_title(prefix)} lacks a package: {first_line(error)}; pip install it", see="package-not-installed"
        ) from error
    except Exception as error:  # the code and data of tasks are third-party
        # lmms-eval retries downloads, and its RetryError does not name the cause.
        cause = error.__cause__ or error if type(error).__name__ == "RetryError" else error
        stopped = f"{_title(prefix)} stopped in {', '.join(names)}"
        raise UserError(f"{stopped}: {type(cause).__name__}: {first_line(cause)}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Hide the process group from the harness, which would otherwise split the requests that `_share` has split."""
    before = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _share(rank: Rank, answer: Callable[[list[Any]], list[Any]]) -> Callable[[list[Any]], list[Any]]:
    """A function that answers requests as `answer` does, each process its share."""

    def answers(requests: list[Any]) -> list[Any]:
        mine = list(rank.share(requests))
        return rank.interleave(answer(mine) if mine else [])

    return answers


def _manager(prefix: str, task_path: Path | None, names: Sequence[str]) -> Any:
    """The harness's index of tasks. Its own thousands are read only when a name is not in `task_path`."""
    need(_title(prefix), f"--tasks {prefix}:{','.join(names)}", extra="eval")
    if task_path is not None and not task_path.is_dir():
        raise UserError(f"{task_path} is not a folder; --task-path expects one with YAML tasks")
    own = None if task_path is None else str(task_path)
    with _running(prefix, names):
        if prefix == "lm":
            from lm_eval.tasks import TaskManager
        else:
            import lmms_eval.models  # noqa: F401  before its tasks: sets the log level
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


HarnessOutput = tuple[dict[str, Any], set[str]]
"""The results of a harness, and the tasks with an image in any question."""


def _lm(vlm: Vlm, names: list[str], batch: int, folder: Path, options: dict[str, Any], rank: Rank) -> HarnessOutput:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if isinstance(vlm.processor, PaliGemmaProcessor):
        raise UserError(
            "PaliGemma's prompt tokens attend to later ones, the answer included: lm-eval's likelihoods are not valid"
        )
    model = HFLM(pretrained=vlm.model, tokenizer=vlm.tokenizer, backend="causal", batch_size=batch)
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(model, kind, _share(rank, getattr(model, kind)))
    return simple_evaluate(model=model, tasks=names, **options), set()


def _lmms(vlm: Vlm, names: list[str], batch: int, folder: Path, options: dict[str, Any], rank: Rank) -> HarnessOutput:
    from lmms_eval.evaluator import simple_evaluate

    model, visual = lmms_model(vlm, batch)
    model.generate_until = _share(rank, model.generate_until)
    arguments = Namespace(output_path=str(folder), process_with_media=True)
    output = simple_evaluate(model=model, tasks=names, cli_args=arguments, **options)
    return output, set().union(*rank.gather(visual))


# A harness's results in striate's format.


def _results(output: dict[str, Any], visual: set[str]) -> dict[str, dict[str, Any]]:
    """Tasks and averaged groups by name, without tasks that are part of such a group."""
    results = {name: result for name in output["results"] if (result := _result(name, output, visual))}
    inner = {task for group in results for task in _below(group, output)}
    return {name: result for name, result in results.items() if name not in inner}


def _result(name: str, output: dict[str, Any], visual: set[str]) -> dict[str, Any] | None:
    entry = output["results"][name]
    leaves = [one for one in (name, *_below(name, output)) if one in output["configs"]]
    listed = output["configs"][leaves[0]].get("metric_list") or [{"metric": metric} for metric in MEANS]
    for one in listed:
        metric = one["metric"]
        default = "mean" if metric in MEANS else None
        mean = one.get("aggregation", default) == "mean" and one.get("higher_is_better", True)
        scale = 1.0 if mean else SCALES.get((name, metric))
        for key, value in entry.items():
            if scale and key.partition(",")[0] == metric and _is_number(value) and 0 <= value * scale <= 1:
                stderr = entry.get(key.replace(",", "_stderr,", 1))
                return {
                    "metric": key.removesuffix(",none").replace(",", ":"),
                    "modality": "visual" if visual & {*leaves} else "text",
                    "value": float(value) * scale,
                    "stderr": float(stderr) * scale if _is_number(stderr) else None,
                    "n": sum(_count(output["samples"].get(leaf, ()), metric) for leaf in leaves),
                }
    return None


def _below(name: str, output: dict[str, Any]) -> list[str]:
    """The tasks and groups inside a group, at all levels."""
    direct = output["group_subtasks"].get(name, ())
    return [one for task in direct for one in (task, *_below(task, output))]


def _count(samples: Sequence[dict[str, Any]], metric: str) -> int:
    """The number of questions that have the metric; a task with several filters logs each several times."""
    return len({sample["doc_id"] for sample in samples if metric in sample})


def _metrics(output: dict[str, Any]) -> dict[str, Any]:
    """All finite metrics by task, with the task's version and number of few-shot examples."""
    return {
        name: {
            "version": output["versions"].get(name),
            "shots": output["n-shot"].get(name),
            "metrics": {key: float(value) for key, value in entry.items() if "," in key and _is_number(value)},
        }
        for name, entry in output["results"].items()
    }


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bool) and math.isfinite(value)
    except TypeError:
        return False
