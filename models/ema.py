"""The EMA teacher: a float32 copy of the online weights that follows them slowly."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


@torch.no_grad()
def ema_update_(teacher_params: Iterable[Tensor], online_params: Iterable[Tensor], decay: float) -> None:
    """teacher <- teacher * decay + online * (1 - decay), in place, each product rounded once.

    Frozen online parameters (`nn.Parameter` with requires_grad False) are skipped: repeated rounding
    would move the teacher's copy away from weights that never change.

    Args:
        teacher_params: tensors to update.
        online_params: tensors of the same shapes in the same order; cast to the teacher's dtype first.
        decay: share of the teacher that stays, in [0, 1].

    Raises:
        ValueError: decay outside [0, 1], or the two lists differ in length or shapes.

    Source: A-CLIP, arXiv 2212.08653. Bit-equal to its released arithmetic; `lerp` and an addition with
        `alpha` are not, because they round once less.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"EMA decay must be in [0, 1], got {decay}")
    teacher_list, online_list = list(teacher_params), list(online_params)
    if len(teacher_list) != len(online_list):
        raise ValueError(f"teacher has {len(teacher_list)} tensors, the online model {len(online_list)}")
    for number, (teacher, online) in enumerate(zip(teacher_list, online_list, strict=True)):
        if teacher.shape != online.shape:
            raise ValueError(
                f"tensor {number}: teacher has shape {tuple(teacher.shape)}, online {tuple(online.shape)}"
            )
    pairs = [(t, o) for t, o in zip(teacher_list, online_list, strict=True) if not _is_frozen(o)]
    if not pairs:
        return
    followers = [teacher for teacher, _ in pairs]
    leaders = [online.detach().to(teacher.dtype) for teacher, online in pairs]
    torch._foreach_mul_(followers, decay)
    torch._foreach_add_(followers, torch._foreach_mul(leaders, 1.0 - decay))


def make_teacher(module: ModuleT) -> ModuleT:
    """A separate float32 copy of `module` in eval mode that takes no gradient.

    Float32 whatever the online dtype: in bf16 a step of (1 - decay) is below the rounding limit and the
    teacher stops moving. A float64 module stays float64.
    """
    teacher = copy.deepcopy(module)
    for tensor in [*teacher.parameters(), *teacher.buffers()]:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.data = tensor.data.float()
    return teacher.requires_grad_(False).eval()


def update_teacher_(teacher: nn.Module, online: nn.Module, decay: float) -> None:
    """`ema_update_` over two modules, matched by parameter name; buffers stay as they are.

    Args:
        teacher: what `make_teacher` returned for `online`.
        online: the trained module, not wrapped for data parallelism.
        decay: share of the teacher that stays, in [0, 1].

    Raises:
        ValueError: the parameter names differ, or as `ema_update_`.
    """
    followers, leaders = dict(teacher.named_parameters()), dict(online.named_parameters())
    if followers.keys() != leaders.keys():
        differing = sorted(followers.keys() ^ leaders.keys())
        raise ValueError(f"teacher and online model differ in parameters: {', '.join(differing[:5])}")
    ema_update_(followers.values(), (leaders[name] for name in followers), decay)
