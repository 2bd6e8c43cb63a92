from __future__ import annotations

import pytest
import torch
from torch.nn.attention.bias import CausalBias

from kvgauge.simulation.machine import SimulatedMachine
from kvgauge.simulation.placing import on_devices
from kvgauge.simulation.tensor import MixedDevicesError, simulated
from kvgauge.testing import random_tokens


@pytest.fixture
def machine():
    with SimulatedMachine() as made:
        yield made


def on(device, *shape):
    return simulated(torch.randn(*shape), device)


def test_results_are_the_cpus_and_stay_on_the_device(machine):
    first, second = on("cuda:1", 3, 4), on("cuda:1", 4, 2)
    product = torch.softmax(first @ second, dim=-1)[:, None].transpose(1, 2)
    assert product.device == torch.device("cuda:1") and product.is_cuda
    assert torch.equal(product.numbers, torch.softmax(first.numbers @ second.numbers, dim=-1)[:, None].transpose(1, 2))
    assert machine.tally.kernels == {"mm": 1, "_softmax": 1}


@pytest.mark.parametrize("other", ["cuda:0", "cpu"])
def test_tensors_of_two_devices_do_not_meet(machine, other):
    with pytest.raises(MixedDevicesError, match="add of tensors on"):
        on("cuda:1", 3) + (torch.randn(3) if other == "cpu" else on(other, 3))


def test_numbers_of_the_host_go_with_any_device(machine):
    assert (on("cuda:1", 3) * torch.tensor(2.0) + 1).device.index == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.linalg.eigh(x @ x.mT),
        lambda x: x.repeat_interleave(simulated(torch.tensor([1, 2, 3]), "cuda:0"), dim=0),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_makes_the_host_wait_is_counted(machine, read):
    read(on("cuda:0", 3, 3))
    assert machine.restart().syncs.total() == 1
    assert machine.tally.syncs.total() == 0


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.repeat_interleave(simulated(torch.tensor([1, 2, 3]), "cuda:0"), dim=0, output_size=6),
        lambda x: x.to("cuda:1"),
        lambda x: x.to(on("cuda:1", 1)),
        lambda x: x.view(-1)[2:].new_zeros(4),
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
)
def test_what_does_not_is_not(machine, move):
    move(on("cuda:0", 3, 3))
    assert machine.tally.syncs.total() == 0


def test_copies_are_told_apart(machine):
    here = on("cuda:0", 3)
    assert here.to("cuda:0", torch.float32).numbers.data_ptr() == here.numbers.data_ptr()
    assert here.to(here.device).device == here.device and machine.tally.launches == 0
    assert here.to("cuda:1").device.index == 1
    assert torch.ones(3).to(here).device.index == 0
    torch.zeros(3).to("cuda:1")
    assert (machine.tally.transfers.total(), machine.tally.uploads.total()) == (1, 2)


def test_writes_reach_the_storage_of_views(machine):
    rows = on("cuda:0", 4, 3)
    rows[1:3].zero_()
    rows[:, 0].copy_(on("cuda:0", 4))
    assert bool((rows.numbers[1:3, 1:] == 0).all()) and not bool((rows.numbers[:, 0] == 0).any())
    assert rows[1:3].untyped_storage().nbytes() == 4 * 3 * 4


@pytest.mark.parametrize(
    ("mask", "value_dim", "grouped", "kind"),
    [(False, 8, True, "flash"), (True, 8, False, "efficient"), (True, 8, True, "math"), (False, 4, False, "efficient")],
)
def test_the_kernel_of_attention(machine, mask, value_dim, grouped, kind):
    query, key, value = on("cuda:0", 1, 4, 3, 8), on("cuda:0", 1, 2 if grouped else 4, 5, 8), None
    value = on("cuda:0", *key.shape[:3], value_dim)
    seen = simulated(torch.ones(3, 5, dtype=torch.bool), "cuda:0") if mask else None
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=grouped)
    assert machine.tally.attention == {kind: 1}
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.numbers, key.numbers, value.numbers, enable_gqa=grouped
    )
    torch.testing.assert_close(output.numbers, expected)


def test_nothing_is_left_behind():
    names = ("_lazy_init", "synchronize", "get_device_properties", "mem_get_info")
    before = [getattr(torch.cuda, name) for name in names]
    with SimulatedMachine() as machine:
        inside = on("cuda:0", 2)
        assert machine.tally.launches == 0
    assert [getattr(torch.cuda, name) for name in names] == before
    assert "__new__" not in vars(CausalBias)
    with pytest.raises(RuntimeError, match="outside its machine"):
        inside + 1


def test_a_model_is_spread_as_device_map_auto_spreads_it(machine, tiny):
    model = tiny("tiny/llama")
    placed = on_devices(model, ["cuda:0", "cuda:1"])
    homes = [next(layer.parameters()).device.index for layer in placed.model.layers]
    assert homes == [0, 0, 1, 1] and placed.model.norm.weight.device.index == 1
    ids = random_tokens(2, 9)
    logits = placed(simulated(ids, "cuda:0")).logits
    assert logits.device.index == 0
    torch.testing.assert_close(logits.numbers, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert machine.tally.transfers.total() > 0
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
