"""TRL on the waist: `patch()` puts fastrl under TRL's fused head and its logits functions, `unpatch()` takes it away.

TRL's SFT, DPO, KTO, GRPO and RLOO trainers all reach the vocabulary through one function, which
`trl.trainer.utils.add_fused_lm_head` looks up by name at every call: replacing that name moves them all, models that
already have their fused head included. The trainers that also pack are in `fastrl.integrations.trl_trainers`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from threading import RLock
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from fastrl.integrations.trl_head import FusedHead
from fastrl.integrations.trl_logits import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy

if TYPE_CHECKING:
    from fastrl.integrations.trl_trainers import FastDPOTrainer, FastGRPOTrainer

__all__ = ["FastDPOTrainer", "FastGRPOTrainer", "Patch", "patch", "patched", "unpatch"]

HEAD = "_ChunkedLogProbFunction"
LEAST, NEXT_MAJOR = (1, 16), 2
# what is replaced, by the names of its arguments in order: other arguments may mean something else
SIGNATURES: dict[str, tuple[str, ...]] = {
    HEAD: (
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
    "selective_log_softmax": ("logits", "index", "temperature", "row_mask"),
    "selective_log_softmax_and_entropy": ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
    "entropy_from_logits": ("logits", "chunk_size"),
}
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True, slots=True)
class Patch:
    """What `patch` did.

    Attributes:
        trl_version: of the installed TRL.
        head: what stands in for TRL's fused head.
        replaced: the names that are fastrl's now, "module.name" each.
    """

    trl_version: str
    head: FusedHead
    replaced: tuple[str, ...]
    _originals: dict[str, Any] = field(repr=False, compare=False)


_lock = RLock()
_active: Patch | None = None


def patch(*, cache_gib: float | None = None, backend: str | None = None) -> Patch:
    """Run TRL's trainers on fastrl's waist, in this process, until `unpatch()`.

    Trainers and models made before or after are moved alike. A second call changes the options and moves modules of
    TRL that were imported meanwhile; it is harmless otherwise.

    Args:
        cache_gib: memory for probabilities kept from forward to backward, which makes their rows cost 6 D V
            operations each instead of 8; None 0.25 GiB, 0 none (`fastrl.ops.linear_logprob`).
        backend: of the ops; None is the machine's best.

    Returns:
        Patch, what was replaced.

    Raises:
        RuntimeError: TRL is not installed, is outside >=1.16,<2, or has other functions than fastrl was written for.
        ValueError: options that the ops refuse.
    """
    global _active
    head = FusedHead(cache_gib=cache_gib, backend=backend)
    with _lock:
        found = _active.trl_version if _active is not None else _checked_version()
        utils = import_module("trl.trainer.utils")
        originals = _active._originals if _active is not None else _checked_originals(utils)
        ours: dict[str, Any] = {
            HEAD: head,
            "selective_log_softmax": selective_log_softmax,
            "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
            "entropy_from_logits": entropy_from_logits,
        }
        present = originals if _active is None else ours | {HEAD: _active.head}
        moved = _exchange(present, ours) | _exchange(originals, ours)
        _active = Patch(found, head, tuple(sorted(moved)), originals)
        return _active


def unpatch() -> None:
    """Give TRL its own functions back, wherever `patch` or an import since then has put fastrl's; harmless without."""
    global _active
    with _lock:
        if _active is None:
            return
        ours: dict[str, Any] = {name: globals().get(name, _active.head) for name in SIGNATURES}
        _exchange(ours, _active._originals)
        _active = None


@contextmanager
def patched(*, cache_gib: float | None = None, backend: str | None = None) -> Iterator[Patch]:
    """`patch` inside the `with` block, and afterwards what was there before; arguments and errors are patch's.

    The block is of the process, not of a thread: two threads that want different things need two processes.
    """
    before = _active
    try:
        yield patch(cache_gib=cache_gib, backend=backend)
    finally:
        if before is None:
            unpatch()
        else:
            patch(cache_gib=before.head.cache_gib, backend=before.head.backend)


def active() -> Patch | None:
    """The patch in force, or None."""
    return _active


def _checked_version() -> str:
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise RuntimeError("patch() needs TRL, which is not installed: pip install 'trl>=1.16,<2'") from None
    release = tuple(int(part) for part in found.split(".")[:2])
    if not LEAST <= release < (NEXT_MAJOR, 0):
        raise RuntimeError(
            f"fastrl fits TRL >=1.16,<2 and found {found}, whose fused head has other arguments or returns: "
            "pip install 'trl>=1.16,<2'"
        )
    running = import_module("trl").__version__
    if running != found:
        raise RuntimeError(
            f"the TRL that was imported says it is {running}, the one that is installed {found}: start Python again, "
            "with one of them"
        )
    return found


def _checked_originals(utils: ModuleType) -> dict[str, Any]:
    """TRL's functions by name, when they are the ones that fastrl's stand in for.

    Raises:
        RuntimeError: a function that is missing, has other arguments, or is no longer where the trainers look.
    """
    originals = {}
    for name, expected in SIGNATURES.items():
        original = vars(utils).get(name)
        if original is None:
            raise RuntimeError(f"trl.trainer.utils has no {name}: this version of TRL is not one fastrl knows")
        called = original.forward if name == HEAD else original
        arguments = tuple(inspect.signature(called).parameters)
        if arguments[name == HEAD :] != expected:
            raise RuntimeError(
                f"trl.trainer.utils.{name} takes {arguments}, fastrl's takes {expected}: leave TRL as it is, or "
                "install the version of TRL that the docs of fastrl.integrations.trl name"
            )
        originals[name] = original
    outputs = import_module("trl.kernels.chunked_logprob").OPTIONAL_OUTPUTS
    if outputs != OUTPUTS:
        raise RuntimeError(f"TRL's fused head gives {outputs} besides log-probabilities, fastrl's gives {OUTPUTS}")
    if not _mentions(utils.add_fused_lm_head.__code__, HEAD):
        raise RuntimeError(f"trl's add_fused_lm_head no longer calls {HEAD}: fastrl would not be reached")
    return originals


def _mentions(code: CodeType, name: str) -> bool:
    """Whether a function, or one defined inside it, looks a global name up."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return name in code.co_names or any(_mentions(constant, name) for constant in inner)


def _exchange(present: dict[str, Any], wanted: dict[str, Any]) -> set[str]:
    """Replace present[name] by wanted[name] in every module of TRL that holds it; returns the places."""
    places = set()
    for module_name, module in list(sys.modules.items()):
        if module_name != "trl" and not module_name.startswith("trl."):
            continue
        for name in SIGNATURES:
            if vars(module).get(name) is present[name]:
                setattr(module, name, wanted[name])
                places.add(f"{module_name}.{name}")
    return places


def __getattr__(name: str) -> Callable[..., Any]:
    # The trainers inherit from TRL's, which takes seconds to import and may be absent.
    if name in ("FastDPOTrainer", "FastGRPOTrainer"):
        try:
            trainers = import_module("fastrl.integrations.trl_trainers")
        except ModuleNotFoundError as error:
            if error.name != "trl":
                raise
            raise ImportError(f"{name} needs TRL, which is not installed: pip install 'trl>=1.16,<2'") from None
        return getattr(trainers, name)  # type: ignore[no-any-return]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
