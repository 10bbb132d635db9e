"""Queue, memory and prototypes inside an objective: stored systems, loops, what a step leaves, workers."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.gather import Gather
from models.keyed_noise import Draw, keyed_uniform
from models.methods.cmc import CMC_MEMORY, CMC_NCE
from models.methods.pcl import PCL
from models.objective import Objective
from models.outputs import PairOutputs, TeacherOutputs
from models.prototypes import PairClusters
from models.table_slots import Candidates, Directions, Temperature
from tests.fake_gather import run_workers
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.memory import (
    loop_binary_nce,
    loop_cross_entropy,
    loop_memory,
    loop_normaliser,
    loop_prototype_nce,
)
from tests.pair_fixture import (
    NUM_QUEUED,
    NUM_ROWS,
    SINGLE,
    build_objective,
    given_features,
    make_batch,
    remember_something,
    rows_of,
    unit,
)

B, D = 6, 5
X, Y = unit(B, D), unit(B, D, seed=1)
OUTPUTS = given_features(X, Y)
BATCH = replace(make_batch([4] * B), row_index=torch.tensor([3, 17, 0, 44, 8, 101]))
ONE_WAY = Directions(image_to_text=1.0, text_to_image=0.0)


def teacher_of(images: Tensor, texts: Tensor) -> TeacherOutputs:
    return TeacherOutputs(torch.zeros(1), images, image_embeds=images, text_embeds=texts)


TEACHER = teacher_of(unit(B, D, seed=2), unit(B, D, seed=3))


# Memory


def stored_memory(golden: dict[str, Tensor], outputs: PairOutputs, *, mode: str) -> tuple[Objective, object]:
    """An objective with the stored memories, whose draws are the stored ones; and the batch."""
    recipe = CMC_NCE if mode == "nce" else CMC_MEMORY
    assert recipe.temperature.init == golden["T"]
    candidates = replace(recipe.candidates, size=int(golden["K"]))
    assert candidates.momentum == golden["momentum"]
    objective = build_objective(replace(recipe, candidates=candidates), outputs, num_rows=10)
    memory = objective.state_of("main").memory
    memory.images.copy_(golden["mem_l"])
    memory.texts.copy_(golden["mem_ab"])
    memory.noise_indices = lambda uniform: golden["idx"][:, 1:]
    return objective, replace(make_batch([4] * 3), row_index=golden["y"])


@pytest.mark.parametrize("mode", ["soft", "nce"])
def test_memory_losses_and_memories_equal_the_release(mode):
    golden = tensors("cmc_official_nce")
    image, text = leaf(golden["l"]), leaf(golden["ab"])
    outputs = given_features(image, text)
    objective, batch = stored_memory(golden, outputs, mode=mode)
    found = objective(outputs, batch, None, SINGLE).loss
    # the release adds 1e-7 to both denominators of the binary loss
    atol = 3e-6 if mode == "nce" else 1e-10
    assert_golden(found, golden[f"{mode}_loss"], atol=atol)
    found.backward()
    assert_golden(image.grad, golden[f"{mode}_grad_l"], atol=atol)
    assert_golden(text.grad, golden[f"{mode}_grad_ab"], atol=atol)
    memory = objective.state_of("main").memory
    assert_golden(memory.images, golden["mem_l"])  # nothing moves before the step
    objective.finish_step()
    assert_golden(memory.images, golden[f"{mode}_mem_l_after"])
    assert_golden(memory.texts, golden[f"{mode}_mem_ab_after"])
    swapped = given_features(golden["ab"], golden["l"])
    other, _ = stored_memory(golden, swapped, mode=mode)
    assert abs(other(swapped, batch, None, SINGLE).loss - golden[f"{mode}_loss"]) > 0.1


def memory_scores(
    objective: Objective, outputs: PairOutputs = OUTPUTS, size: int = 512
) -> tuple[Tensor, ...]:
    """Own score first, then the keyed draws, of both directions; on lists of rows."""
    memory = objective.state_of("main").memory
    drawn = (keyed_uniform(BATCH.draw_keys, Draw.MEMORY, size).double() * NUM_ROWS).floor().long()
    tables = []
    for queries, stored in ((outputs.image_embeds[0], memory.texts), (outputs.report_embeds, memory.images)):
        rows = torch.cat([BATCH.row_index[:, None], drawn], 1)
        tables.append(torch.stack([stored[row] @ query for row, query in zip(rows, queries, strict=True)]))
    return tuple(table / 0.07 for table in tables)


def test_softmax_over_a_memory_equals_the_loop():
    objective = build_objective(CMC_MEMORY, OUTPUTS)
    tables = memory_scores(objective)
    expected = sum(loop_cross_entropy(row[0], row[1:]) for table in tables for row in table.tolist()) / B
    assert objective(OUTPUTS, BATCH, None, SINGLE).loss.item() == pytest.approx(expected, rel=1e-10)
    keys = replace(BATCH, draw_keys=BATCH.draw_keys + 1)
    assert abs(objective(OUTPUTS, keys, None, SINGLE).loss.item() - expected) > 1e-3


def test_binary_nce_keeps_the_constant_of_its_first_batch():
    objective = build_objective(CMC_NCE, OUTPUTS)
    first = memory_scores(objective)
    constants = [loop_normaliser(table, num_rows=NUM_ROWS) for table in first]

    def loop(tables: tuple[Tensor, ...]) -> float:
        pairs = zip(tables, constants, strict=True)
        return sum(sum(loop_binary_nce(table, z=z, num_rows=NUM_ROWS)) / B for table, z in pairs)

    assert objective(OUTPUTS, BATCH, None, SINGLE).loss.item() == pytest.approx(loop(first), rel=1e-10)
    objective.finish_step()
    later = given_features(unit(B, D, seed=8), unit(B, D, seed=9))
    second = memory_scores(objective, later)
    found = objective(later, BATCH, None, SINGLE).loss.item()
    assert found == pytest.approx(loop(second), rel=1e-10)
    constants = [loop_normaliser(table, num_rows=NUM_ROWS) for table in second]
    assert abs(found - loop(second)) > 0.01


def test_a_step_mixes_the_first_view_into_the_memory():
    views = torch.stack([X, unit(B, D, seed=6)])
    outputs = given_features(views, Y)
    objective = build_objective(CMC_MEMORY, outputs)
    memory = objective.state_of("main").memory
    expected = [
        torch.tensor(loop_memory(stored, BATCH.row_index, rows, momentum=0.5), dtype=torch.float64)
        for stored, rows in ((memory.images, X), (memory.texts, Y))
    ]
    before = memory.images.clone()
    objective(outputs, BATCH, None, SINGLE)
    objective.finish_step()
    assert_golden(memory.images, expected[0])
    assert_golden(memory.texts, expected[1])
    assert (memory.images - before).abs().max() > 0.1
    now = memory.images.clone()
    objective.finish_step()  # a step is remembered once
    assert torch.equal(memory.images, now)


# Queue


def queue_only(**slots: object):
    return replace(PCL, extra_tables={}, **slots)


def test_queue_loss_and_gradient_equal_the_release():
    golden = tensors("pcl_official_protonce")
    q_in = leaf(golden["q_in"])
    queries = F.normalize(q_in @ golden["Wq"].T + golden["bq"], dim=1)
    outputs = given_features(queries, unit(4, 5))
    candidates = Candidates(kind="queue", size=8)
    prototypes = replace(
        PCL.extra_tables["prototypes"],
        candidates=Candidates(kind="prototypes", size=4, num_clusters=(10,)),
        directions=ONE_WAY,
    )
    recipe = replace(PCL, candidates=candidates, directions=ONE_WAY, extra_tables={"prototypes": prototypes})
    objective = build_objective(recipe, outputs, num_rows=12)
    objective.state_of("main").memory["texts"].push_(golden["queue"].T)
    memory = objective.state_of("prototypes").memory
    centroids, assignment = golden["centroids0"], golden["im2cluster0"]
    nowhere = unit(10, 5, seed=4)
    memory.set_([PairClusters(nowhere, centroids, golden["phi0"], assignment)])
    uniform = torch.full((10,), 0.9)
    uniform[golden["neg0"]] = torch.arange(1, 5) / 100
    memory.noise = lambda keys: [uniform]
    batch = replace(make_batch([4] * 4), row_index=golden["index"])
    report = objective(outputs, batch, teacher_of(unit(4, 5, seed=9), golden["k_emb"]), SINGLE)
    assert_golden(report.terms["main"], golden["loss_inst"])
    own = assignment[golden["index"]].tolist()
    assert len(set(own)) == 4  # no cluster twice, where the release repeats a column
    released = golden["proto_logits0"].logsumexp(1) - golden["proto_logits0"].diagonal()
    assert_golden(report.terms["prototypes"], released.mean())
    report.loss.backward()
    assert q_in.grad.abs().max() > 1e-3
    swapped = objective(outputs, batch, teacher_of(golden["k_emb"], unit(4, 5, seed=9)), SINGLE)
    assert abs(swapped.terms["main"] - golden["loss_inst"]) > 0.1


def test_each_modality_meets_the_queue_of_the_other():
    objective = build_objective(queue_only(), OUTPUTS)
    remember_something(objective)
    queues = objective.state_of("main").memory
    expected = 0.0
    pairs = ((X, TEACHER.text_embeds, queues["texts"]), (Y, TEACHER.image_embeds, queues["images"]))
    for queries, own, queue in pairs:
        assert queue.num_filled == NUM_QUEUED
        for query, key in zip(queries, own, strict=True):
            others = (queue.rows[:NUM_QUEUED] @ query / 0.2).tolist()
            expected += loop_cross_entropy((query @ key).item() / 0.2, others) / (2 * B)
    report = objective(OUTPUTS, BATCH, TEACHER, SINGLE)
    assert report.loss.item() == pytest.approx(expected, rel=1e-10)
    assert objective(OUTPUTS, BATCH, TEACHER, SINGLE).loss == report.loss  # only a step moves the queues
    objective.finish_step()
    assert torch.equal(queues["texts"].rows[NUM_QUEUED : NUM_QUEUED + B], TEACHER.text_embeds)
    assert torch.equal(queues["images"].rows[NUM_QUEUED : NUM_QUEUED + B], TEACHER.image_embeds)
    assert abs(objective(OUTPUTS, BATCH, TEACHER, SINGLE).loss.item() - expected) > 1e-3


def test_an_empty_queue_is_no_loss_and_no_gradient():
    image = leaf(X)
    outputs = given_features(image, Y)
    report = build_objective(queue_only(), outputs)(outputs, BATCH, TEACHER, SINGLE)
    assert report.loss == 0
    report.loss.backward()
    assert image.grad.abs().max() == 0


@pytest.mark.parametrize("teacher", [None, TeacherOutputs(torch.zeros(1), X)])
def test_a_queue_without_the_teachers_embeddings_is_refused(teacher):
    with pytest.raises(ValueError, match="a queue needs the EMA teacher's embeddings of both modalities"):
        build_objective(queue_only(), OUTPUTS)(OUTPUTS, BATCH, teacher, SINGLE)


# Prototypes


def prototypes_only(num_clusters: tuple[int, ...], size: int = 3):
    candidates = Candidates(kind="prototypes", size=size, num_clusters=num_clusters)
    temperature = Temperature(policy="fixed", init=0.2)
    return replace(PCL, candidates=candidates, temperature=temperature, extra_tables={})


def test_prototypes_of_every_clustering_are_averaged():
    recipe = prototypes_only((7, 12))
    objective = build_objective(recipe, OUTPUTS)
    before = objective(OUTPUTS, BATCH, None, SINGLE)
    assert before.loss == 0  # not clustered yet
    remember_something(objective)
    memory = objective.state_of("main").memory
    expected = 0.0
    for found, uniform in zip(memory.sets, memory.noise(BATCH.draw_keys), strict=True):
        own = found.assignment[BATCH.row_index].tolist()
        free = sorted((c for c in range(len(uniform)) if c not in own), key=lambda c: uniform[c].item())
        columns = sorted(set(own)) + free[:3]
        for queries, centroids in ((X, found.text_centroids), (Y, found.image_centroids)):
            rows = loop_prototype_nce(queries, centroids, found.concentration, own=own, columns=columns)
            expected += sum(rows) / (4 * B)
    report = objective(OUTPUTS, BATCH, None, SINGLE)
    assert report.loss.item() == pytest.approx(expected, rel=1e-10)
    elsewhere = replace(BATCH, row_index=BATCH.row_index + 1)
    assert abs(objective(OUTPUTS, elsewhere, None, SINGLE).loss.item() - expected) > 1e-3
    objective.finish_step()
    assert objective(OUTPUTS, BATCH, None, SINGLE).loss.item() == pytest.approx(expected, rel=1e-10)


def test_more_prototypes_than_rows_are_refused():
    with pytest.raises(ValueError, match="from 2 to the number of training rows, 11, got"):
        build_objective(prototypes_only((12,)), OUTPUTS, num_rows=11)


# Workers and checkpoints

REMEMBERING = {
    "memory": CMC_MEMORY,
    "nce": CMC_NCE,
    "queue": queue_only(),
    "prototypes": prototypes_only((7, 12)),
    "pcl": PCL,
}


def two_steps(objective: Objective, outputs: PairOutputs, share: slice, gather: Gather) -> list[Tensor]:
    """Losses of the same batch before and after a step."""
    batch, losses = rows_of(BATCH, share), []
    teacher = teacher_of(TEACHER.image_embeds[share], TEACHER.text_embeds[share])
    for _ in range(2):
        losses.append(objective(outputs, batch, teacher, gather).loss)
        objective.finish_step()
    return losses


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", REMEMBERING)
def test_several_workers_remember_what_one_does(name, world):
    whole = build_objective(REMEMBERING[name], OUTPUTS)
    remember_something(whole)
    copies = [deepcopy(whole) for _ in range(world)]
    alone, image = leaf(X), leaf(X)
    expected = two_steps(whole, given_features(alone, Y), slice(0, B), SINGLE)
    torch.stack(expected).sum().backward()

    def work(gather: Gather) -> list[Tensor]:
        share = slice(gather.rank * B // world, (gather.rank + 1) * B // world)
        return two_steps(copies[gather.rank], given_features(image[share], Y[share]), share, gather)

    found = run_workers(world, work)
    torch.stack([torch.stack(losses) for losses in found]).mean(0).sum().backward()
    for rank, losses in enumerate(found):
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
        for key, value in whole.state_dict().items():
            copy = copies[rank].state_dict()[key]
            torch.testing.assert_close(copy, value, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(image.grad, alone.grad, rtol=1e-10, atol=1e-12)
    if name in ("memory", "queue", "pcl"):
        assert abs(expected[0] - expected[1]) > 1e-4


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_is_remembered_is_in_the_state(name):
    objective = build_objective(REMEMBERING[name], OUTPUTS)
    remember_something(objective)
    two_steps(objective, OUTPUTS, slice(0, B), SINGLE)
    resumed = build_objective(REMEMBERING[name], OUTPUTS, seed=5)
    resumed.load_state_dict(objective.state_dict())
    found = resumed(OUTPUTS, BATCH, TEACHER, SINGLE).loss
    assert found == objective(OUTPUTS, BATCH, TEACHER, SINGLE).loss
    fresh = build_objective(REMEMBERING[name], OUTPUTS)(OUTPUTS, BATCH, TEACHER, SINGLE).loss
    assert abs(fresh - found) > 1e-4
