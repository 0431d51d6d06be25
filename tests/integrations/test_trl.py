"""`patch` and `unpatch`: what they replace, what they refuse; ten steps of TRL's trainers with and without."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.integrations import trl as integration

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed (tests/hosts has it)")
pytestmark = pytest.mark.filterwarnings("default")  # TRL warns of its own deprecations


@pytest.fixture(autouse=True)
def _leave_trl_as_it_was() -> Iterator[None]:
    yield
    integration.unpatch()


def with_version(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(integration, "version", lambda name: found)


@pytest.mark.parametrize("found", ["1.15.0", "2.0.0", "0.29.1", "2.1.0.dev0"])
def test_another_version_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    with_version(monkeypatch, found)
    with pytest.raises(RuntimeError, match=rf"found {found}.*pip install 'trl>=1.16,<2'"):
        integration.patch()
    assert integration.active() is None


@needs_trl
def test_an_imported_trl_that_is_not_the_installed_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"imported says it is 1\.17\.0"):
        integration.patch()
    assert integration.active() is None


def test_no_trl_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(integration, "version", absent)
    with pytest.raises(RuntimeError, match="pip install"):
        integration.patch()


def test_unpatch_without_patch_is_harmless() -> None:
    integration.unpatch()


def test_bad_options_are_refused_before_anything_is_replaced() -> None:
    with pytest.raises(ValueError, match="cache_gib"):
        integration.patch(cache_gib=-1.0)
    assert integration.active() is None


def utils() -> Any:
    from trl.trainer import utils

    return utils


def held() -> dict[tuple[str, str], Any]:
    """What every module of TRL holds under the names that are replaced.

    But for `trl.kernels`: where Triton is installed, TRL's own kernel of logits has the name of the function above it.
    """
    return {
        (name, attribute): vars(module)[attribute]
        for name, module in list(sys.modules.items())
        if (name == "trl" or name.startswith("trl.")) and not name.startswith("trl.kernels")
        for attribute in integration.SIGNATURES
        if attribute in vars(module)
    }


@needs_trl
def test_unpatch_restores_exactly() -> None:
    utils()
    before = held()
    done = integration.patch()
    assert set(done.replaced) == {".".join(place) for place in before}
    assert all(value is not before[place] for place, value in held().items())
    integration.unpatch()
    assert held() == before
    assert integration.active() is None


@needs_trl
def test_a_second_patch_changes_options_only() -> None:
    utils()
    before = held()
    first = integration.patch()
    assert integration.patch() == first
    second = integration.patch(cache_gib=1.0, backend="torch")
    assert second.replaced == first.replaced
    assert utils()._ChunkedLogProbFunction.cache_gib == 1.0
    integration.unpatch()
    assert held() == before


@needs_trl
def test_a_context_gives_back_what_was_there_even_after_an_error() -> None:
    utils()
    before = held()

    def fails() -> None:
        with integration.patched(cache_gib=0.0) as done:
            assert integration.active() is done
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert held() == before
    integration.patch(cache_gib=2.0)
    with integration.patched() as inside:
        assert integration.active() is inside
        assert inside.head.cache_gib is None
    assert utils()._ChunkedLogProbFunction.cache_gib == 2.0


@needs_trl
def test_a_module_that_imported_the_name_is_moved_and_so_is_one_that_imports_it_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early: Any = ModuleType("trl.early")
    late: Any = ModuleType("trl.late")
    original = utils().selective_log_softmax
    early.selective_log_softmax = original
    monkeypatch.setitem(sys.modules, "trl.early", early)
    assert "trl.early.selective_log_softmax" in integration.patch().replaced
    late.selective_log_softmax = utils().selective_log_softmax
    monkeypatch.setitem(sys.modules, "trl.late", late)
    assert early.selective_log_softmax is late.selective_log_softmax is not original
    integration.unpatch()
    assert early.selective_log_softmax is late.selective_log_softmax is original


@needs_trl
def test_a_function_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
        raise AssertionError

    before = held()
    monkeypatch.setattr(utils(), "selective_log_softmax", changed)
    with pytest.raises(RuntimeError, match="selective_log_softmax takes"):
        integration.patch()
    monkeypatch.undo()
    assert held() == before


@needs_trl
def test_a_head_that_returns_other_things_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.kernels import chunked_logprob

    monkeypatch.setattr(chunked_logprob, "OPTIONAL_OUTPUTS", ("entropy", "varentropy"))
    with pytest.raises(RuntimeError, match="varentropy"):
        integration.patch()


@needs_trl
def test_a_head_that_nobody_calls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils(), "add_fused_lm_head", lambda model: None)
    with pytest.raises(RuntimeError, match="would not be reached"):
        integration.patch()


@needs_trl
def test_threads_that_patch_together_leave_one_patch() -> None:
    utils()
    before = held()
    threads = [threading.Thread(target=integration.patch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    integration.unpatch()
    assert held() == before


@needs_trl
def test_sixteen_bit_gradients_are_nearer_to_float64_than_trls() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(128, 32, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(0, 128, (64,), generator=generator)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprob = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, target[:, None])
    truth = torch.autograd.grad(logprob.sum(), exact)
    errors = []
    for head in (utils()._ChunkedLogProbFunction, integration.patch().head):
        found = head.apply(hidden, weight, None, target, 1.0, 32)[0]
        got = torch.autograd.grad(found.sum(), (hidden, weight))
        errors.append(max(float((x.double() - y).abs().max()) for x, y in zip(got, truth, strict=True)))
    assert errors[1] < errors[0] / 2


@needs_trl
def test_a_hook_of_the_head_is_passed_by_with_trls_own_head_and_with_fastrls() -> None:
    from tests.integrations.tiny_models import make_batch, make_model

    model, batch = make_model().train(), make_batch()
    utils().add_fused_lm_head(model)
    expected = model(**batch, fused_lm_head=True).loss
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, expected)
    with integration.patched():
        torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, expected)


@pytest.mark.parametrize("name", ["FastGRPOTrainer", "FastDPOTrainer"])
def test_a_trainer_without_trl_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastrl.integrations.trl_trainers", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"{name} needs TRL.*pip install 'trl>=1.16,<2'"):
        getattr(importlib.import_module("fastrl.integrations.trl"), name)
