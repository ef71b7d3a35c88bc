"""The faults that scripts/cuda_mutants.py plants in the CUDA kernels, one at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # of cuda/, which has `old` exactly once
    old: str
    new: str
    unit: str  # the .cu file that is compiled
    checks: tuple[str, ...]  # of cuda_checks
    why_not: str = ""  # why nothing here can catch it; empty: something must


NORM = ("rms_norm.cu", ("rms_norm",))
ATTENTION = ("attention.cu", ("attention of boundary rows", "attention of many rows"))
FUSED = ("kv_project_sm90.cu", ("kv_project_sm90",))
MMA = ("skinny_mma.cu", ("skinny_mma",))
WAITS = "  wait_for_kernels_in_front();\n  let_kernel_behind_start();\n"

MUTANTS = (
    Mutant(
        "attention: barrier between loaded K and the scores removed",
        "attention.cu",
        "    __syncthreads();  // K is loaded; V and the probabilities may be overwritten\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier between the scores and the next K removed",
        "attention.cu",
        "    __syncthreads();  // the scores are stored; K may be overwritten\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier between V and its use removed",
        "attention.cu",
        "    __syncthreads();  // the probabilities are stored and V is loaded\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier before the sums take the place of K removed",
        "attention.cu",
        "  __syncthreads();  // K and V may be overwritten\n",
        "",
        *ATTENTION,
    ),
    Mutant(
        "attention: wait for the copy of the first K removed",
        "attention.cu",
        "    if (is_first) {\n      __pipeline_wait_prior(1);",
        "    if (is_first) {",
        *ATTENTION,
    ),
    Mutant(
        "attention: wait for the copy of V removed, last tile",
        "attention.cu",
        "    if (is_last) {\n      __pipeline_wait_prior(0);",
        "    if (is_last) {",
        *ATTENTION,
    ),
    Mutant(
        "attention: wait for the copy of V one group short",
        "attention.cu",
        "    } else {\n      __pipeline_wait_prior(1);\n    }",
        "    } else {\n      __pipeline_wait_prior(2);\n    }",
        *ATTENTION,
    ),
    Mutant(
        "attention: barrier before partial outputs are added removed, merge",
        "attention.cu",
        "  __syncthreads();\n  T* out = static_cast<T*>(p.out)",
        "  T* out = static_cast<T*>(p.out)",
        *ATTENTION,
    ),
    Mutant(
        "attention: __syncwarp before a running maximum is overwritten removed",
        "attention_tile.cuh",
        "  __syncwarp();  // all lanes have read tile.max; a shuffle orders no memory\n",
        "",
        *ATTENTION,
    ),
    Mutant("sum over a block: barrier removed", "launch.cuh", "= value;\n  __syncthreads();\n", "= value;\n", *NORM),
    Mutant(
        "rms_norm: two sums over a block share their memory",
        "rms_norm.cu",
        "    delta_rstd = rms_scale(block_sum(sum, partial_delta), p.width, p.eps);\n  }\n  float sum = 0.0f;\n"
        "#pragma unroll\n",
        "    delta_rstd = rms_scale(block_sum(sum, partial), p.width, p.eps);\n  }\n  float sum = 0.0f;\n"
        "#pragma unroll\n",
        *NORM,
    ),
    Mutant(
        "rms_norm: wait for kernels in front removed",
        "rms_norm.cu",
        WAITS + "  const Row<T> row(p);\n  const int width",
        "  let_kernel_behind_start();\n  const Row<T> row(p);\n  const int width",
        *NORM,
    ),
    Mutant(
        "gated_act: read before the wait for kernels in front",
        "gated_act.cu",
        WAITS,
        "  const float early = to_float(static_cast<const T*>(p.up)[threadIdx.x % p.width]);\n"
        + WAITS
        + "  if (early == 12345.0f) return;\n",
        "gated_act.cu",
        ("gated_act",),
    ),
    Mutant(
        "gated_act: next kernel let start before the wait",
        "gated_act.cu",
        WAITS,
        "  let_kernel_behind_start();\n  wait_for_kernels_in_front();\n",
        "gated_act.cu",
        ("gated_act",),
    ),
    Mutant(
        "skinny_gemm: rows of `a` read before the wait",
        "skinny_gemm.cu",
        "  if (k < end) load_ahead();\n  wait_for_kernels_in_front();",
        "  if (k < end) load_ahead();\n  if (k < end && to_float(*a) == 12345.0f) sums[0] = 1.0f;\n"
        "  wait_for_kernels_in_front();",
        "skinny_gemm.cu",
        ("skinny_gemm",),
    ),
    Mutant(
        "skinny_gemm: barrier before the sums are added removed",
        "skinny_gemm.cu",
        "  __syncthreads();\n",
        "",
        "skinny_gemm.cu",
        ("skinny_gemm",),
    ),
    Mutant(
        "skinny_mma: barrier before the sums are overwritten removed",
        "skinny_mma.cu",
        "    if (first > 0) __syncthreads();  // the sums before have been read\n",
        "",
        *MMA,
    ),
    Mutant(
        "skinny_mma: two words of a fragment exchanged",
        "skinny_mma.cu",
        "{low[2 * half], high[2 * half], low[2 * half + 1], high[2 * half + 1]}",
        "{low[2 * half], low[2 * half + 1], high[2 * half], high[2 * half + 1]}",
        *MMA,
    ),
    Mutant(
        "route: __syncwarp removed",
        "route.cu",
        "  __syncwarp();  // lane 0 wrote the weights\n",
        "",
        "route.cu",
        ("route",),
    ),
    Mutant(
        "group_rows: barrier removed",
        "route.cu",
        "  own[threadIdx.x] = equal;\n  __syncthreads();\n",
        "  own[threadIdx.x] = equal;\n",
        "route.cu",
        ("route",),
    ),
    Mutant(
        "kv_project_sm90: __syncwarp before a stage is released removed",
        "kv_project_sm90.cu",
        "  __syncwarp();  // all lanes have read it\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: producer does not wait for an empty stage",
        "kv_project_sm90.cu",
        "      sm90::barrier_wait(&ring.empty[at.stage], at.parity ^ 1);\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: consumers do not wait for a full stage",
        "kv_project_sm90.cu",
        "    sm90::barrier_wait(&ring.full[at.stage], at.parity);\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: stage released while its products may run",
        "kv_project_sm90.cu",
        "sm90::multiply_wait<1>();",
        "sm90::multiply_wait<2>();",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: wait for the last products removed",
        "kv_project_sm90.cu",
        "  sm90::multiply_wait<0>();\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: fence before the products removed",
        "kv_project_sm90.cu",
        "    sm90::multiply_fence();\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: fence behind the new barriers removed",
        "kv_project_sm90.cu",
        "    sm90::barrier_init_fence();\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: first cluster barrier removed",
        "kv_project_sm90.cu",
        "  sm90::cluster_sync();\n  const int group",
        "  const int group",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: last cluster barrier removed",
        "kv_project_sm90.cu",
        "so neither block may exit first.\n  sm90::cluster_sync();\n",
        "so neither block may exit first.\n",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: cluster barrier before sums are sent removed",
        "kv_project_sm90.cu",
        "  sm90::cluster_sync();  // both blocks have read their last stage\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: cluster barrier behind sent sums removed",
        "kv_project_sm90.cu",
        "  sm90::cluster_sync();  // what the other block has sent is there\n",
        "",
        *FUSED,
    ),
    Mutant(
        "kv_project_sm90: accumulators not tied to the end of the products",
        "kv_project_sm90.cu",
        "  sm90::multiply_done(sums);\n",
        "",
        *FUSED,
        why_not="the compiler may read an accumulator early, and here it need not: only the results of a GPU show it",
    ),
    Mutant(
        "wait for kernels in front does not order memory for the compiler",
        "launch.cuh",
        'asm volatile("griddepcontrol.wait;" ::: "memory");',
        'asm volatile("griddepcontrol.wait;");',
        "gated_act.cu",
        ("gated_act",),
        why_not="the compiler may move a load over the wait, and in this kernel does not; if it did, `make sass` would "
        "say so",
    ),
)
