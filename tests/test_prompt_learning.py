"""Prompts from a few shots: loops, prompt layout, a planted task with controls, frozen towers, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.prompt_learning import (
    ClassNames,
    FittedPrompts,
    PromptLearner,
    PromptSettings,
    counterfactual_features,
    fit_prompts,
    hardest_other_class,
    prompt_loss,
)
from models.towers import TextTower, TowerSettings, build_clip
from tests.golden_files import leaf
from tests.oracles.heads import loop_prompt_terms

C, M, W, D = 6, 4, 16, 24
NAME_LENGTHS = [1, 2, 3, 2, 1, 3]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NAMES = ClassNames(draw(W, seed=3), draw(W, seed=4), draw(C, 3, W, seed=5), torch.tensor(NAME_LENGTHS))
FIRST_CONTEXT, TRUE_CONTEXT = draw(M, W, seed=200), draw(M, W, seed=100)


class SmallEncoder(nn.Module):
    """Mean over words of a random two-layer network of the word and the mean word, to [K, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(draw(2 * W, 32) * 1.5 / math.sqrt(2 * W))
        self.outer = nn.Parameter(draw(32, D, seed=1) / math.sqrt(32))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        self.seen.append((embeddings.detach(), lengths))
        is_real = (torch.arange(embeddings.shape[1]) < lengths[:, None])[:, :, None]
        mean = (embeddings * is_real).sum(1, keepdim=True) / lengths[:, None, None]
        hidden = torch.cat([embeddings, mean.expand_as(embeddings)], dim=2) @ self.inner
        return ((hidden.tanh() * is_real).sum(1) / lengths[:, None]) @ self.outer


ENCODER = SmallEncoder()


def learner(context=FIRST_CONTEXT, seed=0) -> PromptLearner:
    return PromptLearner(NAMES, context, joint_width=D, seed=seed)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_loss_equals_the_loop(scale):
    images, negatives = (F.normalize(draw(5, D, seed=s), dim=1) for s in (0, 1))
    texts, interventions = F.normalize(draw(5, C, D, seed=2), dim=2), draw(5, D, seed=3).sigmoid()
    labels = [0, 3, 3, 5, 1]
    settings = PromptSettings(scale=scale, counterfactual=0.5, intervention_norm=0.07)

    def found(v_neg):
        return prompt_loss(
            images,
            texts,
            torch.tensor(labels),
            negatives_BD=v_neg,
            interventions_BD=interventions,
            settings=settings,
        )

    loop = loop_prompt_terms(
        images, texts, labels, negatives=negatives, interventions=interventions, scale=scale
    )
    total, terms = found(negatives)
    expected = {name: loop[name] * w for name, w in zip(loop, (1.0, 0.5, 0.07), strict=True)}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-12)
    assert total.item() == pytest.approx(sum(expected.values()), abs=1e-12)
    assert abs(found(negatives.roll(1, 0))[0] - total) > 1e-4


def test_loss_passes_gradcheck():
    labels = torch.tensor([0, 1])

    def total(images, texts, interventions):
        return prompt_loss(
            F.normalize(images, dim=1),
            F.normalize(texts, dim=2),
            labels,
            negatives_BD=F.normalize(draw(2, 3, seed=1), dim=1),
            interventions_BD=interventions.sigmoid(),
            settings=PromptSettings(scale=3.0),
        )[0]

    inputs = (leaf(draw(2, 3)), leaf(draw(2, 2, 3, seed=2)), leaf(draw(2, 3, seed=3)))
    assert torch.autograd.gradcheck(total, inputs)


def test_counterfactuals_run_from_the_image_to_the_other():
    image, other = (F.normalize(draw(5, D, seed=s), dim=1) for s in (0, 1))
    torch.testing.assert_close(counterfactual_features(image, other, torch.zeros(5, D)), image)
    torch.testing.assert_close(counterfactual_features(image, other, torch.ones(5, D)), other)
    between = counterfactual_features(image, other, torch.full((5, D), 0.3))
    torch.testing.assert_close(between.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert ((between * other).sum(1) > (image * other).sum(1)).all()


def test_hardest_class_is_the_nearest_other():
    embeds = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0], [-1.0, 0.2]])
    assert hardest_other_class(embeds).tolist() == [1, 0, 3, 2]


