"""One self-contained HTML page: content as JSON, shown by the scripts that the page brings along.

Nothing of the content is markup. The page may load nothing, and run no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_hub.evaluation.answers import FORMAT

_DATA = Path(__file__).parents[1] / "data" / "review"
SCRIPTS = ("d3.min.js", "plot.min.js", "pictures.js", "review.js")  # in this order
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}  # all else is ASCII
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{format}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sage-hub</title>
<style>{style}</style>
</head>
<body>
<noscript>This page is put together by scripts of its own; please allow them.</noscript>
<script type="application/json" id="content">{content}</script>
{scripts}
</body>
</html>
"""


def page_of(content: Mapping[str, Any]) -> str:
    """The page that shows `content` (see `sage_hub.record.content`)."""
    scripts = [(_DATA / name).read_text(encoding="utf-8") for name in SCRIPTS]
    allowed = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _PAGE.format(
        format=FORMAT,
        policy=policy,
        style=(_DATA / "review.css").read_text(encoding="utf-8"),
        content=escaped(content),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def escaped(content: Any) -> str:
    """JSON in which nothing can end a script, begin a comment, or be no character at all."""
    return json.dumps(content, allow_nan=False).translate(_ESCAPES)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
