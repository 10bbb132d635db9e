"""Distillation: loops, released objective, teacher without gradient, removed patches, workers, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.distillation import (
    DistilCritic,
    MaskedDistillationHead,
    distil_jsd_rows,
    jsd_rows,
    removed_patches,
    soft_code_rows,
)
from models.text_heads import reduce_counted
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.heads import loop_code_rows, loop_distil_rows

B, P, D, E = 4, 9, 5, 6
KEPT = torch.tensor([[0, 4, 8], [1, 2, 3], [0, 1, 2], [5, 6, 7]])
REMOVED = [[p for p in range(P) if p not in row] for row in KEPT.tolist()]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(kind, *args, seed=0, **kwargs):
    """A head in float64 from its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(*args, **kwargs).double()


def critic(**changes):
    made = built(DistilCritic, D, E, width=7, **changes)
    with torch.no_grad():
        # fresh LayerNorms would hide a missing weight or bias
        for norm in (made.student[1], made.teacher[1]):
            norm.weight += 0.2 * draw(7, seed=8)
            norm.bias += 0.2 * draw(7, seed=9)
    return made


def head(**changes):
    return built(
        MaskedDistillationHead,
        8,
        E,
        **{"grid": 3, "num_codes": 10, "num_layers": 2, "num_heads": 2} | changes,
    )


