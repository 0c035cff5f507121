"""A model run block by block gives what the whole model gives, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, load, make_model
from transformers import PreTrainedModel

from sage_hub.checkpoint.index import Checkpoint, open_checkpoint
from sage_hub.model.blocks import cut, open_blocks
from sage_hub.model.sites import find_sites
from sage_hub.model.spill import Spill
from sage_hub.model.weights import open_weights
from sage_hub.rows.encoding import Batch


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Some models here do more than their config says."""
    folder = tmp_path_factory.mktemp("shapes")
    monkeypatch.setattr("sage_hub.runtime.shelf.shelf", lambda kind: folder)


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    make_model(name).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    return load(folder, dtype="auto")


def make_batch() -> Batch:
    ids = torch.randint(0, 70, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 9:] = 0
    return Batch(ids, mask, mask.bool(), (0, 1, 2))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_equal_the_whole(name: str, tmp_path: Path) -> None:
    whole, batch = save(name, tmp_path), make_batch()
    inputs: Any = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    with torch.inference_mode():
        expected = whole.get_decoder()(**inputs)[0], whole(**inputs).logits
    checkpoint, hidden, logits = open_checkpoint(str(tmp_path)), None, None
    with open_weights(checkpoint) as weights, open_blocks(checkpoint, weights, "cpu") as model:
        assert len(model.blocks) == 2 + 2
        for block in model.blocks:
            with model.holding(block, weights, head=True):
                hidden = model.run(block, batch, hidden)
                if block.finishes:
                    logits = model.logits(hidden.flatten(0, 1)).reshape(*batch.ids.shape, -1)
        # Nothing stays behind.
        names = {name for block in model.blocks for name in block.parameters}
        state = model.model.state_dict(keep_vars=True)
        assert all(state[name].device.type == "meta" for name in names)
    assert hidden is not None
    assert torch.equal(hidden, expected[0])
    assert logits is not None
    torch.testing.assert_close(logits, expected[1], rtol=2**-7, atol=2**-7)
    with open_weights(checkpoint) as weights, open_blocks(checkpoint, weights, "cpu") as model:
        with model.whole(weights) as one, torch.inference_mode():
            (block,) = one.blocks
            with one.holding(block, weights, head=True):
                assert torch.equal(one.run(block, batch, None), expected[0])
            assert torch.equal(one.model(**inputs).logits, expected[1])
        assert model.model.get_output_embeddings().weight.is_meta


def test_a_model_that_does_something_between_its_layers_is_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.empty_model

    def doubled(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model = real(checkpoint, dtype)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
        return model

    whole, batch = save("Llama", tmp_path), make_batch()
    for layer in whole.model.layers:
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with torch.inference_mode():
        expected = whole(input_ids=batch.ids, attention_mask=batch.mask).logits
    monkeypatch.setattr(Checkpoint, "empty_model", doubled)
    checkpoint = open_checkpoint(str(tmp_path))
    with open_weights(checkpoint) as weights, open_blocks(checkpoint, weights, "cpu") as model:
        (block,) = model.blocks
        with model.holding(block, weights, head=True):
            hidden = model.run(block, batch, None)
            assert torch.equal(model.logits(hidden.flatten(0, 1)), expected.flatten(0, 1))


def test_a_site_belongs_to_the_block_that_computes_its_input(tmp_path: Path) -> None:
    save("Qwen3Moe", tmp_path)
    model = open_checkpoint(str(tmp_path)).empty_model()
    sites, found = find_sites(model), cut(model)
    parts = [found.sites_of(block, sites) for block in found.blocks]
    assert sorted(site.name for part in parts for site in part) == sorted(s.name for s in sites)
    assert parts[0] == parts[-1] == []
    for number, part in enumerate(parts[1:-1]):
        assert {site.name.split(".")[2] for site in part} == {str(number)}


@pytest.mark.parametrize("limit", [0, 100, 10_000])
def test_what_waits_comes_back(limit: int, tmp_path: Path) -> None:
    tensors = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 5, 9)]
    tensors.append(torch.arange(4))
    with Spill(tmp_path / "new", limit) as spill:
        for number, tensor in enumerate(tensors):
            spill.put(number, tensor * 0)
        for number, tensor in enumerate(tensors):
            spill.put(number, tensor)
        for number, tensor in enumerate(tensors):
            back = spill.get(number)
            assert back is not None
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor)
        assert spill.get(17) is None
    assert list((tmp_path / "new").iterdir()) == []
