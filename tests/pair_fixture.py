"""Small towers, hand-made batches and given features for tests of the pair model and the training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features import PairFeatures
from models.gather import Gather, SingleProcess
from models.memory import FeatureQueue
from models.objective import LossReport, Objective
from models.outputs import NUM_TAGS, PairBatch, PairOutputs, TeacherOutputs
from models.pair_model import PairModel
from models.pair_table import PairTable
from models.prototypes import Prototypes, cluster_pairs
from models.recipe import MethodRecipe, TableRecipe
from models.table_state import TableState
from models.tables import Scale, directions
from models.teacher import EmaTeacher, select_tokens
from models.towers import TowerSettings, build_clip
from models.widths import Widths
from pipelines.train_step import TextSpec

SIDE, GRID = 32, 4
TOWERS = TowerSettings(
    image_size=SIDE,
    patch_size=SIDE // GRID,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    embed_dim=16,
    max_tokens=16,
)
TEXT = TextSpec(vocab_size=64, pad_id=0, start_id=1, end_id=2)
# Rows of the training split: several for each prototype of the catalogue's largest clustering.
NUM_ROWS = 200
NUM_QUEUED = 24
SINGLE = SingleProcess()
# Longest first: halves and quarters of a batch are padded to different lengths.
LENGTHS = (11, 9, 8, 8, 7, 5, 4, 3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(draw(*shape, seed=seed), dim=-1)


def colour_fields(num_images: int, g: torch.Generator) -> Tensor:
    """One random colour per patch, uint8 [B, S, S, 3]; pixel noise would make all embeddings alike."""
    colours = torch.randint(0, 256, (num_images, GRID, GRID, 3), dtype=torch.uint8, generator=g)
    return colours.repeat_interleave(SIDE // GRID, 1).repeat_interleave(SIDE // GRID, 2)


def make_batch(
    lengths: Sequence[int] = LENGTHS, *, num_views: int = 1, num_texts: int = 1, seed: int = 0
) -> PairBatch:
    """Colour fields and random texts of the given lengths; views are crops, the teacher sees everything.

    Groups are (0, 1), (2, 3) ... shifted by one: (7, 0), (1, 2) ..., so that they straddle halves. Text 0
    is the same for any number of texts; pair i has i % num_texts more.
    """
    g, num_pairs = generator(seed), len(lengths)
    token_ids, is_real = _random_texts(lengths, g)
    # float32 is the contract, whatever the default type
    size = SIDE * (0.6 + 0.4 * torch.rand(num_views, num_pairs, 2, generator=g, dtype=torch.float32))
    corner = (SIDE - size) * torch.rand(num_views, num_pairs, 2, generator=g, dtype=torch.float32)
    index = torch.arange(num_pairs)
    batch = PairBatch(
        images=colour_fields(num_pairs, g),
        view_boxes=torch.cat([corner, size], 2),
        teacher_boxes=torch.tensor([0, 0, SIDE, SIDE], dtype=torch.float32).repeat(num_pairs, 1),
        token_ids=token_ids[None],
        is_real_token=is_real[None],
        is_text=torch.ones(1, num_pairs, dtype=torch.bool),
        selection_noise=torch.rand(num_views, num_pairs, GRID * GRID, generator=g, dtype=torch.float32),
        row_keys=index,
        group_keys=(index + 1) // 2 % (num_pairs // 2 or 1),
        text_keys=index % max(num_pairs - 1, 1),
        draw_keys=torch.randint(1 << 62, (num_pairs,), generator=g),
        row_index=index,
        # Few labels, so that pairs share some.
        tags=(torch.rand(num_pairs, NUM_TAGS, generator=g, dtype=torch.float32) < 4 / NUM_TAGS).float(),
    )
    return batch if num_texts == 1 else _with_more_texts(batch, num_texts, g)


def _random_texts(lengths: Sequence[int], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts of the given lengths, start and end token included, and what is real; both [B, T]."""
    token_ids = torch.randint(3, TEXT.vocab_size, (len(lengths), max(lengths)), generator=g)
    count = torch.tensor(lengths)
    is_real = torch.arange(max(lengths)) < count[:, None]
    token_ids[:, 0] = TEXT.start_id
    token_ids[torch.arange(len(lengths)), count - 1] = TEXT.end_id
    return token_ids.masked_fill(~is_real, TEXT.pad_id), is_real


