"""Queue and memory bank: stored values, loops, copies, refusals."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.bounds import SigmoidPairs
from models.estimators import InfoNCE, symmetric
from models.keyed_noise import Draw, keyed_uniform
from models.memory import (
    FeatureQueue,
    MemoryBank,
    last_occurrence,
    log_normaliser,
    memory_table,
    noise_contrastive_shift,
    queue_table,
)
from models.pair_table import PairTable
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.memory import (
    LoopQueue,
    loop_binary_nce,
    loop_cross_entropy,
    loop_memory,
    loop_normaliser,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def unit_rows(*shape, seed=0):
    return F.normalize(torch.randn(shape, dtype=torch.float64, generator=generator(seed)), dim=-1)


def loss(estimator, table: PairTable) -> Tensor:
    return estimator.reduce(estimator.rows(table))


def loop(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# CMC: memory bank


def stored_bank(golden: dict[str, Tensor]) -> MemoryBank:
    """The stored memories; the release's rows are not of unit length."""
    bank = MemoryBank(int(golden["n_data"]), 4, momentum=golden["momentum"].item()).double()
    bank.images.copy_(golden["mem_l"])
    bank.texts.copy_(golden["mem_ab"])
    return bank


def stored_tables(bank: MemoryBank, golden: dict[str, Tensor], light: Tensor, ab: Tensor):
    """Each side against the other side's memory."""
    own_images, own_texts = bank.draw(golden["y"])
    noise_images, noise_texts = bank.draw(golden["idx"][:, 1:])
    scale = 1 / golden["T"].item()
    return (
        memory_table(light, own_texts, noise_texts, inverse_temperature=scale),
        memory_table(ab, own_images, noise_images, inverse_temperature=scale),
    )


def test_softmax_over_memory_draws_equals_the_release():
    golden = tensors("cmc_official_nce")
    light, ab = leaf(golden["l"]), leaf(golden["ab"])
    tables = stored_tables(stored_bank(golden), golden, light, ab)
    assert torch.equal(golden["idx"][:, 0], golden["y"])
    for table, key in zip(tables, ("soft_out_l", "soft_out_ab"), strict=True):
        assert_golden(table.scores, golden[key])
    found = sum(loss(InfoNCE(), table) for table in tables)
    assert_golden(found, golden["soft_loss"])
    found.backward()
    assert_golden(light.grad, golden["soft_grad_l"])
    assert_golden(ab.grad, golden["soft_grad_ab"])
    swapped = stored_tables(stored_bank(golden), golden, golden["ab"], golden["l"])
    assert abs(sum(loss(InfoNCE(), table) for table in swapped) - golden["soft_loss"]) > 1


# The release adds this to P + K / n, which moves the shift and a constant.
RELEASED_EPSILON = 1e-7


def shifted(table: PairTable, bank: MemoryBank, side, *, epsilon: float) -> PairTable:
    estimate = log_normaliser(
        table.scores.logsumexp(1), num_columns=table.scores.shape[1], num_rows=bank.num_rows
    )
    log_z = bank.log_normaliser_(side, estimate)
    num_noise = table.scores.shape[1] - 1
    shift = noise_contrastive_shift(log_z, num_noise=num_noise, num_rows=bank.num_rows)
    return replace(table, scores=table.scores - shift - math.log1p(epsilon * bank.num_rows / num_noise))


def test_binary_nce_over_memory_draws_equals_the_release():
    golden = tensors("cmc_official_nce")
    light, ab = leaf(golden["l"]), leaf(golden["ab"])
    bank = stored_bank(golden)
    tables = stored_tables(bank, golden, light, ab)
    moved = [
        shifted(table, bank, side, epsilon=RELEASED_EPSILON)
        for table, side in zip(tables, ("image", "text"), strict=True)
    ]
    for table, side, key in zip(
        tables, (bank.image_log_normaliser, bank.text_log_normaliser), ("l", "ab"), strict=True
    ):
        # Z is 1e5: relative
        assert_golden(side.exp() / golden[f"nce_Z_{key}"], torch.tensor(1.0))
        assert_golden((table.scores - side).exp(), golden[f"nce_out_{key}"])
    num_noise = int(golden["K"])
    constant = num_noise * math.log1p(RELEASED_EPSILON * bank.num_rows / num_noise)
    found = sum(loss(SigmoidPairs(), table) + constant for table in moved)
    assert_golden(found, golden["nce_loss"])
    found.backward()
    assert_golden(light.grad, golden["nce_grad_l"])
    assert_golden(ab.grad, golden["nce_grad_ab"])
    ours = sum(
        loss(SigmoidPairs(), shifted(t, bank, s, epsilon=0.0))
        for t, s in zip(tables, ("image", "text"), strict=True)
    )
    assert 1e-6 < abs(ours - golden["nce_loss"]) < 3e-6


@pytest.mark.parametrize("mode", ["nce", "soft"])
def test_memories_after_a_step_equal_the_release(mode):
    golden = tensors("cmc_official_nce")
    bank = stored_bank(golden)
    bank.update_(golden["y"], golden["l"], golden["ab"])
    assert_golden(bank.images, golden[f"{mode}_mem_l_after"])
    assert_golden(bank.texts, golden[f"{mode}_mem_ab_after"])
    assert (golden["mem_l"] - golden[f"{mode}_mem_l_after"]).abs().max() > 0.1


