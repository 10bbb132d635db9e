"""Prototypes, and the state of queue, bank and prototypes together: stored values, loops, equality on any
number of workers, resume."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.estimators import InfoNCE
from models.memory import FeatureQueue, MemoryBank, Side, queue_table
from models.pair_table import PairTable
from models.prototypes import PairClusters, Prototypes, prototype_columns, prototype_scores
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.memory import loop_prototype_nce


def generator(seed):
    return torch.Generator().manual_seed(seed)


def unit_rows(*shape, seed=0):
    return F.normalize(torch.randn(shape, dtype=torch.float64, generator=generator(seed)), dim=-1)


def rows(table: PairTable) -> Tensor:
    return InfoNCE().rows(table)[:, 0]


def loss(table: PairTable) -> Tensor:
    return InfoNCE().reduce(InfoNCE().rows(table))


def loop(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table_of(
    prototypes: Prototypes,
    queries: Tensor,
    index: Tensor,
    *,
    uniform: Tensor,
    num_others: int,
    number: int = 0,
    side: Side = "image",
) -> PairTable:
    """The table of one worker."""
    return prototypes.table(
        number,
        queries,
        side=side,
        row_index_B=index,
        row_index_N=index,
        uniform_K=uniform,
        num_others=num_others,
    )


def pcl_scores(golden: dict[str, Tensor], q_in: Tensor):
    """Queue table and, as released, one column per own prototype (repeated) and per drawn one."""
    queries = F.normalize(q_in @ golden["Wq"].T + golden["bq"], dim=1)
    keys = F.normalize(golden["k_in"] @ golden["Wk"].T + golden["bk"], dim=1)
    queue = FeatureQueue(8, 5).double()
    queue.push_(golden["queue"].T)
    kept, is_filled = queue.candidates()
    table = queue_table(
        queries, keys, kept, is_filled_K=is_filled, inverse_temperature=1 / golden["T"].item()
    )
    columns = [torch.cat([golden[f"im2cluster{s}"][golden["index"]], golden[f"neg{s}"]]) for s in range(2)]
    scores = [
        prototype_scores(queries, golden[f"centroids{s}"][columns[s]], golden[f"phi{s}"][columns[s]])
        for s in range(2)
    ]
    return queries, table, scores


def test_queue_and_repeated_prototypes_equal_the_release():
    golden = tensors("pcl_official_protonce")
    q_in = leaf(golden["q_in"])
    queries, table, scores = pcl_scores(golden, q_in)
    assert_golden(queries, golden["q_emb"])
    assert_golden(table.scores, golden["inst_logits"])
    own = torch.arange(4)
    for number in range(2):
        assert_golden(scores[number], golden[f"proto_logits{number}"])
    inst = loss(table)
    proto = torch.stack([loss(PairTable(s, own)) for s in scores]).mean()
    assert_golden(inst, golden["loss_inst"])
    assert_golden(proto, golden["loss_proto"])
    assert_golden(inst + proto, golden["loss_total"])
    (inst + proto).backward()
    assert_golden(q_in.grad, golden["grad_q_in"])
    shuffled = torch.stack([loss(PairTable(s, own.roll(1))) for s in scores]).mean()
    assert abs(shuffled - golden["loss_proto"]) > 0.1


def noise_that_draws(columns: Tensor, num_clusters: int) -> Tensor:
    """Uniform numbers whose smallest are at the given prototypes, in that order."""
    uniform = torch.full((num_clusters,), 0.9)
    uniform[columns] = torch.arange(1, len(columns) + 1) / 100
    return uniform


def test_merged_prototypes_equal_the_release_where_no_cluster_repeats():
    """Set 0 has four clusters for four pairs; of set 1 two pairs share one."""
    golden = tensors("pcl_official_protonce")
    sets = [
        PairClusters(
            image_centroids=golden[f"centroids{s}"],
            text_centroids=golden[f"centroids{s}"],
            concentration=golden[f"phi{s}"],
            assignment=golden[f"im2cluster{s}"],
        )
        for s in range(2)
    ]
    prototypes = Prototypes(12, (10, 8), 5).double()
    prototypes.set_(sets)
    for number, num_clusters in enumerate((10, 8)):
        table = table_of(
            prototypes,
            golden["q_emb"],
            golden["index"],
            number=number,
            uniform=noise_that_draws(golden[f"neg{number}"], num_clusters),
            num_others=4,
        )
        released = PairTable(golden[f"proto_logits{number}"], torch.arange(4))
        ours, theirs = loss(table), loss(released)
        own = sets[number].assignment[golden["index"]].tolist()
        columns = sorted(set(own)) + golden[f"neg{number}"].tolist()
        expected = loop_prototype_nce(
            golden["q_emb"],
            sets[number].text_centroids,
            sets[number].concentration,
            own=own,
            columns=columns,
        )
        assert_golden(rows(table), loop(expected))
        if len(set(own)) == 4:
            assert_golden(ours, theirs)
        else:
            # the release's second column of the shared cluster is a false negative
            assert ours < theirs - 0.1


def clusters(num_rows: int, num_clusters: int, width: int, *, seed: int = 0) -> PairClusters:
    draws = generator(seed)
    return PairClusters(
        image_centroids=unit_rows(num_clusters, width, seed=seed + 1),
        text_centroids=unit_rows(num_clusters, width, seed=seed + 2),
        concentration=0.1 + 0.2 * torch.rand(num_clusters, dtype=torch.float64, generator=draws),
        assignment=torch.randint(num_clusters, (num_rows,), generator=draws),
    )


def ready_prototypes() -> tuple[Prototypes, PairClusters]:
    prototypes, found = Prototypes(20, (7,), 4).double(), clusters(20, 7, 4)
    prototypes.set_([found])
    return prototypes, found


@pytest.mark.parametrize("side", ["image", "text"])
def test_prototype_table_equals_the_loop(side):
    prototypes, found = ready_prototypes()
    queries, index = unit_rows(5, 4, seed=9), torch.tensor([3, 17, 3, 8, 11])
    uniform = prototypes.noise(torch.arange(5) * 977)[0]
    table = table_of(prototypes, queries, index, side=side, uniform=uniform, num_others=2)
    own = found.assignment[index].tolist()
    free = [c for c in range(7) if c not in own]
    drawn = sorted(free, key=lambda c: uniform[c].item())[:2]
    against = found.text_centroids if side == "image" else found.image_centroids
    expected = loop_prototype_nce(
        queries, against, found.concentration, own=own, columns=sorted(set(own)) + drawn
    )
    assert_golden(rows(table), loop(expected))
    same_side = found.image_centroids if side == "image" else found.text_centroids
    wrong = loop_prototype_nce(
        queries, same_side, found.concentration, own=own, columns=sorted(set(own)) + drawn
    )
    assert (rows(table) - loop(wrong)).abs().max() > 0.1


def test_prototype_columns():
    uniform = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3])
    columns, positive = prototype_columns(
        torch.tensor([3, 1, 3]), torch.tensor([1, 3, 3]), uniform_K=uniform, num_others=2
    )
    assert (columns.tolist(), positive.tolist()) == ([1, 3, 4, 2], [1, 0, 1])
    everything, _ = prototype_columns(torch.tensor([0]), torch.tensor([0]), uniform_K=uniform, num_others=99)
    assert everything.tolist() == [0, 1, 3, 4, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_prototype_rows_are_the_same_on_any_number_of_workers(world):
    prototypes, _ = ready_prototypes()
    queries, index, keys = unit_rows(8, 4, seed=3), torch.arange(8) * 2, torch.arange(8) * 12345 + 7
    uniform = prototypes.noise(keys)[0]
    assert torch.equal(prototypes.noise(keys.flip(0))[0], uniform)
    assert not torch.equal(prototypes.noise(keys[:4])[0], uniform)
    parts = [
        prototypes.table(0, q, side="text", row_index_B=i, row_index_N=index, uniform_K=uniform, num_others=2)
        for q, i in zip(queries.chunk(world), index.chunk(world), strict=True)
    ]
    whole = table_of(prototypes, queries, index, side="text", uniform=uniform, num_others=2)
    assert torch.equal(torch.cat([part.positive for part in parts]), whole.positive)
    assert_golden(torch.cat([part.scores for part in parts]), whole.scores, atol=1e-13)


def test_order_of_the_batch_only_reorders_prototype_rows():
    prototypes, _ = ready_prototypes()
    queries, index = unit_rows(8, 4, seed=3), torch.arange(8) * 2
    uniform, order = prototypes.noise(index)[0], torch.randperm(8, generator=generator(4))
    table, reordered = (
        table_of(prototypes, q, i, uniform=uniform, num_others=2)
        for q, i in ((queries, index), (queries[order], index[order]))
    )
    assert_golden(reordered.scores, table.scores[order], atol=1e-13)
    assert torch.equal(reordered.positive, table.positive[order])


def test_noise_differs_between_clusterings():
    prototypes = Prototypes(20, (7, 7), 4)
    first, second = prototypes.noise(torch.tensor([5]))
    assert first.shape == second.shape == (7,)
    assert not torch.equal(first, second)


def test_setting_again_does_not_touch_a_table_in_use():
    prototypes, _ = ready_prototypes()
    queries = unit_rows(4, 4, seed=1).requires_grad_()
    index = torch.arange(4)
    table = table_of(prototypes, queries, index, uniform=torch.rand(7, generator=generator(0)), num_others=3)
    prototypes.set_([clusters(20, 7, 4, seed=50)], epoch=1)
    loss(table).backward()
    assert queries.grad is not None


def test_half_precision_queries_give_float32_scores():
    queries = unit_rows(2, 4).bfloat16()
    assert prototype_scores(queries, unit_rows(3, 4).float(), torch.ones(3)).dtype == torch.float32


# All of them


class State(torch.nn.Module):
    """A queue, a bank and prototypes as one step changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.bank = FeatureQueue(10, 4), MemoryBank(16, 4, normaliser_decay=0.9)
        self.prototypes = Prototypes(16, (5, 3), 4)

    def step(self, number: int, gather=lambda parts: torch.cat(parts), *, world: int = 1) -> Tensor:
        """One step on a global batch of 8 split among workers; returns its value."""
        index = torch.randperm(16, generator=generator(number))[:8]
        images, texts = unit_rows(8, 4, seed=3 * number).float(), unit_rows(8, 4, seed=3 * number + 1).float()
        kept, is_filled = self.queue.candidates()
        table = queue_table(images, texts, kept, is_filled_K=is_filled, inverse_temperature=4.0)
        log_z = self.bank.log_normaliser_("image", table.masked_scores().logsumexp(1).mean())
        value = loss(table) + log_z + self.bank.draw(index)[0].sum()
        if number == 1:
            self.prototypes.set_([clusters(16, 5, 4), clusters(16, 3, 4, seed=7)], epoch=number)
        if self.prototypes.is_ready:
            uniform = self.prototypes.noise(index)[1]
            value = value + loss(
                table_of(self.prototypes, images, index, number=1, uniform=uniform, num_others=4)
            )
        gathered = [gather(list(part.chunk(world))) for part in (index, images, texts)]
        self.queue.push_(gathered[2])
        self.bank.update_(*gathered)
        return value


