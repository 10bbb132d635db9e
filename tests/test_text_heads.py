"""Masked tokens and captions: BERT's shares, loops, padding, causality, workers, refusals."""

import math

import pytest
import torch
from torch import Tensor

from models.keyed_noise import Draw, keyed_uniform
from models.text_heads import (
    CaptionHead,
    MaskedTokenHead,
    caption_rows,
    mask_tokens,
    masked_token_rows,
    reduce_counted,
    reverse_real,
)
from tests.golden_files import leaf
from tests.oracles.heads import loop_caption_rows, loop_masked, loop_token_rows

PAD, START, END, MASK, VOCAB = 0, 1, 2, 3, 12
# start, words, end
TEXTS = [[1, 5, 9, 7, 2], [1, 2], [1, 4, 4, 11, 8, 10, 2], [1, 6, 2]]
LENGTHS = [len(text) for text in TEXTS]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def padded(texts: list[list[int]], *, extra: int = 0, filler: int = PAD) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and which are real; `extra` more columns of padding than needed."""
    longest = max(map(len, texts)) + extra
    ids = torch.tensor([text + [filler] * (longest - len(text)) for text in texts])
    return ids, torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]


def built(kind, *args, seed=0, **kwargs):
    """A head in float64 from its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(*args, **kwargs).double()


class TestMasking:
    def test_equals_the_loop(self):
        ids, is_real = padded(TEXTS, extra=1)
        noise = uniform(*ids.shape, 3, seed=4)
        # every fate must occur for the comparison to mean something
        noise[2, 1:5, 0] = 0.1
        noise[2, 1:5, 1] = torch.tensor([0.5, 0.85, 0.95, 0.2])
        found, is_target = mask_tokens(ids, is_real, noise, mask_id=MASK, vocab_size=VOCAB, share=0.3)
        texts, targets = loop_masked(TEXTS, noise, mask_id=MASK, vocab_size=VOCAB, share=0.3)
        assert [row[:n].tolist() for row, n in zip(found, LENGTHS, strict=True)] == texts
        assert [row.nonzero()[:, 0].tolist() for row in is_target] == targets
        other, _ = loop_masked(TEXTS, noise.flip(0), mask_id=MASK, vocab_size=VOCAB, share=0.3)
        assert other != texts

    def test_start_end_and_padding_stay_even_when_everything_is_chosen(self):
        ids, is_real = padded(TEXTS, extra=2)
        found, is_target = mask_tokens(
            ids, is_real, torch.zeros(*ids.shape, 3), mask_id=MASK, vocab_size=VOCAB, share=1.0
        )
        for row, chosen, text in zip(found.tolist(), is_target.tolist(), TEXTS, strict=True):
            inner = len(text) - 2
            assert row[: len(text)] == [START, *[MASK] * inner, END]
            assert set(row[len(text) :]) <= {PAD}
            assert sum(chosen) == inner

    def test_shares_are_those_of_bert(self):
        ids = torch.full((400, 52), 7)
        noise = uniform(400, 52, 3, seed=1)
        found, is_target = mask_tokens(
            ids, torch.ones_like(ids).bool(), noise, mask_id=MASK, vocab_size=VOCAB
        )
        num_targets = int(is_target.sum())
        chosen = found[is_target]
        # 20,000 draws: four standard deviations are .01 of the first share and .03 of the others
        assert num_targets / (400 * 50) == pytest.approx(0.15, abs=0.01)
        assert (chosen == MASK).double().mean() == pytest.approx(0.8 + 0.1 / VOCAB, abs=0.03)
        assert (chosen == 7).double().mean() == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.03)
        assert set(chosen.tolist()) == set(range(VOCAB))
        assert torch.equal(found[~is_target], ids[~is_target])

    def test_the_largest_draw_gives_the_last_token(self):
        ids, is_real = padded([[1, 5, 2]])
        noise = torch.tensor([0.0, 0.85, 1 - 2**-24]).expand(1, 3, 3)
        for vocab_size in (VOCAB, 49408, 65537):
            found, _ = mask_tokens(ids, is_real, noise, mask_id=MASK, vocab_size=vocab_size)
            assert found.tolist() == [[1, vocab_size - 1, 2]]

    def test_draws_belong_to_the_row_and_not_to_its_place(self):
        ids, is_real = padded(TEXTS * 3)
        keys = torch.arange(12) * 7919
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

        def masked(rows):
            noise = keyed_uniform(keys[rows], Draw.MASKED_TOKENS, 3 * ids.shape[1]).view(len(rows), -1, 3)
            return mask_tokens(ids[rows], is_real[rows], noise, mask_id=MASK, vocab_size=VOCAB, share=0.5)[0]

        assert torch.equal(masked(order), masked(torch.arange(12))[order])
        assert not torch.equal(masked(torch.arange(12))[0], masked(torch.arange(12))[4])


