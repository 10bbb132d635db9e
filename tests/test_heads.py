"""SimCLR and BYOL: released values and gradients, workers, head shapes, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.estimators import InfoNCE, symmetric
from models.gather import SingleProcess
from models.heads import (
    Predictor,
    Projector,
    SimCLRProjector,
    byol_loss,
    byol_rows,
    simclr_loss,
    simclr_rows,
)
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.aclip import loop_byol, loop_simclr


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return symmetric(InfoNCE(), scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)


class SlicedGather:
    """Stands for one worker of several in one process: hands out the whole batch, call by call."""

    def __init__(self, rank: int, world: int, *wholes: Tensor) -> None:
        self.rank, self.world, self.wholes = rank, world, list(wholes)

    def __call__(self, local: Tensor) -> Tensor:
        return self.wholes.pop(0)

    def rows(self, whole: Tensor) -> Tensor:
        size = len(whole) // self.world
        return whole[self.rank * size : (self.rank + 1) * size]


def sharded_simclr(rank: int, a: Tensor, b: Tensor) -> Tensor:
    """Local loss of one of two workers; gradients of other workers' rows flow through the gather."""
    gather = SlicedGather(rank, 2, F.normalize(a, dim=1), F.normalize(b, dim=1))
    return simclr_rows(gather.rows(a), gather.rows(b), gather=gather, temperature=0.1).mean()


@pytest.mark.parametrize("name", ["slip_simclr_0", "slip_simclr_1"])
def test_simclr_equals_the_slip_release(name):
    golden = tensors(name)
    a, b = leaf(golden["aug1"]), leaf(golden["aug2"])
    loss = simclr_loss(a, b, temperature=golden["tau"].item())
    assert_golden(loss, golden["loss"])
    loss.backward()
    assert_golden(a.grad, golden["g_aug1"])
    assert_golden(b.grad, golden["g_aug2"])
    assert abs(simclr_loss(a, b.flip(0), temperature=golden["tau"].item()) - golden["loss"]) > 0.1


def test_slip_total_equals_the_release():
    golden = tensors("slip_total_0")
    image, text, scale, a, b = (leaf(golden[k]) for k in ("image", "text", "logit_scale", "aug1", "aug2"))
    contrastive, ssl = clip_loss(image, text, scale), simclr_loss(a, b, temperature=0.1)
    assert_golden(contrastive, golden["clip_loss"])
    assert_golden(ssl, golden["ssl_loss"])
    assert_golden(contrastive + ssl, golden["loss"])
    (contrastive + ssl).backward()
    found = {"image": image, "text": text, "scale": scale, "aug1": a, "aug2": b}
    for key, value in found.items():
        assert_golden(value.grad, golden[f"g_{key}"])


def test_aclip_loss_equals_the_release():
    golden = tensors("aclip_loss_0")
    keys = ("image_embed", "text_embed", "image_ssl_embed", "byol_feats", "byol_feats_e", "logit_scale")
    inputs = {key: leaf(golden[key]) for key in keys}
    (view1, view2), text = inputs["image_embed"].chunk(2), inputs["text_embed"]
    first = clip_loss(view1, text, inputs["logit_scale"])
    second = clip_loss(view2, text, inputs["logit_scale"])
    ssl1 = inputs["image_ssl_embed"][:4]
    simclr = simclr_loss(ssl1, ssl1)  # as released: view 1 twice
    byol = byol_rows(inputs["byol_feats"], inputs["byol_feats_e"].repeat(2, 1)).mean()
    assert_golden(first, golden["contra1"])
    assert_golden(second, golden["contra2"])
    assert_golden(simclr, golden["simclr"])
    assert_golden(byol, golden["byol"])
    total = 0.5 * first + 0.5 * second + simclr + 2 * byol
    assert_golden(total, golden["loss"])
    total.backward()
    for key, value in inputs.items():
        assert_golden(value.grad, golden[f"g_{key}"])


