"""The concat critic: factored layer, two-pass maximum, released and derived values and gradients, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.critics import ConcatCritic
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.critics import loop_concat_scores


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def critic_of(weights: list[Tensor], biases: list[Tensor]) -> ConcatCritic:
    """A critic with given layers."""
    width, hidden = weights[0].shape[1] // 2, (len(weights[0]), len(weights[1]))
    critic = ConcatCritic(width, hidden=hidden).double()
    names = ("first", "second", "last")
    state = {f"{name}.weight": w for name, w in zip(names, weights, strict=True)}
    critic.load_state_dict(state | {f"{name}.bias": b for name, b in zip(names, biases, strict=True)})
    return critic


def random_critic(width: int = 4, hidden: tuple[int, int] = (7, 5)) -> ConcatCritic:
    shapes = [(hidden[0], 2 * width), (hidden[1], hidden[0]), (1, hidden[1])]
    weights = [draw(*shape, seed=10 + k) / shape[1] ** 0.5 for k, shape in enumerate(shapes)]
    return critic_of(weights, [0.3 * draw(shape[0], seed=20 + k) for k, shape in enumerate(shapes)])


def layers(critic: ConcatCritic) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight.detach(), layer.bias.detach()) for layer in critic.children()]


def plain_scores(critic: ConcatCritic, images: Tensor, texts: Tensor) -> Tensor:
    """The unfactored form: every concatenation through the layers."""
    left, right = torch.broadcast_tensors(images[..., None, :], texts)
    both = torch.cat([left, right], dim=-1)
    return critic.last(F.relu(critic.second(F.relu(critic.first(both)))))[..., 0]


def gradients(loss: Tensor, critic: ConcatCritic, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*inputs, *critic.parameters()]))


def weighted(scores: Tensor) -> Tensor:
    """A scalar whose gradient differs from score to score."""
    return (scores * draw(*scores.shape, seed=5)).sum()


def dv(positive: Tensor, negative: Tensor) -> Tensor:
    return negative.logsumexp(0) - math.log(len(negative)) - positive.mean()


def test_scores_equal_the_loop():
    critic, images, texts = random_critic(), draw(3, 4), draw(5, 4, seed=1)
    expected = torch.tensor(loop_concat_scores(images, texts, layers(critic)), dtype=torch.float64)
    torch.testing.assert_close(critic.scores(images, texts), expected, atol=1e-12, rtol=0)
    other_way = torch.tensor(loop_concat_scores(texts, images, layers(critic)), dtype=torch.float64)
    assert (other_way.T - expected).abs().max() > 0.1


def test_the_factored_layer_is_the_plain_one():
    critic, images, texts = random_critic(), leaf(draw(3, 4)), leaf(draw(5, 4, seed=1))
    factored, plain = critic.scores(images, texts), plain_scores(critic, images, texts)
    torch.testing.assert_close(factored, plain, atol=1e-12, rtol=0)
    found = gradients(weighted(factored), critic, images, texts)
    expected = gradients(weighted(plain), critic, images, texts)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    swapped = plain_scores(critic, texts, images).T
    assert (found[0] - gradients(weighted(swapped), critic, images, texts)[0]).abs().max() > 0.01


def test_region_scores_are_the_scores_of_every_region():
    critic, regions, texts = random_critic(), draw(2, 6, 4), draw(3, 4, seed=1)
    expected = torch.stack([critic.scores(image, texts) for image in regions])
    torch.testing.assert_close(critic.region_scores(regions, texts), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 12, 1000])
def test_chunks_change_nothing_and_carry_no_gradient(rows_per_chunk):
    critic, regions, texts = random_critic(), leaf(draw(2, 6, 4)), draw(3, 4, seed=1)
    found = critic.region_scores_in_chunks(regions, texts, rows_per_chunk=rows_per_chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, critic.region_scores(regions, texts).detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_two_passes_equal_the_maximum_of_all_regions(rows_per_chunk):
    critic, regions, texts = random_critic(), leaf(draw(3, 6, 4)), leaf(draw(5, 4, seed=1))
    found = critic.max_scores(regions, texts, rows_per_chunk=rows_per_chunk)
    at_once = critic.region_scores(regions, texts).amax(1)
    torch.testing.assert_close(found, at_once, atol=1e-12, rtol=0)
    from_two_passes = gradients(weighted(found), critic, regions, texts)
    from_amax = gradients(weighted(at_once), critic, regions, texts)
    torch.testing.assert_close(from_two_passes, from_amax, atol=1e-12, rtol=0)
    of_mean = gradients(weighted(critic.region_scores(regions, texts).mean(1)), critic, regions, texts)
    assert (from_two_passes[0] - of_mean[0]).abs().max() > 0.01


def test_the_first_of_equal_regions_takes_the_gradient():
    critic, texts = random_critic(), draw(1, 4, seed=1)
    regions = leaf(draw(1, 1, 4).expand(1, 2, 4))
    (found,) = torch.autograd.grad(critic.max_scores(regions, texts).sum(), regions)
    (shared,) = torch.autograd.grad(critic.region_scores(regions, texts).amax(1).sum(), regions)
    assert found[0, 1].abs().max() == 0
    torch.testing.assert_close(found.sum(1), shared.sum(1))


def saved_bytes(scores) -> int:
    """Bytes that `scores()` keeps for its backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = scores()  # its graph holds the storages, so no address is used twice
    assert alive.requires_grad
    return sum(kept.values())


