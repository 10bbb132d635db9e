"""Few-shot prompts on a frozen pair of towers: learned context, conditioned on the image, kept honest by
counterfactual images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.zero_shot import unit

# B images of a step, S shots (labelled images), C classes, M context tokens, T tokens, W token width,
# D joint width


class PromptEncoder(Protocol):
    """The frozen text tower as a function of token embeddings."""

    def __call__(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """[K, T, W] and their numbers of real tokens [K], start and end included -> [K, D], any length."""
        ...


@dataclass(frozen=True)
class ClassNames:
    """Token embeddings of the class names, before positions are added.

    Attributes:
        start, end: of the tower's start and end token, [W].
        tokens: of the names, padded on the right, [C, T, W].
        lengths: number of tokens of each name, int64 [C].
    """

    start: Tensor
    end: Tensor
    tokens: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        num_classes, longest, width = self.tokens.shape
        if num_classes < 2:
            raise ValueError(f"prompts are learned for at least 2 classes, got {num_classes}")
        if self.start.shape != (width,) or self.end.shape != (width,):
            raise ValueError(
                f"start and end must be [{width}] like the names' tokens, got {list(self.start.shape)} "
                f"and {list(self.end.shape)}"
            )
        lengths = self.lengths.tolist()
        if len(lengths) != num_classes or min(lengths) < 1 or max(lengths) > longest:
            raise ValueError(f"{num_classes} names need lengths from 1 to {longest}, got {lengths}")

    @classmethod
    def from_ids(
        cls, embedding: nn.Embedding, name_ids: Sequence[Sequence[int]], *, start_id: int, end_id: int
    ) -> ClassNames:
        """Names as token ids without start and end, looked up in the tower's table."""
        table = embedding.weight.detach()
        rows = [table[list(ids)] for ids in name_ids]
        lengths = torch.tensor([len(ids) for ids in name_ids], device=table.device)
        return cls(table[start_id], table[end_id], nn.utils.rnn.pad_sequence(rows, True), lengths)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """How prompts are fitted.

    Attributes:
        scale: of the cosines in the class scores, the pair's 1 / temperature.
        counterfactual: weight of the counterfactual term.
        intervention_norm: weight of the intervention's length; .07 is released.
        num_steps, batch_size, learning_rate: of SGD with momentum .9 and a cosine to 0; .002 is CoCoOp's.
        intervention_rate: learning rate of the interventions. Ours: their gradients are those of unscaled
            cosines, and at the prompts' rate they would stay where they start.
        seed: of the weights and of every draw.
    """

    scale: float = 100.0
    counterfactual: float = 1.0
    intervention_norm: float = 0.07
    num_steps: int = 200
    batch_size: int = 16
    learning_rate: float = 0.002
    intervention_rate: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("scale", "num_steps", "batch_size", "learning_rate", "intervention_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("counterfactual", "intervention_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


def counterfactual_features(images_BD: Tensor, negatives_BD: Tensor, interventions_BD: Tensor) -> Tensor:
    """unit((1 - u) v + u v_neg), [B, D]: the image with some features taken from another class's image.

    Args:
        images_BD: unit features v.
        negatives_BD: unit features of an image of the class that is hardest to tell from the own one.
        interventions_BD: u in [0, 1].
    """
    return F.normalize((1 - interventions_BD) * images_BD + interventions_BD * negatives_BD, dim=1)


def prompt_loss(
    images_BD: Tensor,
    texts_BCD: Tensor,
    labels_B: Tensor,
    *,
    negatives_BD: Tensor,
    interventions_BD: Tensor,
    settings: PromptSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the classes, plus: the own class prefers the image to its counterfactual.

    Args:
        images_BD: unit features.
        texts_BCD: unit class embeddings conditioned on each image.
        labels_B: class of each image, int64 [B].
        negatives_BD, interventions_BD: see `counterfactual_features`.

    Returns:
        Scalar in nats and its weighted terms, detached: `classes`, `counterfactual` (log 2 where u is 0)
        and `intervention`, the mean length of u.

    Source: CPL, arXiv 2210.10362. The counterfactual term has cosines without scale, as there; it is
        averaged over images. The release mixes u with a solver's solution at .001; we do not.
    """
    classes = F.cross_entropy(settings.scale * torch.einsum("bd,bcd->bc", images_BD, texts_BCD), labels_B)
    own_BD = texts_BCD[torch.arange(len(labels_B), device=labels_B.device), labels_B]
    altered_BD = counterfactual_features(images_BD, negatives_BD, interventions_BD)
    # -log softmax of two scores at the first
    prefers = F.softplus((own_BD * altered_BD).sum(1) - (own_BD * images_BD).sum(1)).mean()
    length = torch.linalg.vector_norm(interventions_BD, dim=1).mean()
    terms = {
        "classes": classes,
        "counterfactual": settings.counterfactual * prefers,
        "intervention": settings.intervention_norm * length,
    }
    return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}


def hardest_other_class(class_embeds_CD: Tensor) -> Tensor:
    """For each class the other one whose embedding is nearest by cosine, int64 [C].

    Source: CPL, arXiv 2210.10362, which compares the names by BERTScore; ours needs no further model.
    """
    embeds = F.normalize(class_embeds_CD, dim=1)
    return (embeds @ embeds.T).fill_diagonal_(-torch.inf).argmax(1)


class PromptLearner(nn.Module):
    """[start, context + bias(image), name, end] for every class; and each class's intervention u.

    Untrained it is the hand-written prompt: the bias starts at 0 (ours; torch's default in the paper's
    base, CoCoOp, arXiv 2203.05557). u = sigmoid of a weight keeps it in [0, 1].
    """

    start: Tensor
    tails: Tensor
    lengths: Tensor

    def __init__(
        self,
        names: ClassNames,
        context_MW: Tensor,
        *,
        joint_width: int,
        seed: int,
    ) -> None:
        """Args:
            context_MW: embeddings of the tokens before the name at the start, "a photo of a" in the paper.
            joint_width: D of the image features.
            seed: of the bias network's weights.

        Raises:
            ValueError: the context is not [M, W] with at least one token.
        """
        num_classes, _, width = names.tokens.shape
        if context_MW.ndim != 2 or len(context_MW) < 1 or context_MW.shape[1] != width:
            raise ValueError(f"context must be [M >= 1, {width}], got {list(context_MW.shape)}")
        super().__init__()
        self.register_buffer("start", names.start.detach().clone())
        self.register_buffer("tails", _names_with_end(names))
        self.register_buffer("lengths", names.lengths + len(context_MW) + 2)
        self.context = nn.Parameter(context_MW.detach().clone())
        # with narrow joint spaces D / 16 leaves a unit or two, soon dead
        hidden = max(8, joint_width // 16)
        squeeze, excite = (
            # "meta" draws nothing from torch's global generator: fitting must not move a caller's draws
            nn.Linear(*sides, device="meta", dtype=context_MW.dtype).to_empty(device=context_MW.device)
            for sides in ((joint_width, hidden), (hidden, width))
        )
        self.bias = nn.Sequential(squeeze, nn.ReLU(), excite)
        drawn = torch.randn(hidden, joint_width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            # unit image features then give hidden units of about unit variance
            squeeze.weight.copy_(drawn)
            for zero in (squeeze.bias, excite.weight, excite.bias):
                zero.zero_()
        self.intervention = nn.Parameter(context_MW.new_zeros(num_classes, joint_width))

    def interventions(self, labels_B: Tensor) -> Tensor:
        """u of each label, [B, D] in [0, 1]."""
        return self.intervention[labels_B].sigmoid()

    def forward(self, images_BD: Tensor, encode_prompts: PromptEncoder) -> Tensor:
        """Unit class embeddings conditioned on each unit image, [B, C, D]; B * C texts are encoded.

        The tower comes with the call: kept here, it would be a part of this module's weights.
        """
        num_images, num_classes = len(images_BD), len(self.tails)
        context_BMW = self.context + self.bias(images_BD)[:, None]
        parts = (
            self.start.expand(num_images, num_classes, 1, -1),
            context_BMW[:, None].expand(-1, num_classes, -1, -1),
            self.tails.expand(num_images, -1, -1, -1),
        )
        prompts = torch.cat(parts, dim=2).flatten(0, 1)
        embeds = encode_prompts(prompts, self.lengths.repeat(num_images))
        return F.normalize(embeds, dim=1).view(num_images, num_classes, -1)


def _names_with_end(names: ClassNames) -> Tensor:
    """Each name, the end token right after it, zeros to the right, [C, T + 1, W]."""
    tails = F.pad(names.tokens.detach(), (0, 0, 0, 1))
    positions_T = torch.arange(tails.shape[1], device=tails.device)
    is_end_CT = positions_T == names.lengths[:, None]
    is_name_CT = positions_T < names.lengths[:, None]
    return torch.where(is_end_CT[:, :, None], names.end, tails * is_name_CT[:, :, None])


@dataclass(frozen=True)
class FittedPrompts:
    """Prompts after training.

    Attributes:
        learner: the weights.
        encode_prompts: the tower they were fitted on.
        losses: total loss of every step.
    """

    learner: PromptLearner
    encode_prompts: PromptEncoder
    losses: tuple[float, ...]

    @torch.no_grad()
    def class_embeddings(self, image_features: Tensor, *, chunk: int = 64) -> Tensor:
        """Unit class embeddings for each image, [n, C, D].

        Args:
            image_features: [n, D], any length.
            chunk: images at a time; each costs C texts.
        """
        return torch.cat(
            [self.learner(part, self.encode_prompts) for part in torch.split(unit(image_features), chunk)]
        )

    def scores(self, image_features: Tensor) -> Tensor:
        """Cosine of each image with its class embeddings, [n, C]; the largest is the predicted class."""
        return torch.einsum("nd,ncd->nc", unit(image_features), self.class_embeddings(image_features))


def fit_prompts(
    image_features_SD: Tensor,
    labels_S: Tensor,
    names: ClassNames,
    *,
    context_MW: Tensor,
    encode_prompts: PromptEncoder,
    settings: PromptSettings,
) -> FittedPrompts:
    """Learn prompts from a few labelled images; the towers stay as they are and get no gradient.

    Args:
        image_features_SD: frozen image features of the shots, [S, D], any length.
        labels_S: their classes, int64 [S]; every class needs a shot.
        names: token embeddings of the C class names.
        context_MW: embeddings of the first context, [M, W].
        encode_prompts: the frozen text tower.
        settings: of the loss and of the training.

    Returns:
        the fitted prompts; the same for the same arguments, whatever was drawn before.

    Raises:
        ValueError: shapes that do not fit, or a class without a shot.

    Source: CPL, arXiv 2210.10362.
    """
    if labels_S.shape != image_features_SD.shape[:1]:
        raise ValueError(
            f"each image needs one label, got {list(image_features_SD.shape)} and {list(labels_S.shape)}"
        )
    images = unit(image_features_SD)
    draws = _ShotDraws(labels_S, len(names.lengths), seed=settings.seed)
    learner = PromptLearner(names, context_MW, joint_width=images.shape[1], seed=settings.seed)
    with torch.no_grad():
        # untrained, the class embeddings are the same for every image
        hardest_C = hardest_other_class(learner(images[:1], encode_prompts)[0])
    weights = list(learner.parameters())
    optimizer = _optimizer(learner, settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.num_steps)
    losses = []
    for _ in range(settings.num_steps):
        rows_B = draws.batch(settings.batch_size)
        labels_B = labels_S[rows_B]
        loss, _ = prompt_loss(
            images[rows_B],
            learner(images[rows_B], encode_prompts),
            labels_B,
            negatives_BD=images[draws.one_of(hardest_C[labels_B])],
            interventions_BD=learner.interventions(labels_B),
            settings=settings,
        )
        # not backward(): it would fill the gradients of the tower's weights
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return FittedPrompts(learner.requires_grad_(False), encode_prompts, tuple(torch.stack(losses).tolist()))


def _optimizer(learner: PromptLearner, settings: PromptSettings) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [learner.context, *learner.bias.parameters()]},
        {"params": [learner.intervention], "lr": settings.intervention_rate},
    ]
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9)


class _ShotDraws:
    """Which shots a step sees, from a generator of its own."""

    def __init__(self, labels_S: Tensor, num_classes: int, *, seed: int) -> None:
        self.counts_C = labels_S.bincount(minlength=num_classes)
        if len(self.counts_C) != num_classes or bool((self.counts_C == 0).any()):
            raise ValueError(
                f"each of {num_classes} classes needs a shot, got counts {self.counts_C.tolist()}"
            )
        self.by_class_S = labels_S.argsort(stable=True)
        self.first_C = self.counts_C.cumsum(0) - self.counts_C
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Tensor:
        """Different rows, at most `size`."""
        drawn = torch.randperm(len(self.by_class_S), generator=self.generator)[:size]
        return drawn.to(self.by_class_S.device)

    def one_of(self, classes_B: Tensor) -> Tensor:
        """A row of each class."""
        drawn = torch.rand(len(classes_B), generator=self.generator, dtype=torch.float64)
        offset_B = (drawn.to(classes_B.device) * self.counts_C[classes_B]).long()
        return self.by_class_S[self.first_C[classes_B] + offset_B]