def same_state(one: State, other: State) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[key].nan_to_num(), b[key].nan_to_num()) for key in a)


@pytest.mark.parametrize("world", [2, 4])
def test_state_is_the_same_on_any_number_of_workers(world):
    single, one_of_many, ungathered = State(), State(), State()
    for number in range(3):
        single.step(number)
        one_of_many.step(number, world=world)
        ungathered.step(number, lambda parts: parts[0], world=world)
    assert same_state(single, one_of_many)
    assert not same_state(single, ungathered)


def test_a_resumed_state_takes_the_same_next_step():
    whole = State()
    for number in range(3):
        whole.step(number)
    resumed, fresh = State(), State()
    resumed.load_state_dict(whole.state_dict())
    assert same_state(whole, resumed)
    assert not same_state(whole, fresh)
    values = [state.step(3) for state in (whole, resumed, fresh)]
    assert values[0] == values[1]
    assert abs(values[0] - values[2]) > 1e-3
    assert same_state(whole, resumed)


def test_nothing_here_is_trained():
    state = State()
    assert list(state.parameters()) == []
    assert len(state.state_dict()) == len(list(state.buffers())) == 3 + 4 + 2 * 4 + 1


# Refusals


@pytest.mark.parametrize("num_clusters", [(), (4, 11), (1,)])
def test_clusterings_that_cannot_be_are_refused(num_clusters):
    with pytest.raises(ValueError, match="from 2 to the number of training rows, 10, got"):
        Prototypes(10, num_clusters, 3)