def test_two_passes_keep_the_winners_only():
    """Hidden vectors dominate: 16 regions need 16 times as many as their winners."""
    critic, regions, texts = random_critic(4, (64, 32)), leaf(draw(4, 16, 4)), draw(8, 4, seed=1)
    whole = saved_bytes(lambda: critic.region_scores(regions, texts).amax(1))
    winners = saved_bytes(lambda: critic.max_scores(regions, texts))
    hidden_bytes = 4 * 8 * (64 + 32) * 8
    assert whole > 16 * hidden_bytes
    assert winners < 2 * hidden_bytes


def test_regions_and_texts_may_be_permuted():
    critic, regions, texts = random_critic(), draw(3, 6, 4), draw(5, 4, seed=1)
    generator = torch.Generator().manual_seed(2)
    order, columns = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    scores = critic.max_scores(regions, texts)
    torch.testing.assert_close(critic.max_scores(regions[:, order], texts), scores)
    torch.testing.assert_close(critic.max_scores(regions, texts[columns]), scores[:, columns])
    assert (scores[:, columns] - scores).abs().max() > 0.01


def test_half_precision_features_are_scored_in_float32():
    critic = random_critic().float()
    regions, texts = draw(2, 3, 4).bfloat16(), draw(2, 4, seed=1).bfloat16()
    for scores in (critic.max_scores(regions, texts), critic.scores(regions[:, 0], texts)):
        assert scores.dtype == torch.float32
    torch.testing.assert_close(
        critic.max_scores(regions, texts), critic.max_scores(regions.float(), texts.float())
    )


def official_critic(golden: dict[str, Tensor]) -> ConcatCritic:
    return critic_of([golden[f"w_{k}_weight"] for k in (0, 2, 4)], [golden[f"w_{k}_bias"] for k in (0, 2, 4)])


def test_scores_equal_the_released_critic():
    """The release lists true pairs, then pairs (i, i + gap) of different studies, gap by gap."""
    golden = tensors("localmi_official_global")
    critic = official_critic(golden)
    images, texts = leaf(golden["img"]), leaf(golden["txt"])
    B, studies = len(images), golden["study_id"].tolist()
    pairs = [(i, (i + gap) % B) for gap in range(B) for i in range(B)]
    rows, columns = zip(*((i, j) for i, j in pairs if i == j or studies[i] != studies[j]), strict=True)
    logits = critic.scores(images, texts)[list(rows), list(columns)]
    assert len(logits) - B == golden["num_neg"]
    assert_golden(logits, golden["logits"][:, 0])
    loss = dv(logits[:B], logits[B:])
    assert_golden(loss, golden["dv_loss"], atol=2e-7)  # the release rounds log(count) to float32
    assert_golden(logits[B:].logsumexp(0) - logits[:B].mean(), golden["infonce_loss"])
    loss.backward()
    for key in ("dv", "infonce"):  # they differ by a constant
        assert_golden(images.grad, golden[f"grad_img_{key}"])
        assert_golden(texts.grad, golden[f"grad_txt_{key}"])
    assert (logits.detach().roll(1) - golden["logits"][:, 0]).abs().max() > 1e-3