def _with_more_texts(batch: PairBatch, num_texts: int, g: torch.Generator) -> PairBatch:
    """The batch with texts after text 0, each a word shorter; a missing one is start and end."""
    lengths = batch.is_real_token[0].sum(1).tolist()
    token_ids, is_real = [batch.token_ids[0]], [batch.is_real_token[0]]
    is_text = torch.arange(num_texts)[:, None] <= torch.arange(len(lengths))[None, :] % num_texts
    for text in range(1, num_texts):
        there = zip(lengths, is_text[text].tolist(), strict=True)
        ids, real = _random_texts([max(3, length - text) if exists else 2 for length, exists in there], g)
        missing = max(lengths) - ids.shape[1]
        token_ids.append(F.pad(ids, (0, missing), value=TEXT.pad_id))
        is_real.append(F.pad(real, (0, missing)))
    return replace(
        batch, token_ids=torch.stack(token_ids), is_real_token=torch.stack(is_real), is_text=is_text
    )


# Fields whose first axis counts views or texts; pairs are the second.
_SECOND_AXIS = {"view_boxes", "selection_noise", "token_ids", "is_real_token", "is_text"}


def rows_of(batch: PairBatch, rows: slice | Tensor) -> PairBatch:
    """Some pairs, the share of one worker for example, their texts padded to their own longest."""
    cut = {
        f.name: getattr(batch, f.name)[:, rows] if f.name in _SECOND_AXIS else getattr(batch, f.name)[rows]
        for f in fields(batch)
        if getattr(batch, f.name) is not None
    }
    longest = int(cut["is_real_token"].sum(2).max())
    cut["token_ids"] = cut["token_ids"][:, :, :longest]
    cut["is_real_token"] = cut["is_real_token"][:, :, :longest]
    return replace(batch, **cut)


def padded(batch: PairBatch, extra: int, filler: int) -> PairBatch:
    """The same texts with more padding, which holds the token `filler`."""
    ids, is_real = F.pad(batch.token_ids, (0, extra)), F.pad(batch.is_real_token, (0, extra))
    return replace(batch, token_ids=ids.masked_fill(~is_real, filler), is_real_token=is_real)