def test_binary_nce_equals_its_probabilities():
    scores = 4 * torch.randn(5, 7, dtype=torch.float64, generator=generator(0))
    z = loop_normaliser(scores, num_rows=30)
    log_z = log_normaliser(scores.logsumexp(1), num_columns=7, num_rows=30)
    assert_golden(log_z, loop(math.log(z)))
    shift = noise_contrastive_shift(log_z, num_noise=6, num_rows=30)
    table = PairTable(scores - shift, torch.zeros(5, dtype=torch.int64))
    expected = loop(loop_binary_nce(scores, z=z, num_rows=30))
    assert_golden(SigmoidPairs().rows(table)[:, 0], expected)
    assert (SigmoidPairs().rows(replace(table, scores=scores))[:, 0] - expected).abs().max() > 0.1


def test_normaliser_is_frozen_or_follows():
    frozen, following = MemoryBank(4, 2), MemoryBank(4, 2, normaliser_decay=0.99)
    for bank in (frozen, following):
        assert bank.image_log_normaliser.isnan()
        assert bank.log_normaliser_("image", torch.tensor(3.0)) == 3.0
        assert bank.text_log_normaliser.isnan()
    assert frozen.log_normaliser_("image", torch.tensor(5.0)) == 3.0
    expected = math.log(0.99 * math.exp(3) + 0.01 * math.exp(5))
    moved = following.log_normaliser_("image", torch.tensor(5.0))
    torch.testing.assert_close(moved, torch.tensor(expected))
    assert moved != 3.0


def test_normaliser_of_gathered_rows_is_that_of_the_batch():
    scores = torch.randn(8, 5, dtype=torch.float64, generator=generator(3))
    whole = log_normaliser(scores.logsumexp(1), num_columns=5, num_rows=9)
    gathered = torch.cat([part.logsumexp(1) for part in scores.chunk(4)])
    assert torch.equal(log_normaliser(gathered, num_columns=5, num_rows=9), whole)
    means = torch.stack(
        [log_normaliser(p.logsumexp(1), num_columns=5, num_rows=9) for p in scores.chunk(4)]
    ).mean()
    assert abs(means - whole) > 0.01


def test_memory_update_equals_the_loop_with_rows_that_occur_twice():
    bank = MemoryBank(6, 3, momentum=0.3, seed=1).double()
    index = torch.tensor([4, 1, 4, 0, 1, 4])
    images, texts = unit_rows(6, 3, seed=2), unit_rows(6, 3, seed=3)
    expected = [
        loop(loop_memory(memory, index, features, momentum=0.3))
        for memory, features in ((bank.images, images), (bank.texts, texts))
    ]
    first_wins = loop(loop_memory(bank.images, index.flip(0), images.flip(0), momentum=0.3))
    bank.update_(index, images, texts)
    assert_golden(bank.images, expected[0])
    assert_golden(bank.texts, expected[1])
    assert_golden(bank.images[[0, 1, 4]].norm(dim=1), torch.ones(3))
    assert (bank.images - first_wins).abs().max() > 0.1


def test_last_occurrence():
    index = torch.tensor([3, 1, 3, 3, 0, 1])
    assert last_occurrence(index).tolist() == [3, 5, 3, 3, 4, 5]


def test_order_of_different_rows_does_not_matter_to_the_memory():
    index, order = torch.tensor([5, 0, 3, 2]), torch.tensor([2, 0, 3, 1])
    images, texts = unit_rows(4, 3, seed=0), unit_rows(4, 3, seed=1)
    one, other = MemoryBank(6, 3), MemoryBank(6, 3)
    one.update_(index, images, texts)
    other.update_(index[order], images[order], texts[order])
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.texts, other.texts)


def test_memory_starts_alike_from_a_seed():
    one, same, other = MemoryBank(9, 4, seed=1), MemoryBank(9, 4, seed=1), MemoryBank(9, 4, seed=2)
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.texts, same.texts)
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.images, one.texts)
    torch.testing.assert_close(one.texts.norm(dim=1), torch.ones(9))


def test_noise_reaches_every_row_and_none_beyond():
    bank = MemoryBank(10, 2)
    below_one = 1 - 2.0**-24
    assert bank.noise_indices(torch.tensor([[0.0, 0.0999, 0.1001, below_one]])).tolist() == [[0, 0, 1, 9]]
    drawn = bank.noise_indices(keyed_uniform(torch.arange(50), Draw.MEMORY, 200))
    assert drawn.shape == (50, 200)
    counts = drawn.flatten().bincount(minlength=10)
    assert len(counts) == 10
    # 10000 draws: one standard deviation of a count is 30
    assert (counts - 1000).abs().max() < 150


def test_memory_draws_are_copies():
    bank = MemoryBank(4, 3)
    images, texts = bank.draw(torch.tensor([[0, 1], [2, 3]]))
    before = images.clone(), texts.clone()
    bank.update_(torch.arange(4), unit_rows(4, 3, seed=5), unit_rows(4, 3, seed=6))
    assert torch.equal(images, before[0])
    assert torch.equal(texts, before[1])


