"""Every objective is one function of the global batch: on any number of workers, in chunks of any size."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import models.tables
from models.bounds import TUBA, SigmoidPairs
from models.estimators import DonskerVaradhan, InfoLOOB, InfoNCE, JensenShannon, SoftKL
from models.gather import Gather
from models.methods.catalogue import METHODS
from models.methods.clip import CLIP
from models.methods.cloob import CLOOB
from models.methods.cmc import CMC_GRAPH
from models.methods.dim import DIM
from models.methods.gloria import GLORIA
from models.methods.local_mi import LOCAL_MI, LOCAL_MI_CRITIC
from models.methods.mil import MIL_LSE, MIL_NOISY_OR
from models.methods.siglip import SIGLIP
from models.methods.softclip import SOFTCLIP
from models.objective import Objective
from models.recipe import MethodRecipe, TableRecipe
from models.table_slots import (
    Baseline,
    Bias,
    Candidates,
    Directions,
    RegionPool,
    SentencePool,
    Targets,
    Temperature,
    Transform,
)
from tests.fake_gather import run_workers
from tests.given_outputs import batch_for, leaves_of, outputs_for, share_of, teacher_for
from tests.pair_fixture import SINGLE, build_objective, remember_something, rows_of

NUM_PAIRS = 8
SAME_GROUP, SAME_TEXT = Candidates(exclude="same_group"), Candidates(exclude="same_text")
BOTH = Candidates(modality="both", exclude="same_group")
FIXED = Temperature(policy="fixed", init=0.2)
EACH = RegionPool(kind="each")


def both_ways(recipe: MethodRecipe, **slots: object) -> MethodRecipe:
    """Both directions of every table of single patches."""
    extra = {name: replace(t, directions=Directions(), **slots) for name, t in recipe.extra_tables.items()}
    return replace(recipe, directions=Directions(), extra_tables=extra, **slots)


# Beyond the catalogue: what it does not combine.
CASES: dict[str, MethodRecipe] = {
    **METHODS,
    "both_modalities": replace(CLIP, candidates=BOTH),
    "cloob_both_modalities": replace(CLOOB, candidates=BOTH),
    "dv_of_groups": replace(CLIP, candidates=SAME_GROUP, estimator=DonskerVaradhan(), temperature=FIXED),
    "jsd_of_texts": replace(CLIP, candidates=SAME_TEXT, estimator=JensenShannon()),
    "loob_of_groups": replace(CLIP, candidates=SAME_GROUP, estimator=InfoLOOB()),
    "smoothed": replace(CLIP, candidates=SAME_TEXT, targets=Targets(kind="smoothed")),
    "groups": replace(CLIP, candidates=SAME_TEXT, targets=Targets(kind="same_group"), estimator=SoftKL()),
    "soft_embeds": replace(
        SOFTCLIP,
        candidates=SAME_GROUP,
        targets=Targets(kind="soft", image_guidance="embeds", text_guidance="embeds"),
    ),
    "relaxed_of_groups": replace(CLIP, candidates=SAME_GROUP, transform=Transform(kind="leaky", limit=0.1)),
    "relaxed_regions": replace(LOCAL_MI, transform=Transform(kind="cap_all", limit=0.3), extra_tables={}),
    "learned_baseline": replace(
        CLIP, estimator=TUBA(), baseline=Baseline(kind="learned"), temperature=FIXED, candidates=SAME_TEXT
    ),
    "words_of_groups": replace(GLORIA, candidates=SAME_GROUP, estimator=InfoLOOB()),
    "patches_both_ways": both_ways(DIM, candidates=SAME_GROUP, estimator=InfoNCE()),
    "patches_with_baselines": replace(
        both_ways(DIM, estimator=TUBA(), baseline=Baseline(kind="learned"), temperature=FIXED),
        extra_tables={},
    ),
    "rolled_patches": replace(both_ways(DIM), candidates=Candidates(kind="roll")),
    "rolled_critic": replace(
        LOCAL_MI_CRITIC, candidates=Candidates(kind="roll"), estimator=JensenShannon(), extra_tables={}
    ),
    "critic_lse": replace(LOCAL_MI_CRITIC, region_pool=RegionPool(kind="lse")),
    "sentences_lse": replace(MIL_LSE, sentence_pool=SentencePool(kind="lse"), candidates=SAME_GROUP),
    "sentences_sum": replace(MIL_NOISY_OR, sentence_pool=SentencePool(kind="sum")),
    "sigmoid_both_ways": replace(SIGLIP, directions=Directions(), bias=Bias(policy="fixed", init=-2.0)),
    "graph_dv": replace(
        CMC_GRAPH,
        extra_tables={
            name: replace(
                table, estimator=DonskerVaradhan(), candidates=BOTH, temperature=Temperature(policy="learned")
            )
            for name, table in CMC_GRAPH.extra_tables.items()
        },
    ),
    "graph_smoothed": replace(
        CMC_GRAPH,
        extra_tables={
            name: replace(table, targets=Targets(kind="smoothed"))
            for name, table in CMC_GRAPH.extra_tables.items()
        },
    ),
    "views_sigmoid": replace(
        CMC_GRAPH,
        extra_tables={
            "views": TableRecipe(between="image_views", estimator=SigmoidPairs(), temperature=FIXED)
        },
    ),
}
SEVERAL_ROWS = {"atol": 1e-11, "rtol": 1e-9}


def objective_for(name: str) -> Objective:
    batch = batch_for(CASES[name])
    objective = build_objective(CASES[name], outputs_for(CASES[name], batch))
    remember_something(objective)
    return objective


def loss_and_gradients(
    objective: Objective, name: str, *, world: int = 1, seed: int = 0
) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor | None]]:
    """Loss, gradients of all features, and those of all parameters as data parallelism averages them."""
    recipe = CASES[name]
    batch = batch_for(recipe)
    outputs, leaves = leaves_of(outputs_for(recipe, batch, seed=seed))
    teacher = teacher_for(batch)
    copies = [deepcopy(objective) for _ in range(world)]

    def work(gather: Gather) -> Tensor:
        size = NUM_PAIRS // world
        rows = slice(gather.rank * size, (gather.rank + 1) * size)
        own = rows_of(batch, rows)
        is_counted = recipe.regularisers.token_entropy.padding == "counted"
        # Where padding counts, everybody's reaches as far.
        length = (batch if is_counted else own).token_ids.shape[2]
        parts = share_of(outputs, rows, length), own, share_of(teacher, rows, length)
        loss: Tensor = copies[gather.rank](*parts, gather).loss
        return loss

    losses = [work(SINGLE)] if world == 1 else run_workers(world, work)
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-12, atol=1e-12)
    torch.stack(losses).mean().backward()
    gradients = {}
    for key, parameter in copies[0].named_parameters():
        found = [dict(copy.named_parameters())[key].grad for copy in copies]
        assert len({gradient is None for gradient in found}) == 1
        gradients[key] = None if parameter.grad is None else torch.stack(found).sum(0)
    return losses[0].detach(), [leaf.grad for leaf in leaves], gradients


@pytest.mark.parametrize("name", CASES)
def test_several_workers_have_the_gradient_of_one(name):
    """Shares of two workers are padded to other lengths; four hold one pair of a group apart."""
    objective = objective_for(name)
    expected = loss_and_gradients(objective, name)
    for world in (2, 4):
        found = loss_and_gradients(objective, name, world=world)
        torch.testing.assert_close(found, expected, **SEVERAL_ROWS)
    other = loss_and_gradients(objective, name, seed=1)
    assert not torch.isclose(other[0], expected[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_chunks_of_tables_have_the_gradient_of_whole_ones(name, monkeypatch):
    objective = objective_for(name)
    expected = loss_and_gradients(objective, name)
    sizes = []
    whole = models.tables.rows_in_chunks

    def spied(rows_of, num_rows, rows_per_chunk):
        sizes.append(rows_per_chunk)
        return whole(rows_of, num_rows, rows_per_chunk)

    monkeypatch.setattr(models.tables, "rows_in_chunks", spied)
    objective.max_table_rows = 3
    found = loss_and_gradients(objective, name)
    assert set(sizes) == {3}
    torch.testing.assert_close(found, expected, **SEVERAL_ROWS)


@pytest.mark.parametrize(
    "name", ["clip", "cloob", "softclip", "gloria", "patches_both_ways", "both_modalities"]
)
def test_chunks_on_several_workers_gather_nothing_twice(name):
    """A collective in a chunk would run once more in the backward, where nobody meets it."""
    objective = objective_for(name)
    expected = loss_and_gradients(objective, name)
    objective.max_table_rows = 3
    torch.testing.assert_close(loss_and_gradients(objective, name, world=2), expected, **SEVERAL_ROWS)