def build_model(recipe: MethodRecipe, *, num_rows: int = NUM_ROWS, seed: int = 0) -> PairModel:
    """A method on small towers, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = build_clip(
            TOWERS,
            vocab_size=TEXT.vocab_size,
            pad_id=TEXT.pad_id,
            start_id=TEXT.start_id,
            end_id=TEXT.end_id,
        )
        return PairModel(clip, recipe, num_rows=num_rows).double()


def build_objective(
    recipe: MethodRecipe, outputs: PairOutputs, *, num_rows: int = NUM_ROWS, seed: int = 0
) -> Objective:
    """A method's loss for given features, float64; its grid is square if the patches of the features are."""
    side = round(outputs.image_tokens.shape[2] ** 0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = Widths(
            joint=outputs.image_embeds.shape[2],
            vision=outputs.image_features.shape[2],
            text=TOWERS.text_width,
            grid=side,
            vocab_size=TEXT.vocab_size,
            max_tokens=TOWERS.max_tokens,
            num_rows=num_rows,
        )
        return Objective(recipe, widths).double()


def given_features(
    image: Tensor,
    text: Tensor,
    *,
    patches: Tensor | None = None,
    words: Tensor | None = None,
    is_word: Tensor | None = None,
    is_text: Tensor | None = None,
    report: Tensor | None = None,
) -> PairOutputs:
    """What towers would say.

    Args:
        image: unit, one view [B, D] or several [V, B, D].
        text: unit, one text [B, D] or several [M, B, D].
        patches: not normalised, [B, P, D] or [V, B, P, D]; the image feature alone unless given.
        words: of text 0, not normalised, [B, T, D]; its feature alone unless given.
        is_word: False at padding, [B, T].
        is_text: False where a pair has fewer texts, [M, B].
        report: unit feature of all texts of a pair, [B, D]; text 0 unless given.
    """
    views, texts = (embeds if embeds.ndim == 3 else embeds[None] for embeds in (image, text))
    tokens = views[:, :, None] if patches is None else patches
    tokens = tokens if tokens.ndim == 4 else tokens[None]
    words = texts[0][:, None] if words is None else words
    return PairOutputs(
        image_embeds=views,
        text_embeds=texts,
        report_embeds=texts[0] if report is None else report,
        is_text=torch.ones(texts.shape[:2], dtype=torch.bool) if is_text is None else is_text,
        image_tokens=tokens,
        text_tokens=words,
        is_real_token=torch.ones(words.shape[:2], dtype=torch.bool) if is_word is None else is_word,
        image_features=views,
        patch_features=tokens,
    )


def tables_of(
    recipe: TableRecipe,
    outputs: PairOutputs,
    batch: PairBatch | None = None,
    *,
    inverse_temperature: float | Tensor = 1.0,
    bias: float = 0.0,
    gather: Gather = SINGLE,
) -> dict[str, PairTable]:
    """The whole table of each direction, from view 0 of given features."""
    width = outputs.image_embeds.shape[2]
    num_patches = outputs.image_tokens.shape[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = TableState(recipe, width=width, num_patches=num_patches, num_rows=NUM_ROWS).double()
    batch = batch or make_batch([4] * outputs.image_embeds.shape[1])
    features = PairFeatures(outputs, batch, None, gather)
    scale = Scale(torch.as_tensor(inverse_temperature), torch.tensor(bias, dtype=torch.float64))
    found = directions(recipe, state, features, view=0, scale=scale, max_rows=None)
    return {name: only.rows(slice(0, only.num_queries)) for name, [only] in found.items()}


def report_of_features(
    recipe: MethodRecipe,
    outputs: PairOutputs,
    batch: PairBatch | None = None,
    *,
    teacher: TeacherOutputs | None = None,
) -> LossReport:
    """Loss and terms of a method from features alone, in one process."""
    batch = batch or make_batch([4] * outputs.image_embeds.shape[1])
    report: LossReport = build_objective(recipe, outputs)(outputs, batch, teacher, SINGLE)
    return report


def remember_something(objective: Objective, seed: int = 0) -> None:
    """Fill queues and set prototypes, as earlier batches and epochs would have."""
    for name, table in objective.recipe.tables.items():
        memory = objective.state_of(name).memory
        if isinstance(memory, nn.ModuleDict):
            for number, queue in enumerate(memory.values()):
                assert isinstance(queue, FeatureQueue)
                queue.push_(unit(NUM_QUEUED, queue.rows.shape[1], seed=seed + number))
        elif isinstance(memory, Prototypes):
            assignment = memory.get_buffer("sets.0.assignment")
            width = memory.get_buffer("sets.0.image_centroids").shape[1]
            images, texts = (unit(len(assignment), width, seed=seed + number) for number in range(2))
            temperature = table.temperature.init
            memory.set_(
                [
                    cluster_pairs(images, texts, num_clusters=count, temperature=temperature, seed=seed)
                    for count in table.candidates.num_clusters
                ]
            )


def loss_of_features(recipe: MethodRecipe, outputs: PairOutputs, batch: PairBatch | None = None) -> Tensor:
    """Whole loss of a method from features alone, in one process."""
    return report_of_features(recipe, outputs, batch).loss


def forward(model: PairModel, batch: PairBatch) -> LossReport:
    """Loss of a batch in one process; a teacher, where the method needs one, starts as the model's copy."""
    recipe, teacher, kept = model.recipe, None, None
    if recipe.needs_teacher:
        teacher = EmaTeacher(model)(batch)
    if recipe.selection.kind != "none":
        scores = [None] * len(batch.view_boxes) if teacher is None else teacher.token_scores
        chosen = [
            select_tokens(recipe.selection, scores=view, noise=noise, grid=GRID)
            for view, noise in zip(scores, batch.selection_noise, strict=True)
        ]
        kept = torch.stack(chosen)
    report: LossReport = model(batch, kept, teacher, SINGLE)
    return report
