"""Run tasks of lm-eval, the language model evaluation harness, on a model that is in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ResultsError, UsageError, first_line
from sage_hub.evaluation.comparison import Result
from sage_hub.evaluation.imported import from_lm_eval
from sage_hub.model.blocks import BlockModel
from sage_hub.rows.encoding import load_tokenizer


def check_available(tasks: str | None) -> None:
    """Raise UsageError if `tasks` are wanted and lm-eval is not installed."""
    if tasks and find_spec("lm_eval") is None:
        raise UsageError(
            "--lm-eval takes the harness; install it: pip install 'sage-hub[lm-eval]'."
        )


def run_tasks(
    name: str, model: BlockModel, tokens_of: Checkpoint, tasks: str, *, batch_size: int, seed: int
) -> list[Result]:
    """The results of `model`, which must be whole and in memory, called `name`, on `tasks`.

    `tasks` are names of lm-eval's, or YAML files of one's own, with commas between. Raises
    ResultsError with the harness's own reason.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wanted = [task.strip() for task in tasks.split(",")]
    own = [Path(task).expanduser() for task in wanted if task.endswith((".yaml", ".yml"))]
    names = [Path(task).stem if task.endswith((".yaml", ".yml")) else task for task in wanted]
    with _quiet():
        try:
            manager = TaskManager(include_path=[str(path.resolve().parent) for path in own] or None)
            found: dict[str, Any] = simple_evaluate(
                model=HFLM(
                    pretrained=model.model,
                    tokenizer=load_tokenizer(tokens_of),
                    batch_size=batch_size,
                    device=model.device,
                    softmax_dtype="float32",  # in bfloat16 it is off by up to a nat per row
                ),
                tasks=names,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except Exception as error:  # whatever it raises, the user's next step is the same
            raise ResultsError(
                f"lm-eval could not run {tasks} on {name}: {first_line(error)}"
            ) from None
    from lm_eval import __version__

    return list(from_lm_eval(name, found, f"lm-eval {__version__}"))


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs what it also raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
