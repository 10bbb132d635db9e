"""Adversarial prior matching: two losses in one backward, sign, penalty, a run that reaches the prior."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.prior import PriorDiscriminator, prior_rows
from tests.golden_files import leaf
from tests.oracles.critics import loop_prior


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_discriminator(width: int = 3, hidden: tuple[int, int] = (6, 4), seed=0) -> PriorDiscriminator:
    """Weights large enough for slopes to matter."""
    discriminator = PriorDiscriminator(width, hidden=hidden).double()
    with torch.no_grad():
        for k, parameter in enumerate(discriminator.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=10 * seed + k) / parameter.shape[-1] ** 0.5)
    return discriminator


def layers(discriminator: PriorDiscriminator) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight.detach(), layer.bias.detach()) for layer in discriminator.children()]


def plain_discriminator_rows(discriminator, features: Tensor, noise: Tensor, penalty: float) -> Tensor:
    """The loss as published, its slopes by automatic differentiation."""
    total = 0.0
    for points, sign in ((noise, -1.0), (features.detach().sigmoid(), 1.0)):
        z = points.clone().requires_grad_()
        logits = discriminator(z)
        (slope,) = torch.autograd.grad(logits.sum(), z, create_graph=True)
        total = total + F.softplus(sign * logits) + penalty / 2 * slope.square().sum(1)
    return total


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_rows_equal_the_loop(penalty):
    discriminator, features, noise = random_discriminator(), draw(5, 3), uniform(5, 3)
    found = prior_rows(discriminator, features, noise, gradient_penalty=penalty)
    expected = loop_prior(features, noise, layers(discriminator), gradient_penalty=penalty)
    for rows, values in zip(found, expected, strict=True):
        torch.testing.assert_close(rows.detach(), torch.tensor(values).double(), atol=1e-6, rtol=0)
    other = prior_rows(discriminator, features, noise, gradient_penalty=penalty + 1)[1]
    assert (other - found[1]).abs().min() > 1e-4


def test_the_written_out_slope_is_the_gradient():
    discriminator, z = random_discriminator(), leaf(uniform(5, 3))
    logits, slope = discriminator.with_input_gradient(z)
    torch.testing.assert_close(logits, discriminator(z), atol=1e-14, rtol=0)
    (expected,) = torch.autograd.grad(discriminator(z).sum(), z)
    torch.testing.assert_close(slope, expected, atol=1e-14, rtol=0)
    assert slope.abs().max() > 1e-2


def test_the_penalty_has_the_gradient_of_a_second_backward():
    discriminator, features, noise = random_discriminator(), draw(5, 3), uniform(5, 3)
    weights = list(discriminator.parameters())
    rows = prior_rows(discriminator, features, noise)[1]
    plain = plain_discriminator_rows(discriminator, features, noise, 1.0)
    torch.testing.assert_close(rows, plain, atol=1e-12, rtol=0)
    found = torch.autograd.grad(rows.sum(), weights)
    torch.testing.assert_close(found, torch.autograd.grad(plain.sum(), weights), atol=1e-12, rtol=0)
    without = prior_rows(discriminator, features, noise, gradient_penalty=0.0)[1]
    assert (found[0] - torch.autograd.grad(without.sum(), weights)[0]).abs().max() > 1e-2


def test_the_discriminators_gradient_equals_finite_differences():
    discriminator, features, noise = random_discriminator(), draw(4, 3), uniform(4, 3)
    loss = prior_rows(discriminator, features, noise, gradient_penalty=2.0)[1].sum()
    found = torch.autograd.grad(loss, list(discriminator.parameters()))
    step = 1e-6
    for parameter, gradient in zip(discriminator.parameters(), found, strict=True):
        for k in range(parameter.numel()):
            values = []
            for shift in (step, -2 * step):
                with torch.no_grad():
                    parameter.view(-1)[k] += shift
                values.append(
                    prior_rows(discriminator, features, noise, gradient_penalty=2.0)[1].sum().item()
                )
            with torch.no_grad():
                parameter.view(-1)[k] += step
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(
                gradient.view(-1)[k].item(), abs=1e-6
            )


def test_one_backward_gives_the_two_separate_gradients():
    discriminator, noise = random_discriminator(), uniform(5, 3)
    encoder, inputs = leaf(draw(3, 4)), draw(5, 4, seed=1)
    weights = list(discriminator.parameters())
    encoder_rows, discriminator_rows = prior_rows(discriminator, inputs @ encoder.T, noise)
    (encoder_rows.mean() + discriminator_rows.mean()).backward()

    features = inputs @ encoder.T
    alone = F.softplus(-discriminator(features.sigmoid())).mean()
    torch.testing.assert_close(encoder.grad, torch.autograd.grad(alone, encoder)[0], atol=1e-14, rtol=0)
    alone = plain_discriminator_rows(discriminator, features, noise, 1.0).mean()
    expected = torch.autograd.grad(alone, weights)
    found = tuple(weight.grad for weight in weights)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    # A joint minimisation, as the release of CLIP-Lite has it, is something else for both.
    z = (inputs @ encoder.T).sigmoid()
    joint = (F.softplus(-discriminator(z)) + F.softplus(discriminator(z))).mean()
    assert (torch.autograd.grad(joint, encoder)[0] - encoder.grad).abs().max() > 1e-3


def test_each_loss_is_blind_to_the_others_parameters():
    discriminator, features = random_discriminator(), leaf(draw(5, 3))
    weights = list(discriminator.parameters())
    encoder_rows, discriminator_rows = prior_rows(discriminator, features, uniform(5, 3))
    of_weights = torch.autograd.grad(encoder_rows.sum(), weights, allow_unused=True, retain_graph=True)
    assert of_weights == (None,) * len(weights)
    assert torch.autograd.grad(discriminator_rows.sum(), features, allow_unused=True) == (None,)
    assert torch.autograd.grad(encoder_rows.sum(), features)[0].abs().max() > 1e-3


def test_the_encoder_step_raises_the_discriminators_logit():
    """Matching means being taken for noise; the published unofficial term lowers it."""
    discriminator, features = random_discriminator(), leaf(draw(16, 3))
    before = discriminator(features.sigmoid()).mean()

    def after(loss: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(loss, features)
        return discriminator((features - slope).sigmoid()).mean()

    assert after(prior_rows(discriminator, features, uniform(16, 3))[0].sum()) > before + 5e-4
    assert after(F.softplus(discriminator(features.sigmoid())).sum()) < before - 5e-4


def test_the_encoders_gradient_passes_gradcheck():
    discriminator, noise = random_discriminator(), uniform(4, 3)
    assert torch.autograd.gradcheck(lambda x: prior_rows(discriminator, x, noise)[0], leaf(draw(4, 3)))


def test_rows_stand_on_their_own():
    """So that workers may each compute theirs."""
    discriminator, features, noise = random_discriminator(), draw(6, 3), uniform(6, 3)
    whole = torch.stack(prior_rows(discriminator, features, noise))
    parts = [
        torch.stack(prior_rows(discriminator, *part))
        for part in zip(features.split(2), noise.split(2), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        torch.stack(prior_rows(discriminator, features[order], noise[order])), whole[:, order]
    )
    assert (torch.stack(prior_rows(discriminator, features, noise[order])) - whole).abs().max() > 1e-3


def test_an_undecided_discriminator_has_closed_values():
    discriminator = PriorDiscriminator(3, hidden=(4, 4))
    with torch.no_grad():
        discriminator.last.weight.zero_()
        discriminator.last.bias.zero_()
    encoder_rows, discriminator_rows = prior_rows(discriminator, torch.ones(2, 3), torch.zeros(2, 3))
    torch.testing.assert_close(encoder_rows, torch.full((2,), math.log(2)))
    torch.testing.assert_close(discriminator_rows, torch.full((2,), 2 * math.log(2)))


def test_rows_are_finite_in_float32_for_features_of_any_size_and_need_no_graph():
    discriminator = random_discriminator().float()
    with torch.no_grad():
        found = prior_rows(discriminator, 1e4 * draw(4, 3).bfloat16(), uniform(4, 3).float())
    for rows in found:
        assert rows.dtype == torch.float32
        assert rows.isfinite().all()


def distance_to_uniform(points: Tensor) -> float:
    """Largest gap between the distribution of a coordinate and the uniform one (Kolmogorov-Smirnov)."""
    ordered = points.sort(0).values
    steps = (torch.arange(len(points)) + 1) / len(points)
    return (ordered - steps[:, None]).abs().max().item()


def trained(num_steps: int, *, right_sign: bool, seed: int = 0) -> Tensor:
    """Points of a two-dimensional encoder after training; they start in the corner, around (0.9, 0.9)."""
    generator = torch.Generator().manual_seed(seed)
    features = (0.3 * torch.randn(256, 2, generator=generator) + 2.2).requires_grad_()
    discriminator = random_discriminator(2, (32, 32), seed=seed).float()
    optimiser = torch.optim.Adam(
        [{"params": [features], "lr": 0.03}, {"params": discriminator.parameters(), "lr": 0.005}]
    )
    for _ in range(num_steps):
        noise = torch.rand(256, 2, generator=generator)
        encoder_rows, discriminator_rows = prior_rows(discriminator, features, noise)
        encoder = encoder_rows.mean() if right_sign else -encoder_rows.mean()
        optimiser.zero_grad()
        (encoder + discriminator_rows.mean()).backward()
        optimiser.step()
    return features.detach().sigmoid()


def share_in_middle(points: Tensor) -> float:
    """Share of points with both coordinates between 0.1 and 0.9; 0.64 for the prior."""
    return ((points - 0.5).abs() < 0.4).all(1).float().mean().item()


def test_features_reach_the_prior_and_with_the_wrong_sign_do_not():
    start = trained(0, right_sign=True)
    right, wrong = trained(400, right_sign=True), trained(400, right_sign=False)
    assert distance_to_uniform(start) > 0.7
    assert distance_to_uniform(right) < 0.2
    assert distance_to_uniform(wrong) > 0.9
    assert 0.4 < share_in_middle(right) < 0.9
    assert share_in_middle(wrong) == 0


def test_the_discriminator_has_the_published_shape():
    shapes = {name: tuple(p.shape) for name, p in PriorDiscriminator(64).named_parameters()}
    assert shapes == {
        "first.weight": (1000, 64),
        "first.bias": (1000,),
        "second.weight": (200, 1000),
        "second.bias": (200,),
        "last.weight": (1, 200),
        "last.bias": (1,),
    }


D = PriorDiscriminator(3, hidden=(2, 2))
X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PriorDiscriminator(0), "discriminator widths must be >= 1, got 0, 1000 and 200"),
        (lambda: prior_rows(D, X[:, :2], X[:, :2]), r"takes features \[B, 3\], got \[2, 2\]"),
        (lambda: prior_rows(D, X, X[:1]), r"noise must have the features' shape \[2, 3\], got \[1, 3\]"),
        (lambda: prior_rows(D, X, X, gradient_penalty=-1.0), "gradient_penalty must be >= 0, got -1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