class TestLearner:
    images = F.normalize(draw(3, D), dim=1)

    def test_prompts_are_start_context_name_end(self):
        encoder = SmallEncoder()
        made = learner()
        with torch.no_grad():
            made.bias[2].weight.copy_(draw(W, 8, seed=6))
        made(self.images, encoder)
        prompts, lengths = encoder.seen[0]
        assert lengths.tolist() == [2 + M + n for n in NAME_LENGTHS] * 3
        bias = made.bias(self.images).detach()
        assert bias.abs().max() > 0.1
        for k, prompt in enumerate(prompts):
            image, c = divmod(k, C)
            name = NAMES.tokens[c, : NAME_LENGTHS[c]]
            rows = [NAMES.start[None], FIRST_CONTEXT + bias[image], name, NAMES.end[None]]
            wanted = torch.cat(rows)
            torch.testing.assert_close(prompt[: len(wanted)], wanted)
            assert not prompt[len(wanted) :].any()

    def test_padding_of_names_changes_nothing(self):
        filled = NAMES.tokens.clone()
        is_padding = torch.arange(3) >= torch.tensor(NAME_LENGTHS)[:, None]
        filled[is_padding] = 7.0
        names = ClassNames(NAMES.start, NAMES.end, filled, NAMES.lengths)
        other = PromptLearner(names, FIRST_CONTEXT, joint_width=D, seed=0)
        assert torch.equal(other(self.images, ENCODER), learner()(self.images, ENCODER))

    def test_untrained_it_is_the_hand_written_prompt_for_every_image(self):
        embeds = learner()(self.images, ENCODER)
        assert embeds.shape == (3, C, D)
        torch.testing.assert_close(embeds[0], embeds[1])
        torch.testing.assert_close(embeds.norm(dim=2), torch.ones(3, C, dtype=torch.float64))
        assert (learner(TRUE_CONTEXT)(self.images, ENCODER) - embeds).abs().max() > 0.1
        assert learner().interventions(torch.tensor([0, 5])).tolist() == [[0.5] * D] * 2

    def test_building_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        first, again, other = learner(), learner(), learner(seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.bias[0].weight, again.bias[0].weight)
        assert not torch.equal(first.bias[0].weight, other.bias[0].weight)

    def test_its_state_is_enough_to_rebuild_it(self):
        made = learner(TRUE_CONTEXT)
        other = learner(FIRST_CONTEXT, seed=1)
        with torch.no_grad():
            other.start.zero_()
            other.tails.zero_()
        assert not torch.equal(other(self.images, ENCODER), made(self.images, ENCODER))
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(self.images, ENCODER), made(self.images, ENCODER))