class TestMaskedTokenRows:
    ids, is_real = padded(TEXTS)
    positions = ([1, 3], [], [2, 3, 5], [1])

    def is_target(self):
        found = torch.zeros_like(self.is_real)
        for b, wanted in enumerate(self.positions):
            found[b, wanted] = True
        return found

    def test_equal_the_loop(self):
        logits = draw(4, 7, VOCAB)
        rows = masked_token_rows(logits, self.ids, self.is_target())
        expected = torch.tensor(loop_token_rows(logits, TEXTS, list(self.positions)), dtype=torch.float64)
        torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)
        total = sum(row[0] for row in expected.tolist()) / 6
        assert reduce_counted(rows).item() == pytest.approx(total, abs=1e-12)
        wrong = masked_token_rows(logits, self.ids.roll(1, 0), self.is_target())
        assert abs(reduce_counted(wrong) - total) > 1e-2

    def test_only_targets_get_gradient(self):
        logits = leaf(draw(4, 7, VOCAB))
        reduce_counted(masked_token_rows(logits, self.ids, self.is_target())).sum().backward()
        is_target = self.is_target()
        assert logits.grad[~is_target].abs().max() == 0
        assert (logits.grad[is_target].abs().amax(-1) > 1e-3).all()

    def test_scores_nobody_asks_for_may_be_infinite(self):
        logits = draw(4, 7, VOCAB)
        expected = masked_token_rows(logits, self.ids, self.is_target())
        logits[0, 0, :3] = torch.inf
        assert torch.equal(masked_token_rows(logits, self.ids, self.is_target()), expected)

    def test_a_batch_without_masks_is_zero_with_zero_gradient(self):
        head = built(MaskedTokenHead, 6, VOCAB)
        states, nothing = leaf(draw(4, 7, 6)), torch.zeros_like(self.is_real)
        for rows in (
            masked_token_rows(head(states), self.ids, nothing),
            head.rows(states, self.ids, nothing),
        ):
            loss = reduce_counted(rows).sum()
            assert loss == 0
            gradients = torch.autograd.grad(loss, list(head.parameters()))
            assert all(not g.any() for g in gradients)

    def test_the_head_scores_only_what_is_asked(self):
        head, states = built(MaskedTokenHead, 6, VOCAB), draw(4, 7, 6)
        rows = [
            masked_token_rows(head(states), self.ids, self.is_target()),
            head.rows(states, self.ids, self.is_target()),
        ]
        torch.testing.assert_close(rows[0], rows[1], atol=1e-12, rtol=0)
        grads = [torch.autograd.grad(reduce_counted(r).sum(), list(head.parameters())) for r in rows]
        for first, second in zip(*grads, strict=True):
            torch.testing.assert_close(first, second, atol=1e-12, rtol=0)
            assert first.any()

    def test_equal_scores_cost_the_log_of_the_vocabulary(self):
        rows = masked_token_rows(torch.zeros(4, 7, VOCAB), self.ids, self.is_target())
        assert reduce_counted(rows).item() == pytest.approx(math.log(VOCAB))

    def test_half_precision_is_raised_and_double_stays(self):
        for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            rows = masked_token_rows(torch.zeros(4, 7, VOCAB, dtype=dtype), self.ids, self.is_target())
            assert rows.dtype == wanted

    def test_gradients_pass_gradcheck(self):
        ids, is_target = torch.tensor([[1, 0, 2]]), torch.tensor([[True, False, True]])
        assert torch.autograd.gradcheck(
            lambda x: reduce_counted(masked_token_rows(x, ids, is_target)), [leaf(draw(1, 3, 4))]
        )


