"""Projections before the unit sphere: shapes, initial copy, loops, and CLIP-Lite's released losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.divergences import one_negative_jsd
from models.projections import MIBlock, MLPProjection
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.critics import loop_mi_block

PARTS = {
    "feature_nonlinear_0": "first",
    "feature_nonlinear_1": "norm",
    "feature_nonlinear_3": "second",
    "feature_shortcut": "shortcut",
    "feature_block_ln": "out_norm",
}


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def released_block(golden: dict[str, Tensor], side: str) -> MIBlock:
    """An MI block with the stored weights of a critic's side, e.g. "global_d_img"."""
    prefix = f"w_{side}_block_"
    state = {
        f"{ours}.{key.removeprefix(f'{prefix}{released}_')}": value
        for released, ours in PARTS.items()
        for key, value in golden.items()
        if key.startswith(prefix + released)
    }
    units, width = state["first.weight"].shape
    block = MIBlock(width, units=units, norm="batch").double()
    block.load_state_dict(state)
    return block


class ReleasedCritic:
    """exp(temperature) * cosine of two blocks' outputs, the batch norms in training mode."""

    def __init__(self, golden: dict[str, Tensor], name: str) -> None:
        self.left, self.right = (released_block(golden, f"{name}_{side}") for side in ("img", "text"))
        self.scale = golden[f"w_{name}_temperature"].exp()

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        return self.scale * F.cosine_similarity(self.left(left), self.right(right), dim=1)

    def loss(self, left: Tensor, right: Tensor, negative: Tensor) -> Tensor:
        return one_negative_jsd(self(left, right), self(left, negative))


def next_row(rows: Tensor) -> Tensor:
    return rows.roll(-1, 0)


def test_one_rolled_negative_equals_the_cliplite_release():
    golden = tensors("cliplite_official_dot")
    critic = ReleasedCritic(golden, "global_d")
    image, text = leaf(golden["img"]), leaf(golden["txt"])
    assert_golden(critic(image, text), golden["pos_logit"])
    assert_golden(critic(image, next_row(text)), golden["neg_logit"])
    cross = critic.loss(image, text, next_row(text))
    assert_golden(cross, golden["cross"])
    total = 0.9 * cross  # beside 0.1 of the prior, which is off
    assert_golden(total, golden["total"])
    total.backward()
    assert_golden(image.grad, golden["grad_img"])
    assert_golden(text.grad, golden["grad_txt"])
    assert abs(critic.loss(image, text, text.roll(1, 0)) - golden["cross"]) > 0.1


def test_hard_negatives_equal_the_cliplite_release():
    """Twice the pairs; the batch norms see originals and negatives together."""
    golden = tensors("cliplite_official_dot")
    critic = ReleasedCritic(golden, "global_d")
    inputs = {key: leaf(golden[key]) for key in ("img", "txt", "nimg", "ntxt")}
    images = torch.cat([inputs["img"], inputs["nimg"]])
    texts = torch.cat([inputs["txt"], inputs["ntxt"]])
    others = torch.cat([inputs["ntxt"], next_row(inputs["txt"])])
    total = 0.9 * critic.loss(images, texts, others)
    assert_golden(total, golden["hard_total"])
    total.backward()
    for key, value in inputs.items():
        assert_golden(value.grad, golden[f"hard_grad_{key}"])
    assert abs(0.9 * critic.loss(images, texts, next_row(texts)) - golden["hard_total"]) > 0.01


def test_augmented_views_equal_the_cliplite_release():
    golden = tensors("cliplite_official_dot")
    image, text, other_image, other_text = (golden[key] for key in ("img", "txt", "aimg", "atxt"))
    visual = ReleasedCritic(golden, "visual_d").loss(image, other_image, next_row(other_image))
    textual = ReleasedCritic(golden, "textual_d").loss(text, other_text, next_row(other_text))
    cross = ReleasedCritic(golden, "global_d").loss(image, text, next_row(text))
    assert_golden(visual, golden["ssl_visual"])
    assert_golden(textual, golden["ssl_textual"])
    assert_golden(0.9 * (cross + visual + textual), golden["ssl_total"])
    swapped = ReleasedCritic(golden, "textual_d").loss(other_text, text, next_row(text))
    assert abs(swapped - golden["ssl_textual"]) > 0.1


def test_every_stored_key_is_used():
    golden = tensors("cliplite_official_dot")
    blocks = {f"{name}_{side}" for name in ("global_d", "visual_d", "textual_d") for side in ("img", "text")}
    used = sum(len(released_block(golden, side).state_dict()) for side in blocks)
    weights = [key for key in golden if key.startswith("w_")]
    assert len(weights) == used + 3  # and three temperatures


def random_block(norm="layer") -> MIBlock:
    block = MIBlock(3, units=5, norm=norm).double()
    with torch.no_grad():
        for k, parameter in enumerate(block.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=k))
    return block


def test_the_layer_norm_block_equals_the_loop():
    block, x = random_block(), draw(4, 3, seed=30)
    expected = torch.tensor(loop_mi_block(x, block.state_dict()), dtype=torch.float64)
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)
    assert (block(x.roll(1, 0)) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("norm", "is_per_row"), [("layer", True), ("batch", False)])
def test_only_the_layer_norm_block_treats_rows_on_their_own(norm, is_per_row):
    block, x = random_block(norm), draw(6, 3)
    assert torch.allclose(block(x), torch.cat([block(x[:3]), block(x[3:])])) == is_per_row


@pytest.mark.parametrize(
    "projection",
    [random_block(), random_block("batch"), MLPProjection(3, out=5).double()],
    ids=["layer", "batch", "mlp"],
)
def test_regions_are_projected_like_rows(projection):
    regions = draw(2, 4, 3)
    found = projection(regions)
    assert found.shape == (2, 4, projection.out_width)
    torch.testing.assert_close(found.flatten(0, 1), projection(regions.flatten(0, 1)))


def test_the_shortcut_starts_as_a_noisy_copy():
    weight = MIBlock(3, units=5).shortcut.weight.detach()
    assert torch.equal(weight.diagonal(), torch.ones(3))
    rest = weight[~torch.eye(5, 3, dtype=torch.bool)]
    assert rest.abs().min() > 0
    assert rest.abs().max() <= 0.01


def test_square_blocks_are_allowed():
    assert MIBlock(3, units=3)(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_the_mlp_projection_is_linear_relu_linear(norm):
    projection, x = MLPProjection(3, out=4, hidden=6, norm=norm).double(), draw(5, 3)
    first, second = projection.first, projection.second
    hidden = x @ first.weight.T + first.bias
    if norm == "layer":
        centred = hidden - hidden.mean(1, keepdim=True)
        hidden = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = hidden.clamp(min=0) @ second.weight.T + second.bias
    torch.testing.assert_close(projection(x), expected)
    assert (projection(x) - (hidden @ second.weight.T + second.bias)).abs().max() > 0.01


def test_the_mlp_hidden_width_is_its_output_width_unless_given():
    assert MLPProjection(3, out=4).first.out_features == 4
    assert MLPProjection(3, out=4, hidden=7).first.out_features == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MIBlock(0, units=2), "width of an MI block must be >= 1, got 0"),
        (lambda: MIBlock(3, units=2), "units >= width, got units=2 and width=3"),
        (lambda: MIBlock(3, units=3, norm="group"), "MI block must be 'layer' or 'batch', got 'group'"),
        (lambda: MLPProjection(3, out=0), "projection widths must be >= 1, got 3, 0 and 0"),
        (lambda: MLPProjection(3, out=2, norm="batch"), "projection must be 'none' or 'layer', got 'batch'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
