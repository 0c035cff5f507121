"""`sage-hub plan`: what a run takes, from a config alone."""

from __future__ import annotations

from sage_hub.calibration.estimate import Estimate, Robustness, estimate, probe
from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.commands.here import settle
from sage_hub.commands.inputs import Supply
from sage_hub.commands.rows import GUARD_ROWS, RETAIN_ROWS, SPARE
from sage_hub.evaluation import depth
from sage_hub.evaluation.relearning import RECOVERING, trained_tokens
from sage_hub.evaluation.robustness import BITS
from sage_hub.evaluation.suites import ANSWERS, SAMPLED_ROWS, SAMPLES
from sage_hub.evaluation.written import ANSWER, QUESTION_TOKENS
from sage_hub.model.compute import type_of
from sage_hub.rows.encoding import row_limit
from sage_hub.runtime.ranks import Ranks
from sage_hub.settings import Settings

HOLD_WEIGHTS = (".safetensors", ".bin")


def forecast(base: str, settings: Settings) -> Estimate:
    """What it takes to calibrate `base` and to sanitize an update of it, and how long, here.

    `base` may be a config alone. The proxies are taken to be as long as the settings allow.
    """
    files = open_files(base)
    whole = any(name.endswith(HOLD_WEIGHTS) for name in files.sizes)
    checkpoint = Checkpoint(files, {})
    if whole:
        checkpoint = open_checkpoint(base, pickled=settings.pickled_weights, dequantize=True)
    settings = settle(settings, checkpoint, Ranks())
    model = checkpoint.empty_model(type_of(settings.compute_dtype))
    supply = Supply.of(checkpoint, settings, calibrates=True)
    rows = round(SPARE * (RETAIN_ROWS + GUARD_ROWS)) if supply.written else 0
    longest = row_limit(checkpoint, settings.max_length)
    return estimate(
        model,
        settings,
        written=rows * (QUESTION_TOKENS + ANSWER.max_new_tokens),
        robustness=_robustness(settings, longest),
        deep=min(settings.max_tokens, depth.ROWS * longest) if settings.depth else 0,
        tokens=settings.max_tokens,
        longest=longest,
        rates=probe(model.dtype, settings.device),
    )


def _robustness(settings: Settings, longest: int) -> Robustness:
    """What measuring it takes: nothing unless it is wanted, and little without a forget set."""
    tokens, forget = settings.max_tokens, settings.forget is not None
    if not settings.robustness:
        return Robustness()
    rounded = len(BITS) * (1 + forget)  # the held-out set, and the forget set
    if not forget:
        return Robustness(shown=rounded * tokens)
    shown = (rounded + len(RECOVERING)) * tokens
    answers = SAMPLES * min(SAMPLED_ROWS, settings.generate_rows)
    sampled = answers * max(kind.max_new_tokens for kind in ANSWERS.values())
    return Robustness(shown, trained_tokens(tokens, longest), sampled)
