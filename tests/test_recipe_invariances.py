"""What no recipe's loss depends on: padding, missing texts, the order in a bag, the precision of a tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from models.encoder import encode_pairs
from models.outputs import PairBatch, PairOutputs
from models.recipe import MethodRecipe
from tests.pair_fixture import SINGLE, TEXT, generator, padded
from tests.recipe_fixture import (
    RECIPES,
    TRAIN,
    batch_of,
    float64,
    in_the_middle,
    inputs_of_a_step,
    trainer_of,
)

# The one recipe that counts padding as words, as its authors' code does: the control of those that do not.
COUNTS_PADDING = "tier_release"


@pytest.mark.parametrize("name", RECIPES)
def test_pads_change_no_loss_and_get_no_gradient(name):
    """Padding after a text, texts a pair does not have, and a text that nobody has."""
    recipe, filler = RECIPES[name], TEXT.vocab_size - 1
    with float64():
        trainer, other = (in_the_middle(trainer_of(recipe, TRAIN)) for _ in range(2))
        batch = batch_of(recipe)
        batch = replace(batch, token_ids=batch.token_ids.masked_fill(batch.token_ids == filler, 5))
        short = other.backward(batch).loss
        report = trainer.backward(with_junk(batch, filler))
    if name == COUNTS_PADDING:
        assert abs(report.loss - short) > 1e-3
        return
    torch.testing.assert_close(report.loss, short, atol=1e-12, rtol=1e-12)
    embeddings = trainer.model.encoder.text.text.embeddings
    assert embeddings.token_embedding.weight.grad[filler].abs().max() == 0
    assert embeddings.position_embedding.weight.grad[batch.token_ids.shape[2] :].abs().max() == 0
    assert embeddings.token_embedding.weight.grad[5].abs().max() > 0


def with_junk(batch: PairBatch, filler: int) -> PairBatch:
    """The same pairs with `filler` wherever nothing is to be read."""
    batch = padded(batch, 3, filler)
    if len(batch.is_text) == 1:
        return batch
    # A missing text is encoded, whatever it holds: here one more of them, all of junk.
    token_ids, is_real, is_text = (
        torch.cat([values, torch.zeros_like(values[:1])])
        for values in (batch.token_ids, batch.is_real_token, batch.is_text)
    )
    token_ids = token_ids.masked_fill(~is_text[:, :, None], filler)
    is_real = is_real | (~is_text[:, :, None] & (torch.arange(token_ids.shape[2]) < 4))
    return replace(batch, token_ids=token_ids, is_real_token=is_real, is_text=is_text)


def test_some_pairs_have_fewer_texts():
    recipe = RECIPES["lovt"]
    assert sorted(set(batch_of(recipe).is_text.sum(0).tolist())) == list(range(1, 9))


def reads_patches(recipe: MethodRecipe) -> bool:
    """Whether anything but the tower's own image feature comes from single patches."""
    heads, entropy = recipe.heads, recipe.regularisers.token_entropy
    by_patches = any(
        table.region_pool.kind != "global"
        or (table.targets.kind, table.targets.image_guidance) == ("soft", "patches")
        for table in recipe.tables.values()
    )
    return by_patches or entropy.is_on or heads.caption.weight > 0 or heads.distil.weight > 0


def reads_sentences(recipe: MethodRecipe) -> bool:
    """Whether the texts of a pair are a bag; a table that names its texts knows which is which."""
    pooled = any(t.sentence_pool.kind != "none" or t.between == "sentences" for t in recipe.tables.values())
    return pooled or recipe.features.report != "first"


# LoVT's targets know where a patch lies; it is the control.
OF_PATCHES = [name for name, recipe in RECIPES.items() if reads_patches(recipe) or name == "lovt"]
OF_SENTENCES = [name for name, recipe in RECIPES.items() if reads_sentences(recipe)]


def losses_of_outputs(name: str, changes: list[Any]) -> list[float]:
    """The loss of a batch as it is, and with each change made to what the towers say; float64."""
    with float64(), torch.no_grad():
        trainer = in_the_middle(trainer_of(RECIPES[name], TRAIN))
        with torch.enable_grad():
            batch, kept, teacher, _ = inputs_of_a_step(trainer, batch_of(RECIPES[name]))
        model = trainer.model
        outputs = encode_pairs(model.encoder, model.recipe, batch, kept)
        variants = [outputs, *(change(model.encoder, outputs) for change in changes)]
        return [model.objective(variant, batch, teacher, SINGLE).loss.item() for variant in variants]


