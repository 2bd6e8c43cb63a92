"""Squeezed weights against the dense formula, and the model that they make."""

from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.models.identity import model_fingerprint, weights_nbytes
from kvgauge.models.spec import ModelSpec
from kvgauge.models.squeezellm import (
    PARTS,
    SqueezedLinear,
    SqueezeLLM,
    kept_entries,
    linears,
    packed_buffers,
    squeezed_parts,
    weight_fisher,
)

NAME = "tiny/llama"


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return tmp_path_factory.mktemp("squeezed")


@pytest.fixture
def squeezed(copies, monkeypatch):
    """A squeezed tiny model; the copy of each setting is made once."""
    monkeypatch.setenv("KVGAUGE_CACHE", str(copies))
    return lambda **options: kvgauge.load_model(NAME, weights={"method": "squeezellm", "fit_tokens": 512} | options)[0]


def matrix(rows=40, columns=50):
    return torch.randn(rows, columns).pow(3), torch.rand(rows, columns).pow(4)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sparse", [0.0, 0.05])
def test_a_matrix_is_its_nearest_levels_and_kept_entries(bits, sparse):
    weight, fisher = matrix()
    options = SqueezeLLM(bits=bits, sparse=sparse, sensitive=sparse / 2)
    parts = squeezed_parts(weight, fisher, options)
    levels = parts["levels"].double()
    nearest = levels.gather(1, (weight.double()[..., None] - levels[:, None]).abs().argmin(-1))
    expected = torch.where(kept_entries(weight, fisher, options), weight.half().double(), nearest)
    layer = SqueezedLinear(parts, 50, torch.float32, None)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-6)
    states = torch.randn(3, 50)
    torch.testing.assert_close(layer(states), states @ expected.float().T, rtol=1e-4, atol=1e-4)


def test_the_largest_and_the_most_sensitive_are_kept():
    weight, fisher = matrix(10, 100)
    kept = kept_entries(weight, fisher, SqueezeLLM(sparse=0.02, sensitive=0.005))
    assert int(kept.sum()) == 20
    largest = weight.abs().flatten().sort(descending=True).indices
    assert bool(kept.flatten()[largest[:15]].all())
    rest = fisher.flatten().clone()
    rest[largest[:15]] = -1
    assert bool(kept.flatten()[rest.topk(5).indices].all())


def test_sensitive_weights_come_back_nearer():
    weight = torch.randn(4, 200)
    fisher = torch.where(torch.arange(200) < 20, 1.0, 1e-5).expand(4, -1)
    parts = squeezed_parts(weight, fisher, SqueezeLLM(bits=3, sparse=0.0, sensitive=0.0))
    error = (SqueezedLinear(parts, 200, torch.float32, None).weight - weight).square().mean(0)
    assert float(error[:20].mean()) < 0.5 * float(error[20:].mean())


def test_the_fisher_diagonal_is_the_squared_gradient_of_the_loss(tiny, tokens):
    """Against finite differences of the loss in the most sensitive weight of a layer."""
    model = kvgauge.load_model("tiny/mistral")[0]
    ids = tokens(2, 30, seed=4)
    fisher = weight_fisher(model, ids)
    assert set(fisher) == {name for name, _ in linears(model)}
    name = next(iter(fisher))
    row, column = divmod(int(fisher[name].argmax()), fisher[name].shape[1])
    weight, step, expected = model.get_submodule(name).weight, 5e-3, 0.0
    for sequence in ids.split(1):
        losses = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                weight[row, column] += sign * step
                losses.append(float(model(sequence, labels=sequence).loss))
        expected += ((losses[0] - losses[1]) / (2 * step)) ** 2
    assert float(fisher[name][row, column]) == pytest.approx(expected, rel=0.1)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "sparse": 1.0}])
def test_the_gentlest_settings_give_the_model_s_logits(options, squeezed, tiny, tokens):
    """Up to the 16 bits that levels and kept entries are stored in."""
    ids = tokens(1, 60, seed=2)
    with torch.no_grad():
        expected, actual = tiny(NAME)(ids).logits, squeezed(**options)(ids).logits
    assert float((actual - expected).norm() / expected.norm()) < 5e-3


def test_fewer_bits_lose_more(squeezed, tiny, tokens):
    ids = tokens(1, 60, seed=2)
    with torch.no_grad():
        expected = tiny(NAME)(ids).logits
        errors = [float((squeezed(bits=bits)(ids).logits - expected).norm()) for bits in (3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_bytes_are_those_of_live_tensors(squeezed, tiny):
    model = squeezed(bits=4)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *(buffer for _, buffer in packed_buffers(model))))
    assert weights_nbytes(model) == held < weights_nbytes(tiny(NAME))
    layers = [module for module in model.modules() if isinstance(module, SqueezedLinear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert not list(linears(model))  # no dense copy stays
    assert all(layer.codes.nbytes == layer.out_features * layer.in_features // 2 for layer in layers)


def test_another_setting_is_another_model(squeezed, tiny):
    prints = {model_fingerprint(squeezed(bits=bits)) for bits in (3, 4)} | {model_fingerprint(tiny(NAME))}
    assert len(prints) == 3
    assert model_fingerprint(squeezed(bits=4)) in prints  # and the same setting the same


def test_the_copy_on_disk_is_made_once(squeezed, tmp_path, monkeypatch):
    monkeypatch.setenv("KVGAUGE_CACHE", str(tmp_path))
    squeezed(bits=4)
    [path] = tmp_path.glob("squeezellm-*.safetensors")
    before = path.stat().st_mtime_ns
    squeezed(bits=4)
    assert path.stat().st_mtime_ns == before
    squeezed(bits=3)
    assert len(list(tmp_path.glob("squeezellm-*.safetensors"))) == 2


@pytest.mark.parametrize("name", ["full", "kqsvd", "kvquant"])
def test_methods_work_on_squeezed_models(name, squeezed, tokens):
    model, ids = squeezed(bits=4), tokens(1, 90, seed=3)
    method = kvgauge.build_method(name)
    method = method.lossless(kvgauge.architecture.facts.model_facts(model))
    fitted = method.fit(kvgauge.collect(model, [tokens(2, 80)]), model)
    cache = method.new_cache(model, fitted)
    with torch.no_grad():
        expected = model(ids).logits[:, 80:]
        model(ids[:, :80], past_key_values=cache)
        cache.compress()
        actual = model(ids[:, 80:], past_key_values=cache).logits
    assert float((actual - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "give 3, 4 or 8"),
        ({"sparse": 1.5}, "sparse 1.5"),
        ({"sparse": 0.001, "sensitive": 0.002}, "sensitive 0.002"),
        ({"method": "gptq"}, "choose one of squeezellm"),
        ({"bit": 4}, "did you mean 'bits'"),
        ({"fit_tokens": 100}, "below one sequence"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(kvgauge.UserError, match=message):
        ModelSpec(name="x", source="y", weights=options)


def test_all_parts_are_tensors():
    parts = squeezed_parts(*matrix(), SqueezeLLM())
    assert set(parts) == set(PARTS)
