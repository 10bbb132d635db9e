"""TIER's entropies and uniformity: released values and gradients, padding, workers."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.estimators import InfoNCE, symmetric
from models.regularisers import (
    TokenEntropies,
    disagreement,
    matched_similarities,
    projection_directions,
    sliced_wasserstein,
    token_entropies,
    uniformity,
)
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.heads import loop_disagreement, loop_sliced_wasserstein
from tests.oracles.tier import loop_entropies, loop_means

PENALTIES = ["tier_pen_s401_N2_T5_E8_P4", "tier_pen_s402_N4_T9_E32_P9"]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masks(num_words=(6, 3, 1), num_patches=(5, 5, 2), T=6, P=5):
    words = torch.arange(T) < torch.tensor(num_words)[:, None]
    patches = torch.arange(P) < torch.tensor(num_patches)[:, None]
    return words, patches


def penalty(words, patches, lam):
    """lam[0] * H(word over patches) + lam[1] * H(patch over words), nothing masked; patches [N, E, h, w]."""
    means = token_entropies(matched_similarities(words, patches.flatten(2).transpose(1, 2))).reduce()
    return lam[0] * means.over_patches + lam[1] * means.over_tokens


@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_and_gradient_equal_the_tier_release(name):
    golden = tensors(name)
    words, patches = leaf(golden["words"]), leaf(golden["patches"])
    similarities = matched_similarities(words, patches.flatten(2).transpose(1, 2))
    assert_golden(similarities, golden["cross"])
    means = token_entropies(similarities).reduce()
    assert_golden(means.over_patches, golden["H_token"])
    assert_golden(means.over_tokens, golden["H_patch"])
    total = penalty(words, patches, golden["lam"])
    assert_golden(total, golden["penalty"])
    total.backward()
    assert_golden(words.grad, golden["g_words"])
    assert_golden(patches.grad, golden["g_patches"])
    swapped = penalty(words, patches, golden["lam"].flip(0))
    assert abs(swapped.item() - golden["penalty"].item()) > 1e-5


@pytest.mark.parametrize("name", ["tier_full_s411_N4_T6_E16_P9_views1", "tier_full_s412_N3_T6_E16_P4_views2"])
def test_whole_loss_and_gradient_equal_the_tier_release(name):
    """Means of CLIP-type terms and of penalties; with two views the release adds the bugged image-image term,
    which is the first view's image-to-text cross-entropy once more."""
    golden = tensors(name)
    views = [leaf(golden[key]) for key in ("patches0", "patches1") if key in golden]
    words, text, log_scale = leaf(golden["words"]), leaf(golden["text_emb"]), leaf(golden["log_logit_scale"])
    logits = [
        log_scale.exp() * F.normalize(v.flatten(2).mean(2), dim=1) @ F.normalize(text, dim=1).T for v in views
    ]
    contrastive = [symmetric(InfoNCE(), table) for table in logits]
    if len(views) == 2:
        contrastive.append(F.cross_entropy(logits[0], torch.arange(len(text))))
    penalties = [penalty(words, v, golden["lam"]) for v in views]
    assert_golden(torch.stack([*contrastive, *penalties]), golden["parts"])
    total = torch.stack(contrastive).mean() + torch.stack(penalties).mean()
    assert_golden(total, golden["loss"])
    total.backward()
    assert_golden(words.grad, golden["g_words"])
    assert_golden(text.grad, golden["g_text_emb"])
    assert_golden(log_scale.grad, golden["g_log_logit_scale"])
    for number, view in enumerate(views):
        assert_golden(view.grad, golden[f"g_patches{number}"])


def test_composed_totals_carry_the_same_entropies():
    golden = tensors("derived_compose_totals")
    means = token_entropies(matched_similarities(golden["words"], golden["patches"].transpose(1, 2))).reduce()
    assert_golden(means.over_patches, golden["H_token"])
    assert_golden(means.over_tokens, golden["H_patch"])