class TestMutualInformation:
    student, patches = draw(B, D), draw(B, P, D, seed=1)
    teacher, maps = draw(B, E, seed=2), draw(B, P, E, seed=3)

    @pytest.mark.parametrize("kind", ["global", "local", "matched"])
    def test_rows_equal_the_loop(self, kind):
        student = self.student if kind == "global" else self.patches
        teacher = self.maps if kind == "matched" else self.teacher
        negatives = teacher.roll(1, 0)
        rows = distil_jsd_rows(student, teacher, negatives, critic=critic())
        places = [x.reshape(B, -1, x.shape[-1]).tolist() for x in (student, teacher, negatives)]
        expected = loop_distil_rows(*places, critic())
        assert rows.tolist() == pytest.approx(expected, abs=1e-11)
        wrong = distil_jsd_rows(student, teacher, teacher.roll(2, 0), critic=critic())
        assert abs(wrong.mean().item() - sum(expected) / B) > 1e-3

    def test_objective_equals_the_clip_lite_release(self):
        golden = tensors("cliplite_official_dot")
        rows = jsd_rows(golden["pos_logit"], golden["neg_logit"])
        assert_golden(rows.mean(), golden["cross"])
        swapped = jsd_rows(golden["neg_logit"], golden["pos_logit"])
        assert abs(swapped.mean() - golden["cross"]) > 0.1

    def test_objective_is_stable_and_silent_critics_cost_two_logs(self):
        assert jsd_rows(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(2 * math.log(2))
        extreme = leaf(torch.tensor([1e4, -1e4]))
        jsd_rows(extreme, extreme).sum().backward()
        assert jsd_rows(extreme, -extreme).tolist() == [0.0, 2e4]
        assert extreme.grad.tolist() == [1.0, -1.0]
        assert torch.autograd.gradcheck(jsd_rows, (leaf(draw(4)), leaf(draw(4, seed=1))))

    @pytest.mark.parametrize("kind", ["global", "local", "matched"])
    def test_the_teacher_gets_no_gradient_and_its_projection_does(self, kind):
        student = leaf(self.student if kind == "global" else self.patches)
        teacher = leaf(self.maps if kind == "matched" else self.teacher)
        negatives, judge = leaf(teacher.roll(1, 0)), critic()
        distil_jsd_rows(student, teacher, negatives, critic=judge).mean().backward()
        assert teacher.grad is None
        assert negatives.grad is None
        assert student.grad.abs().amax(-1).min() > 0
        for name, parameter in judge.named_parameters():
            assert parameter.grad.any(), name

    def test_order_of_patches_is_irrelevant_where_nothing_is_matched(self):
        order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
        for teacher, is_free in ((self.teacher, True), (self.maps, False)):
            rows = [
                distil_jsd_rows(patches, teacher, teacher.roll(1, 0), critic=critic())
                for patches in (self.patches, self.patches[:, order])
            ]
            assert torch.allclose(*rows, atol=1e-12, rtol=0) == is_free

    def test_one_patch_is_a_global_feature(self):
        rows = [
            distil_jsd_rows(student, self.teacher, self.teacher.roll(1, 0), critic=critic())
            for student in (self.student, self.student[:, None])
        ]
        torch.testing.assert_close(*rows, atol=1e-12, rtol=0)

    def test_half_precision_is_raised(self):
        half = built(DistilCritic, D, E).bfloat16()
        rows = distil_jsd_rows(
            self.student.bfloat16(), self.teacher.bfloat16(), self.teacher.bfloat16(), critic=half
        )
        assert rows.dtype == torch.float32

    def test_given_negatives_make_the_loss_independent_of_the_workers(self):
        negatives = self.teacher.roll(1, 0)
        whole, shared = critic(), critic()
        distil_jsd_rows(self.patches, self.teacher, negatives, critic=whole).mean().backward()
        parts = [
            distil_jsd_rows(self.patches[r], self.teacher[r], negatives[r], critic=shared)
            for r in (slice(0, 2), slice(2, 4))
        ]
        torch.cat(parts).mean().backward()
        for first, second in zip(whole.parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(first.grad, second.grad, atol=1e-12, rtol=0)
        inside = distil_jsd_rows(
            self.patches[:2], self.teacher[:2], self.teacher[:2].roll(1, 0), critic=shared
        )
        assert abs(inside[0] - parts[0][0]) > 1e-3

    def test_training_finds_the_shared_information(self):
        """A linear student of noisy copies learns; with teachers of other images it does not."""
        losses = {}
        for name, shift in (("own", 0), ("other", 1)):
            judge = built(DistilCritic, D, D, width=16)
            optimizer = torch.optim.Adam(judge.parameters(), lr=0.01)
            for step in range(80):
                x = draw(64, D, seed=step)
                teacher = (x + 0.1 * draw(64, D, seed=1000 + step)).roll(shift, 0)
                loss = distil_jsd_rows(x, teacher, teacher.roll(5, 0), critic=judge).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses[name] = loss.item()
        assert losses["own"] < 0.7
        assert losses["other"] > 1.2


class TestMaskedDistillation:
    kept_tokens = draw(B, 3, 8)
    teacher = draw(B, P, E, seed=1)

    def test_removed_are_the_patches_not_kept(self):
        found = [row.nonzero()[:, 0].tolist() for row in removed_patches(KEPT, P)]
        assert found == REMOVED

    @pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.5, 0.5)])
    def test_rows_equal_the_loop(self, temperatures):
        made = head()
        student_temperature, teacher_temperature = temperatures
        rows = made.rows(
            self.kept_tokens,
            KEPT,
            self.teacher,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        predicted = made(self.kept_tokens, KEPT).detach()
        expected = loop_code_rows(
            predicted, self.teacher, made.codes, removed=REMOVED, temperatures=temperatures
        )
        torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64), atol=1e-11, rtol=0)
        others = [row[:5] for row in KEPT.roll(1, 0).tolist()]
        wrong = loop_code_rows(predicted, self.teacher, made.codes, removed=others, temperatures=temperatures)
        assert abs(wrong[0][0] - expected[0][0]) > 1e-2

    def test_kept_patches_of_the_teacher_say_nothing_and_no_patch_gets_gradient(self):
        made, teacher = head(), leaf(self.teacher)
        is_removed = removed_patches(KEPT, P)
        loss = reduce_counted(made.rows(self.kept_tokens, KEPT, teacher)).sum()
        loss.backward()
        assert teacher.grad is None
        changed = torch.where(is_removed[:, :, None], self.teacher, 7.0)
        assert reduce_counted(made.rows(self.kept_tokens, KEPT, changed)).sum() == loss
        changed = torch.where(is_removed[:, :, None], -self.teacher, self.teacher)
        assert abs(reduce_counted(made.rows(self.kept_tokens, KEPT, changed)).sum() - loss) > 1e-2

    def test_scores_of_kept_patches_get_exactly_no_gradient(self):
        scores, is_removed = leaf(draw(B, P, 10)), removed_patches(KEPT, P)
        reduce_counted(soft_code_rows(scores, draw(B, P, 10, seed=1), is_removed)).sum().backward()
        assert scores.grad[~is_removed].abs().max() == 0
        assert scores.grad[is_removed].abs().amax(-1).min() > 0

    def test_order_of_the_kept_is_irrelevant_and_their_place_is_not(self):
        made, order = head(), torch.tensor([2, 0, 1])
        rows = made.rows(self.kept_tokens, KEPT, self.teacher)
        shuffled = made.rows(self.kept_tokens[:, order], KEPT[:, order], self.teacher)
        torch.testing.assert_close(shuffled, rows, atol=1e-12, rtol=0)
        misplaced = made.rows(self.kept_tokens[:, order], KEPT, self.teacher)
        assert abs(misplaced - rows).max() > 1e-3

    def test_every_kept_patch_and_every_weight_gets_a_gradient(self):
        made, tokens = head(), leaf(self.kept_tokens)
        reduce_counted(made.rows(tokens, KEPT, self.teacher)).sum().backward()
        assert tokens.grad.abs().amax(-1).min() > 0
        for name, parameter in made.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name

    def test_nothing_removed_is_zero_with_zero_gradient(self):
        made = head()
        everything = torch.arange(P).expand(B, P)
        loss = reduce_counted(made.rows(draw(B, P, 8), everything, self.teacher)).sum()
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, list(made.parameters())))

    def test_means_over_workers_are_exact(self):
        whole, shared = head(), head()
        reduce_counted(whole.rows(self.kept_tokens, KEPT, self.teacher)).sum().backward()
        parts = [
            shared.rows(self.kept_tokens[r], KEPT[r], self.teacher[r]) for r in (slice(0, 2), slice(2, 4))
        ]
        reduce_counted(torch.cat(parts)).sum().backward()
        for first, second in zip(whole.parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(first.grad, second.grad, atol=1e-12, rtol=0)

    def test_a_student_like_the_teacher_pays_the_teachers_entropy(self):
        scores, is_removed = draw(B, P, 10), removed_patches(KEPT, P)
        rows = soft_code_rows(scores, scores, is_removed, student_temperature=0.3, teacher_temperature=0.3)
        entropy = torch.special.entr((scores / 0.3).softmax(2)).sum(2)[is_removed].mean()
        assert reduce_counted(rows).item() == pytest.approx(entropy.item(), abs=1e-12)
        flat = soft_code_rows(torch.zeros(B, P, 10), scores, is_removed)
        assert reduce_counted(flat).item() == pytest.approx(math.log(10))

    def test_gradients_pass_gradcheck(self):
        is_removed = torch.tensor([[True, False, True]])
        assert torch.autograd.gradcheck(
            lambda x: soft_code_rows(x, draw(1, 3, 4, seed=1), is_removed).sum(0)[0], [leaf(draw(1, 3, 4))]
        )

    def test_training_predicts_removed_patches_from_the_kept(self):
        """Each image has one direction in all its patches; a teacher of other images cannot be predicted."""
        excess = {}
        for name, shift in (("own", 0), ("other", 1)):
            made = built(MaskedDistillationHead, 8, E, grid=3, num_codes=10, num_heads=2)
            optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
            lift = draw(E, 8, seed=99)
            for step in range(150):
                image = draw(32, 1, E, seed=step).expand(-1, P, -1)
                kept = KEPT.repeat(8, 1)
                rows = made.rows((image @ lift)[:, :3], kept, image.roll(shift, 0), teacher_temperature=0.1)
                loss = reduce_counted(rows).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            target = (made.code_scores(image) / 0.1).softmax(-1)
            excess[name] = loss.item() - torch.special.entr(target).sum(-1).mean().item()
            # the code book did not fall to one code for all
            assert torch.special.entr(target.mean((0, 1))).sum() > 1.5
        assert excess["own"] < 0.4
        assert excess["other"] > 1.0

    def test_code_scores_are_cosines_of_centred_features(self):
        made = head()
        scores = made.code_scores(3 * self.teacher + 5)
        torch.testing.assert_close(scores, made.code_scores(self.teacher), atol=1e-4, rtol=0)
        assert scores.abs().max() <= 1
        centred = self.teacher - self.teacher.mean(-1, keepdim=True)
        expected = F.normalize(centred, dim=-1) @ F.normalize(made.codes, dim=-1).T
        torch.testing.assert_close(made.code_scores(self.teacher), expected, atol=1e-4, rtol=0)


X = torch.zeros(2, 3)
SCORES, REMOVED_MASK = torch.zeros(2, 4, 3), torch.ones(2, 4).bool()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jsd_rows(X[0], X[0, :2]), r"equal shapes, got \[3\] and \[2\]"),
        (lambda: DistilCritic(0, 1), "critic widths must be >= 1, got 0, 1 and 128"),
        (
            lambda: distil_jsd_rows(X, X, X[:1], critic=critic()),
            r"teacher and negatives alike with the same B, got \[2, 3\], \[2, 3\] and \[1, 3\]",
        ),
        (
            lambda: distil_jsd_rows(SCORES, SCORES[:, :2], SCORES[:, :2], critic=critic()),
            r"matched one by one, got \[2, 4, 3\] of the student and \[2, 2, 3\]",
        ),
        (
            lambda: distil_jsd_rows(X, SCORES, SCORES, critic=critic()),
            r"matched one by one, got \[2, 3\] of the student and \[2, 4, 3\]",
        ),
        (lambda: head(num_heads=3), "num_heads must divide the width of the head, got 3 and 8"),
        (lambda: head(num_codes=1), "num_codes >= 2 and a decoder num_layers >= 1, got 1 and 2"),
        (
            lambda: head()(draw(B, 2, 8), KEPT),
            r"kept tokens \[4, 2, 8\] and indices \[4, 3\] must agree",
        ),
        (
            lambda: soft_code_rows(SCORES, SCORES, REMOVED_MASK, teacher_temperature=0.0),
            "temperatures must be > 0, got student 0.1 and teacher 0.0",
        ),
        (
            lambda: soft_code_rows(SCORES, SCORES[:, :3], REMOVED_MASK),
            r"code scores \[2, 4, 3\] and \[2, 3, 3\] must agree",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
