"""Which patch tokens the online tower keeps: by teacher score, at random, or a mixture.

All rules return token indices in ascending order, so positions and float sums do not depend on the rule,
and keep the same number for every sample. Noise is an argument: who draws it decides that results do not
depend on the number of workers. Ties go to the lower index.
"""

import torch
from torch import Tensor

from models.token_scores import grid_side

# B images, P patches on a square grid, K kept tokens, M blocks, J kept blocks


def _check_keep_ratio(keep_ratio: float) -> None:
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")


def num_kept_blocks(num_blocks: int, keep_ratio: float) -> int:
    """int(num_blocks * keep_ratio) + 1, at most num_blocks.

    Raises:
        ValueError: keep_ratio outside (0, 1].

    Source: A-CLIP, arXiv 2212.08653: 25 of 49 blocks at 0.5.
    """
    _check_keep_ratio(keep_ratio)
    return min(int(num_blocks * keep_ratio) + 1, num_blocks)


def num_kept_random(num_tokens: int, keep_ratio: float) -> int:
    """int(num_tokens * keep_ratio), at least 1.

    Raises:
        ValueError: keep_ratio outside (0, 1].

    Source: FLIP, arXiv 2212.00794: 98 of 196 at 0.5. The floor of 1 is ours.
    """
    _check_keep_ratio(keep_ratio)
    return max(int(num_tokens * keep_ratio), 1)


def block_scores(scores_BP: Tensor, *, block: int = 2) -> Tensor:
    """Mean score of each block of block x block patches.

    Args:
        scores_BP: [B, P], row-major square grid.
        block: side of a block in patches; 1 ranks single patches (small or odd grids).

    Returns:
        [B, M], M = (grid / block)^2, row-major; float32 for half-precision scores.

    Raises:
        ValueError: patches that form no square, or a grid that blocks do not divide.

    Source: A-CLIP, arXiv 2212.08653: bilinear 14x14 -> 7x7, which is exactly the 2x2 mean.
    """
    side = _side_in_blocks(scores_BP.shape[1], block)
    scores = scores_BP.float() if scores_BP.dtype in (torch.float16, torch.bfloat16) else scores_BP
    return scores.view(-1, side, block, side, block).mean(dim=(2, 4)).flatten(1)


