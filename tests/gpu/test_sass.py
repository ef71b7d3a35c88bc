"""scripts/check_sass.py finds kernels that act before their wait: in short texts of SASS, and in what nvcc makes."""

from __future__ import annotations

import re
from pathlib import Path

import check_sass
import cuda_tools
import pytest
from check_sass import ROOT, before_wait, early_sources, names_kernel, parse, violations

PLANTED = Path(__file__).with_name("planted_early_kernels.cu")

needs_nvcc = pytest.mark.skipif(
    cuda_tools.find_nvcc() is None or cuda_tools.find_cuobjdump() is None, reason="needs nvcc and cuobjdump"
)

HEADER = """
Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a
\t.target\tsm_90a

\t\tFunction : {name}
\t.headerflags\t@"EF_CUDA_SM90"
"""


def sass(*lines: str, name: str = "some_kernel") -> str:
    """Return a text as cuobjdump prints it, with the encoding that follows each instruction and stands below it."""
    code = (
        f"        /*{16 * i:04x}*/          {line} ;      /* 0x00000a00ff017b82 */\n{'':60}/* 0x000ff00000000800 */"
        for i, line in enumerate(lines)
    )
    return HEADER.format(name=name) + "\n".join(code) + "\n\t\t..........\n"


def code_of(*lines: str):
    (function,) = parse(sass(*lines))
    return function.code


def early(*lines: str) -> list[str]:
    reached, lost = before_wait(code_of(*lines))
    assert lost == []
    return [f"{i.operation} {i.operands}".strip() for i in reached]


# Parsing


def test_instructions_are_read_with_guard_operation_and_operands():
    text = sass("LDC R1, c[0x0][0x28]", "@!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10]", "@UP1 BRA 0x0", "EXIT")
    (function,) = parse(text)
    assert (function.architecture, function.symbol) == ("sm_90a", "some_kernel")
    assert [str(i) for i in function.code] == [
        "0000 LDC R1, c[0x0][0x28]",
        "0010 @!P0 LDG.E.128 R4, desc[UR6][R2.64+0x10]",
        "0020 @UP1 BRA 0x0",
        "0030 EXIT",
    ]


def test_functions_of_several_architectures_are_kept_apart():
    functions = list(parse(sass("EXIT", "NOP") + sass("NOP", name="b").replace("sm_90a", "sm_100")))
    assert [(f.architecture, f.symbol, len(f.code)) for f in functions] == [
        ("sm_90a", "some_kernel", 2),
        ("sm_100", "b", 1),
    ]


@pytest.mark.parametrize(
    ("symbol", "expected"),
    [
        ("_ZN3pop4cuda41_GLOBAL__N__d6d03bb5_8_merge_cu_a994a01512merge_kernelIfEEvNS1_15AttentionLaunchE", True),
        ("_Z12merge_kernelv", True),
        ("_ZN3pop12merge_kernelEv", True),
        ("merge_kernel", True),
        ("_ZN3pop17other_merge_kernelIfEEvv", False),
        ("_ZN3pop18merge_kernel_twiceIfEEvv", False),
    ],
)
def test_a_mangled_name_is_that_of_the_kernel(symbol, expected):
    assert names_kernel(symbol, "merge_kernel") is expected


# Control flow


def test_nothing_behind_the_wait_is_early():
    assert early("MOV R1, R2", "ACQBULK", "PREEXIT", "LDG.E R0, desc[UR4][R2.64]", "EXIT") == ["MOV R1, R2"]


def test_both_ways_of_a_guarded_branch_are_followed():
    assert early("@P0 BRA 0x30", "ACQBULK", "EXIT", "IADD3 R0, R0, R1, RZ", "BRA 0x10") == [
        "BRA 0x30",
        "IADD3 R0, R0, R1, RZ",
        "BRA 0x10",
    ]


