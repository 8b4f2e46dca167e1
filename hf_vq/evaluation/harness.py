"""Tasks of lm-eval (the `eval` extra) on a packed model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Run lm-eval's tasks on a model that is loaded already.

    Args:
        tasks: names of tasks or groups.
        limit: only the first documents of each task; None: all.
        shots: examples in the prompt; None: the task's own number.
        include_path: folder of more tasks, as YAML files.

    Returns:
        One dict per task and metric: task, version, filter, shots, metric, value, stderr (or
        None), limit, lm_eval_version.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a task is not known, or there is no tokenizer.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks are run by lm-eval, which cannot be imported ({error}): "
            "pip install 'hf-vq[eval]'"
        ) from None
    if tokenizer is None:
        raise ValueError("tasks are text: name a tokenizer")
    names = list(tasks)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return rows_of(found, limit, lm_eval.__version__)


def rows_of(found: dict[str, Any], limit: int | None, version: str) -> list[dict[str, Any]]:
    """What `lm_eval.simple_evaluate` returns -> rows, in its order."""
    rows = []
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "version": found.get("versions", {}).get(task, "N/A"),
                    "filter": chosen,
                    "shots": found.get("n-shot", {}).get(task, 0),
                    "metric": metric,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "limit": limit,
                    "lm_eval_version": version,
                }
            )
    return rows
