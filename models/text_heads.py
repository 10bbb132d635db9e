"""Text heads: masked language modelling on text states, and captions written from image tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import at_least_float32

# B pairs of this worker, N pairs of all workers, T tokens, P image tokens, V vocabulary, W head width

# BERT's shares of the chosen positions: masked, replaced by a random token; the rest stays as it is.
_MASKED = 0.8
_MASKED_OR_RANDOM = 0.9


def mask_tokens(
    token_ids_BT: Tensor,
    is_real_BT: Tensor,
    noise_BT3: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    share: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict; of these, mask 80 %, replace 10 % by a random token and leave 10 %.

    Args:
        token_ids_BT: [start, ..., end] and padding on the right, int64 [B, T].
        is_real_BT: False at padding, bool [B, T].
        noise_BT3: uniform in [0, 1), [B, T, 3], from row keys so that it is the same on any worker:
            whether the token is chosen, what becomes of it, which token replaces it.
        mask_id: what stands for a masked token; any id that the embedding table has.
        vocab_size: random tokens are drawn from 0 to vocab_size - 1, special ones included as in BERT.
        share: probability that a token is chosen, in (0, 1]. Start, end and padding never are.

    Returns:
        Corrupted ids [B, T] and True at the chosen positions, bool [B, T].

    Raises:
        ValueError: shapes that do not fit, or a share outside (0, 1].

    Source: BERT, arXiv 1810.04805. Chosen independently per token (BERT takes an exact share of each
        text), so that a token's fate does not depend on the others.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if is_real_BT.shape != token_ids_BT.shape or noise_BT3.shape != (*token_ids_BT.shape, 3):
        raise ValueError(
            f"token ids {list(token_ids_BT.shape)} need a mask of the same shape and noise [B, T, 3], "
            f"got {list(is_real_BT.shape)} and {list(noise_BT3.shape)}"
        )
    positions_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    is_inner_BT = (positions_T > 0) & (positions_T < is_real_BT.sum(1, keepdim=True) - 1)
    chosen_BT, fate_BT, replacement_BT = noise_BT3.unbind(2)
    is_target_BT = is_inner_BT & is_real_BT & (chosen_BT < share)
    # float64: a product in float32 could round up to vocab_size itself
    random_BT = (replacement_BT.double() * vocab_size).long()
    replaced_BT = torch.where(fate_BT < _MASKED, mask_id, random_BT)
    is_replaced_BT = is_target_BT & (fate_BT < _MASKED_OR_RANDOM)
    return torch.where(is_replaced_BT, replaced_BT, token_ids_BT), is_target_BT


def reduce_counted(rows_NK: Tensor) -> Tensor:
    """Means from sums and counts of all workers' rows: [N, 2k] -> [k].

    Columns come in pairs, a sum and the number of entries in it. A mean over nothing is 0, with zero
    gradient: a small batch in which no token is masked is no error.
    """
    totals = rows_NK.sum(0)
    return totals[0::2] / totals[1::2].clamp(min=1)


class MaskedTokenHead(nn.Module):
    """From a token's state to a score for each token of the vocabulary: linear, GELU, LayerNorm, linear.

    Source: BERT, arXiv 1810.04805, as in BioViL, arXiv 2204.09817; the output layer is not tied to the
    embedding. In a causal tower a prediction rests on the text before the token alone.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.output = nn.Linear(width, vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        scores: Tensor = self.output(self.transform(states))
        return scores

    def rows(self, states_BTH: Tensor, target_ids_BT: Tensor, is_target_BT: Tensor) -> Tensor:
        """`masked_token_rows` of this head's scores, [B, 2], without scoring the positions nobody asks for.

        At a share of 15 % the scores, the largest tensor of a language model, shrink by as much.
        """
        scores = at_least_float32(self(states_BTH[is_target_BT]))
        losses = F.cross_entropy(scores, target_ids_BT[is_target_BT], reduction="none")
        losses_BT = losses.new_zeros(is_target_BT.shape).masked_scatter(is_target_BT, losses)
        return torch.stack([losses_BT.sum(1), is_target_BT.sum(1).to(losses_BT.dtype)], dim=1)


def masked_token_rows(logits_BTV: Tensor, target_ids_BT: Tensor, is_target_BT: Tensor) -> Tensor:
    """Cross-entropy at the positions to be predicted.

    Args:
        logits_BTV: [B, T, V].
        target_ids_BT: the ids before corruption, [B, T].
        is_target_BT: True where a token is to be predicted, bool [B, T].

    Returns:
        [B, 2]: sum in nats and count of each pair. Gather the rows, then `reduce_counted`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits_BTV.shape[:2] != target_ids_BT.shape or is_target_BT.shape != target_ids_BT.shape:
        raise ValueError(
            f"logits {list(logits_BTV.shape)}, ids {list(target_ids_BT.shape)} and targets "
            f"{list(is_target_BT.shape)} must agree in pairs and tokens"
        )
    logits = at_least_float32(logits_BTV)
    losses_BT = F.cross_entropy(logits.transpose(1, 2), target_ids_BT, reduction="none")
    # where, not a product: a score that is not finite at a position nobody asks for must not spread
    losses_BT = torch.where(is_target_BT, losses_BT, 0.0)
    return torch.stack([losses_BT.sum(1), is_target_BT.sum(1).to(losses_BT.dtype)], dim=1)


def reverse_real(token_ids_BT: Tensor, is_real_BT: Tensor) -> Tensor:
    """The real tokens of each text in reverse order, padding still on the right, [B, T]."""
    positions_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    mirrored_BT = is_real_BT.sum(1, keepdim=True) - 1 - positions_T
    return token_ids_BT.gather(1, torch.where(mirrored_BT >= 0, mirrored_BT, positions_T))


class CaptionHead(nn.Module):
    """Two causal decoders over the image tokens: one writes the text forwards, one backwards.

    They share the projection of the image tokens, the token and position embeddings and the output
    weights, which are the token embeddings (VirTex).

    Source: RadTex, arXiv 2208.03218, after VirTex, arXiv 2006.06666 (1 layer, width 1024, 16 heads).
        Without dropout, so that a step depends on nothing but its rows.
    """

    def __init__(
        self,
        memory_width: int,
        width: int,
        vocab_size: int,
        *,
        num_layers: int = 1,
        num_heads: int = 4,
        max_tokens: int = 77,
    ) -> None:
        """Args:
            memory_width: of the image tokens.
            width: of the decoders.
            max_tokens: longest text, start and end included.

        Raises:
            ValueError: `num_heads` does not divide `width`, no layer, or fewer than 2 tokens.
        """
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width of the head, got {num_heads} and {width}")
        if num_layers < 1 or max_tokens < 2:
            raise ValueError(
                f"a caption head needs num_layers >= 1 and max_tokens >= 2, got {num_layers} and {max_tokens}"
            )
        super().__init__()
        self.memory = nn.Linear(memory_width, width)
        self.tokens = nn.Embedding(vocab_size, width)
        # the last token is predicted and never read
        self.positions = nn.Embedding(max_tokens - 1, width)
        self.norm = nn.LayerNorm(width)
        self.forwards = _decoder(width, num_layers=num_layers, num_heads=num_heads)
        self.backwards = _decoder(width, num_layers=num_layers, num_heads=num_heads)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        for embedding in (self.tokens, self.positions):
            # torch's unit variance would give the tied output layer scores of size sqrt(width)
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self, image_tokens_BPD: Tensor, token_ids_BT: Tensor, is_real_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of each next token, from the tokens before it and the image.

        Args:
            image_tokens_BPD: every token counts, [B, P, memory width].
            token_ids_BT: [start, ..., end] and padding on the right, int64 [B, T].
            is_real_BT: bool [B, T].

        Returns:
            Forwards [B, T - 1, V]: position t scores token t + 1. Backwards, the same for the reversed
            text, which begins with its end token. `caption_rows` leaves out what padding says.

        Raises:
            ValueError: fewer than 2 or more than `max_tokens` positions.
        """
        longest, num_tokens = self.positions.num_embeddings + 1, token_ids_BT.shape[1]
        if not 2 <= num_tokens <= longest:
            raise ValueError(f"a caption has 2 to {longest} tokens, got {num_tokens}")
        memory = self.memory(image_tokens_BPD)
        reversed_BT = reverse_real(token_ids_BT, is_real_BT)
        return (
            self._scores(self.forwards, token_ids_BT[:, :-1], memory),
            self._scores(self.backwards, reversed_BT[:, :-1], memory),
        )

    def _scores(self, decoder: nn.ModuleList, token_ids_BT: Tensor, memory_BPW: Tensor) -> Tensor:
        length = token_ids_BT.shape[1]
        states = self.norm(self.tokens(token_ids_BT) + self.positions.weight[:length])
        # padding stands on the right, so the causal mask alone keeps it from every real token
        is_later_TT = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        for layer in decoder:
            states = layer(states, memory_BPW, tgt_mask=is_later_TT, tgt_is_causal=True)
        return F.linear(states, self.tokens.weight, self.output_bias)


def _decoder(width: int, *, num_layers: int, num_heads: int) -> nn.ModuleList:
    """Layers with weights of their own; `nn.TransformerDecoder` would start all from one copy."""
    return nn.ModuleList(
        nn.TransformerDecoderLayer(
            width, num_heads, dim_feedforward=4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        for _ in range(num_layers)
    )


def caption_rows(logits: tuple[Tensor, Tensor], token_ids_BT: Tensor, is_real_BT: Tensor) -> Tensor:
    """Cross-entropy of every token after the first, in both directions.

    Args:
        logits: forwards and backwards [B, T - 1, V], as `CaptionHead` gives them.
        token_ids_BT: [B, T]; is_real_BT: bool [B, T].

    Returns:
        [B, 4]: sum in nats and count of tokens forwards, then the same backwards. Gather the rows;
        `reduce_counted(rows).sum()` is the loss, each direction averaged per token that is not padding.

    Raises:
        ValueError: shapes that do not fit.

    Source: RadTex, arXiv 2208.03218.
    """
    is_counted_BT = is_real_BT[:, 1:]
    directions = (token_ids_BT, reverse_real(token_ids_BT, is_real_BT))
    rows = [
        masked_token_rows(scores, ids_BT[:, 1:], is_counted_BT)
        for scores, ids_BT in zip(logits, directions, strict=True)
    ]
    return torch.cat(rows, dim=1)