def test_simclr_of_two_views_equals_the_derived_value():
    golden = tensors("aclip_loss_0")
    projections = leaf(golden["image_ssl_embed"])
    loss = simclr_loss(*projections.chunk(2))
    assert_golden(loss, golden["simclr_fixed"])
    loss.backward()
    assert_golden(projections.grad, golden["g_ssl_fixed"])
    assert abs(golden["simclr_fixed"] - golden["simclr"]) > 1


def test_two_workers_equal_the_aclip_release_on_two_ranks():
    """Stored gradients are sums over both ranks' losses, before the data-parallel average."""
    golden = tensors("aclip_slip_dist_w2")
    keys = ("v1", "v2", "t", "s1", "s2", "b1", "b2", "be")
    x = {key: leaf(golden[key]) for key in keys}
    scales = [leaf(golden["logit_scale"]) for _ in range(2)]
    for rank in range(2):
        rows = slice(3 * rank, 3 * rank + 3)
        clips = [sharded_clip(rank, x[v], x["t"], scales[rank]) for v in ("v1", "v2")]
        simclr = sharded_simclr(rank, x["s1"], x["s1"])
        byol = torch.cat([byol_rows(x[b][rows], x["be"][rows]) for b in ("b1", "b2")]).mean()
        total = 0.5 * clips[0] + 0.5 * clips[1] + simclr + 2 * byol
        for key, value in zip(
            ("c1", "c2", "simclr", "byol", "loss"), (*clips, simclr, byol, total), strict=True
        ):
            assert_golden(value, golden[f"aclip_{key}"][rank])
        total.backward()
        assert_golden(scales[rank].grad, golden["aclip_gscale"][rank])
    for key, value in x.items():
        assert_golden(value.grad, golden[f"aclip_g_{key}"])
        assert_golden(value.grad / 2 if value.grad is not None else None, golden[f"ref_aclip_g_{key}"])


def sharded_clip(rank: int, image: Tensor, text: Tensor, scale: Tensor, *, keys_carry: bool = True) -> Tensor:
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    gather = SlicedGather(rank, 2)
    own = torch.arange(len(gather.rows(image))) + rank * len(gather.rows(image))
    all_image, all_text = (image, text) if keys_carry else (image.detach(), text.detach())
    to_text, to_image = scale * gather.rows(image) @ all_text.T, scale * gather.rows(text) @ all_image.T
    return 0.5 * (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own))


def test_two_workers_equal_the_slip_release_on_two_ranks():
    """The release's CLIP term takes keys without gradient, its SimCLR term with: only the second is exact."""
    golden = tensors("aclip_slip_dist_w2")
    x = {key: leaf(golden[key]) for key in ("v1", "t", "s1", "s2")}
    for rank in range(2):
        scale = leaf(golden["logit_scale"])
        contrastive = sharded_clip(rank, x["v1"], x["t"], scale, keys_carry=False)
        ssl = sharded_simclr(rank, x["s1"], x["s2"])
        assert_golden(contrastive, golden["slip_clip"][rank])
        assert_golden(ssl, golden["slip_ssl"][rank])
        assert_golden(contrastive + ssl, golden["slip_loss"][rank])
        (contrastive + ssl).backward()
        assert_golden(scale.grad, golden["slip_gscale"][rank])
    for key, value in x.items():
        assert_golden(value.grad, golden[f"slip_g_{key}"])
    for key in ("s1", "s2"):
        assert_golden(x[key].grad / 2, golden[f"ref_slip_g_{key}"])
    assert (x["v1"].grad / 2 - golden["ref_slip_g_v1"]).abs().max() > 0.1


def test_one_process_equals_the_mean_over_two_workers():
    a, b = draw(6, 4), draw(6, 4, seed=1)
    local = [sharded_simclr(rank, a, b) for rank in range(2)]
    torch.testing.assert_close(torch.stack(local).mean(), simclr_loss(a, b))
    alone = torch.stack([simclr_loss(a[:3], b[:3]), simclr_loss(a[3:], b[3:])]).mean()
    assert abs(alone - simclr_loss(a, b)) > 0.1


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_simclr_equals_the_loop(temperature):
    a, b = draw(5, 4), draw(5, 4, seed=1)
    expected = loop_simclr(a, b, temperature=temperature)
    assert simclr_loss(a, b, temperature=temperature).item() == pytest.approx(expected, abs=1e-12)
    assert simclr_loss(a, b.flip(0), temperature=temperature).item() != pytest.approx(expected, abs=1e-2)


