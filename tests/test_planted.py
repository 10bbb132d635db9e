"""The planted task in small: local recipes find and point, global ones do not find, `select` loses, shuffled
pairs teach nothing. The whole table is `python -m tests.benchmarks.planted`."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from models.methods.catalogue import METHODS
from models.training_slots import Features
from pipelines.evaluation.multi_label import auroc
from tests.benchmarks.planted import Measured, verdicts
from tests.benchmarks.planted_rows import CATALOGUE, PAIRS, REFERENCE, recipe_of
from tests.planted import Figures, Training, missing_for, planted_figures
from tests.planted_world import (
    MAX_CONCEPTS,
    NUM_CONCEPTS,
    NUM_FILLERS,
    NUM_REGIONS,
    LinearEncoders,
    make_world,
    pair_batch,
    prompts,
    read,
)

# A third of the steps at three times the rate, which costs a hundredth of AUROC.
SHORT = Training(steps=200, lr=1e-2)
TRAINABLE = [name for name, recipe in METHODS.items() if missing_for(recipe) is None]


@cache
def short_run(row: str, pairs: str = "planted") -> Figures:
    return planted_figures(recipe_of(row), replace(SHORT, pairs=pairs), seed=0)


# Measured on seeds 0 and 1: .978 to .986 and .978 to .987.
@pytest.mark.parametrize("row", ["lse", "max + jsd", "local_mi", "mil_noisy_or"])
def test_a_local_recipe_finds_concepts_and_points_at_them(row):
    found = short_run(row)
    assert found.auroc > 0.96
    assert found.pointing > 0.95
    assert found.num_missed == 0


# Measured: .835 and .837. Pointing is another matter: the encoder knows the concepts, the mean hides them.
@pytest.mark.parametrize("row", ["convirt", "mil_global", "global"])
def test_a_global_recipe_points_but_does_not_find(row):
    found = short_run(row)
    assert 0.7 < found.auroc < 0.88
    assert found.pointing > 0.9


# Measured gaps: .041 and .041, .012 and .014, .28 and .37.
@pytest.mark.parametrize(
    ("best", "own", "margin"),
    [
        ("max", "select", 0.02),
        ("local_mi", "local_mi_select", 0.005),
        ("critic + max + dv", "critic + select + dv", 0.1),
    ],
)
def test_a_region_chosen_on_the_own_pair_loses_to_the_best_of_every_pair(best, own, margin):
    assert short_run(own).auroc < short_run(best).auroc - margin


@pytest.mark.parametrize("row", ["lse", "global"])
def test_shuffled_pairs_teach_nothing(row):
    found = short_run(row, "shuffled")
    assert found.auroc == pytest.approx(0.5, abs=0.06)
    assert found.pointing < 2.5 / NUM_REGIONS
    assert found.num_missed == NUM_CONCEPTS


def test_figures_are_those_of_their_seed():
    few = Training(steps=5)
    first, again, other = (planted_figures(recipe_of("lse"), few, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_recipe_without_further_needs_trains(name):
    found = planted_figures(METHODS[name], Training(steps=2, batch_size=8), seed=0)
    assert 0 < found.auroc < 1
    assert 0 < found.pointing < 1


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("attentive", "a teacher, patches to remove"),
        ("slip", "views, heads"),
        ("biovil", "heads"),
        ("cmc_memory", "a training split"),
    ],
)
def test_what_the_task_lacks_is_named(name, need):
    with pytest.raises(ValueError, match=f"cannot train '{name}', which needs {need}"):
        planted_figures(METHODS[name], seed=0)


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match="no row 'lsd'"):
        recipe_of("lsd")


def test_every_row_of_the_table_exists_and_trains():
    rows = {*CATALOGUE, *REFERENCE, *(row for pair in PAIRS for row in pair)}
    assert all(missing_for(recipe_of(row)) is None for row in rows)


WORLD = make_world(0, 240)
BAGS = WORLD.training
SENTENCES = Features(text="sentence", num_texts=2)


def test_every_concept_of_a_bag_has_a_region_and_a_sentence_of_its_own():
    shown_by_bag = BAGS.is_shown.nonzero().tolist()
    for bag, (concepts, is_there) in enumerate(zip(BAGS.concepts, BAGS.is_sentence, strict=True)):
        there = concepts[is_there].tolist()
        shown = [(region, concept) for owner, region, concept in shown_by_bag if owner == bag]
        assert sorted(concept for _, concept in shown) == sorted(there)
        assert len({region for region, _ in shown}) == len(there) == len(set(there))
        assert is_there[0]
    assert set(BAGS.is_sentence.sum(1).tolist()) == {1, 2, 3}


def test_sentences_say_and_regions_show_their_concepts():
    said = BAGS.sentences[BAGS.is_sentence] @ WORLD.text_codes.T
    assert (said.argmax(1) == BAGS.concepts[BAGS.is_sentence]).float().mean() > 0.98
    evidence = BAGS.regions @ WORLD.image_codes.T
    assert evidence[BAGS.is_shown].mean() > 5 * evidence[~BAGS.is_shown].std() / 2


# The codes themselves, in place of an encoder: what is there to be found in the best region and in the mean.
@pytest.mark.parametrize(("pool", "low", "high"), [("amax", 0.97, 1.0), ("mean", 0.8, 0.93)])
def test_the_best_region_says_more_than_the_mean(pool, low, high):
    bags = WORLD.held_out
    scores = getattr(bags.regions @ WORLD.image_codes.T, pool)(1).numpy()
    truth = bags.is_shown.any(1).numpy()
    values = [auroc(scores[:, concept], truth[:, concept]) for concept in range(NUM_CONCEPTS)]
    assert low < sum(values) / NUM_CONCEPTS <= high


def test_shuffled_reports_are_those_of_the_bag_before():
    shuffled = BAGS.shuffled()
    assert torch.equal(shuffled.regions, BAGS.regions)
    assert torch.equal(shuffled.is_shown, BAGS.is_shown)
    assert torch.equal(shuffled.concepts[1:], BAGS.concepts[:-1])
    assert torch.equal(shuffled.is_sentence[1:], BAGS.is_sentence[:-1])
    assert torch.equal(shuffled.sentences[0], BAGS.sentences[-1])


def test_a_caption_is_the_mean_of_its_sentences():
    caption = read(BAGS, Features(), fillers_FE=WORLD.fillers)
    for bag in range(20):
        own = [s for s, there in zip(BAGS.sentences[bag], BAGS.is_sentence[bag], strict=True) if there]
        torch.testing.assert_close(caption.texts[bag, 0], sum(own) / len(own))
        assert caption.is_word[bag].sum() == len(own) + NUM_FILLERS


@pytest.mark.parametrize("features", [Features(), SENTENCES, replace(SENTENCES, report="mean")])
def test_sentences_that_are_not_there_change_nothing(features):
    def outputs(bags):
        torch.manual_seed(0)
        texts = read(bags, features, fillers_FE=WORLD.fillers)
        return LinearEncoders()(bags.regions, texts, features)

    is_missing = ~BAGS.is_sentence[..., None]
    first, other = (
        outputs(replace(BAGS, sentences=BAGS.sentences.masked_fill(is_missing, fill))) for fill in (0.0, 9.0)
    )
    torch.testing.assert_close(first.report_embeds, other.report_embeds)
    torch.testing.assert_close(first.text_embeds[first.is_text], other.text_embeds[other.is_text])
    torch.testing.assert_close(first.text_tokens[first.is_real_token], other.text_tokens[other.is_real_token])
    assert bool((~first.is_real_token).any()) == (features.text == "caption")


def test_tokens_name_the_concepts_of_text_0():
    for features, num_words in ((Features(), MAX_CONCEPTS), (SENTENCES, 1)):
        texts = read(BAGS, features, fillers_FE=WORLD.fillers)
        batch = pair_batch(BAGS, texts)
        assert torch.equal(batch.token_ids[0, :, :num_words], BAGS.concepts[:, :num_words] + 1)
        assert (batch.token_ids[0, :, num_words:] > NUM_CONCEPTS).all()
        assert torch.equal(batch.is_real_token[0], texts.is_word)
    assert torch.equal(batch.tags[:, :NUM_CONCEPTS].bool(), BAGS.is_shown.any(1))


def test_prompts_are_the_codes():
    found = prompts(WORLD)
    assert torch.equal(found.texts[:, 0], WORLD.text_codes)
    assert torch.equal(found.words[:, 1:], WORLD.fillers.expand(NUM_CONCEPTS, -1, -1))


def measured(kind: str, auroc: float, pointing: float = 0.95) -> Measured:
    return Measured(kind, [Figures(auroc, pointing, 0)], 1.0)


def test_verdicts_name_what_does_not_hold():
    rows = {
        "max": measured("local", 0.96),
        "lse": measured("local", 0.94),
        "attention": measured("local", 0.97, pointing=0.8),
        "global": measured("global", 0.85),
        "clip": measured("global", 0.91),
        "select": measured("own region", 0.97),
        "pmi": measured("own region", 0.9),
    }
    local, whole, own = verdicts(rows)
    assert local.startswith("local: 1 of 3 rows")
    assert local.endswith("not lse (0.940, 0.950), attention (0.970, 0.800)")
    assert whole.startswith("global: 1 of 2 rows")
    assert whole.endswith("not clip (0.910, 0.950)")
    assert own.startswith("own region: 1 of 2 rows")
    assert own.endswith("select by -0.010 (standard error ?), pmi by 0.060 (standard error ?)")
