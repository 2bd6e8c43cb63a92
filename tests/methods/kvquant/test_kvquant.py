from __future__ import annotations

import pytest
import torch

import kvgauge
from kvgauge.architecture.facts import model_facts
from kvgauge.contract.budget import reference_nbytes
from kvgauge.methods.kvquant.fit import calibration_samples, levels, thresholds
from kvgauge.methods.kvquant.grid import ChannelGrid

NAME = "tiny/llama"


def new_cache(method, model, fitted, ids):
    cache = method.new_cache(model, fitted)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.compress()
    return cache


def error(method, model, fitted, ids, question):
    with torch.no_grad():
        expected = model(torch.cat([ids, question], dim=1)).logits[:, ids.shape[1] :]
        actual = model(question, past_key_values=new_cache(method, model, fitted, ids)).logits
    return float((actual - expected).norm() / expected.norm())


def test_logits_come_nearer_with_bits(tiny, fit, tokens):
    model, ids, question = tiny(NAME), tokens(1, 200, seed=5), tokens(1, 12, seed=6)
    errors = []
    for bits in (2, 3, 4, 16):
        method = kvgauge.build_method("kvquant", bits=bits)
        errors.append(error(method, model, fit(method, NAME), ids, question))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]
    assert errors[3] < 1e-4


@pytest.mark.parametrize("budget", [0.35, 0.25])
def test_one_fit_serves_every_number_of_bits(budget, tiny, fit, tokens):
    fitted = fit(kvgauge.build_method("kvquant", bits=4), NAME)
    method = kvgauge.build_method("kvquant", budget=budget)
    cache = new_cache(method, tiny(NAME), fitted, tokens(1, 300, seed=5))
    assert {layer.bits for layer in cache.layers} == {{0.35: 4, 0.25: 2}[budget]}
    assert cache.nbytes() <= budget * reference_nbytes(method, model_facts(tiny(NAME)), 300)


def test_the_parts_can_be_switched_off(tiny, fit, tokens):
    model, ids = tiny(NAME), tokens(1, 200, seed=5)
    parts = {}
    for name, change in {"all": {}, "outliers": {"outliers": 0.0}, "sinks": {"sinks": 0}}.items():
        method = kvgauge.build_method("kvquant", bits=3, **change)
        parts[name] = new_cache(method, model, fit(method, NAME), ids).nbytes_by_part()
    assert set(parts["all"]) == {"codes", "scales", "outliers", "sinks"}
    assert set(parts["outliers"]) == {"codes", "scales", "sinks"}
    assert set(parts["sinks"]) == {"codes", "scales", "outliers"}
    even = kvgauge.build_method("kvquant", bits=3, nuq=False)
    cache = even.new_cache(model, fit(even, NAME))
    torch.testing.assert_close(cache.layers[0].quantiser.key_levels[3], torch.linspace(-1, 1, 8))
    post = kvgauge.build_method("kvquant", bits=3, pre_rope=False)
    assert post.new_cache(model, fit(post, NAME)).layers[0].quantiser.rotation is None


def test_the_fisher_diagonal_is_the_squared_gradient_of_the_loss(tiny, tokens):
    """Against a finite difference of the loss in one cached value."""
    model, ids = tiny("tiny/mistral"), tokens(1, 20, seed=3)[0]
    layer = model_facts(model).num_layers - 1
    samples = calibration_samples(model, [ids], [None] * 4, 0)[layer]
    projection = model.get_decoder().layers[layer].self_attn.v_proj
    fisher = samples.value_fisher[0]
    token, channel = divmod(int(fisher.argmax()), fisher.shape[1])  # where float32 losses differ enough
    step, losses = 1e-2, []
    for sign in (1, -1):

        def nudge(module, inputs, output, sign=sign):
            output = output.clone()
            output[0, token, channel] += sign * step
            return output

        hook = projection.register_forward_hook(nudge)
        with torch.no_grad():
            losses.append(float(model(ids[None], labels=ids[None]).loss))
        hook.remove()
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float(fisher[token, channel]) == pytest.approx(slope**2, rel=0.05)


