"""Run the proxies through the base model and write the second moments of every site's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sage_hub.architecture import Site, find_sites, load_model
from sage_hub.checkpoint import Checkpoint
from sage_hub.encoding import Encoded, batches, encode, load_tokenizer, row_limit, take_tokens
from sage_hub.errors import ArchitectureError, NonFiniteError
from sage_hub.moments import SecondMoment
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
        moments[which] = collect_moments(
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


@torch.inference_mode()
def collect_moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    what: str = "Calibrating",
    progress: Progress = SILENT,
) -> dict[str, SecondMoment]:
    """Site name -> second moment of its inputs over all tokens of `rows`, padding left out.

    Raises NonFiniteError with the site at the first NaN or Inf.
    """
    moments = {site.name: SecondMoment(site.size, model.device) for site in sites}
    token_mask = torch.zeros(0, dtype=torch.bool)

    def observe(site: Site) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].reshape(-1, site.size)
            if len(inputs) != len(token_mask):
                raise ArchitectureError(
                    f"{site.name} does not see every token once (it has {len(inputs)} inputs "
                    f"for {len(token_mask)} tokens); this architecture is not supported yet."
                )
            moments[site.name].add(inputs[token_mask])

        hooks.enter_context(model.get_submodule(site.name).register_forward_pre_hook(hook))

    with (
        ExitStack() as hooks,
        progress.counter(what, sum(len(row.ids) for row in rows), "tok") as bar,
    ):
        for site in sites:
            observe(site)
        for batch in batches(rows, batch_size):
            mask = batch.mask.to(model.device)
            token_mask = mask.bool().reshape(-1)
            # Without the LM head, whose output nobody looks at.
            model.base_model(
                input_ids=batch.ids.to(model.device), attention_mask=mask, use_cache=False
            )
            bar.update(int(batch.mask.sum()))
    _check_finite(moments)
    return moments


def _check_finite(moments: Mapping[str, SecondMoment]) -> None:
    for name, moment in moments.items():
        if not torch.isfinite(moment.total).all():
            raise NonFiniteError(
                f"The inputs of {name} hold NaN or Inf on the proxy; the base model overflows. "
                "Check its weights, or store it in bfloat16 or float32 instead of float16."
            )