def spread_block_scores(scores_BM: Tensor, *, num_patches: int) -> Tensor:
    """Scores of blocks, from a teacher that sees fewer patches, as scores of a finer grid's patches.

    Every patch gets the score of its block, so that ranking blocks of that size ranks the given scores:
    `block_scores` of the result is the input, and `keep_attentive` keeps the best of the M blocks.

    Args:
        scores_BM: [B, M], row-major square grid, one score per block.
        num_patches: of the online tower's full square grid, P.

    Returns:
        [B, P], row-major.

    Raises:
        ValueError: either count forms no square, or blocks do not divide the grid.

    Source: A-CLIP-eff, arXiv 2212.08653: the half-resolution teacher's 7x7 scores are those of the 7x7
        blocks. No code is released; that they are used as they are is our reading.
    """
    side, grid = grid_side(scores_BM.shape[1]), grid_side(num_patches)
    if grid % side:
        raise ValueError(f"a {side}x{side} score map does not divide the {grid}x{grid} patch grid")
    map_BGG = scores_BM.view(-1, side, side)
    return map_BGG.repeat_interleave(grid // side, 1).repeat_interleave(grid // side, 2).flatten(1)


def _side_in_blocks(num_patches: int, block: int) -> int:
    grid = grid_side(num_patches)
    if block < 1 or grid % block:
        raise ValueError(
            f"block={block} does not divide the {grid}x{grid} patch grid; use block=1 or a divisor"
        )
    return grid // block


def expand_blocks(blocks_BJ: Tensor, *, num_patches: int, block: int = 2) -> Tensor:
    """Token indices [B, J * block^2], ascending, of the blocks with indices [B, J].

    Raises:
        ValueError: patches that form no square, or a grid that blocks do not divide.
    """
    side = _side_in_blocks(num_patches, block)
    steps = torch.arange(block, device=blocks_BJ.device)
    offsets = (steps[:, None] * side * block + steps[None, :]).flatten()
    corners_BJ = (blocks_BJ // side) * side * block * block + (blocks_BJ % side) * block
    return (corners_BJ[:, :, None] + offsets).flatten(1).sort(dim=1).values


def is_kept(kept_BK: Tensor, num_patches: int) -> Tensor:
    """Boolean [B, P], True at the kept token indices [B, K]."""
    mask = torch.zeros(kept_BK.shape[0], num_patches, dtype=torch.bool, device=kept_BK.device)
    return mask.scatter(1, kept_BK, True)


def kept_iou(a_BK: Tensor, b_BK: Tensor, num_patches: int) -> Tensor:
    """Intersection over union of two choices of patches, [B]; two random halves have about 1/3."""
    a_BP, b_BP = is_kept(a_BK, num_patches), is_kept(b_BK, num_patches)
    return (a_BP & b_BP).sum(1) / (a_BP | b_BP).sum(1)


def _first(order_BM: Tensor, count: int) -> Tensor:
    return order_BM[:, :count].sort(dim=1).values


def keep_attentive(scores_BP: Tensor, *, keep_ratio: float, block: int = 2) -> Tensor:
    """Keep the highest-scoring blocks (the paper's "low" strategy: remove the lowest).

    Args:
        scores_BP: [B, P], row-major square grid.
        keep_ratio: share of blocks to keep, in (0, 1].
        block: side of a block in patches.

    Returns:
        kept token indices [B, K], ascending; K = num_kept_blocks * block^2.

    Raises:
        ValueError: keep_ratio outside (0, 1], or a grid that blocks do not divide.

    Source: A-CLIP, arXiv 2212.08653; its release sorts unstably, ours breaks ties by index.
    """
    blocks_BM = block_scores(scores_BP, block=block)
    count = num_kept_blocks(blocks_BM.shape[1], keep_ratio)
    order = blocks_BM.argsort(dim=1, descending=True, stable=True)
    return expand_blocks(_first(order, count), num_patches=scores_BP.shape[1], block=block)


def keep_least_attentive(scores_BP: Tensor, *, keep_ratio: float, block: int = 2) -> Tensor:
    """Keep the lowest-scoring blocks (the paper's "high" strategy), the control of `keep_attentive`.

    Arguments, result and errors as `keep_attentive`; the same number of tokens is kept.
    """
    return keep_attentive(-scores_BP, keep_ratio=keep_ratio, block=block)


def keep_mixed(
    scores_BP: Tensor, noise_BP: Tensor, *, keep_ratio: float, best_share: float, block: int = 2
) -> Tensor:
    """Keep round(best_share * J) best blocks and draw the others of the J kept blocks from the rest.

    Args:
        scores_BP: [B, P], row-major square grid.
        noise_BP: uniform noise [B, P]; a block uses that of its first token, smallest is drawn first.
        keep_ratio: share of blocks to keep, in (0, 1].
        best_share: in [0, 1]; 1 is `keep_attentive`, 0 is `keep_random_blocks`.
        block: side of a block in patches.

    Returns:
        kept token indices [B, K], ascending.

    Raises:
        ValueError: keep_ratio or best_share out of range, noise of another shape, or a bad grid.

    Source: own rule; A-CLIP names a mixed strategy, its release does not contain it.
    """
    if not 0.0 <= best_share <= 1.0:
        raise ValueError(f"best_share must be in [0, 1], got {best_share}")
    if noise_BP.shape != scores_BP.shape:
        raise ValueError(f"noise has shape {tuple(noise_BP.shape)}, scores {tuple(scores_BP.shape)}")
    blocks_BM = block_scores(scores_BP, block=block)
    count = num_kept_blocks(blocks_BM.shape[1], keep_ratio)
    best_BJ = blocks_BM.argsort(dim=1, descending=True, stable=True)[:, : round(best_share * count)]
    # -inf puts the best ahead of every noise value, so one ranking serves both parts
    noise_BM = _block_noise(noise_BP, block).scatter(1, best_BJ, -torch.inf)
    order = noise_BM.argsort(dim=1, stable=True)
    return expand_blocks(_first(order, count), num_patches=scores_BP.shape[1], block=block)


def _block_noise(noise_BP: Tensor, block: int) -> Tensor:
    side = _side_in_blocks(noise_BP.shape[1], block)
    return noise_BP.view(-1, side, block, side, block)[:, :, 0, :, 0].flatten(1)


def keep_random(noise_BP: Tensor, *, keep_ratio: float) -> Tensor:
    """Keep the tokens with the smallest noise.

    Args:
        noise_BP: uniform noise [B, P].
        keep_ratio: share of tokens to keep, in (0, 1]; the release's mask ratio is 1 - keep_ratio.

    Returns:
        kept token indices [B, K], ascending; K = num_kept_random.

    Raises:
        ValueError: keep_ratio outside (0, 1].

    Source: FLIP, arXiv 2212.00794, and A-CLIP's random masking. The release returns the same set in the
        order of the noise.
    """
    count = num_kept_random(noise_BP.shape[1], keep_ratio)
    return _first(noise_BP.argsort(dim=1, stable=True), count)


def keep_random_blocks(noise_BP: Tensor, *, keep_ratio: float, block: int = 2) -> Tensor:
    """Keep random blocks, as many as `keep_attentive`: the control that differs in the choice alone.

    Args:
        noise_BP: uniform noise [B, P]; a block uses that of its first token.
        keep_ratio: share of blocks to keep, in (0, 1].
        block: side of a block in patches.

    Returns:
        kept token indices [B, K], ascending.

    Raises:
        ValueError: keep_ratio outside (0, 1], or a grid that blocks do not divide.
    """
    noise_BM = _block_noise(noise_BP, block)
    count = num_kept_blocks(noise_BM.shape[1], keep_ratio)
    order = noise_BM.argsort(dim=1, stable=True)
    return expand_blocks(_first(order, count), num_patches=noise_BP.shape[1], block=block)
