"""One self-contained HTML page with an audit's table and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from sage_hub.record.pictures import bias_by_layer, bias_by_strength

TOP = 30  # modules in the table

_PAGE = Environment(autoescape=True).from_string(
    """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sage-hub audit: {{ audit.unlearned }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }
  img { max-width: 100%; height: auto; }
  table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
  th, td { text-align: right; padding: 0.25rem 0.5rem; border-bottom: 1px solid #ddd; }
  th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
</style>
<h1>What unlearning does to retained inputs</h1>
<p><strong>{{ audit.unlearned }}</strong> against <strong>{{ audit.base }}</strong>. Retention
activation bias is the mean of ‖Δx‖² over retained inputs x, relative to that of the base's outputs
‖Wx‖². Over all {{ audit.model.weights }} weights that can be filtered it is
<strong>{{ "%.3g" | format(audit.model.retain_before or 0) }}</strong>; with
λ = {{ audit.settings.strength }} and ρ = {{ audit.settings.energy }} it would be
<strong>{{ "%.3g" | format(audit.model.retain_after or 0) }}</strong>
{%- if audit.model.forget_kept is not none %}, and
{{ "%.0f" | format(100 * audit.model.forget_kept) }} % of the effect on the forget set would
stay{% endif %}.</p>
{% for alt, data in pictures.items() %}
<p><img alt="Retention activation {{ alt }}" src="data:image/png;base64,{{ data }}"></p>
{% endfor %}
<h2>The modules with the largest part of it</h2>
<table>
<tr><th>module<th>rank<th>share<th>before<th>after<th>forget kept</tr>
{% for module in audit.modules[:top] %}
<tr><td>{{ module.module }}<td>{{ module.rank }}
{%- for key in ("share", "retain_before", "retain_after", "forget_kept") %}<td>
{{- "–" if module[key] is none else "%.3g" | format(module[key]) }}{% endfor %}</tr>
{% endfor %}
</table>
</html>
"""
)


def audit_page(audit: Mapping[str, Any]) -> str:
    """The page for what `sage_hub.audit` returns."""
    tensors = [
        {
            "name": f"{module['module']}.weight",
            "bias_before": module["retain_before"],
            "bias_after": module["retain_after"],
        }
        for module in audit["modules"]
    ]
    drawn = {
        "bias per layer and kind of module, before and after": bias_by_layer({"tensors": tensors}),
        "bias that other strengths would leave": bias_by_strength(audit),
    }
    pictures = {alt: _encoded(figure) for alt, figure in drawn.items() if figure is not None}
    return _PAGE.render(audit=audit, top=TOP, pictures=pictures)


def _encoded(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