def test_masked_entropies_equal_the_derived_values():
    golden = tensors("derived_tier_masked")
    cross, mask = golden["cross"], golden["mask"]
    entropies = token_entropies(cross, is_real_token=mask)
    means, by_pair = entropies.reduce(), entropies.reduce_by_pair()
    assert_golden(means.over_patches, golden["H_token_global"])
    assert_golden(by_pair.over_patches, golden["H_token_persample"])
    assert_golden(means.over_tokens, golden["H_patch"])
    assert_golden(means.normalised_over_patches, golden["H_token_norm"])
    assert_golden(means.normalised_over_tokens, golden["H_patch_norm"])
    sharp = token_entropies(cross, is_real_token=mask, temperature=0.07).reduce()
    assert_golden(sharp.over_patches, golden["H_token_temp007"])
    assert_golden(sharp.over_tokens, golden["H_patch_temp007"])
    unmasked = token_entropies(cross).reduce()
    assert_golden(unmasked.over_patches, golden["official_H_token"])
    assert_golden(unmasked.over_tokens, golden["official_H_patch"])
    assert abs(unmasked.over_tokens - means.over_tokens) > 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_entropies_equal_the_loop(temperature):
    similarities = draw(3, 6, 5).tanh()
    words, patches = masks()
    entropies = token_entropies(
        similarities, temperature=temperature, is_real_token=words, is_kept_patch=patches
    )
    loop = loop_entropies(similarities, temperature=temperature, is_real_token=words, is_kept_patch=patches)
    found = [entropies.reduce(), entropies.reduce_by_pair()]
    for key, per_pair in zip(("over_patches", "over_tokens"), loop, strict=True):
        expected = torch.tensor(loop_means(per_pair), dtype=torch.float64)
        torch.testing.assert_close(torch.stack([getattr(means, key) for means in found]), expected)
    other = loop_means(loop_entropies(similarities, temperature=temperature)[1])[0]
    assert abs(other - found[0].over_tokens.item()) > 1e-2


def test_padding_and_dropped_patches_change_nothing_and_get_no_gradient():
    words_mask, patches_mask = masks()
    gradients, values = [], []
    for filler in (0.5, -7.0):
        words, patches = draw(3, 6, 4), draw(3, 5, 4, seed=1)
        words[~words_mask], patches[~patches_mask] = filler, filler
        words, patches = leaf(words), leaf(patches)
        means = token_entropies(
            matched_similarities(words, patches), is_real_token=words_mask, is_kept_patch=patches_mask
        ).reduce()
        total = means.over_patches + 2 * means.over_tokens
        total.backward()
        assert words.grad[~words_mask].abs().max() == 0
        assert patches.grad[~patches_mask].abs().max() == 0
        values.append(total.detach())
        gradients.append(words.grad)
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])
    counted = token_entropies(matched_similarities(words, patches)).reduce()
    assert abs(counted.over_tokens - means.over_tokens) > 0.1


def test_cutting_padding_off_equals_masking_it():
    similarities = draw(1, 6, 5).tanh()
    words, patches = masks((4,), (3,))
    masked = token_entropies(similarities, is_real_token=words, is_kept_patch=patches).reduce()
    cut = token_entropies(similarities[:, :4, :3]).reduce()
    for key in ("over_patches", "over_tokens", "normalised_over_patches", "normalised_over_tokens"):
        torch.testing.assert_close(getattr(masked, key), getattr(cut, key))


def test_the_order_of_patches_words_and_pairs_is_irrelevant():
    similarities = draw(3, 6, 5).tanh()
    shuffled = similarities[[2, 0, 1]][:, [5, 3, 1, 0, 2, 4]][:, :, [4, 1, 3, 0, 2]]
    a, b = token_entropies(similarities).reduce(), token_entropies(shuffled).reduce()
    torch.testing.assert_close(a.over_patches, b.over_patches)
    torch.testing.assert_close(a.over_tokens, b.over_tokens)
    transposed = token_entropies(similarities.transpose(1, 2)).reduce()
    torch.testing.assert_close(a.over_patches, transposed.over_tokens)
    assert not torch.isclose(a.over_patches, transposed.over_patches)


def test_equal_similarities_have_the_entropy_of_the_uniform_distribution():
    words, patches = masks()
    entropies = token_entropies(
        torch.zeros(3, 6, 5, dtype=torch.float64), is_real_token=words, is_kept_patch=patches, eps=0.0
    )
    means = entropies.reduce_by_pair()
    over_patches, over_tokens = ([math.log(n) for n in counts] for counts in ((5, 5, 2), (6, 3, 1)))
    assert means.over_patches.item() == pytest.approx(sum(over_patches) / 3)
    assert means.over_tokens.item() == pytest.approx(sum(over_tokens) / 3)
    assert means.normalised_over_patches.item() == pytest.approx(1.0)
    # one word has no entropy to normalise: the third pair counts 0
    assert means.normalised_over_tokens.item() == pytest.approx(2 / 3)