@pytest.mark.parametrize("branch", ["BRA P0, 0x30", "BRA.U !UP0, 0x30", "@!UP0 BRA 0x30", "BRA.DIV UR4, 0x30"])
def test_every_form_of_condition_may_fail(branch):
    assert "EXIT" in early(branch, "EXIT", "NOP", "ACQBULK", "EXIT")


@pytest.mark.parametrize("branch", ["BRA 0x30", "@PT BRA 0x30", "BRA.U 0x30"])
def test_code_that_a_branch_jumps_over_is_not_early(branch):
    assert "EXIT" not in early(branch, "EXIT", "NOP", "ACQBULK", "EXIT")


def test_a_loop_ends_the_search():
    assert len(early("IADD3 R0, R0, R1, RZ", "@P0 BRA 0x0", "BRA.U UP0, 0x10", "ACQBULK", "BRA 0x40")) == 3


def test_a_guarded_wait_is_none():
    assert "EXIT" in early("@P0 ACQBULK", "EXIT", "ACQBULK")


def test_a_thread_goes_on_where_its_barrier_register_says():
    assert "EXIT" not in early("BSSY B0, 0x40", "@P0 BRA 0x20", "BSYNC B0", "EXIT", "ACQBULK", "EXIT")
    assert "EXIT" in early("BSSY.RECONVERGENT B0, 0x20", "BSYNC.RECONVERGENT B0", "EXIT", "ACQBULK")


@pytest.mark.parametrize(
    "line",
    ["CALL.REL.NOINC 0x20", "BRX R2 -0x30", "RET.REL.NODEC R2 0x0", "BSYNC B1", "BRA 0x1000", "JMP 0x20"],
)
def test_a_jump_that_is_not_followed_is_a_violation(line):
    (reason, *_) = violations(code_of("NOP", line, "ACQBULK", "EXIT"), 0)
    assert reason == f"jumps before the wait in a way that is not followed: 0010 {line}"


def test_a_barrier_register_that_was_moved_is_not_followed():
    (reason, *_) = violations(code_of("BSSY B0, 0x30", "BMOV.32 B0, R2", "BSYNC B0", "ACQBULK", "EXIT"), 0)
    assert "0020 BSYNC B0" in reason


# Rules

LOAD = "@P4 LDG.E.EF.128 R28, desc[UR6][R106.64]"


def test_a_kernel_that_waits_first_is_right():
    assert violations(code_of("LDC R1, c[0x0][0x28]", "ACQBULK", "PREEXIT", LOAD, "@P0 EXIT", "EXIT"), 0) == []


def test_named_loads_of_weights_are_counted():
    code = code_of(LOAD, LOAD, "ACQBULK", "PREEXIT", "EXIT")
    assert violations(code, 2) == []
    assert violations(code, 1)[0].startswith("expected 1 loads before the wait, got 2:")
    assert violations(code, 3)[0].startswith("expected 3 loads before the wait, got 2:")
    assert violations(code[2:], 1) != []


@pytest.mark.parametrize(
    "line",
    [
        "LD.E R0, [R2.64]",
        "ST.E desc[UR4][R2.64], R0",
        "@P1 STG.E.64 desc[UR4][R2.64], R4",
        "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]",
        "ATOMG.E.ADD.STRONG.GPU PT, R0, desc[UR4][R2.64], R5",
        "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5",
        "UTMALDG.2D [UR8], [UR4]",
        "UBLKCP.S.G [UR4], [UR6], UR8",
        "TEX R0, R2, R4, 0x0, 0x58, 2D",
        "NEWLOAD.E R0, desc[UR4][R2.64]",
    ],
)
def test_any_other_access_of_global_memory_is_a_violation(line):
    assert violations(code_of(line, "ACQBULK", "EXIT"), 0) == [f"touches global memory before the wait: 0000 {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "LDS R0, [R2]",
        "STS.128 [R5], R4",
        "LDC.64 R2, c[0x0][R24+0x25c]",
        "LDCU UR4, c[0x0][0x360]",
        "LDL R0, [R1]",
        "REDUX.SUM UR4, R2",
        "LDGDEPBAR",
        "ULDC.64 UR6, c[0x0][0x208]",
        "ATOMS.ADD R0, [R2], R4",
        "LDSM.16.M88 R0, [R2]",
    ],
)
def test_other_memory_may_be_used_before_the_wait(line):
    assert violations(code_of(line, "ACQBULK", "EXIT"), 0) == []


