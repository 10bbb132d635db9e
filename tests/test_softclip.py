"""The whole SoftCLIP objective: stored values and gradients, what its settings do, refusals."""

import pytest
import torch

from models.softclip import SoftClipSettings, softclip_loss
from models.targets import cross_entropy_rows, soft_targets
from tests.golden_files import assert_golden, leaf, tensors
from tests.oracles.softclip import loop_softclip

LOSSES = ["softclip_loss_0", "softclip_loss_2"]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def golden_loss(golden, *, term="total", mixing=None):
    inputs = {key: leaf(golden[key]) for key in ("v", "t", "r", "a", "scale")}
    settings = SoftClipSettings(
        guidance_temperature=golden["tau_intra"].item(),
        mixing=golden["beta"].item() if mixing is None else mixing,
        divergence="symmetric" if golden["symmetric"] else "forward",
        detach_targets=bool(golden["detach"]),
    )
    terms = softclip_loss(
        inputs["v"],
        inputs["t"],
        image_guidance=inputs["r"],
        text_guidance=inputs["a"],
        temperature=1 / inputs["scale"],
        settings=settings,
    )
    getattr(terms, term).backward()
    return terms, inputs


@pytest.mark.parametrize("name", LOSSES)
def test_softclip_values_equal_the_stored_ones(name):
    golden = tensors(name)
    terms, _ = golden_loss(golden)
    for term, key in [("hard", "hard"), ("soft", "soft"), ("relation", "re"), ("total", "total")]:
        assert_golden(getattr(terms, term), golden[key])
    other, _ = golden_loss(golden, mixing=0.31)
    assert abs(other.soft - terms.soft) > 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("term", "key"), [("soft", "soft"), ("relation", "re"), ("total", "total")])
def test_softclip_gradients_equal_the_stored_ones(name, term, key):
    golden = tensors(name)
    _, inputs = golden_loss(golden, term=term)
    for input_name, value in inputs.items():
        assert_golden(value.grad, golden[f"g_{key}_{input_name}"])


@pytest.mark.parametrize("divergence", ["forward", "symmetric"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softclip_equals_the_loop(divergence, smoothing):
    v, t, r, a = (draw(5, 4, seed=s) for s in range(4))
    settings = SoftClipSettings(
        guidance_temperature=0.3, mixing=0.4, divergence=divergence, label_smoothing=smoothing
    )
    terms = softclip_loss(v, t, image_guidance=r, text_guidance=a, temperature=0.2, settings=settings)
    expected = loop_softclip(
        v,
        t,
        image_guidance=r,
        text_guidance=a,
        inverse_temperature=5.0,
        guidance_temperature=0.3,
        mixing=0.4,
        smoothing=smoothing,
        symmetric=divergence == "symmetric",
    )
    found = [terms.hard.item(), terms.soft.item(), terms.relation.item()]
    assert found == pytest.approx(expected, abs=1e-12)
    swapped = softclip_loss(v, t, image_guidance=a, text_guidance=r, temperature=0.2, settings=settings)
    assert abs(swapped.soft - terms.soft) > 1e-4


@pytest.mark.parametrize("name", ["softclip_other_meaning_0", "softclip_other_meaning_1"])
def test_the_unrelated_loss_of_the_same_name_is_another_one(name):
    """fMRI decoders call CE(softmax(targ targ^T / temp), softmax(pred targ^T / temp)) a soft CLIP loss."""
    golden = tensors(name)
    predictions, targets, temp = leaf(golden["preds"]), golden["targs"], golden["temp"]
    own = torch.arange(len(targets))
    logits = predictions @ targets.T / temp
    log_targets = soft_targets(targets @ targets.T, own, temperature=temp, mixing=1.0)
    theirs = 0.5 * (
        cross_entropy_rows(log_targets, logits).mean() + cross_entropy_rows(log_targets, logits.T).mean()
    )
    assert_golden(theirs, golden["loss"])
    theirs.backward()
    assert_golden(predictions.grad, golden["g_preds"])
    ours = softclip_loss(
        predictions,
        targets,
        image_guidance=targets,
        text_guidance=targets,
        temperature=temp,
        settings=SoftClipSettings(),
    )
    assert abs(ours.total - golden["loss"]) > 1e-2


@pytest.mark.parametrize("mixing", [0.3, 1.0])
@pytest.mark.parametrize("divergence", ["forward", "symmetric"])
def test_gradients_pass_gradcheck_when_targets_are_not_detached(mixing, divergence):
    settings = SoftClipSettings(
        guidance_temperature=0.3, mixing=mixing, divergence=divergence, hard_weight=0.5, detach_targets=False
    )

    def total(v, t, r, a):
        return softclip_loss(
            v, t, image_guidance=r, text_guidance=a, temperature=0.3, settings=settings
        ).total

    assert torch.autograd.gradcheck(total, [leaf(draw(4, 3, seed=s)) for s in range(4)])


def test_detached_targets_send_no_gradient_into_the_guidance():
    v, t, r, a = (leaf(draw(4, 3, seed=s)) for s in range(4))
    for detach in (True, False):
        settings = SoftClipSettings(detach_targets=detach)
        softclip_loss(
            v, t, image_guidance=r, text_guidance=a, temperature=0.1, settings=settings
        ).total.backward()
        assert (r.grad is None) == detach


def test_guidance_can_come_from_either_side_or_both():
    v, t, r, a = (draw(4, 3, seed=s) for s in range(4))
    soft = {}
    for source in ("image", "text", "mean"):
        settings = SoftClipSettings(image_to_text=source, text_to_image=source)
        soft[source] = softclip_loss(
            v, t, image_guidance=r, text_guidance=a, temperature=0.1, settings=settings
        ).soft.item()
    same = softclip_loss(
        v, t, image_guidance=r, text_guidance=r, temperature=0.1, settings=SoftClipSettings()
    ).soft.item()
    assert soft["image"] == pytest.approx(same)
    assert len({round(value, 6) for value in soft.values()}) == 3


X = torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SoftClipSettings(guidance_temperature=0), "guidance_temperature must be > 0, got 0"),
        (lambda: SoftClipSettings(mixing=-0.1), r"mixing must be in \[0, 1\], got -0.1"),
        (lambda: SoftClipSettings(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: SoftClipSettings(mixing=0.0, divergence="symmetric"), "infinite for one-hot targets"),
        (
            lambda: softclip_loss(
                X, X, image_guidance=X, text_guidance=X, temperature=1, settings=SoftClipSettings()
            ),
            "at least 2 candidates, got 1",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