def test_means_over_workers_are_exact():
    similarities = draw(4, 6, 5).tanh()
    words, _ = masks((6, 3, 1, 2), (5, 5, 5, 5))
    whole = token_entropies(similarities, is_real_token=words).reduce()
    parts = [token_entropies(similarities[rows], is_real_token=words[rows]) for rows in ([0, 1], [2, 3])]
    gathered = TokenEntropies.from_tensor(torch.cat([part.as_tensor() for part in parts])).reduce()
    torch.testing.assert_close(gathered.over_patches, whole.over_patches)
    torch.testing.assert_close(gathered.over_tokens, whole.over_tokens)
    # negative control: a mean of the workers' means weighs short texts too much
    naive = torch.stack([part.reduce().over_patches for part in parts]).mean()
    assert abs(naive - whole.over_patches) > 1e-4


def test_a_pair_without_words_stays_out_of_the_means():
    similarities = leaf(draw(2, 6, 5).tanh())
    words, _ = masks((4, 0), (5, 5))
    means = token_entropies(similarities, is_real_token=words).reduce()
    alone = token_entropies(similarities[:1], is_real_token=words[:1]).reduce()
    torch.testing.assert_close(means.over_patches, alone.over_patches)
    torch.testing.assert_close(means.over_tokens, alone.over_tokens)
    (means.over_patches + means.over_tokens).backward()
    assert similarities.grad[1].abs().max() == 0
    assert similarities.grad[0].isfinite().all()


def test_gradients_pass_gradcheck():
    words, patches = masks()

    def total(x):
        entropies = token_entropies(x, temperature=0.3, is_real_token=words, is_kept_patch=patches)
        means = entropies.reduce()
        return means.over_patches + means.over_tokens + means.normalised_over_tokens

    assert torch.autograd.gradcheck(total, [leaf(draw(3, 6, 5).tanh())])


def test_float32_stays_float32():
    entropies = token_entropies(draw(2, 6, 5).float().tanh())
    assert entropies.as_tensor().dtype == torch.float32


def test_uniformity_equals_the_derived_value():
    golden = tensors("derived_embedding_geometry")
    assert_golden(uniformity(golden["Z"]), golden["uniformity_t2"])
    assert abs(uniformity(golden["Z"], scale=3.0) - golden["uniformity_t2"]) > 0.1
    assert uniformity(torch.ones(4, 3)).item() == 0.0
    assert torch.autograd.gradcheck(uniformity, [leaf(F.normalize(golden["Z"][:5], dim=1))])


class TestSlicedWasserstein:
    a, b = draw(7, 4), draw(7, 4, seed=1) + 0.5
    directions = projection_directions(3, step=0, num_directions=10, width=4)

    def test_equals_the_loop(self):
        found = sliced_wasserstein(self.a, self.b, self.directions)
        expected = loop_sliced_wasserstein(self.a, self.b, self.directions)
        assert found.item() == pytest.approx(expected, abs=1e-12)
        others = projection_directions(4, step=0, num_directions=10, width=4)
        assert abs(sliced_wasserstein(self.a, self.b, others) - expected) > 1e-3

    def test_compares_distributions_and_not_pairs(self):
        order = torch.tensor([3, 0, 6, 4, 1, 2, 5])
        found = sliced_wasserstein(self.a, self.b, self.directions)
        torch.testing.assert_close(sliced_wasserstein(self.a[order], self.b, self.directions), found)
        torch.testing.assert_close(sliced_wasserstein(self.b, self.a, self.directions), found)
        assert sliced_wasserstein(self.a, self.a[order], self.directions) == 0
        assert found > 0.1

    def test_of_a_shift_is_its_mean_squared_projection(self):
        shift = draw(4, seed=2)
        found = sliced_wasserstein(self.a, self.a + shift, self.directions)
        torch.testing.assert_close(found, (self.directions.double() @ shift).square().mean())
        many = projection_directions(0, step=0, num_directions=4000, width=4)
        # a random unit direction catches 1 / D of a squared length, here within some 3 %
        found = sliced_wasserstein(self.a, self.a + shift, many)
        torch.testing.assert_close(found, shift.square().sum() / 4, atol=0, rtol=0.1)

    def test_workers_must_gather(self):
        whole = sliced_wasserstein(self.a[:6], self.b[:6], self.directions)
        halves = [
            sliced_wasserstein(self.a[rows], self.b[rows], self.directions)
            for rows in (slice(0, 3), slice(3, 6))
        ]
        assert abs(torch.stack(halves).mean() - whole) > 1e-3

    def test_gradient_passes_gradcheck_and_closes_the_gap(self):
        directions = self.directions.double()
        assert torch.autograd.gradcheck(sliced_wasserstein, (leaf(self.a), leaf(self.b), directions))
        a = leaf(self.a)
        for _ in range(50):
            loss = sliced_wasserstein(a, self.b, directions)
            (gradient,) = torch.autograd.grad(loss, a)
            a = leaf(a - 5 * gradient)
        assert loss < 0.05 * sliced_wasserstein(self.a, self.b, directions)

    def test_half_precision_is_raised(self):
        assert (
            sliced_wasserstein(self.a.bfloat16(), self.b.bfloat16(), self.directions).dtype == torch.float32
        )


