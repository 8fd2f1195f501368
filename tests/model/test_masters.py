import torch
from torch import nn

from longgrpo.model.masters import MasterWeights


def steps(dtype, masters, count=64, relative=1e-4):
    """`count` updates of 1e-4 of a weight of 1, through SGD."""
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    shared = weight.detach().view(2, 4)
    held = MasterWeights({"w": weight})
    stepped = held.parameters["w"] if masters else weight
    optimizer = torch.optim.SGD([stepped], lr=relative)
    for _ in range(count):
        (-weight.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        held.publish()
    assert shared.data_ptr() == weight.data_ptr()
    return shared.float()


def test_small_updates_add_up():
    """1.0064 is not a bfloat16: the nearest is 1.0078."""
    assert torch.equal(steps(torch.bfloat16, masters=True), torch.full((2, 4), 1.0078125))
    torch.testing.assert_close(steps(torch.float32, masters=True), torch.full((2, 4), 1.0064))


def test_float32_has_no_second_copy():
    weight = nn.Parameter(torch.ones(3))
    assert MasterWeights({"w": weight}).parameters["w"] is weight


def test_gradients_add_up_in_float32():
    """Micro-batches of 1, 2^-9 and 2^-9: in bfloat16 the sum would stay 1."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = MasterWeights({"w": weight})
    for part in (1.0, 2**-9, 2**-9):
        (weight * part).sum().backward()
    assert weight.grad is None
    assert masters.parameters["w"].grad.item() == 1 + 2**-8
