from __future__ import annotations

import pytest
import torch

from trainer.device import choose_precision

CPU = torch.device("cpu")
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@pytest.fixture(autouse=True)
def _unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "value"),
    [(VARIABLES[0], "AVX2"), (VARIABLES[0], "avx512_core"), (VARIABLES[1], "AVX2"), (VARIABLES[2], "avx2")],
)
def test_without_instructions_for_bf16_a_cpu_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    for training in (True, False):
        assert str(choose_precision("auto", CPU, training)) == "fp32 (auto: this CPU has no instructions for bf16)"
        assert "emulates bf16, which takes about 2 to 10 times as long as fp32" in (
            choose_precision("bf16", CPU, training).warning
        )


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
@pytest.mark.parametrize(
    ("most", "training", "evaluating"),
    [
        ("", "bf16 (auto: this CPU has amx_bf16)", "bf16 (auto: this CPU has amx_bf16)"),
        ("AVX512_CORE_BF16", "fp32 (auto: avx512_bf16 does not train faster)", "bf16 (auto: this CPU has avx512_bf16)"),
    ],
)
def test_bf16_is_chosen_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, most: str, training: str, evaluating: str
) -> None:
    monkeypatch.setenv(VARIABLES[0], most)
    assert str(choose_precision("auto", CPU, training=True)) == training
    assert str(choose_precision("auto", CPU, training=False)) == evaluating
    assert choose_precision("bf16", CPU, training=True).warning == ""


def test_a_given_precision_is_used() -> None:
    assert choose_precision("fp32", CPU, training=True) == ("fp32", "", "")
    assert "emulates fp16" in choose_precision("fp16", CPU, training=True).warning