def test_thresholds_leave_the_share_outside():
    rows = torch.randn(1000, 6)
    low, high = thresholds(rows, 0.02)
    assert ((rows < low) | (rows > high)).float().mean(0).tolist() == pytest.approx([0.02] * 6)


def test_levels_go_where_the_loss_is_sensitive():
    rows = torch.linspace(-1, 1, 400)[:, None]
    fisher = torch.where(rows > 0.5, 1.0, 1e-6)
    [found] = levels(ChannelGrid(-torch.ones(1), torch.ones(1), sparse=False), rows, fisher, (2,))
    assert int((found > 0.5).sum()) >= 3


def test_fitting_leaves_no_gradient_in_the_model(tiny, fit):
    fitted = fit(kvgauge.build_method("kvquant"), NAME)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in tiny(NAME).parameters())
    assert fitted.tensors["key_levels_4"].shape == (model_facts(tiny(NAME)).num_layers, 16)
    assert bool((fitted.tensors["key_levels_4"].diff(dim=1) >= 0).all())
    assert fitted.metadata["fit_tokens"] == 640


def test_the_fit_survives_the_disk(tiny, fit, tmp_path):
    method = kvgauge.build_method("kvquant", bits=4)
    fitted = fit(method, NAME)
    fitted.save(tmp_path / "projections.safetensors")
    method.new_cache(tiny(NAME), kvgauge.Fitted.load(tmp_path / "projections.safetensors"))


@pytest.mark.parametrize("bits", [0, 1, 5, 8, 32])
def test_bits_outside_the_set(bits):
    with pytest.raises(kvgauge.UserError, match="give 2, 3 or 4"):
        kvgauge.build_method("kvquant", bits=bits)


@pytest.mark.parametrize("change", [{"outliers": -0.01}, {"outliers": 0.1}, {"sinks": -1}, {"fit_tokens": 1}])
def test_values_out_of_range(change):
    [name] = change
    with pytest.raises(kvgauge.UserError, match=name):
        kvgauge.build_method("kvquant", **change)


def test_no_setting_at_all():
    with pytest.raises(kvgauge.UserError, match="needs a budget, or bits"):
        kvgauge.build_method("kvquant", budget=None)


def test_no_fit(tiny):
    with pytest.raises(kvgauge.UserError, match=r"kvgauge fit method=kvquant"):
        kvgauge.build_method("kvquant").new_cache(tiny(NAME))


def test_a_fit_with_other_outliers(tiny, fit):
    fitted = fit(kvgauge.build_method("kvquant"), NAME)
    with pytest.raises(kvgauge.UserError, match="another configuration"):
        kvgauge.build_method("kvquant", outliers=0.02).new_cache(tiny(NAME), fitted)


def test_moments_without_sequences(tiny, moments):
    bare = kvgauge.Moments(moments(NAME).tensors, moments(NAME).metadata)
    with pytest.raises(kvgauge.UserError, match="collect again"):
        kvgauge.build_method("kvquant").fit(bare, tiny(NAME))


def test_sequences_that_are_too_short(tiny, moments):
    known = moments(NAME)
    short = kvgauge.Moments(known.tensors, known.metadata, (torch.tensor([5, 6]),))
    with pytest.raises(kvgauge.UserError, match="too short"):
        kvgauge.build_method("kvquant").fit(short, tiny(NAME))


def test_a_budget_below_two_bits(tiny, fit):
    method = kvgauge.build_method("kvquant", budget=0.1)
    with pytest.raises(kvgauge.UserError, match=r"budget 0\.1 of kvquant is below the 0\.1\d\d that 2 bits take"):
        method.new_cache(tiny(NAME), fit(method, NAME))


def test_a_budget_that_outliers_break(tiny, fit, tokens):
    method = kvgauge.build_method("kvquant", budget=0.17)
    with pytest.raises(kvgauge.UserError, match=r"budget 0\.17 of kvquant is below"):
        new_cache(method, tiny(NAME), fit(method, NAME), tokens(1, 64))


def test_latents_are_refused(tiny, moments):
    with pytest.raises(kvgauge.UserError, match="use xkv"):
        kvgauge.build_method("kvquant").fit(moments("tiny/deepseek_v2"), tiny("tiny/deepseek_v2"))
