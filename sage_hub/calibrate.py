"""Run the proxies through the base model and write the second moments of every site's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sage_hub.architecture import (
    EXPERT_KINDS,
    Site,
    expert_inputs,
    find_sites,
    is_experts,
    load_model,
    normalized,
)
from sage_hub.checkpoint import Checkpoint
from sage_hub.encoding import Encoded, batches, encode, load_tokenizer, row_limit, take_tokens
from sage_hub.errors import ArchitectureError, NonFiniteError
from sage_hub.moments import AxisMoment, SecondMoment
from sage_hub.progress import SILENT, Progress
from sage_hub.proxies import Proxy
from sage_hub.settings import Settings
from sage_hub.statistics import Origin, write_statistics


def calibrate(
    checkpoint: Checkpoint,
    proxies: Mapping[str, Proxy],
    settings: Settings,
    path: Path,
    *,
    weights: str,
    progress: Progress,
) -> Origin:
    """Calibrate `checkpoint` on `proxies` (set -> rows) and write the statistics file `path`.

    `weights` is the checkpoint's fingerprint, which its caller has computed already.
    """
    model = load_model(checkpoint, settings.device)
    tokenizer = load_tokenizer(checkpoint)
    max_length = row_limit(checkpoint, settings.max_length)
    sites = find_sites(model)
    data, moments = {}, {}
    for which, proxy in proxies.items():
        rows = encode(proxy, tokenizer, chat_template=settings.chat_template, max_length=max_length)
        places = take_tokens(rows, settings.max_tokens, settings.seed)
        used = [rows[place] for place in places]
        moments[which], starved = collect_moments(
            model,
            sites,
            used,
            batch_size=settings.batch_size,
            what=f"Calibrating on {which}",
            progress=progress,
        )
        data[which] = {
            **proxy.describe(),
            "rows_used": len(used),
            "tokens_used": sum(len(row.ids) for row in used),
            "rows_truncated": sum(row.truncated for row in used),
            "experts_shown_block_input": starved,
            "row_hashes": [proxy.rows[place].hash for place in places],
        }
    del model
    origin = Origin(
        model=checkpoint.name,
        commit=checkpoint.commit,
        weights=weights,
        tokenizer=checkpoint.tokenizer_fingerprint(),
        data=data,
        settings={
            "energy": settings.energy,
            "rank": settings.rank,
            "max_tokens": settings.max_tokens,
            "max_length": max_length,
            "seed": settings.seed,
            "chat_template": settings.chat_template,
        },
    )
    write_statistics(
        path,
        origin,
        sites,
        moments,
        energy=settings.energy,
        rank=settings.rank,
        progress=progress,
    )
    return origin


def collect_moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    what: str = "Calibrating",
    progress: Progress = SILENT,
) -> tuple[dict[str, SecondMoment | AxisMoment], list[str]]:
    """Site name -> second moment of its inputs over all tokens of `rows`, padding left out.

    An expert sees the tokens that are routed to it. Where those are fewer than it has features,
    they say too little, and it is shown the input of its whole block instead, in a second pass;
    the sites that this happened to are returned beside the moments. Raises NonFiniteError with
    the site at the first NaN or Inf.
    """
    options: Any = {"batch_size": batch_size, "progress": progress}
    moments = _observe(model, sites, rows, routed=True, what=what, **options)
    starved = [site for site in sites if site.expert and moments[site.name].tokens < site.size]
    if starved:
        what = f"{what}, {len(starved)} rare experts"
        moments |= _observe(model, starved, rows, routed=False, what=what, **options)
    _check_finite(moments)
    return moments, [site.name for site in starved]


@torch.inference_mode()
def _observe(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[Encoded],
    *,
    routed: bool,
    batch_size: int,
    what: str,
    progress: Progress,
) -> dict[str, SecondMoment | AxisMoment]:
    """The moments of `sites`; experts are shown the tokens routed to them, or all."""
    moments: dict[str, SecondMoment | AxisMoment] = {
        site.name: (AxisMoment if site.diagonal else SecondMoment)(site.size, model.device)
        for site in sites
    }
    token_mask = torch.zeros(0, dtype=torch.bool)

    def tokens(name: str, inputs: Tensor) -> Tensor:
        """The inputs (tokens, in) of a module that sees every token, padding left out."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        if len(flat) != len(token_mask):
            raise ArchitectureError(
                f"{name} does not see every token once (it has {len(flat)} inputs for "
                f"{len(token_mask)} tokens); this architecture is not supported yet."
            )
        return flat[token_mask]

    def observe(site: Site) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments[site.name].add(tokens(site.name, args[0]))

        hooks.enter_context(model.get_submodule(site.name).register_forward_pre_hook(hook))

    def observe_norm(site: Site) -> None:
        ours = False

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal ours
            if ours:  # `normalized` calls the module too
                return
            ours = True
            hat = normalized(module, args[0])
            ours = False
            if site.sees == "by head":
                hat = hat.transpose(1, 2)
            hat = hat.reshape(len(token_mask), -1, site.size)
            moments[site.name].add(hat[token_mask].flatten(0, 1))

        hooks.enter_context(model.get_submodule(site.name).register_forward_pre_hook(hook))

    def observe_experts(name: str, module: Any) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, chosen = tokens(name, args[0]), tokens(name, args[1])
            for expert in range(module.num_experts):
                seen = x[(chosen == expert).any(dim=1)] if routed else x
                wanted = [k for k in EXPERT_KINDS if f"{name}.{k}.{expert}" in moments]
                if wanted and len(seen):
                    inputs = expert_inputs(module, expert, seen)
                    for kind in wanted:
                        moments[f"{name}.{kind}.{expert}"].add(inputs[kind])

        hooks.enter_context(module.register_forward_pre_hook(hook))

    with (
        ExitStack() as hooks,
        progress.counter(what, sum(len(row.ids) for row in rows), "tok") as bar,
    ):
        for site in sites:
            if site.sees == "input":
                observe(site)
            elif site.sees in ("normalized", "by head"):
                observe_norm(site)
        for name, module in model.named_modules():
            if is_experts(module):
                observe_experts(name, module)
        for batch in batches(rows, batch_size):
            mask = batch.mask.to(model.device)
            token_mask = mask.bool().reshape(-1)
            ids = batch.ids.to(model.device)
            # Without the LM head, whose output nobody looks at.
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            for site in sites:
                moment = moments[site.name]
                if site.sees == "hidden":
                    moment.add(tokens(site.name, hidden))
                elif isinstance(moment, AxisMoment) and site.sees == "tokens":
                    moment.add_one_hot(ids.reshape(-1)[token_mask])
                elif site.sees == "one":
                    moment.add(torch.ones(int(token_mask.sum()), 1, device=model.device))
            bar.update(int(batch.mask.sum()))
    return moments


def _check_finite(moments: Mapping[str, SecondMoment | AxisMoment]) -> None:
    for name, moment in moments.items():
        if not torch.isfinite(moment.total).all():
            raise NonFiniteError(
                f"The inputs of {name} hold NaN or Inf on the proxy; the base model overflows. "
                "Check its weights, or store it in bfloat16 or float32 instead of float16."
            )
