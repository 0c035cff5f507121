"""`sage-hub eval`: any models on the same rows, and how they differ from the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.checkpoint.pair import open_unlearned
from sage_hub.commands.here import settle
from sage_hub.commands.inputs import read_proxies
from sage_hub.errors import UsageError
from sage_hub.evaluation import harness
from sage_hub.evaluation.answers import check_place, write_answers
from sage_hub.evaluation.depth import check_depth
from sage_hub.evaluation.evaluate import Study, evaluate
from sage_hub.evaluation.look import Candidate
from sage_hub.record.manifest import make_report
from sage_hub.rows.encoding import check_rows, describe_prompts
from sage_hub.runtime.places import scratch
from sage_hub.runtime.progress import Clock
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


def evaluate_models(
    models: Sequence[str],
    *,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    run: Run = Run(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Evaluate `models`, repos of the Hub or folders, on the sets of `settings`, in turn.

    The first is what the others are compared with, and the base of those that are adapters; all
    see rows as tokens of its tokenizer. The result is a report as in a release (docs/formats.md),
    with `models` that maps each name to its commit. Raises UsageError without any set.
    """
    if len(set(models)) < len(models):
        raise UsageError("A model is given twice; name each of them once.")
    if "reference" in models:
        raise UsageError("A model cannot be called 'reference' here; write ./reference.")
    if not settings.sets:
        raise UsageError("Nothing to evaluate on; give --forget, --retain, --heldout or others.")
    harness.check_available(settings.lm_eval)
    proxies = read_proxies(settings)
    pickled = settings.pickled_weights
    first = open_checkpoint(models[0], pickled=pickled, dequantize=True)
    sides: dict[str, Checkpoint] = {models[0]: first}
    sides |= {name: open_unlearned(name, first, pickled=pickled) for name in models[1:]}
    if run.answers is not None:
        folders = [side.files.location.folder for side in sides.values()]
        check_place(run.answers, "--answers", folders)
    candidates = {name: Candidate(side) for name, side in sides.items()}
    if settings.reference:
        candidates["reference"] = Candidate(open_checkpoint(settings.reference, pickled=pickled))
    others = [candidate.side for candidate in candidates.values()]
    reader = first.reading_with(settings.tokenizer, others)
    settings = settle(settings, reader, run.ranks)
    check_rows(proxies, reader, settings, *others)
    check_depth(proxies, settings, *others)
    study = Study(
        proxies,
        tokens_of=reader,
        compared=[(name, models[0]) for name in models[1:]],
        robust=list(sides),
        origin=models[0],
    )
    clock = Clock()
    with scratch() as folder:
        found = evaluate(candidates, study, settings, folder, run)
    clock.lap("evaluate")
    if (path := run.answers) is not None:
        run.ranks.once(lambda: write_answers(path, found.seen))
    report = make_report(found, settings, clock.laps, control=None, card={})
    about = {
        "models": {name: side.commit for name, side in sides.items()},
        "prompts": describe_prompts(reader, settings),
    }
    return about | report
