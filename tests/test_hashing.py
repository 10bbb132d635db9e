"""Hash codes: loops, saturation, straight-through gradient, a planted task, rankings by Hamming distance."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.hashing import (
    HashHead,
    HashSettings,
    binary_codes,
    hamming_average_precision,
    hamming_distances,
    hamming_map,
    hamming_precision,
    hash_loss,
    straight_through_signs,
)
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.heads import loop_average_precision, loop_hamming, loop_hash_terms, loop_ranking

ONES = HashSettings(temperature=0.3, balance=1.0, certainty=1.0, gap=1.0)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(width, num_bits, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HashHead(width, num_bits).double()


class TestLoss:
    image, text = draw(5, 6), draw(5, 6, seed=1)

    @pytest.mark.parametrize(
        "settings",
        [ONES, HashSettings(), HashSettings(temperature=1.0, balance=0.5, certainty=0.0, gap=2.0)],
    )
    def test_terms_equal_the_loop(self, settings):
        total, terms = hash_loss(self.image, self.text, settings)
        loop = loop_hash_terms(self.image, self.text, temperature=settings.temperature)
        expected = {
            "contrast": loop["contrast"],
            "balance": -settings.balance * loop["balance"],
            "certainty": settings.certainty * loop["certainty"],
            "gap": settings.gap * loop["gap"],
        }
        assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, abs=1e-12)
        assert total.item() == pytest.approx(sum(expected.values()), abs=1e-12)
        wrong, _ = hash_loss(self.image, self.text.roll(1, 0), settings)
        assert abs(wrong - total) > 1e-2

    def test_order_of_pairs_and_of_bits_is_irrelevant(self):
        total, _ = hash_loss(self.image, self.text, ONES)
        pairs, bits = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 1, 4, 3])
        for rows in (lambda x: x[pairs], lambda x: x[:, bits]):
            torch.testing.assert_close(hash_loss(rows(self.image), rows(self.text), ONES)[0], total)
        assert abs(hash_loss(self.image[pairs], self.text, ONES)[0] - total) > 1e-2

    def test_the_code_has_the_gradient_of_tanh(self):
        h = leaf(torch.cat([self.image.flatten(), torch.zeros(1)]))
        signs = straight_through_signs(h)
        torch.testing.assert_close(signs.abs(), torch.ones_like(h), atol=1e-15, rtol=0)
        assert torch.equal(signs > 0, binary_codes(h))
        weights = draw(len(h), seed=2)
        (signs * weights).sum().backward()
        torch.testing.assert_close(h.grad, weights / h.detach().cosh().square())

    def test_smooth_terms_pass_gradcheck(self):
        """The contrast's gradient is not that of its value, by design."""
        image, text = leaf(draw(3, 2)), leaf(draw(3, 2, seed=1))
        contrast_free = replace(ONES, temperature=1e12)
        assert torch.autograd.gradcheck(lambda a, b: hash_loss(a, b, contrast_free)[0], (image, text))

    def test_gradient_of_the_contrast_is_that_of_soft_codes_at_the_signs(self):
        image, text = leaf(self.image), leaf(self.text)
        settings = HashSettings(temperature=0.3, balance=0.0, certainty=0.0, gap=0.0)
        hash_loss(image, text, settings)[0].backward()
        signs = [leaf(torch.where(x >= 0, 1.0, -1.0)) for x in (self.image, self.text)]
        logits = signs[0] @ signs[1].T / 6 / 0.3
        own = torch.arange(5)
        (0.5 * F.cross_entropy(logits, own) + 0.5 * F.cross_entropy(logits.T, own)).backward()
        for found, sign in ((image, signs[0]), (text, signs[1])):
            expected = sign.grad * (1 - found.detach().tanh() ** 2)
            torch.testing.assert_close(found.grad, expected, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("size", [1e-3, 50.0, 1e4])
    def test_saturated_bits_stay_finite_in_float32(self, size):
        image, text = (size * x.float() for x in (self.image, self.text))
        image, text = image.requires_grad_(), text.requires_grad_()
        total, terms = hash_loss(image, text, ONES)
        total.backward()
        assert all(term.isfinite() for term in terms.values())
        assert image.grad.isfinite().all()
        assert text.grad.isfinite().all()

    def test_a_bit_that_is_always_on_has_no_entropy_and_a_finite_gradient(self):
        image = leaf(torch.full((4, 2), 2000.0))
        total, terms = hash_loss(image, image.detach(), ONES)
        total.backward()
        assert terms["balance"] == 0
        assert terms["certainty"] == 0
        assert image.grad.isfinite().all()

    def test_undecided_bits_have_one_bit_of_entropy(self):
        _, terms = hash_loss(torch.zeros(4, 3), torch.zeros(4, 3), ONES)
        assert terms["balance"].item() == pytest.approx(-3 * math.log(2))
        assert terms["certainty"].item() == pytest.approx(3 * math.log(2))
        assert terms["contrast"].item() == pytest.approx(math.log(4))
        assert terms["gap"] == 0

    def test_the_gap_is_no_symmetric_divergence(self):
        one, other = hash_loss(self.image, self.text, ONES)[1], hash_loss(self.text, self.image, ONES)[1]
        assert abs(one["gap"] - other["gap"]) > 1e-3
        torch.testing.assert_close(one["contrast"], other["contrast"])

    def test_gathered_is_not_the_mean_of_workers(self):
        """Why the loss takes the global batch: on two halves the entropies of the mean bits differ."""
        total, terms = hash_loss(self.image[:4], self.text[:4], ONES)
        halves = [hash_loss(self.image[r], self.text[r], ONES)[1] for r in (slice(0, 2), slice(2, 4))]
        assert abs(torch.stack([h["balance"] for h in halves]).mean() - terms["balance"]) > 1e-2
        torch.testing.assert_close(torch.stack([h["gap"] for h in halves]).mean(), terms["gap"])
        assert total.dtype == torch.float64

    def test_half_precision_is_raised(self):
        total, _ = hash_loss(self.image.bfloat16(), self.text.bfloat16(), ONES)
        assert total.dtype == torch.float32


@pytest.mark.parametrize("num_bits", [16, 32, 64, 128])
class TestPlantedTask:
    """Pairs share a concept direction; codes must find it again through Hamming distance."""

    def data(self, seed):
        concepts = F.normalize(draw(10, 24), dim=1)
        labels = torch.arange(60) % 10
        noisy = [concepts[labels] + 0.15 * draw(60, 24, seed=seed + k) for k in range(2)]
        return *(F.normalize(x, dim=1) for x in noisy), labels

    def retrieval(self, head, seed=50):
        image, text, labels = self.data(seed)
        with torch.no_grad():
            codes = [binary_codes(h) for h in head(image, text)]
        return hamming_map(hamming_distances(*codes), labels[:, None] == labels, at=20)

    def test_training_raises_map_and_mismatched_pairs_do_not(self, num_bits):
        found = {"untrained": self.retrieval(built(24, num_bits))}
        for name, shift in (("own", 0), ("other", 7)):
            head = built(24, num_bits)
            optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
            for step in range(60):
                image, text, _ = self.data(100 + 2 * step)
                loss, _ = hash_loss(*head(image, text.roll(shift, 0)), HashSettings())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            found[name] = self.retrieval(head)
            for parameter in head.parameters():
                assert parameter.grad.any()
        assert found["untrained"] < 0.4
        assert found["own"] > 0.8
        assert found["other"] < 0.4


class TestRanking:
    queries = draw(7, 16) > 0
    candidates = draw(9, 16, seed=1) > 0

    @pytest.mark.parametrize("num_bits", [16, 32, 64, 128])
    def test_distances_equal_the_loop(self, num_bits):
        queries, candidates = draw(7, num_bits) > 0, draw(9, num_bits, seed=1) > 0
        found = hamming_distances(queries, candidates)
        assert found.dtype == torch.int64
        assert found.tolist() == loop_hamming(queries, candidates)
        assert hamming_distances(queries, queries).diagonal().tolist() == [0] * 7
        assert hamming_distances(queries, ~queries).diagonal().tolist() == [num_bits] * 7

    @pytest.mark.parametrize("at", [1, 3, 9, 50])
    def test_average_precision_equals_the_loop(self, at):
        """Four bits leave many ties."""
        distances = hamming_distances(self.queries[:, :4], self.candidates[:, :4])
        relevant = draw(7, 9, seed=2) > 0.3
        relevant[3] = False
        found = hamming_average_precision(distances, relevant, at=at)
        rows = list(zip(distances.tolist(), relevant.tolist(), strict=True))
        expected = [loop_average_precision(d, r, at) for d, r in rows]
        assert found.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
        assert math.isnan(expected[3])
        defined = [x for x in expected if not math.isnan(x)]
        assert hamming_map(distances, relevant, at=at) == pytest.approx(sum(defined) / 6)
        if at <= 9:
            precision = [sum(r[c] for c in loop_ranking(d)[:at]) / at for d, r in rows]
            assert hamming_precision(distances, relevant, at=at).tolist() == pytest.approx(precision)
        assert hamming_map(-distances, relevant, at=at) != pytest.approx(sum(defined) / 6, abs=1e-3)

    def test_ties_rank_in_the_candidates_order(self):
        same = torch.zeros(1, 4, dtype=torch.int64)
        relevant = torch.tensor([[False, True, False, True]])
        assert hamming_precision(same, relevant, at=1).item() == 0
        assert hamming_precision(same, relevant, at=2).item() == 0.5
        assert hamming_average_precision(same, relevant, at=4).item() == pytest.approx((1 / 2 + 2 / 4) / 2)

    def test_missing_a_relevant_candidate_costs(self):
        distances = torch.tensor([[0, 1, 2, 3]])
        relevant = torch.tensor([[True, False, False, True]])
        assert hamming_average_precision(distances, relevant, at=2).item() == 0.5
        assert hamming_average_precision(distances, relevant, at=1).item() == 1.0

    @pytest.mark.parametrize("at", [1, 5, 10])
    def test_precision_equals_the_derived_value(self, at):
        golden = tensors("mil_derived_eval")
        image, text = (F.normalize(golden[key], dim=1) for key in ("ret_img", "ret_txt"))
        relevant = golden["ret_label"][:, None] == golden["ret_label"]
        found = hamming_precision(-image @ text.T, relevant, at=at)
        assert_golden(found.mean(), golden[f"p_at_{at}"])
        shuffled = hamming_precision(-image @ text.T, relevant.roll(1, 1), at=at)
        assert abs(shuffled.mean() - golden[f"p_at_{at}"]) > 1e-3


X, DISTANCES, RELEVANT = torch.zeros(2, 3), torch.zeros(2, 3).long(), torch.zeros(2, 3).bool()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HashSettings(temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: HashSettings(gap=-1.0), "weights must be >= 0, got balance=0.1, certainty=0.1 and gap=-1.0"),
        (lambda: HashHead(4, 0), "width and num_bits >= 1, got 4 and 0"),
        (lambda: hash_loss(X, X[:1], ONES), r"\[N, L\] alike, got \[2, 3\] and \[1, 3\]"),
        (lambda: hash_loss(X[:1], X[:1], ONES), "N >= 2 pairs, got 1"),
        (lambda: hamming_distances(X, RELEVANT), "codes must be bool, got torch.float32 and torch.bool"),
        (lambda: hamming_distances(RELEVANT, RELEVANT[:, :2]), "equally many bits, got 3 and 2"),
        (lambda: hamming_map(DISTANCES, RELEVANT, at=3), "none of 2 has one"),
        (lambda: hamming_map(DISTANCES, DISTANCES, at=3), r"relevance must be bool \[2, 3\]"),
        (lambda: hamming_map(DISTANCES, RELEVANT, at=0), "at must be >= 1, got 0"),
        (lambda: hamming_precision(DISTANCES, RELEVANT, at=4), "precision@4 needs 4 candidates, got 3"),
        (lambda: hamming_precision(DISTANCES, RELEVANT, at=0), "at must be >= 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
