"""What happens to a model that fastrl was applied to: copied, wrapped, adapted, resized, saved, compiled, reverted."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers

from fastrl.integrations.transformers import apply_fastrl
from tests.integrations.tiny_models import assert_same_with_and_without, loss_and_gradients, make_batch, make_model

# peft asks transformers for a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_revert_gives_back_the_very_functions() -> None:
    model = make_model()
    before = (model.loss_function, inspect.signature(model.forward))
    applied = apply_fastrl(model)
    assert inspect.signature(model.forward) == before[1]  # a Trainer drops columns by it
    applied.revert()
    applied.revert()
    assert (model.loss_function, inspect.signature(model.forward)) == before
    assert "forward" not in vars(model) | vars(model.lm_head)
    assert model.train()(**make_batch()).logits is not None


def test_revert_leaves_a_forward_that_was_wrapped_since() -> None:
    model, batch = make_model(), make_batch()
    applied = apply_fastrl(model)
    ours = model.forward.__func__
    model.forward = wrapped = MethodType(functools.wraps(ours)(lambda model, **inputs: ours(model, **inputs)), model)
    applied.revert()
    assert model.forward is wrapped
    assert model.train()(**batch).logits is not None


def test_lora_that_is_put_on_the_head_afterwards_is_refused_in_the_first_step() -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    apply_fastrl(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="the head has LoRA"):
        model.train()(**make_batch())


def test_a_head_that_is_copied_by_peft_afterwards_is_the_one_that_is_trained() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    expected, got = make_model(), make_model()
    transformers.set_seed(0)
    expected = peft.get_peft_model(expected, config)
    apply_fastrl(got)
    transformers.set_seed(0)
    got = peft.get_peft_model(got, config)
    one, other = loss_and_gradients(expected, **make_batch()), loss_and_gradients(got, **make_batch())
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert got.get_base_model().lm_head.modules_to_save["default"].weight.grad is not None


def test_a_vocabulary_that_grows_afterwards_is_trained_whole() -> None:
    model = make_model()
    applied = apply_fastrl(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    got = loss_and_gradients(model, **make_batch())
    assert model(**make_batch()).logits is None
    applied.revert()
    torch.testing.assert_close(got, loss_and_gradients(model, **make_batch()), rtol=1e-4, atol=1e-5)


def test_what_is_done_around_the_heads_product_is_refused() -> None:
    """Which a stand-in would pass by in silence: a forward of the instance (accelerate's offload), backward hooks."""
    offloaded = make_model()
    plain = offloaded.lm_head.forward
    offloaded.lm_head.forward = lambda hidden: 2 * plain(hidden)
    with pytest.raises(ValueError, match="forward of its own"):
        apply_fastrl(offloaded)
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        hooked = make_model()
        apply_fastrl(hooked)
        handle = getattr(hooked.lm_head, register)(lambda *gradients: None)
        with pytest.raises(ValueError, match="backward hook"):
            hooked.train()(**make_batch())
        handle.remove()
        assert hooked(**make_batch()).logits is None


def doubled_if_a_tensor(module: Any, inputs: Any, output: Any) -> Any:
    return 2 * output if isinstance(output, torch.Tensor) else None


def test_a_forward_hook_of_the_head_is_refused() -> None:
    """A stand-in is no tensor, so a hook that asks for one would do nothing, and the loss be another."""
    model, batch = make_model(), make_batch()
    expected = loss_and_gradients(model, **batch)
    handle = model.lm_head.register_forward_hook(doubled_if_a_tensor)
    assert abs(loss_and_gradients(model, **batch)[0] - expected[0]) > 1e-3  # the model's own logits are doubled
    with pytest.raises(ValueError, match="forward hook"):
        apply_fastrl(model)
    handle.remove()
    apply_fastrl(model)
    handle = model.lm_head.register_forward_hook(doubled_if_a_tensor)
    with pytest.raises(ValueError, match="forward hook"):
        model.train()(**batch)
    assert model.eval()(**batch).logits is not None
    handle.remove()
    torch.testing.assert_close(loss_and_gradients(model, **batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_a_hook_of_the_layer_that_peft_put_around_the_head_is_refused(register: str) -> None:
    peft = pytest.importorskip("peft")
    model, batch = make_model(), make_batch()
    apply_fastrl(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    handle = getattr(model.get_base_model().lm_head, register)(lambda *seen: None)
    with pytest.raises(ValueError, match="hook"):
        model.train()(**batch)
    handle.remove()
    assert model(**batch).logits is None


def test_what_changes_the_hidden_states_before_the_head_is_heard() -> None:
    model, batch = make_model(), make_batch()
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],))
    assert_same_with_and_without(model, **batch)


def test_a_second_thread_in_one_models_forward_is_refused() -> None:
    """It would put the first one's stand-in back for good."""
    model, batch, found = make_model().train(), make_batch(), []

    def step() -> None:
        try:
            model(**batch)
        except ValueError as error:
            found.append(str(error))

    def second(module: Any, inputs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()

    apply_fastrl(model)
    model.lm_head.register_forward_pre_hook(second)
    assert model(**batch).logits is None
    assert len(found) == 1
    assert "one thread" in found[0]
    assert "forward" not in vars(model.lm_head)


def test_applying_twice_is_refused() -> None:
    model = make_model()
    with apply_fastrl(model), pytest.raises(ValueError, match="applied to this model already"):
        apply_fastrl(model)
    with apply_fastrl(model):
        pass


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_deep_copy_trains_its_own_weights(is_wrapped: bool) -> None:
    model, batch = make_model(), make_batch()
    apply_fastrl(model)
    if is_wrapped:  # as accelerate does for mixed precision
        model.forward = MethodType(functools.wraps(model.forward.__func__)(model.forward.__func__), model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    got = loss_and_gradients(copied, **batch)
    assert len(got[1]) == len(list(model.parameters()))
    assert all(x.grad is None for x in model.parameters())
    copied._fastrl_applied.revert()
    torch.testing.assert_close(got, loss_and_gradients(copied, **batch), rtol=1e-4, atol=1e-5)
    assert model.train()(**batch).logits is None


def test_a_model_that_was_reverted_under_another_wrapper_can_be_applied_again() -> None:
    model, batch = make_model(), make_batch()
    applied = apply_fastrl(model)
    ours = model.forward
    model.forward = lambda **inputs: ours(**inputs)
    applied.revert()
    with apply_fastrl(model):
        assert model.train()(**batch).logits is None
    assert model(**batch).logits is not None


def test_a_loss_that_was_set_since_stays() -> None:
    model = make_model()
    applied = apply_fastrl(model)
    model.loss_function = later = lambda logits, labels, **others: logits.sum()
    applied.revert()
    assert model.loss_function is later


def test_a_compiled_model_keeps_its_own_loss() -> None:
    model, batch = make_model(), make_batch()
    expected = loss_and_gradients(model, **batch)
    apply_fastrl(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(compiled, **batch), expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_a_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model, batch = make_model(), make_batch()
    apply_fastrl(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.train()(**batch).logits is not None
    expected = loss_and_gradients(model, **batch)
    torch.testing.assert_close(loss_and_gradients(loaded, **batch), expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_model_is_a_model() -> None:
    model = make_model()
    applied = apply_fastrl(model)
    applied.revert()
    assert_same_with_and_without(copy.deepcopy(model), **make_batch())