def test_prototypes_before_the_first_clustering_are_refused():
    index, uniform = torch.arange(2), torch.rand(3, generator=generator(0))
    with pytest.raises(ValueError, match="prototypes are not set; cluster the training split"):
        table_of(Prototypes(5, (3,), 4), unit_rows(2, 4), index, uniform=uniform, num_others=1)


GOOD = clusters(20, 7, 4)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "1 clusterings are needed, got 0"),
        (
            [replace(GOOD, assignment=GOOD.assignment[:19])],
            r"clustering 0: assignment must have shape \(20,\), got \(19,\)",
        ),
        (
            [replace(GOOD, text_centroids=GOOD.text_centroids[:, :3])],
            r"clustering 0: text_centroids must have shape \(7, 4\), got \(7, 3\)",
        ),
        ([replace(GOOD, assignment=GOOD.assignment + 7)], r"clustering 0: assignments must be in \[0, 7\)"),
        ([replace(GOOD, concentration=0 * GOOD.concentration)], "clustering 0: concentrations must be > 0"),
    ],
)
def test_unfit_clusters_are_refused_and_change_nothing(found, message):
    prototypes = Prototypes(20, (7,), 4)
    with pytest.raises(ValueError, match=message):
        prototypes.set_(found)
    assert not prototypes.is_ready


def test_a_negative_epoch_would_mean_none():
    prototypes = Prototypes(20, (7,), 4)
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        prototypes.set_([GOOD], epoch=-1)
    prototypes.set_([GOOD], epoch=3)
    assert (int(prototypes.epoch), prototypes.is_ready) == (3, True)