# CMC: graphs of views


def graph(views: list[Tensor], kind: str, scale: float) -> Tensor:
    """Both directions of every edge; the core view is the first."""
    units = [F.normalize(view, dim=1) for view in views]
    edges = [(i, j) for i, j in itertools.combinations(range(len(views)), 2) if kind == "full" or i == 0]
    return torch.stack([2 * symmetric(InfoNCE(), scale * units[i] @ units[j].T) for i, j in edges]).sum()


@pytest.mark.parametrize("kind", ["full", "core"])
def test_view_graphs_are_sums_of_two_directional_info_nce(kind):
    golden = tensors("cmc_derived_graph")
    views, scale = [leaf(golden[f"v{i}"]) for i in range(3)], 1 / golden["T"].item()
    found = graph(views, kind, scale)
    assert_golden(found, golden[kind])
    found.backward()
    for number, view in enumerate(views):
        assert_golden(view.grad, golden[f"{kind}_g{number}"])
    other = {"full": "core", "core": "full"}[kind]
    assert abs(graph(views, other, scale) - golden[kind]) > 1


# Queue


@pytest.mark.parametrize("sizes", [[3, 3, 3], [2, 5, 1, 4], [12], [7, 7], [0, 3, 15, 2]])
def test_queue_equals_the_loop(sizes):
    queue, slots = FeatureQueue(7, 3).double(), LoopQueue(7)
    for number, size in enumerate(sizes):
        rows = unit_rows(size, 3, seed=number)
        queue.push_(rows)
        slots.push(rows)
        candidates, is_filled = queue.candidates()
        assert is_filled.tolist() == [slot is not None for slot in slots.slots]
        expected = [slot or [0.0, 0.0, 0.0] for slot in slots.slots]
        assert torch.equal(candidates, loop(expected))
        assert queue.position == slots.next


@pytest.mark.parametrize("num_rows", [5, 11, 16])
def test_one_push_equals_pushing_row_by_row(num_rows):
    rows, one, many = unit_rows(num_rows, 3), FeatureQueue(5, 3), FeatureQueue(5, 3)
    for queue in (one, many):
        queue.push_(unit_rows(2, 3, seed=9))
    one.push_(rows)
    for row in rows:
        many.push_(row[None])
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), many.buffers(), strict=True))


def test_queue_candidates_survive_a_push_before_the_backward():
    queue = FeatureQueue(4, 3).double()
    queue.push_(unit_rows(3, 3, seed=0))
    rows, is_filled = queue.candidates()
    queries = unit_rows(2, 3, seed=1).requires_grad_()
    before = rows.clone()
    table = queue_table(
        queries, unit_rows(2, 3, seed=2), rows, is_filled_K=is_filled, inverse_temperature=5.0
    )
    queue.push_(unit_rows(4, 3, seed=3))
    assert torch.equal(rows, before)
    loss(InfoNCE(), table).backward()
    assert queries.grad is not None


def test_queue_table_has_no_empty_candidates():
    queue = FeatureQueue(6, 3).double()
    queue.push_(unit_rows(2, 3, seed=0))
    rows, is_filled = queue.candidates()
    queries, keys = unit_rows(4, 3, seed=1), unit_rows(4, 3, seed=2)
    table = queue_table(queries, keys, rows, is_filled_K=is_filled, inverse_temperature=3.0)
    scores = [
        loop_cross_entropy(3 * (q @ k).item(), (3 * rows[:2] @ q).tolist())
        for q, k in zip(queries, keys, strict=True)
    ]
    assert_golden(InfoNCE().rows(table)[:, 0], loop(scores))
    with_empty = InfoNCE().rows(replace(table, is_valid=None))[:, 0]
    assert (with_empty - loop(scores)).abs().max() > 0.1


def test_half_precision_queries_give_float32_tables():
    queue, bank = FeatureQueue(3, 4), MemoryBank(3, 4)
    queries, index = unit_rows(2, 4).bfloat16(), torch.arange(2)
    rows, is_filled = queue.candidates()
    images, _ = bank.draw(index)
    noise, _ = bank.draw(index[:, None])
    tables = [
        queue_table(queries, queries, rows, is_filled_K=is_filled, inverse_temperature=1.0),
        memory_table(queries, images, noise, inverse_temperature=1.0),
    ]
    assert [table.scores.dtype for table in tables] == [torch.float32] * 2


# Refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureQueue(0, 3), "size and a width >= 1, got 0 and 3"),
        (lambda: FeatureQueue(4, 3).push_(torch.zeros(2, 5)), r"width 3 takes \[N, 3\], got \(2, 5\)"),
        (lambda: MemoryBank(0, 3), "num_rows and a width >= 1, got 0 and 3"),
        (lambda: MemoryBank(4, 3, momentum=1.5), r"momentum must be in \[0, 1\], got 1.5"),
        (lambda: MemoryBank(4, 3, normaliser_decay=0.0), r"normaliser_decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