def patches_reordered(_: Any, outputs: PairOutputs) -> PairOutputs:
    order = torch.randperm(outputs.image_tokens.shape[2], generator=generator(4))
    taken = [None if t is None else t[:, :, order] for t in (outputs.image_tokens, outputs.patch_features)]
    weights_of = outputs.patch_weights
    return replace(
        outputs,
        image_tokens=taken[0],
        patch_features=taken[1],
        patch_weights=None if weights_of is None else weights_of[:, :, order],
    )


def patches_of_the_neighbour(_: Any, outputs: PairOutputs) -> PairOutputs:
    """The control: patches in the right order in the wrong image."""
    tokens, features = (t.roll(1, 1) for t in (outputs.image_tokens, outputs.patch_features))
    return replace(outputs, image_tokens=tokens, patch_features=features)


@pytest.mark.parametrize("name", OF_PATCHES)
def test_patches_are_a_bag(name):
    loss, reordered, misplaced = losses_of_outputs(name, [patches_reordered, patches_of_the_neighbour])
    assert abs(misplaced - loss) > 1e-6
    if name == "lovt":
        assert abs(reordered - loss) > 1e-6
    else:
        assert reordered == pytest.approx(loss, rel=1e-12)


def sentences_reordered(encoder: Any, outputs: PairOutputs) -> PairOutputs:
    """Each report's own order, its missing texts anywhere."""
    order_MB = torch.rand(outputs.is_text.shape, generator=generator(5)).argsort(0)
    texts = outputs.text_embeds.take_along_dim(order_MB[:, :, None], 0)
    return with_texts(encoder, outputs, texts, outputs.is_text.take_along_dim(order_MB, 0))


def sentences_of_the_neighbour(encoder: Any, outputs: PairOutputs) -> PairOutputs:
    """The control: each last sentence of all in another report."""
    texts = outputs.text_embeds.clone()
    texts[0] = texts[0].roll(1, 0)
    return with_texts(encoder, outputs, texts, outputs.is_text)


def with_texts(encoder: Any, outputs: PairOutputs, texts: Tensor, is_text: Tensor) -> PairOutputs:
    report, text_weights = encoder.embed_reports(texts, is_text)
    return replace(
        outputs, text_embeds=texts, is_text=is_text, report_embeds=report, text_weights=text_weights
    )


@pytest.mark.parametrize("name", OF_SENTENCES)
def test_sentences_are_a_bag(name):
    loss, reordered, misplaced = losses_of_outputs(name, [sentences_reordered, sentences_of_the_neighbour])
    assert reordered == pytest.approx(loss, rel=1e-12)
    assert abs(misplaced - loss) > 1e-6


def test_the_multiple_instance_recipes_are_among_the_bags():
    pooled = {name for name in RECIPES if name.startswith("mil_")} | {"lse_nl"}
    assert len(pooled) == 8
    assert pooled <= set(OF_SENTENCES)
    assert (pooled | {"gloria", "local_mi", "tier", "dim"}) <= set(OF_PATCHES)


# They move numbers and compute none; the conversion is what is asked for.
_NO_ARITHMETIC = {"_to_copy", "detach", "select", "slice", "unbind", "view", "t", "transpose", "expand"}


class HalfPrecisionArithmetic(TorchDispatchMode):
    """Notes every operation whose result is in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if name not in _NO_ARITHMETIC and any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors):
            self.found.add(name)
        return result


@pytest.mark.parametrize("name", RECIPES)
def test_losses_are_float32_under_bf16_autocast(name, monkeypatch):
    """The towers in half precision, tables and losses and what they do to the teacher's features not."""
    recipe = RECIPES[name]
    trainer = in_the_middle(trainer_of(recipe, TRAIN.model_copy(update={"precision": "bf16"})))
    encode, objective = trainer.model.encoder.forward, trainer.model.objective.forward
    of_towers, of_losses = HalfPrecisionArithmetic(), HalfPrecisionArithmetic()

    def encode_watched(*args: Any, **kwargs: Any) -> Any:
        with of_towers:
            return encode(*args, **kwargs)

    def objective_watched(*args: Any, **kwargs: Any) -> Any:
        with of_losses:
            return objective(*args, **kwargs)

    monkeypatch.setattr(trainer.model.encoder, "forward", encode_watched)
    monkeypatch.setattr(trainer.model.objective, "forward", objective_watched)
    report = trainer.backward(batch_of(recipe))
    # Control: it does see what autocast does.
    assert {"mm", "addmm", "bmm"} & of_towers.found
    assert of_losses.found == set()
    assert report.loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in report.terms.values())
    for key, parameter in trainer.model.named_parameters():
        assert parameter.grad.dtype == torch.float32, key
        assert parameter.grad.isfinite().all(), key