def caption_head(**changes):
    arguments = {"num_layers": 2, "num_heads": 2, "max_tokens": 10} | changes
    return built(CaptionHead, 5, 8, VOCAB, **arguments)


def caption_loss(head, memory, texts=TEXTS, **padding):
    ids, is_real = padded(texts, **padding)
    return caption_rows(head(memory, ids, is_real), ids, is_real)


class TestCaptions:
    memory = draw(4, 6, 5)

    def test_rows_equal_the_loop(self):
        ids, is_real = padded(TEXTS, extra=1)
        forwards, backwards = draw(4, 7, VOCAB), draw(4, 7, VOCAB, seed=1)
        rows = caption_rows((forwards, backwards), ids, is_real)
        expected = torch.tensor(loop_caption_rows(forwards, backwards, TEXTS), dtype=torch.float64)
        torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(reduce_counted(rows), expected.sum(0)[0::2] / (sum(LENGTHS) - 4))
        swapped = caption_rows((backwards, forwards), ids, is_real)
        assert abs(swapped - expected).max() > 1e-2

    def test_real_tokens_are_reversed_and_padding_stays(self):
        ids, is_real = padded(TEXTS)
        for row, text in zip(reverse_real(ids, is_real).tolist(), TEXTS, strict=True):
            assert row == text[::-1] + [PAD] * (7 - len(text))
        assert torch.equal(reverse_real(reverse_real(ids, is_real), is_real), ids)

    def test_padding_changes_nothing_and_gets_no_gradient(self):
        """The padding id is one that no text has, so all its gradient would come from padding."""
        rows, gradients = [], []
        for extra, filler in ((0, PAD), (2, PAD), (2, MASK)):
            head = caption_head()
            found = caption_loss(head, self.memory, extra=extra, filler=filler)
            reduce_counted(found).sum().backward()
            rows.append(found.detach())
            gradients.append({name: p.grad for name, p in head.named_parameters()})
        for other_rows, other in zip(rows[1:], gradients[1:], strict=True):
            torch.testing.assert_close(other_rows, rows[0], atol=1e-12, rtol=0)
            for name, gradient in other.items():
                torch.testing.assert_close(gradient, gradients[0][name], atol=1e-12, rtol=0)
        counted = caption_loss(caption_head(), self.memory, [[*text, PAD] for text in TEXTS])
        assert abs(reduce_counted(counted) - reduce_counted(rows[0])).max() > 1e-3

    def test_padding_reads_get_exactly_no_gradient(self):
        head = caption_head()
        embedded = []
        head.tokens.register_forward_hook(lambda *call: (call[2].retain_grad(), embedded.append(call[2]))[1])
        reduce_counted(caption_loss(head, self.memory, extra=1)).sum().backward()
        _, is_real = padded(TEXTS, extra=1)
        for found in embedded:
            # what is read are all tokens but the last column
            gradient = found.grad
            assert gradient[~is_real[:, :-1]].abs().max() == 0
            # the last real token is predicted; what is said after it does not count
            assert gradient[torch.arange(4), torch.tensor(LENGTHS) - 1].abs().max() == 0
            assert gradient[:, 0].abs().amax(-1).min() > 0

    def test_a_score_sees_the_text_before_it_alone(self):
        head = caption_head()
        ids, is_real = padded([TEXTS[2]] * 4)
        forwards, backwards = head(self.memory, ids, is_real)
        changed = ids.clone()
        changed[:, 3] = 5
        other_forwards, other_backwards = head(self.memory, changed, is_real)
        torch.testing.assert_close(other_forwards[:, :3], forwards[:, :3], atol=1e-12, rtol=0)
        assert (other_forwards[:, 3:] - forwards[:, 3:]).abs().amax((0, 2)).min() > 1e-4
        # of 7 tokens reversed, the fourth is the fourth
        torch.testing.assert_close(other_backwards[:, :3], backwards[:, :3], atol=1e-12, rtol=0)
        assert (other_backwards[:, 3:] - backwards[:, 3:]).abs().amax((0, 2)).min() > 1e-4

    def test_backwards_is_the_other_decoder_on_the_reversed_text(self):
        head = caption_head()
        ids, is_real = padded(TEXTS)
        _, backwards = head(self.memory, ids, is_real)
        head.forwards = head.backwards
        mirrored, _ = head(self.memory, reverse_real(ids, is_real), is_real)
        assert torch.equal(mirrored, backwards)
        straight, _ = head(self.memory, ids, is_real)
        assert (straight - backwards).abs().max() > 1e-3

    def test_order_of_image_tokens_is_irrelevant_and_their_content_is_not(self):
        head = caption_head()
        rows = caption_loss(head, self.memory)
        torch.testing.assert_close(
            caption_loss(head, self.memory[:, [3, 1, 5, 0, 2, 4]]), rows, atol=1e-12, rtol=0
        )
        assert abs(caption_loss(head, self.memory.roll(1, 0)) - rows).max() > 1e-4

    def test_the_image_learns_from_its_own_text_alone(self):
        memory = leaf(self.memory)
        caption_loss(caption_head(), memory)[0, 0].backward()
        assert memory.grad[0].abs().amax(-1).min() > 0
        assert memory.grad[1:].abs().max() == 0

    def test_every_weight_gets_a_gradient(self):
        head = caption_head(max_tokens=7)
        reduce_counted(caption_loss(head, self.memory)).sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
        # every position is read
        assert head.positions.weight.grad.any(1).all()

    def test_layers_start_from_different_weights(self):
        head = caption_head()
        weights = [layer.linear1.weight for stack in (head.forwards, head.backwards) for layer in stack]
        assert len({tuple(w.flatten().tolist()) for w in weights}) == 4

    def test_untrained_the_loss_is_near_the_log_of_the_vocabulary(self):
        means = reduce_counted(caption_loss(caption_head(), self.memory))
        assert means.tolist() == pytest.approx([math.log(VOCAB)] * 2, abs=0.1)

    def test_a_few_steps_learn_which_text_belongs_to_which_image(self):
        head = caption_head()
        optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
        for _ in range(60):
            loss = reduce_counted(caption_loss(head, self.memory)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            mismatched = reduce_counted(caption_loss(head, self.memory.roll(1, 0))).sum()
        assert loss < 0.5
        assert mismatched > 2

    def test_losses_and_gradients_over_workers_are_exact(self):
        whole, shared = caption_head(), caption_head()
        loss = reduce_counted(caption_loss(whole, self.memory)).sum()
        loss.backward()
        parts = [caption_loss(shared, self.memory[r], TEXTS[r]) for r in (slice(0, 2), slice(2, 4))]
        gathered = reduce_counted(torch.cat(parts)).sum()
        gathered.backward()
        torch.testing.assert_close(gathered, loss, atol=1e-12, rtol=0)
        for (name, first), second in zip(whole.named_parameters(), shared.parameters(), strict=True):
            torch.testing.assert_close(
                first.grad, second.grad, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
        # negative control: a mean of the workers' means weighs short texts too much
        naive = torch.stack([reduce_counted(part).sum() for part in parts]).mean()
        assert abs(naive - loss) > 1e-4


IDS, IS_REAL = padded(TEXTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: mask_tokens(IDS, IS_REAL, torch.zeros(4, 7, 3), mask_id=3, vocab_size=12, share=0.0),
            r"share must lie in \(0, 1\], got 0.0",
        ),
        (
            lambda: mask_tokens(IDS, IS_REAL, torch.zeros(4, 7), mask_id=3, vocab_size=12),
            r"noise \[B, T, 3\], got \[4, 7\] and \[4, 7\]",
        ),
        (
            lambda: masked_token_rows(torch.zeros(4, 6, 12), IDS, IS_REAL),
            r"logits \[4, 6, 12\], ids \[4, 7\] and targets \[4, 7\] must agree",
        ),
        (
            lambda: CaptionHead(5, 8, 12, num_heads=3),
            "num_heads must divide the width of the head, got 3 and 8",
        ),
        (lambda: CaptionHead(5, 8, 12, num_layers=0), "num_layers >= 1 and max_tokens >= 2, got 0 and 77"),
        (
            lambda: caption_head(max_tokens=6)(TestCaptions.memory, IDS, IS_REAL),
            "a caption has 2 to 6 tokens, got 7",
        ),
        (
            lambda: caption_head()(TestCaptions.memory, IDS[:, :1], IS_REAL[:, :1]),
            "a caption has 2 to 10 tokens, got 1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