class TestDirections:
    def test_are_unit_and_spread_evenly(self):
        found = projection_directions(0, step=5, num_directions=4000, width=3)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4000))
        # standard errors are .009 and .005
        torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=0.04, rtol=0)
        torch.testing.assert_close(found.T @ found / 4000, torch.eye(3) / 3, atol=0.02, rtol=0)

    def test_belong_to_seed_and_step(self):
        def made(seed, step):
            return projection_directions(seed, step=step, num_directions=5, width=3)

        assert torch.equal(made(1, 2), made(1, 2))
        found = [made(seed, step) for seed in (0, 1, -1, 2**40) for step in (0, 1, 2)]
        assert len({tuple(f.flatten().tolist()) for f in found}) == 12
        assert torch.equal(made(torch.tensor(1), 2), made(1, 2))
        # integers wrap as they do when keys are summed
        assert torch.equal(made(torch.tensor(2**62) * 2, 0), made(-(2**63), 0))

    def test_leave_the_global_generator_alone(self):
        before = torch.get_rng_state()
        projection_directions(0, step=0, num_directions=5, width=3)
        assert torch.equal(torch.get_rng_state(), before)


def test_disagreement_equals_the_loop():
    a, b = draw(5, 4), draw(5, 4, seed=1)
    assert disagreement(a, b).item() == pytest.approx(loop_disagreement(a, b), abs=1e-12)
    assert disagreement(a, b.roll(1, 0)).item() != pytest.approx(loop_disagreement(a, b), abs=1e-3)
    torch.testing.assert_close(disagreement(2 * a, -b), disagreement(a, b))
    assert torch.autograd.gradcheck(disagreement, (leaf(a), leaf(b)))
    halves = torch.stack([disagreement(a[:2], b[:2]), disagreement(a[2:4], b[2:4])])
    torch.testing.assert_close(halves.mean(), disagreement(a[:4], b[:4]))


def test_disagreement_runs_from_orthogonal_to_parallel():
    first, second = torch.eye(4)[:2]
    assert disagreement(first.expand(3, 4), second.expand(3, 4)) == 0
    assert disagreement(first.expand(3, 4), -first.expand(3, 4)) == 1


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_entropies(X, temperature=0.0), "temperature must be > 0, got 0.0"),
        (
            lambda: token_entropies(X, is_real_token=torch.ones(2, 4)),
            r"is_real_token must have shape \[2, 3\]",
        ),
        (
            lambda: token_entropies(X, is_kept_patch=torch.ones(2, 3)),
            r"is_kept_patch must have shape \[2, 4\]",
        ),
        (lambda: matched_similarities(X, X[:1]), "must agree in pairs and width"),
        (
            lambda: sliced_wasserstein(X[0], X[0], X[0, :, :3]),
            r"directions \[L, D\], got \[3, 4\], \[3, 4\] and \[3, 3\]",
        ),
        (lambda: sliced_wasserstein(X[0], X[0, :2], X[0]), r"\[N, D\] alike .* got \[3, 4\], \[2, 4\]"),
        (
            lambda: projection_directions(0, step=0, num_directions=0, width=3),
            "num_directions and width must be >= 1, got 0 and 3",
        ),
        (lambda: disagreement(X[0], X[0, :2]), r"\[N, D\] alike, got \[3, 4\] and \[2, 4\]"),
        (lambda: uniformity(torch.ones(1, 3)), "B >= 2 embeddings, got 1"),
        (lambda: uniformity(torch.ones(2, 3), scale=0), "scale must be > 0, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