def test_simclr_of_equal_projections_counts_the_candidates():
    equal = torch.ones(5, 3, dtype=torch.float64)
    assert simclr_loss(equal, equal).item() == pytest.approx(math.log(9))


def test_simclr_has_two_symmetries():
    a, b = draw(5, 4), draw(5, 4, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = simclr_loss(a, b)
    torch.testing.assert_close(simclr_loss(a[order], b[order]), loss)
    torch.testing.assert_close(simclr_loss(b, a), loss)
    torch.testing.assert_close(simclr_loss(3 * a, 0.5 * b), loss)
    assert abs(simclr_loss(a[order], b) - loss) > 0.1


def test_simclr_passes_gradcheck():
    assert torch.autograd.gradcheck(simclr_loss, (leaf(draw(4, 3)), leaf(draw(4, 3, seed=1))))


def test_byol_equals_the_loop_and_stops_the_target_gradient():
    prediction, target = leaf(draw(5, 4)), leaf(draw(5, 4, seed=1))
    loss = byol_loss(prediction, target)
    assert loss.item() == pytest.approx(loop_byol(prediction.detach(), target.detach()), abs=1e-12)
    assert loss.item() != pytest.approx(loop_byol(prediction.detach(), -target.detach()), abs=1e-2)
    loss.backward()
    assert target.grad is None
    assert prediction.grad.abs().max() > 1e-3
    byol_rows(prediction, target).mean().backward()
    assert target.grad.abs().max() > 1e-3


def test_byol_runs_from_zero_to_four():
    x = draw(5, 4)
    torch.testing.assert_close(byol_loss(x, 2 * x), torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(byol_loss(x, -x), torch.tensor(4.0, dtype=torch.float64))


def test_head_shapes_are_the_published_ones():
    simclr, byol = SimCLRProjector(768, hidden=4096, out=256), Projector(768, hidden=4096, out=256)
    predictor = Predictor(256, hidden=4096)

    def shapes(head):
        return [tuple(p.shape) for p in head.parameters() if p.ndim == 2]

    assert shapes(simclr) == [(4096, 768), (4096, 4096), (256, 4096)]
    assert shapes(byol) == [(4096, 768), (256, 4096)]
    assert shapes(predictor) == [(4096, 256), (256, 4096)]
    assert simclr[0].bias is not None
    assert byol[0].bias is None
    assert predictor[-1].bias is None


@pytest.mark.parametrize(("norm", "is_per_row"), [("layer", True), ("batch", False)])
def test_only_the_layer_norm_head_treats_rows_on_their_own(norm, is_per_row):
    torch.manual_seed(0)
    head = Projector(4, hidden=8, out=3, norm=norm).double()
    x = draw(6, 4)
    halves = torch.cat([head(x[:3]), head(x[3:])])
    assert torch.allclose(head(x), halves) == is_per_row


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simclr_loss(X, X, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: simclr_loss(X, X[:1]), r"equal shapes, got \(2, 3\) and \(1, 3\)"),
        (lambda: simclr_loss(X[:1], X[:1]), "global batch of at least 2 pairs, got 1"),
        (
            lambda: simclr_rows(X[:1], X[:1], gather=SingleProcess(), temperature=0.1),
            "global batch of at least 2 pairs, got 1",
        ),
        (lambda: byol_loss(X, X[:1]), r"equal shapes, got \(2, 3\) and \(1, 3\)"),
        (lambda: Projector(0, hidden=1, out=1), "widths must be >= 1, got 0, 1 and 1"),
        (lambda: Projector(1, hidden=1, out=1, num_layers=1), "num_layers >= 2, got 1"),
        (lambda: Projector(1, hidden=1, out=1, norm="group"), "'layer' or 'batch', got 'group'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
