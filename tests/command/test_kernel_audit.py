"""What the audit reads out of assemblies, what it calls a problem, and what it refuses; compiling is tests/kernels'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastrl.command import kernel_audit as module
from fastrl.command.kernel_audit import TARGETS, TENSOR_CORE, audit, known_modules

CLEAN = """
    v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     70
    .vgpr_spill_count: 0
"""


def audited(
    monkeypatch: pytest.MonkeyPatch, assembly: str, *, shared: int = 0, tensor_core: bool = False
) -> module.Audited:
    """The record of a kernel whose AMD assembly is given."""

    def kernel() -> None: ...

    entry = {"kernel": kernel, "signature": {"x_ptr": "*fp32", "N": "i32"}, "constexprs": {"BLOCK": 64}}
    entry |= {"num_warps": 4, "num_stages": 2, "tensor_core": tensor_core}
    compiled = SimpleNamespace(asm={"amdgcn": assembly}, metadata=SimpleNamespace(shared=shared))
    monkeypatch.setattr(module, "_compiled", lambda *_: compiled)
    return module._audited("some_file", entry, "gfx942")


def test_registers_stack_and_tensor_core_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    record = audited(monkeypatch, CLEAN, shared=512)
    assert (record.registers, record.spills, record.stack, record.shared_bytes, record.tensor_core) == (
        70,
        0,
        0,
        512,
        1,
    )
    assert record.kernel == "some_file.kernel"
    assert record.config == "fp32 BLOCK=64 4 warps 2 stages"
    assert record.problem is None


def test_a_spill_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    record = audited(monkeypatch, CLEAN.replace(".vgpr_spill_count: 0", ".vgpr_spill_count: 12"))
    assert (record.spills, record.problem) == (12, "spills 12")


def test_a_scalar_kept_in_a_vector_register_is_no_spill_and_one_in_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = CLEAN.replace(".sgpr_spill_count: 0", ".sgpr_spill_count: 2")
    assert audited(monkeypatch, spilled).problem is None
    assert audited(monkeypatch, spilled.replace("segment_fixed_size: 0", "segment_fixed_size: 8")).spills == 2


def test_a_product_without_tensor_core_instructions_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = CLEAN.replace("v_mfma", "v_fma")
    assert audited(monkeypatch, slow).problem is None
    assert audited(monkeypatch, slow, tensor_core=True).problem == "a product without tensor-core instructions"
    assert audited(monkeypatch, CLEAN, tensor_core=True).problem is None


def test_a_rotation_has_every_configuration_once_and_every_kernel_on_every_chip() -> None:
    whole = module.listed()
    entries = list(module._entries(known_modules(), 1))
    task = {"modules": known_modules(), "targets": list(TARGETS), "every": 1, "rotate": True}
    rotated = module._everything(task)
    assert [id(entry) for _, entry, _ in rotated] == [id(entry) for _, entry in entries]
    named = [module._named(*x) for x in rotated]
    assert set(named) <= set(whole)
    assert {(x.kernel, x.target) for x in named} == {(x.kernel, x.target) for x in whole}


def test_more_shared_memory_than_the_chip_has_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = TARGETS["gfx942"].shared_limit
    assert audited(monkeypatch, CLEAN, shared=limit).problem is None
    assert audited(monkeypatch, CLEAN, shared=limit + 1).problem == "65537 bytes of shared memory, the chip has 65536"


def test_a_kernel_that_does_not_compile_is_a_problem_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("at 7:4:\nincompatible types")

    entry = {"kernel": broken, "signature": {}, "constexprs": {}, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(module, "_compiled", broken)
    assert module._audited("some_file", entry, "sm_90").problem == "does not compile: incompatible types"


def test_tensor_core_instructions_of_every_chip_are_known() -> None:
    lines = (
        "\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};",
        "\twgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1;",
        "\t@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p2;",
        "\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]",
        "\twgmma.fence.sync.aligned;",
        "// mma.sync in a comment",
    )
    assert len(TENSOR_CORE.findall("\n".join(lines))) == 4


def test_the_files_of_the_kernels_folder_are_found_by_name() -> None:
    assert {"token_objective", "group_advantage", "reverse_scan", "gae"} <= set(known_modules())


def test_an_unknown_file_or_chip_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no kernel file 'softmax'"):
        audit(["softmax"])
    with pytest.raises(ValueError, match="no target 'sm_91'; there are sm_80"):
        audit(targets=["sm_91"])


def test_a_worker_that_dies_is_reported_and_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "known_modules", lambda: ["no_such_file"])
    with pytest.raises(RuntimeError, match=r"ended with code 1: .*no_such_file"):
        audit(["no_such_file"], jobs=1)
