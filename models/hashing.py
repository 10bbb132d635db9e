"""Binary codes for retrieval: a head for both modalities, its loss, and rankings by Hamming distance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.outputs import at_least_float32

# N pairs of all workers, L bits, Q queries, C candidates, R ranks


class HashWeights(Protocol):
    """What `hash_loss` reads of its settings; see `HashSettings`."""

    @property
    def temperature(self) -> float: ...

    @property
    def balance(self) -> float: ...

    @property
    def certainty(self) -> float: ...

    @property
    def gap(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class HashSettings:
    """Weights of the hash loss.

    Attributes:
        temperature: divides the codes' agreement, which runs from -1 to 1, > 0.
        balance: of each bit's entropy over the batch, maximised: a bit that is always on says nothing.
        certainty: of each pair's own entropy, minimised: a bit near its threshold is lost in rounding.
        gap: of the divergence between the two modalities' bits; small, since closing the gap entirely
            loses information (the paper's finding).
    """

    temperature: float = 0.2
    balance: float = 0.1
    certainty: float = 0.1
    gap: float = 0.01

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if min(self.balance, self.certainty, self.gap) < 0:
            raise ValueError(
                f"weights must be >= 0, got balance={self.balance}, certainty={self.certainty} "
                f"and gap={self.gap}"
            )


class HashHead(nn.Module):
    """One linear map per modality; the sign of its output is the code.

    Source: CMIMH, arXiv 2112.06489, in the spirit: its decoders are not reproduced.
    """

    def __init__(self, width: int, num_bits: int) -> None:
        """Args:
            width: of the joint embeddings.
            num_bits: length of a code; the papers compare 16 to 128.

        Raises:
            ValueError: width or number of bits < 1.
        """
        if min(width, num_bits) < 1:
            raise ValueError(f"a hash head needs width and num_bits >= 1, got {width} and {num_bits}")
        super().__init__()
        self.image = nn.Linear(width, num_bits, bias=False)
        self.text = nn.Linear(width, num_bits, bias=False)

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations h of both, [..., D] -> [..., L] each; sigmoid(h) is a bit's probability."""
        return self.image(image_embeds), self.text(text_embeds)


def binary_codes(h: Tensor) -> Tensor:
    """Codes of pre-activations, bool like `h`; 0 counts as on."""
    return h >= 0


def straight_through_signs(h: Tensor) -> Tensor:
    """Codes as -1 and 1 whose gradient is that of tanh(h)."""
    soft = h.tanh()
    signs = torch.where(h >= 0, 1.0, -1.0).to(h.dtype)
    return soft + (signs - soft).detach()


def hash_loss(
    all_image_NL: Tensor, all_text_NL: Tensor, settings: HashWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast of the codes, and what keeps their bits informative, certain and alike.

    contrast - balance * H(mean bit) + certainty * H(bit) + gap * KL(image bit || text bit): entropies
    and divergence are summed over bits, averaged over pairs where they are per pair, and the entropies
    over both modalities. The contrast is the mean of both directions' InfoNCE of <code, code> / L over
    the temperature, through straight-through signs.

    Args:
        all_image_NL: pre-activations of the global batch, [N, L]; gather them with gradient, since the
            entropy of the mean bit is no mean over workers.
        all_text_NL: row i belongs to the same pair.

    Returns:
        Scalar in nats and its weighted terms, detached: `contrast`, `balance` (<= 0), `certainty`, `gap`.

    Raises:
        ValueError: shapes that differ, or N < 2.

    Source: CMIMH, arXiv 2112.06489, in the spirit (the paper's variational terms have decoders).
    """
    if all_image_NL.shape != all_text_NL.shape or all_image_NL.ndim != 2:
        raise ValueError(
            f"image and text bits must be [N, L] alike, got {list(all_image_NL.shape)} "
            f"and {list(all_text_NL.shape)}"
        )
    if len(all_image_NL) < 2:
        raise ValueError(f"hash codes are contrasted over N >= 2 pairs, got {len(all_image_NL)}")
    image, text = at_least_float32(all_image_NL), at_least_float32(all_text_NL)
    both_2NL = torch.stack([image, text])
    terms = {
        "contrast": _contrast(image, text, temperature=settings.temperature),
        "balance": -settings.balance * _entropy_of_mean(both_2NL).sum(1).mean(),
        "certainty": settings.certainty * _entropy(both_2NL).sum(2).mean(),
        "gap": settings.gap * _divergence(image, text).sum(1).mean(),
    }
    total = torch.stack(list(terms.values())).sum()
    return total, {name: term.detach() for name, term in terms.items()}


def _contrast(image_NL: Tensor, text_NL: Tensor, *, temperature: float) -> Tensor:
    agreement_NN = straight_through_signs(image_NL) @ straight_through_signs(text_NL).T / image_NL.shape[1]
    logits = agreement_NN / temperature
    own_N = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, own_N) + F.cross_entropy(logits.T, own_N))


# From logits, never from probabilities: a saturated bit has p = 1 exactly, whose entropy has no gradient.


def _entropy(h: Tensor) -> Tensor:
    """Entropy of Bernoulli(sigmoid(h)) in nats."""
    return h.sigmoid() * F.softplus(-h) + (-h).sigmoid() * F.softplus(h)


def _entropy_of_mean(h_2NL: Tensor) -> Tensor:
    """Entropy of the mean over pairs of each bit's probability, [2, L] in nats."""
    log_count = math.log(h_2NL.shape[1])
    log_on = F.logsigmoid(h_2NL).logsumexp(1) - log_count
    log_off = F.logsigmoid(-h_2NL).logsumexp(1) - log_count
    return -(log_on.exp() * log_on + log_off.exp() * log_off)


def _divergence(h: Tensor, other: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(h)) || Bernoulli(sigmoid(other))) in nats."""
    if_on = F.logsigmoid(h) - F.logsigmoid(other)
    if_off = F.logsigmoid(-h) - F.logsigmoid(-other)
    return h.sigmoid() * if_on + (-h).sigmoid() * if_off


def hamming_distances(codes_QL: Tensor, codes_CL: Tensor) -> Tensor:
    """Number of differing bits of every query with every candidate, int64 [Q, C].

    Args:
        codes_QL: bool [Q, L] (`binary_codes`).
        codes_CL: bool [C, L].

    Raises:
        ValueError: codes that are not bool, or of different lengths.
    """
    if codes_QL.dtype != torch.bool or codes_CL.dtype != torch.bool:
        raise ValueError(f"codes must be bool, got {codes_QL.dtype} and {codes_CL.dtype}")
    if codes_QL.shape[1] != codes_CL.shape[1]:
        raise ValueError(
            f"codes must have equally many bits, got {codes_QL.shape[1]} and {codes_CL.shape[1]}"
        )
    # float32 counts exactly to 2^24 bits and, unlike integers, multiplies fast
    signs_QL, signs_CL = codes_QL.float() * 2 - 1, codes_CL.float() * 2 - 1
    agreement = signs_QL @ signs_CL.T
    return ((codes_QL.shape[1] - agreement) / 2).round().long()


def hamming_average_precision(distances_QC: Tensor, is_relevant_QC: Tensor, *, at: int) -> Tensor:
    """Average precision of the first `at` candidates of each query, [Q] in [0, 1].

    Args:
        distances_QC: smaller is better; equal distances rank in the candidates' order.
        is_relevant_QC: bool [Q, C].
        at: R of mAP@R, >= 1; at most C count.

    Returns:
        (sum over ranks r <= R of precision@r where rank r is relevant) / min(R, number of relevant
        candidates), so that missing a relevant candidate costs. Not a number for a query without any.

    Raises:
        ValueError: shapes that differ, or at < 1.
    """
    hits_QR = _hits(distances_QC, is_relevant_QC, at=min(at, distances_QC.shape[1]))
    ranks_R = torch.arange(1, hits_QR.shape[1] + 1, device=hits_QR.device)
    precision_QR = hits_QR.cumsum(1) / ranks_R
    num_relevant_Q = is_relevant_QC.sum(1).clamp(max=at)
    return (precision_QR * hits_QR).sum(1) / num_relevant_Q


def hamming_map(distances_QC: Tensor, is_relevant_QC: Tensor, *, at: int) -> float:
    """mAP@R: mean of `hamming_average_precision` over the queries that have a relevant candidate.

    Raises:
        ValueError: as there, or no query has a relevant candidate.
    """
    precision_Q = hamming_average_precision(distances_QC, is_relevant_QC, at=at)
    is_defined_Q = ~precision_Q.isnan()
    if not bool(is_defined_Q.any()):
        raise ValueError(f"mAP needs a query with a relevant candidate, none of {len(precision_Q)} has one")
    return float(precision_Q[is_defined_Q].mean())


def hamming_precision(distances_QC: Tensor, is_relevant_QC: Tensor, *, at: int) -> Tensor:
    """Share of relevant candidates among the first `at` of each query, [Q]; ties in candidates' order.

    Raises:
        ValueError: shapes that differ, at < 1, or fewer than `at` candidates.
    """
    if at > distances_QC.shape[1]:
        raise ValueError(f"precision@{at} needs {at} candidates, got {distances_QC.shape[1]}")
    return _hits(distances_QC, is_relevant_QC, at=at).mean(1)


def _hits(distances_QC: Tensor, is_relevant_QC: Tensor, *, at: int) -> Tensor:
    """1 where the candidate of that rank is relevant, float64 [Q, at]."""
    if distances_QC.shape != is_relevant_QC.shape or is_relevant_QC.dtype != torch.bool:
        raise ValueError(
            f"relevance must be bool {list(distances_QC.shape)} like the distances, "
            f"got {is_relevant_QC.dtype} {list(is_relevant_QC.shape)}"
        )
    if at < 1:
        raise ValueError(f"at must be >= 1, got {at}")
    order_QR = distances_QC.argsort(dim=1, stable=True)[:, :at]
    return is_relevant_QC.gather(1, order_QR).double()
