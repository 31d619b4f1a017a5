# SPDX-License-Identifier: Apache-2.0
"""
Ahead-of-time compilation of every shipped kernel configuration, without a GPU: registers, spills, shared memory,
tensor-core and asynchronous-copy instructions, and an instruction budget, so that a slow kernel fails.

The interpreter and the compiler exclude each other within a process, so this file runs itself as a script:
`python test_ops_contrastive_aot.py OUTPUT.json [all]`.
"""

import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest


# Shared memory a program may use, by architecture, in bytes.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# SASS instructions of a kernel for the diagonal pair rule: measured with triton 3.9 plus 10 %. A program of `grad` and
# `sigmoid` is one tile; `lse` and `exact` hold one tile in their loop and the column reduction behind it.
BUDGET = {
    "lse": {
        (80, True): 1910,
        (90, True): 2650,
        (100, True): 4200,
        (80, False): 1900,
        (90, False): 2050,
        (100, False): 3040,
    },
    "exact": {
        (80, True): 2130,
        (90, True): 3310,
        (100, True): 1350,
        (80, False): 2040,
        (90, False): 2310,
        (100, False): 3580,
    },
    "exact_ids": {(80, True): 1810, (90, True): 2250, (100, True): 3500},
    "grad": {
        (80, True): 1700,
        (90, True): 1720,
        (100, True): 1310,
        (80, False): 1690,
        (90, False): 1540,
        (100, False): 2000,
    },
    "sigmoid": {
        (80, True): 5660,
        (90, True): 5000,
        (100, True): 2910,
        (80, False): 4250,
        (90, False): 3230,
        (100, False): 3590,
    },
}
POINTERS = {
    "*fp32": "scale_ptr bias_ptr weights row_part col_part bias_part row_lse col_lse grad_row grad_col row_pos"
    " col_pos pair",
    "*i32": "flags row_ids col_ids",
    "i32": "n M D row_offset stride tiles",
}


def cases(everything):
    """(kernel, architecture, dtype, configuration, pair rule, with gradient) of what is shipped."""
    from llm2clip_hf.ops import contrastive_triton as kernels

    found = []
    for (kernel, arch, half), configs in kernels.CONFIGS.items():
        rules = (0,) if not kernel.endswith("_ids") else (2,) if kernel == "lse_ids" else (1, 2)
        for config in configs:
            # One tile serves all 32-bit features with room to spare: the rules with ids are compiled for 16 bits only.
            for rule in rules if half else rules[:1] if rules[0] == 0 else ():
                found.append((kernel.removesuffix("_ids"), arch, "bf16" if half else "fp32", config, rule, True))
            if kernel.startswith("lse") and (half or kernel == "lse"):
                exact = config._replace(warps=kernels.exact_warps(config, arch))
                found.append(("exact", arch, "bf16" if half else "fp32", exact, rules[0], True))
    default = [case for case in found if case[1] == 90 and case[2] == "bf16" and case[4] == 0]
    if not everything:
        return default
    # fp16 differs from bf16 in the type of its loads, evaluation from training by what it leaves out: once is enough.
    found += [(*case[:2], "fp16", *case[3:]) for case in default if case[0] in ("lse", "grad")]
    return found + [(*case[:5], False) for case in default if case[0] == "sigmoid"]


def compile_case(case):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llm2clip_hf.ops import contrastive_triton as kernels

    kernel, arch, dtype, (bm, bn, bd, warps, stages), pairs, grad = case
    function = {
        "lse": kernels._lse_kernel,
        "exact": kernels._lse_exact_kernel,
        "grad": kernels._lse_grad_kernel,
        "sigmoid": kernels._sigmoid_kernel,
    }[kernel]
    descriptors = arch >= 90
    constants = {
        "BM": bm, "BN": bn, "BD": bd, "PAIRS": pairs, "DESC": descriptors, "UP": False, "GROUP": kernels.GROUP,
        "GRAD": grad, "ROWS": True, "COLS": True, "K": 2 if pairs == 2 else 1,
        "PREC": "tf32x3" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    if pairs == 0:
        constants |= {"row_ids": None, "col_ids": None}
    if pairs != 1:
        constants |= {"row_pos": None, "col_pos": None}
    if not grad:
        constants["g"] = None
    types = {name: kind for kind, group in POINTERS.items() for name in group.split()}
    for name, block in (("x", (bm, bd)), ("y", (bn, bd)), ("g", (bm, bn))):
        types[name] = f"tensordesc<{dtype}[{block[0]},{block[1]}]>" if descriptors else f"*{dtype}"
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in function.arg_names},
        constexprs=constants,
        # What the launcher would find out: storage is aligned, and widths are multiples of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if name not in constants and (types[name][0] == "*" or name in ("D", "stride"))
        },
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    return {
        "kernel": kernel,
        "arch": arch,
        "dtype": dtype,
        "config": [bm, bn, bd, warps, stages],
        "pairs": pairs,
        "grad": grad,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "spills": sum(name in ("STL", "LDL") for name in instructions),
        "tensor_core": sum(bool(re.match(r"HGMMA|HMMA|UTC\w*MMA", name)) for name in instructions),
        "async_copy": len(re.findall(r"cp\.async\.(?:bulk\.tensor|c[ag])", compiled.asm["ptx"])),
        "instructions": sum(name != "NOP" for name in instructions),
    }


def main(output, everything):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(compile_case, cases(everything), chunksize=1)
    pathlib.Path(output).write_text(json.dumps(results), encoding="utf-8")


def compiled(tmp_path, *arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default is about to change; the budgets are for this one
    output = tmp_path / "aot.json"
    command = [sys.executable, __file__, str(output), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text(encoding="utf-8"))


def check(result):
    threads = result["config"][3] * 32
    assert result["stack"] == 0, result
    assert result["spills"] == 0, result
    assert result["registers"] * threads <= 65_536, result
    assert result["shared"] <= SHARED_LIMIT[result["arch"]], result
    assert result["tensor_core"] > 0, result
    assert result["async_copy"] > 0, result
    kernel = "exact_ids" if result["kernel"] == "exact" and result["pairs"] else result["kernel"]
    budget = BUDGET[kernel][result["arch"], result["dtype"] != "fp32"]
    assert result["instructions"] <= budget * (1.0 if result["pairs"] == 0 or kernel == "exact_ids" else 1.5), result


def test_default_hopper_kernels_fit_their_budgets(tmp_path):
    pytest.importorskip("triton")
    results = compiled(tmp_path)
    assert {result["kernel"] for result in results} == {"lse", "exact", "grad", "sigmoid"}
    for result in results:
        check(result)


@pytest.mark.slow
def test_every_shipped_configuration_fits_its_budget(tmp_path):
    pytest.importorskip("triton")
    results = compiled(tmp_path, "all")
    assert {result["arch"] for result in results} == {80, 90, 100}
    for result in results:
        check(result)


if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