def test_exits_and_triggers_before_the_wait_are_violations():
    assert violations(code_of("@P0 EXIT", "PREEXIT", "ACQBULK", "EXIT"), 0) == [
        "may exit before the wait: 0000 @P0 EXIT",
        "may let the next kernel start before the wait: 0010 PREEXIT",
    ]


def test_a_kernel_without_a_wait_is_a_violation():
    assert violations(code_of("PREEXIT", "EXIT"), 0) == ["never waits for the kernel in front"]


# Which kernels


def test_early_kernels_are_those_of_files_that_launch_early():
    sources = early_sources(ROOT / "cuda")
    kernels = {name for found in sources.values() for name in found}
    assert {path.name for path in sources} == {
        path.name
        for path in (ROOT / "cuda").rglob("*.cu")
        if re.search(r"\blaunch_(early|skinny)\(", path.read_text(encoding="utf-8"))  # the latter is of a header
    }
    assert {"attention_kernel", "merge_kernel", "rms_norm_kernel", "skinny_gemm_kernel"} <= kernels
    assert sources[ROOT / "cuda" / "skinny_gemm.cu"] == {"skinny_gemm_kernel": 4}


def test_a_kernel_in_a_header_counts_and_a_comment_does_not(tmp_path):
    (tmp_path / "tile.cuh").write_text("__global__ void __launch_bounds__(k, f(2)) tile_kernel(int) {}\n")
    (tmp_path / "one.cu").write_text('#include "cuda/tile.cuh"\nlaunch_early("one", tile_kernel);\n')
    (tmp_path / "two.cu").write_text('// launch_early(...)\n__global__ void plain_kernel() {}\nlaunch("two", plain);\n')
    assert early_sources(tmp_path) == {tmp_path / "one.cu": {"tile_kernel": 0}}


def test_a_kernel_whose_name_is_not_found_is_an_error(tmp_path):
    (tmp_path / "one.cu").write_text("extern __global__ some_macro(kernel);\nlaunch_early(kernel);\n")
    with pytest.raises(ValueError, match="expected the name of each of 1 kernels"):
        early_sources(tmp_path)


def test_a_marker_of_an_unknown_kernel_is_an_error(tmp_path):
    (tmp_path / "one.cu").write_text(
        "// check_sass: b_kernel loads 1 weights early\n__global__ void a_kernel() {}\nlaunch_early(a_kernel);\n"
    )
    with pytest.raises(ValueError, match=r"got one of \['b_kernel'\]"):
        early_sources(tmp_path)


def test_missing_kernels_and_unlisted_waits_are_reported():
    functions = [*parse(sass("ACQBULK", "EXIT", name="a_kernel")), *parse(sass("PREEXIT", "EXIT", name="c_kernel"))]
    lines, failed = check_sass.check(functions, {"a_kernel": 0, "b_kernel": 0})
    assert failed == 2
    assert lines == [
        "sm_90a a_kernel, 1 forms: nothing before the wait",
        "FAILED sm_90a c_kernel\n    waits or triggers, and its file never calls launch_early",
        "FAILED sm_90a b_kernel\n    is not in the machine code",
    ]


def test_code_for_older_devices_alone_is_reported():
    functions = parse(sass("EXIT", name="a_kernel").replace("90a", "80"))
    lines, failed = check_sass.check(functions, {"a_kernel": 0})
    assert (failed, lines) == (1, ["FAILED expected code for compute capability 9.0 or more, got none"])


# Planted faults

