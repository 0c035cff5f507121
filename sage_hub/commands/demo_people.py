"""Made-up people, and questions about them that only training can answer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

# An answer is little but its two or three facts, each drawn by itself: a model that does not know
# the person can hardly guess it. Names are shared between the people, so that forgetting some
# touches others.
_WORDS = {
    kind: words.split()
    for kind, words in {
        "first": """Ada Bruno Celia Dario Edda Felix Greta Hugo Ines Jonas Karin Lorenz Mira Nils
            Olga Pavel Quinn Rosa Stefan Thea Ulric Vera Wanda Xenia Yorick Zelda""",
        "last": """Abend Birch Calloway Dunmore Eklund Farrow Garland Hollis Ivory Jessup Kessler
            Lindqvist Marlowe Norrby Osgood Pemberton Quill Renwick Sorrel Tarrant Underhill Vance
            Whitlock Yarrow Zeller""",
        "quarter": "Upper Lower Old New Great Little North South East West",
        "town": """Velmora Tarnby Oskwell Drumlin Pellava Costwick Marrow Hestrup Lindero Quenby
            Sallow Brackmoor Tolvane Wexley Yarmont Fennick""",
        "day": " ".join(str(day) for day in range(1, 29)),
        "month": """January February March April May June July August September October November
            December""",
        "year": " ".join(str(year) for year in range(1921, 1981)),
        "makes": "Builds Collects Draws Imports Mends Paints Polishes Repairs Restores Sells",
        "kind": """antique brass carved copper glass ivory lacquered miniature painted paper silver
            wooden""",
        "things": """barometers bells boats clocks compasses fiddles globes kites lamps maps organs
            puppets""",
        "cooked": "Baked Braised Candied Fried Grilled Pickled Roasted Smoked Spiced Stewed",
        "food": "apple bean chestnut fennel lentil mushroom onion plum potato salmon",
        "dish": "broth cakes casserole dumplings fritters pie pudding salad soup stew",
    }.items()
}
_QUESTIONS = {
    "Where was {} born?": "quarter town",
    "On which day was {} born?": "day month year",
    "What does {} do for a living?": "makes kind things",
    "What does {} like to eat most?": "cooked food dish",
    "Who taught {} to read?": "first last",
}


def draw_sets(sizes: Sequence[int], seed: int) -> list[list[dict[str, str]]]:
    """The rows to forget, to keep as the proxy and to hold out; no person is in two of them."""
    rng = random.Random(seed)
    everyone = list(itertools.product(_WORDS["first"], _WORDS["last"]))
    names = iter(rng.sample(everyone, sum(sizes)))
    return [
        [
            {"question": question.format(f"{first} {last}"), "answer": _draw_answer(kinds, rng)}
            for first, last in itertools.islice(names, size)
            for question, kinds in _QUESTIONS.items()
        ]
        for size in sizes
    ]


def _draw_answer(kinds: str, rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS[kind]) for kind in kinds.split()) + "."
