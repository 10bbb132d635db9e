"""The EMA update: bit-equal to the release, frozen tensors untouched, refusals."""

import pytest
import torch
from torch import nn

from models.ema import ema_update_, make_teacher, update_teacher_
from tests.golden_files import tensors
from tests.oracles.aclip import loop_ema


@pytest.mark.parametrize(("dtype", "key"), [(torch.float64, "out64"), (torch.float32, "out32")])
def test_update_is_bit_equal_to_the_aclip_release(dtype, key):
    golden = tensors("aclip_ema_update")
    for decay, stored in zip(golden["m"].tolist(), golden[key], strict=True):
        teacher = golden["ema"].to(dtype, copy=True)
        ema_update_([teacher], [golden["online"].to(dtype)], decay)
        assert torch.equal(teacher, stored)


def test_lerp_would_not_be_bit_equal():
    golden = tensors("aclip_ema_update")
    assert not torch.equal(golden["out32_lerp"], golden["out32"])


def test_update_equals_the_loop():
    generator = torch.Generator().manual_seed(0)
    teacher, online = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    expected = torch.tensor(loop_ema(teacher, online, 0.9), dtype=torch.float64)
    wrong = torch.tensor(loop_ema(teacher, online, 0.91), dtype=torch.float64)
    ema_update_([teacher], [online], 0.9)
    torch.testing.assert_close(teacher, expected, atol=1e-15, rtol=0)
    assert not torch.allclose(teacher, wrong)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_decay(decay):
    teacher, online = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    ema_update_([teacher], [online], decay)
    assert torch.equal(teacher, torch.tensor([1.0, 2.0]) if decay else online)


def test_the_online_side_is_left_alone():
    online = nn.Linear(3, 2)
    before = [p.detach().clone() for p in online.parameters()]
    teacher = make_teacher(online)
    with torch.no_grad():
        teacher.weight.zero_()
    update_teacher_(teacher, online, 0.5)
    assert all(torch.equal(p, b) for p, b in zip(online.parameters(), before, strict=True))
    torch.testing.assert_close(teacher.weight, before[0] / 2)


def test_frozen_parameters_never_drift():
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    online[0].requires_grad_(False)
    teacher = make_teacher(online)
    with torch.no_grad():
        online[1].weight.add_(1.0)
    rounded = online[0].weight.detach().clone()
    for _ in range(200):
        update_teacher_(teacher, online, 0.996)
        ema_update_([rounded], [online[0].weight.detach()], 0.996)
    assert torch.equal(teacher[0].weight, online[0].weight)
    assert not torch.equal(teacher[1].weight, online[1].weight)
    # negative control: averaged like the others, the copy of a constant moves by rounding
    assert not torch.equal(rounded, online[0].weight)


def test_teacher_is_a_separate_frozen_float32_copy_in_eval_mode():
    online = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).bfloat16().train()
    teacher = make_teacher(online)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert online.training
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in online.parameters())
    update_teacher_(teacher, online, 0.999)
    assert make_teacher(nn.Linear(2, 2).double()).weight.dtype == torch.float64


def test_half_precision_steps_are_not_lost():
    online = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(online.weight, 1.0)
    teacher = make_teacher(online)
    nn.init.constant_(online.weight, 1.0078125)
    for _ in range(100):
        update_teacher_(teacher, online, 0.99)
    assert teacher.weight.item() == pytest.approx(1 + 0.0078125 * (1 - 0.99**100), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_update_([], [], 1.1), r"in \[0, 1\], got 1.1"),
        (lambda: ema_update_([torch.ones(1)], [], 0.5), "teacher has 1 tensors, the online model 0"),
        (lambda: ema_update_([torch.ones(2)], [torch.ones(1)], 0.5), r"tensor 0: teacher has shape \(2,\)"),
        (
            lambda: update_teacher_(nn.Linear(1, 1), nn.Linear(1, 1, bias=False), 0.5),
            "differ in parameters: bias",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_update_is_legal():
    ema_update_([], [], 0.5)