REASONS = {
    "right_kernel": None,
    "right_weights_kernel": None,
    "read_kernel": "expected 0 loads before the wait, got 1",
    "second_read_kernel": "expected 1 loads before the wait, got 2",
    "write_kernel": "touches global memory before the wait",
    "copy_kernel": "touches global memory before the wait",
    "exit_kernel": "may exit before the wait",
    "trigger_kernel": "may let the next kernel start before the wait",
    "sometimes_kernel": "",  # everything behind a wait that some thread may skip
    "never_kernel": "never waits for the kernel in front",
}


@needs_nvcc
def test_planted_faults_are_found_in_machine_code(tmp_path):
    (tmp_path / PLANTED.name).write_bytes(PLANTED.read_bytes())
    ((source, kernels),) = early_sources(tmp_path).items()
    assert kernels.keys() == REASONS.keys()
    cuda_tools.compile_kernels(source, tmp_path / "planted.fatbin", check_sass.ARCHITECTURES)
    functions = list(parse(cuda_tools.disassemble(tmp_path / "planted.fatbin")))
    for architecture in [f"sm_{name}" for name in check_sass.ARCHITECTURES]:
        for name, reason in REASONS.items():
            (function,) = [f for f in functions if f.architecture == architecture and names_kernel(f.symbol, name)]
            found = violations(function.code, kernels[name])
            if reason is None:
                assert found == [], name
            else:
                assert any(line.startswith(reason) for line in found), (name, found)


WAIT = "  wait_for_kernels_in_front();\n  let_kernel_behind_start();\n"

MUTATIONS = {
    "a read before the wait": (
        "gated_act.cu",
        rf"({re.escape(WAIT)})(.*?)(  float out\[)",
        r"\2\1\3",
        "expected 0 loads before the wait, got ",
    ),
    "an exit before the wait": (
        "gated_act.cu",
        rf"({re.escape(WAIT)})",
        r"  if (threadIdx.x >= p.width) return;\n\1",
        "may exit before the wait",
    ),
}


@needs_nvcc
@pytest.mark.parametrize(("file", "pattern", "replacement", "reason"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_fault_planted_in_a_kernel_of_ours_is_found(tmp_path, file, pattern, replacement, reason):
    text = (ROOT / "cuda" / file).read_text(encoding="utf-8")
    mutated, count = re.subn(pattern, replacement, text, count=1, flags=re.DOTALL)
    assert count == 1
    (tmp_path / file).write_text(mutated)
    kernels = early_sources(tmp_path)[tmp_path / file]
    cuda_tools.compile_kernels(tmp_path / file, tmp_path / "mutated.fatbin", ["90a"])
    lines, failed = check_sass.check(parse(cuda_tools.disassemble(tmp_path / "mutated.fatbin")), kernels)
    assert failed > 0
    failures = [line for line in lines if line.startswith("FAILED")]
    assert [line for line in failures if reason not in line] == []


@needs_nvcc
def test_the_epilogue_of_the_fused_projection_issues_its_loads_before_its_stores(tmp_path):
    cuda_tools.compile_kernels(ROOT / "cuda" / "kv_project_sm90.cu", tmp_path / "kernel.fatbin", ["90a"])
    functions = list(parse(cuda_tools.disassemble(tmp_path / "kernel.fatbin")))
    assert len(functions) == 6
    for function in functions:
        has_halves = "ELb1E" in function.symbol
        operations = [instruction.base for instruction in function.code]
        stores = [instruction for instruction in function.code if instruction.base == "STG"]
        # Of 16 bytes, 8 for each of the two rows of a thread. Of the form with halves the compiler makes some twice.
        assert len(stores) >= 16 if has_halves else len(stores) == 16
        assert all(store.operation == "STG.E.128" for store in stores)
        assert "LDG" not in operations[operations.index("STG") :]
        assert operations.count("HGMMA") == 4  # one loop of products, in both forms
        sent = [instruction.operation for instruction in function.code if instruction.base == "ST"]
        assert sent == ["ST.E.128"] * 33 * has_halves  # 128 sums and the squares, to the other block