def derived_table(rule: str, critic: ConcatCritic, regions: Tensor, texts: Tensor) -> Tensor:
    """Image-text scores [B, B] under a rule for the region that speaks for an image."""
    if rule == "max":
        return critic.max_scores(regions, texts)
    scores = critic.region_scores_in_chunks(regions, texts)
    own = torch.arange(len(texts))
    ranked = scores - scores.logsumexp(2, keepdim=True) if rule == "pmi" else scores
    chosen = ranked[own, :, own].argmax(1)
    golden = tensors("localmi_derived_regions")
    assert torch.equal(chosen, golden[f"idx_{rule}"])
    return critic.scores(regions[own, chosen], texts)


ESTIMATORS = {
    "dv": lambda table: dv(table.diagonal(), table[~torch.eye(len(table), dtype=torch.bool)]),
    "nce_row": lambda table: (table.logsumexp(1) - table.diagonal()).mean(),
    "nce_col": lambda table: (table.logsumexp(0) - table.diagonal()).mean(),
}


@pytest.mark.parametrize("rule", ["max", "sel", "pmi"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_local_scores_equal_the_derived_values(rule, estimator):
    golden = tensors("localmi_derived_regions")
    critic = critic_of([golden[f"W{k}"] for k in (1, 2, 3)], [golden[f"b{k}"] for k in (1, 2, 3)])
    regions, texts = leaf(golden["V"]), leaf(golden["U"])
    assert_golden(critic.region_scores(regions, texts).transpose(1, 2), golden["S"])
    table = derived_table(rule, critic, regions, texts)
    if rule == "max":
        assert_golden(table, golden["score_max"])
    loss = ESTIMATORS[estimator](table)
    key = f"{rule}_{estimator}"
    assert_golden(loss, golden[key])
    loss.backward()
    assert_golden(regions.grad, golden[f"{key}_gradV"])
    assert_golden(texts.grad, golden[f"{key}_gradU"])
    other = {"max": "sel", "sel": "pmi", "pmi": "max"}[rule]
    assert (regions.grad - golden[f"{other}_{estimator}_gradV"]).abs().max() > 1e-3


def test_weights_are_ordinary_parameters():
    critic = ConcatCritic(8)
    shapes = {name: tuple(p.shape) for name, p in critic.named_parameters()}
    assert shapes == {
        "first.weight": (1024, 16),
        "first.bias": (1024,),
        "second.weight": (512, 1024),
        "second.bias": (512,),
        "last.weight": (1, 512),
        "last.bias": (1,),
    }
    assert set(critic.state_dict()) == set(shapes)


CRITIC = ConcatCritic(3, hidden=(2, 2))
X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConcatCritic(0), "critic widths must be >= 1, got 0, 1024 and 512"),
        (lambda: ConcatCritic(3, hidden=(2, 0)), "critic widths must be >= 1, got 3, 2 and 0"),
        (lambda: CRITIC.scores(X[:, :2], X), r"images of shape \[B, 3\], got \[2, 2\]"),
        (lambda: CRITIC.scores(X, X[:, :2]), r"texts of shape \[N, 3\], got \[2, 2\]"),
        (lambda: CRITIC.region_scores(X, X), r"regions of shape \[B, P, 3\], got \[2, 3\]"),
        (lambda: CRITIC.max_scores(X[None], X[None]), r"texts of shape \[N, 3\], got \[1, 2, 3\]"),
        (lambda: CRITIC.max_scores(X[None], X, rows_per_chunk=0), "rows_per_chunk must be >= 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
