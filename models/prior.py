"""Adversarial prior matching: pushes features towards a uniform distribution on the unit cube.

A discriminator learns to tell uniform noise from sigmoid(feature); the encoder learns to be taken for
noise. Both losses are differentiated in one backward of their sum, so each must be blind to the other's
parameters: the encoder's rows take the discriminator's weights, the discriminator's rows the features, as
constants.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from models.outputs import at_least_float32

# B rows, D width of the features


class PriorDiscriminator(nn.Module):
    """D(z): logit that z is a sample of the prior rather than a feature; two ReLU layers.

    Source: Deep InfoMax, arXiv 1808.06670 (1000 and 200 units). The code's is a sigmoid on this logit.
    """

    def __init__(self, width: int, *, hidden: tuple[int, int] = (1000, 200)) -> None:
        """
        Args:
            width: D, of the features.
            hidden: widths of the two hidden layers.

        Raises:
            ValueError: a width < 1.
        """
        super().__init__()
        if min(width, *hidden) < 1:
            raise ValueError(f"discriminator widths must be >= 1, got {width}, {hidden[0]} and {hidden[1]}")
        self.width = width
        self.first = nn.Linear(width, hidden[0])
        self.second = nn.Linear(hidden[0], hidden[1])
        self.last = nn.Linear(hidden[1], 1)

    def forward(self, z_BD: Tensor) -> Tensor:
        """Logits [B] of points z in the unit cube [B, D]."""
        logits: Tensor = self.last(self.second(self.first(z_BD).relu()).relu())[:, 0]
        return logits

    def with_input_gradient(self, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] and their gradients in z, [B, D].

        The gradient is written out, which a ReLU network allows exactly: it needs no backward inside the
        loss, and works under no_grad. It is differentiable in the weights, as the penalty requires.
        """
        first = self.first(z_BD)
        second = self.second(first.relu())
        at_second = self.last.weight * (second > 0)
        at_first = (at_second @ self.second.weight) * (first > 0)
        return self.last(second.relu())[:, 0], at_first @ self.first.weight


def prior_rows(
    discriminator: PriorDiscriminator,
    features_BD: Tensor,
    noise_BD: Tensor,
    *,
    gradient_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Rows of the encoder's and the discriminator's loss; gather both, take means, minimise their sum.

    With z_q = sigmoid(features) and z_p = noise, the encoder's row is softplus(-D(z_q)) and the
    discriminator's softplus(-D(z_p)) + softplus(D(z_q)) + g/2 (|grad D(z_p)|^2 + |grad D(z_q)|^2). The
    encoder's rows give no gradient to the discriminator's parameters, the discriminator's none to the
    features.

    Args:
        discriminator: D.
        features_BD: before the sigmoid and not normalised, [B, D].
        noise_BD: samples of the prior, uniform on [0, 1), [B, D], drawn by row key.
        gradient_penalty: g, >= 0.

    Returns:
        (encoder_rows [B], discriminator_rows [B]) in nats; log 2 and 2 log 2 when D is 0 everywhere.

    Raises:
        ValueError: features not [B, width], noise of another shape, or gradient_penalty < 0.

    Source: Deep InfoMax, arXiv 1808.06670. CLIP-Lite, arXiv 2112.07133, and the unofficial code it follows
        let encoder and discriminator minimise one term together, which drives features away from the prior.
    """
    if features_BD.ndim != 2 or features_BD.shape[1] != discriminator.width:
        raise ValueError(
            f"prior matching takes features [B, {discriminator.width}], got {list(features_BD.shape)}"
        )
    if noise_BD.shape != features_BD.shape:
        raise ValueError(
            f"noise must have the features' shape {list(features_BD.shape)}, got {list(noise_BD.shape)}"
        )
    if not gradient_penalty >= 0:
        raise ValueError(f"gradient_penalty must be >= 0, got {gradient_penalty}")
    encoded_BD = at_least_float32(features_BD).sigmoid()
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    encoder_rows = F.softplus(-functional_call(discriminator, frozen, (encoded_BD,)))
    of_noise, slope_at_noise = discriminator.with_input_gradient(noise_BD.to(encoded_BD))
    of_encoded, slope_at_encoded = discriminator.with_input_gradient(encoded_BD.detach())
    slopes = slope_at_noise.square().sum(1) + slope_at_encoded.square().sum(1)
    discriminator_rows = F.softplus(-of_noise) + F.softplus(of_encoded) + 0.5 * gradient_penalty * slopes
    return encoder_rows, discriminator_rows
