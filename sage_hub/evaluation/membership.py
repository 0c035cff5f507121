"""Attacks on membership: whether a model gives away which rows it was trained on.

Each attack gives a row a number that is smaller for one that the model has seen, as open-unlearning
has them; rows to forget are compared by it with rows that no model was trained on.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sage_hub.evaluation.metrics import Seen

MIN_K = 0.4  # MUSE's share of the least probable tokens


def loss(seen: Seen) -> float:
    """The mean negative log-likelihood of the answer's tokens (Yeom et al. 2018)."""
    return seen.told.answer.loss


def zlib_ratio(seen: Seen) -> float:
    """The same over the bytes of the text when compressed (Carlini et al. 2021, 2012.07805)."""
    return seen.told.answer.loss / len(zlib.compress(seen.counted.encode()))


def min_k(seen: Seen) -> float:
    """The mean negative log-likelihood of the K % of tokens that are the least probable.

    Of those that may be memorized (Shi et al. 2024, arXiv 2310.16789); K = 40 as in MUSE.
    """
    return _lowest(seen.told.answer.logprobs, seen)


def min_k_plus_plus(seen: Seen) -> float:
    """Min-K% of how far a token's log-probability lies above the mean of the vocabulary's.

    In standard deviations, both under the model's own distribution (Zhang et al. 2024, arXiv
    2404.02936).
    """
    scores = seen.told.answer.standard
    return math.nan if scores is None else _lowest(scores, seen)


def _lowest(values: np.ndarray, seen: Seen) -> float:
    counted = values[: len(seen.told.answer.hits)]
    if not len(counted):
        return 0.0
    some = max(1, int(MIN_K * len(counted)))
    return -float(np.sort(counted)[:some].mean(dtype=np.float64))


ATTACKS: Mapping[str, Callable[[Seen], float]] = {
    "mia_loss": loss,
    "mia_zlib": zlib_ratio,
    "mia_min_k": min_k,
    "mia_min_k_plus_plus": min_k_plus_plus,
}


def membership_auc(
    forget: Sequence[Seen], unseen: Sequence[Seen], attack: Callable[[Seen], float]
) -> float:
    """How often a row that was never seen looks less familiar than one to forget, in [0, 1].

    1 where the model gives all of them away, ½ where it has no idea.
    """
    from scipy.stats import mannwhitneyu

    surprise = [[attack(seen) for seen in side] for side in (unseen, forget)]
    found = mannwhitneyu(*surprise).statistic
    return float(found) / (len(forget) * len(unseen))


def privleak(auc: float, reference_auc: float) -> float:
    """100 (AUC' − AUC'_retrain) / AUC'_retrain of Min-K%, AUC' = 1 − AUC (MUSE, Shi et al. 2024,
    arXiv 2407.06460).

    `reference_auc` is that of a model trained without the forget set. Far below 0 the model still
    knows what it should forget, far above it stands out for not knowing it.
    """
    own, theirs = 1 - auc, 1 - reference_auc
    return 100 * (own - theirs) / theirs if theirs else math.nan
