"""Which repairs are tried: each method's own strengths, and the gains for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data import MAIN, SKETCHED

GAINS = (1.0, 2.0, 3.0, 4.5, 7.0, 12.0)
LARGE = (1.0, 4.5, 7.0, 12.0, 20.0, 32.0, 50.0)  # where a sharp filter leaves little
FINE = (1.0, 2.0, 3.0, 4.5, 7.0, 12.0, 20.0)  # where shares may meet the level early
AROUND_ONE = (0.7, 1.0, 1.5, 2.5)
# What a point's update is of.
ABOUT = ("method", "strength", "retain", "others", "drop", "weigh", "shares_of")
ALPHAS = (1.0, 0.85, 0.7, 0.55, 0.4)


@dataclass(frozen=True)
class Config:
    """One method at one own strength, with the gains that it is tried with."""

    method: str
    strength: Mapping[str, Any]
    gains: tuple[float, ...] = GAINS
    retain: str = MAIN  # which retain proxy
    others: str = "source"  # or "base": what is outside of the linear maps is as there
    drop: float = 0.0  # share of the weights, those with most retain per forget bias, left alone
    weigh: float = 0.0  # the power of forget per retain bias that each weight's gain goes with
    match: bool = False  # the closed-form gain too

    @property
    def about(self) -> dict[str, Any]:
        """All but the gains: what the update is made from."""
        about = {
            "method": self.method,
            "strength": dict(self.strength),
            "retain": self.retain,
            "others": self.others,
        }
        shares_of = self.retain if self.weigh and self.retain != MAIN else None
        more = {"drop": self.drop, "weigh": self.weigh, "shares_of": shares_of}
        return about | {name: value for name, value in more.items() if value}


def _sage(strength: float, energy: float, **more: Any) -> Config:
    return Config("sage", {"strength": strength, "energy": energy}, **more)


def _each(method: str, name: str, *values: Any, **more: Any) -> list[Config]:
    return [Config(method, {name: value}, **more) for value in values]


SCALED = Config("scaled", {}, ALPHAS)

CORE = [
    SCALED,
    _sage(10, 0.9, match=True),
    Config("hard", {"energy": 0.9}),
]
BEST = [
    _sage(100, 0.99, weigh=1.0, gains=LARGE, match=True),
    Config("hard", {"energy": 0.99}, weigh=1.0, gains=LARGE),
]
HEADLINE = [  # what a reader asks for first, each with the same gains
    SCALED,
    _sage(100, 0.99, gains=LARGE),
    _sage(100, 0.99, weigh=1.0, gains=LARGE),
    Config("hard", {"energy": 0.99}, LARGE),
    Config("null_space", {"threshold": 0.1}, LARGE),
]
DEFAULTS = [  # how near the default, the first, comes to the best of those around it
    _sage(100, 0.99, weigh=1.0, gains=FINE),
    _sage(10, 0.99, weigh=1.0, gains=FINE),
    _sage(1000, 0.99, weigh=1.0, gains=FINE),
    _sage(100, 0.95, weigh=1.0, gains=FINE),
    _sage(10, 0.9, weigh=1.0, gains=FINE),
    Config("hard", {"energy": 0.99}, weigh=1.0, gains=FINE),
]
LARGEST = [  # the largest gain that the product tries
    _sage(100, 0.99, gains=(64.0,)),
    _sage(100, 0.99, weigh=1.0, gains=(64.0,)),
]
WEIGHED = [
    _sage(10, 0.9, weigh=1.0, match=True),
    Config("hard", {"energy": 0.9}, weigh=1.0),
]
SHARPNESS = [
    _sage(1, 0.9),
    _sage(100, 0.99, gains=LARGE),
]
GRID = [
    *_each("hard", "energy", 0.99, gains=LARGE),
    Config("sage_to_bias", {"kept": 0.02, "energy": 0.99}, LARGE),
    _sage(10, 0.99, gains=LARGE),
    _sage(1000, 0.99, gains=LARGE),
    *_each("hard", "energy", 0.5),
    _sage(100, 0.9),
    _sage(1, 0.99),
    _sage(3, 0.9),
    Config("sage_to_bias", {"kept": 0.1, "energy": 0.99}),
]
PEERS = [  # one strength of each
    *_each("ridge", "strength", 100, gains=LARGE),
    *_each("sap", "alpha", 1e3),
    *_each("null_space", "threshold", 1.0),
    *_each("per_parameter", "weight", 1.0),
    *_each("regmean", "weight", 1.0),
    *_each("lines", "shallow", 0.0, gains=AROUND_ONE),
    *_each("trimmed", "keep", 0.1, gains=AROUND_ONE),
    *_each("low_rank", "rank", 8, gains=AROUND_ONE),
    *_each("dare", "drop", 0.9, gains=AROUND_ONE),
]
MORE_PEERS = [
    *_each("ridge", "strength", 10, gains=LARGE),
    *_each("sap", "alpha", 1e4, gains=LARGE),
    *_each("null_space", "threshold", 0.1, gains=LARGE),
    *_each("per_parameter", "weight", 10.0),
    *_each("regmean", "weight", 10.0),
    *_each("lines", "shallow", 0.5, gains=AROUND_ONE),
    *_each("trimmed", "keep", 0.3, gains=AROUND_ONE),
    *_each("low_rank", "rank", 32, gains=AROUND_ONE),
    *_each("dare", "drop", 0.5, gains=AROUND_ONE),
]
PEER_SHARES = [
    *_each("ridge", "strength", 100, gains=LARGE, weigh=1.0),
    *_each("sap", "alpha", 1e4, gains=LARGE, weigh=1.0),
    *_each("null_space", "threshold", 0.1, gains=LARGE, weigh=1.0),
    *_each("per_parameter", "weight", 1.0, weigh=1.0),
    *_each("regmean", "weight", 10.0, weigh=1.0),
    *_each("lines", "shallow", 0.0, gains=AROUND_ONE, weigh=1.0),
    *_each("trimmed", "keep", 0.1, gains=AROUND_ONE, weigh=1.0),
    *_each("low_rank", "rank", 8, gains=AROUND_ONE, weigh=1.0),
    *_each("dare", "drop", 0.9, gains=AROUND_ONE, weigh=1.0),
]
ANCHORED = [
    Config("forget_anchored", {"strength": 10, "anchor": 10}),
    Config("forget_anchored", {"strength": 100, "anchor": 10}),
]
SENSITIVITY = [
    _sage(10, 0.9, retain="general", match=True),
    _sage(10, 0.9, retain="facts", match=True),
    _sage(10, 0.9, retain="quarter", match=True),
    _sage(100, 0.99, retain="general", gains=LARGE),
    _sage(10, 0.9, retain="most"),
    _sage(10, 0.9, retain="half"),
]
SKETCHES = [
    _sage(10, 0.9, retain=SKETCHED),
    _sage(100, 0.99, retain=SKETCHED, weigh=1.0),
]
PARTS = [
    _sage(10, 0.9, others="base"),
    _sage(10, 0.9, drop=0.1),
    _sage(10, 0.9, drop=0.3),
    _sage(10, 0.9, weigh=0.5),
    _sage(10, 0.99, weigh=1.0, gains=LARGE),
    _sage(1000, 0.99, weigh=1.0, gains=LARGE),
    _sage(1, 0.9, weigh=1.0),
    _sage(10, 0.9, weigh=2.0),
    _sage(100, 0.95, weigh=1.0, gains=LARGE),
    _sage(10, 0.9, retain="general", weigh=1.0),
    _sage(100, 0.99, retain="general", weigh=1.0, gains=LARGE),
    _sage(100, 0.99, retain="quarter", weigh=1.0, gains=LARGE),
]
STAGES = {
    "headline": HEADLINE,
    "core": CORE,
    "best": BEST,
    "defaults": DEFAULTS,
    "largest": LARGEST,
    "weighed": WEIGHED,
    "sharpness": SHARPNESS,
    "peers": PEERS,
    "parts": PARTS,
    "anchored": ANCHORED,
    "grid": GRID,
    "sensitivity": SENSITIVITY,
    "sketches": SKETCHES,
    "more-peers": MORE_PEERS,
    "peer-shares": PEER_SHARES,
}
