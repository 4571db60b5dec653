"""Accuracy on tasks, by lm-evaluation-harness (the extra ``lm-eval``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EvaluationError, PackageMissingError, listed
from ..running import evaluating

# The zero-shot tasks that papers about quantization report.
TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande")


def check_tasks(tasks: Sequence[str | Mapping[str, Any]]) -> Any:
    """Make sure, before anything takes time, that lm-evaluation-harness is there and knows these tasks.

    Returns:
        Its index of tasks (a ``TaskManager``).

    Raises:
        PackageMissingError: It is not installed.
        EvaluationError: It knows no such task, and there is no such file; or there are no tasks.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PackageMissingError("lm-evaluation-harness", "lm-eval") from error
    manager = TaskManager()
    known = manager.task_index
    unknown = [task for task in tasks if isinstance(task, str) and task not in known and not Path(task).is_file()]
    if unknown or not tasks:
        raise EvaluationError(
            f"lm-evaluation-harness has no task {listed(map(repr, unknown))}. `lm_eval ls tasks` lists those it has; "
            "the path of a task's YAML file will do, too."
            if unknown
            else "There are no tasks to run."
        )
    return manager


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | Mapping[str, Any]] = TASKS,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of a model on tasks of lm-evaluation-harness, zero-shot where a task does not say otherwise.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups, paths of YAML files, or configs of tasks. Named tasks fetch their data.
        batch_size: Texts that go through the model together.
        limit: Examples per task at most; for a quick look only.

    Returns:
        Task -> metric (``acc``, ``acc_norm``, ..., and ``acc_stderr``, ...) -> value.

    Raises:
        PackageMissingError: lm-evaluation-harness is not installed.
        EvaluationError: It has no such task.
    """
    manager = check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    specs = [dict(task) if isinstance(task, Mapping) else task for task in tasks]
    # The harness would seed every random generator of the process.
    unseeded: dict[str, Any] = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
    with evaluating(model):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(
            harness, tasks=specs, task_manager=manager, limit=limit, log_samples=False, **unseeded
        )
    return {
        task: {
            # A metric is named with its filter: "acc,none".
            name.partition(",")[0]: float(value)
            for name, value in metrics.items()
            if "," in name and isinstance(value, int | float)
        }
        for task, metrics in found["results"].items()
    }