def shots(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images around the class embeddings of a prompt that nobody knows."""
    labels = torch.arange(count) % C
    with torch.no_grad():
        centres = learner(TRUE_CONTEXT)(torch.ones(1, D, dtype=torch.float64), ENCODER)[0]
    return F.normalize(centres[labels] + 0.1 * draw(count, D, seed=seed), dim=1), labels


def fitted(images: Tensor, labels: Tensor, encoder=None, **changes) -> FittedPrompts:
    settings = PromptSettings(**{"scale": 30.0, "num_steps": 100} | changes)
    return fit_prompts(
        images,
        labels,
        NAMES,
        context_MW=FIRST_CONTEXT,
        encode_prompts=encoder or ENCODER,
        settings=settings,
    )


def accuracy(prompts: FittedPrompts) -> float:
    images, labels = shots(300, seed=8)
    return (prompts.scores(images).argmax(1) == labels).double().mean().item()


class TestFitting:
    images, labels = shots(8 * C, seed=7)

    def test_a_few_shots_raise_accuracy_and_shuffled_labels_do_not(self):
        untrained = accuracy(FittedPrompts(learner(), ENCODER, ()))
        trained = accuracy(fitted(self.images, self.labels))
        assert trained > 0.85
        assert trained > untrained + 0.4
        for seed in (9, 10, 11):
            order = torch.randperm(8 * C, generator=torch.Generator().manual_seed(seed))
            # above chance: some labels agree by chance, and any fit moves to where the images lie
            assert trained > accuracy(fitted(self.images, self.labels[order])) + 0.25

    def test_every_weight_moves_and_interventions_shrink_where_they_are_not_needed(self):
        first, prompts = learner(), fitted(self.images, self.labels)
        weights = zip(first.named_parameters(), prompts.learner.parameters(), strict=True)
        for (name, before), after in weights:
            assert not torch.equal(before, after), name
        u = prompts.learner.interventions(torch.arange(C))
        assert u.median() < 0.3
        without_length = fitted(self.images, self.labels, intervention_norm=0.0)
        assert without_length.learner.interventions(torch.arange(C)).median() > 0.5

    def test_the_counterfactual_term_takes_part(self):
        plain, whole = (fitted(self.images, self.labels, counterfactual=w) for w in (0.0, 1.0))
        difference = plain.class_embeddings(self.images) - whole.class_embeddings(self.images)
        assert difference.abs().max() > 1e-4

    def test_is_a_function_of_its_arguments(self):
        changes = {"num_steps": 5}
        first = fitted(self.images, self.labels, **changes)
        before = torch.get_rng_state()
        torch.rand(3)
        again = fitted(self.images, self.labels, **changes)
        torch.set_rng_state(before)
        assert first.losses == again.losses
        assert torch.equal(first.class_embeddings(self.images), again.class_embeddings(self.images))
        other = fitted(self.images, self.labels, seed=1, **changes)
        assert first.losses != other.losses
        assert len(first.losses) == 5

    def test_the_tower_stays_frozen_and_gets_no_gradient(self):
        encoder = SmallEncoder()
        before = [p.detach().clone() for p in encoder.parameters()]
        fitted(self.images, self.labels, encoder, num_steps=3)
        for parameter, old in zip(encoder.parameters(), before, strict=True):
            assert parameter.grad is None
            assert torch.equal(parameter, old)
            assert parameter.requires_grad

    def test_lengths_of_image_features_are_irrelevant(self):
        first, scaled = (fitted(k * self.images, self.labels, num_steps=5) for k in (1, 2))
        assert first.losses == pytest.approx(scaled.losses, abs=1e-9)

    def test_chunks_change_nothing(self):
        prompts = fitted(self.images, self.labels, num_steps=5)
        whole = prompts.class_embeddings(self.images)
        torch.testing.assert_close(prompts.class_embeddings(self.images, chunk=7), whole)
        assert whole.shape == (8 * C, C, D)
        assert not whole.requires_grad

    def test_negatives_are_shots_of_the_hardest_class(self, monkeypatch):
        """Each counterfactual of a step mixes in an image whose label is the hardest other class."""
        seen = []

        def spy(*args, **kwargs):
            seen.append((args[2], kwargs["negatives_BD"]))
            return prompt_loss(*args, **kwargs)

        monkeypatch.setattr("models.prompt_learning.prompt_loss", spy)
        fitted(self.images, self.labels, num_steps=10)
        hardest = hardest_other_class(learner()(self.images[:1], ENCODER)[0])
        drawn = set()
        for labels, negatives in seen:
            rows = (negatives @ self.images.T).argmax(1)
            assert torch.equal(self.labels[rows], hardest[labels])
            drawn |= set(rows.tolist())
        # one image per class would be 6 at most
        assert len(drawn) > 10


def test_works_on_the_text_tower():
    """With the embeddings of token ids as context, untrained prompts are the tower's own text features."""
    settings = TowerSettings(
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        text_width=16,
        text_layers=2,
        text_heads=2,
        embed_dim=8,
        max_tokens=12,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = build_clip(settings, vocab_size=64, pad_id=0, start_id=1, end_id=7)
    tower, projection = TextTower(clip.text_model), clip.text_projection

    def encode(embeddings: Tensor, lengths: Tensor) -> Tensor:
        is_real = torch.arange(embeddings.shape[1]) < lengths[:, None]
        return projection(tower(None, is_real, inputs_embeds=embeddings)[0])

    table = tower.text.embeddings.token_embedding
    names = ClassNames.from_ids(table, [[20], [21, 22], [23, 24, 25]], start_id=1, end_id=7)
    prompts = PromptLearner(names, table.weight[[9, 10]], joint_width=8, seed=0)
    texts = [[1, 9, 10, 20, 7, 0, 0], [1, 9, 10, 21, 22, 7, 0], [1, 9, 10, 23, 24, 25, 7]]
    is_real = torch.arange(7) < torch.tensor([5, 6, 7])[:, None]
    expected = F.normalize(projection(tower(torch.tensor(texts), is_real)[0]), dim=1)
    found = prompts(F.normalize(torch.ones(2, 8), dim=1), encode)
    torch.testing.assert_close(found, expected.expand(2, -1, -1), atol=1e-6, rtol=0)
    assert (found[0].roll(1, 0) - expected).abs().max() > 1e-3


X, LABELS = draw(12, D), torch.arange(12) % C


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PromptSettings(scale=0.0), "scale must be > 0, got 0.0"),
        (lambda: PromptSettings(num_steps=0), "num_steps must be > 0, got 0"),
        (lambda: PromptSettings(intervention_norm=-1.0), "intervention_norm must be >= 0, got -1.0"),
        (
            lambda: ClassNames(NAMES.start, NAMES.end, NAMES.tokens[:1], NAMES.lengths[:1]),
            "at least 2 classes, got 1",
        ),
        (
            lambda: ClassNames(NAMES.start[:3], NAMES.end, NAMES.tokens, NAMES.lengths),
            r"start and end must be \[16\] like the names' tokens, got \[3\] and \[16\]",
        ),
        (
            lambda: ClassNames(NAMES.start, NAMES.end, NAMES.tokens, NAMES.lengths + 1),
            r"6 names need lengths from 1 to 3, got \[2, 3, 4, 3, 2, 4\]",
        ),
        (lambda: learner(FIRST_CONTEXT[:, :3]), r"context must be \[M >= 1, 16\], got \[4, 3\]"),
        (lambda: learner(FIRST_CONTEXT[:0]), r"context must be \[M >= 1, 16\], got \[0, 16\]"),
        (lambda: fitted(X, LABELS[:3]), r"one label, got \[12, 24\] and \[3\]"),
        (
            lambda: fitted(X, LABELS.clamp(max=4)),
            r"each of 6 classes needs a shot, got counts \[2, 2, 2, 2, 4, 0\]",
        ),
        (lambda: fitted(X, LABELS + 1), r"each of 6 classes needs a shot, got counts \[0, 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
