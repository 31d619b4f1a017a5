# SPDX-License-Identifier: Apache-2.0
"""
Ahead-of-time compilation of every shipped kernel configuration, without a GPU: registers, spills, shared memory,
tensor-core and asynchronous-copy instructions, programs per processor, and budgets of instructions inside the loop
over tiles, so that a slow kernel fails.

The interpreter and the compiler exclude each other within a process, so this file runs itself as a script:
`python test_contrastive_aot.py OUTPUT.json [all]`.
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


# Shared memory a program may use, and what a processor has for all of its programs, by architecture, in bytes.
SHARED_LIMIT = {80: (166_912, 167_936), 90: (232_448, 233_472), 100: (232_448, 233_472)}
# SASS instructions per logit of a thread, by kernel and architecture: measured with triton 3.9 plus 10 %. For `lse`
# those of the loop over tiles; for the others of the whole kernel, where a program is one tile but for `exact`, which
# seldom runs. The narrowest tile of a kernel, which has the fewest logits, decides.
BUDGET = {
    "lse": {80: 22.3, 90: 12.4, 100: 14.7},
    "exact": {80: 51.3, 90: 62.0, 100: 96.5},
    "grad one": {80: 25.3, 90: 22.5, 100: 26.3},
    "grad two": {80: 28.2, 90: 24.9, 100: 28.5},
    "sigmoid": {80: 49.5, 90: 47.1, 100: 49.3},
    "fp32": {80: 45.3, 90: 47.0, 100: 48.5},
    "ids": {80: 59.7, 90: 73.5, 100: 116.0},
}
POINTERS = {
    "*fp32": "scale_ptr bias_ptr weights row_part col_part bias_part row_vectors col_vectors scalars",
    "*i32": "flags row_ids col_ids",
    "i32": "n M D row_offset stride row_stride col_stride tiles groups",
}


def cases(everything):
    """(kernel, architecture, dtype of features, of G, configuration, pair rule, flag) of what is shipped."""
    from llm2clip_hf.ops import contrastive_blocks as blocks

    found = []
    for (kernel, arch), configs in blocks.CONFIGS.items():
        rules = (0,) if not kernel.endswith("_ids") else (2,) if kernel == "lse_ids" else (1, 2)
        kernel = kernel.removesuffix("_ids")
        for number, config in enumerate(configs):
            for rule in rules:
                # The flag: one exponential (grad), with gradient (sigmoid).
                for flag in (True, False) if kernel == "grad" else (True,):
                    tile = config if flag else blocks.two_exponentials(config)
                    found.append((kernel, arch, "bf16", "bf16", tile, rule, flag))
                if kernel == "lse":
                    exact = config._replace(warps=blocks.exact_warps(config, arch), registers=None)
                    found.append(("exact", arch, "bf16", "bf16", exact, rule, True))
                if kernel != "lse" and rule == 0 and number == 0:
                    # fp32 features, in halves: G stays in fp32.
                    found.append((kernel, arch, "fp16", "fp32", config, rule, True))
    default = [
        (*case[:4], blocks.CONFIGS[case[0], 90][0], *case[5:])
        for case in found
        if case[1] == 90 and case[3] == "bf16" and case[5] == 0 and case[0] != "exact"
    ]
    if not everything:
        return list(dict.fromkeys(default))
    # Evaluation differs from training by what it leaves out: once is enough.
    return list(dict.fromkeys([*found, *((*case[:6], False) for case in default if case[0] == "sigmoid")]))


def loop_over_tiles(sass):
    """Instructions of the smallest loop around the loop over features, in program order."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", sass)
    code = [(int(address, 16), text) for address, text in lines]
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            inside = [each for at, each in code if int(target.group(1), 16) <= at <= address]
            if any("MUFU.EX2" in each for each in inside):
                loops.append(inside)
    return min(loops, key=len, default=[])


def compile_case(case):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llm2clip_hf.ops import contrastive_blocks as blocks
    from llm2clip_hf.ops import contrastive_triton as kernels

    kernel, arch, dtype, g_dtype, (bm, bn, bd, warps, stages, registers), rule, flag = case
    function = {
        "lse": kernels.lse_kernel,
        "exact": kernels.lse_exact_kernel,
        "grad": kernels.lse_grad_kernel,
        "sigmoid": kernels.sigmoid_kernel,
    }[kernel]
    descriptors = arch >= 90
    constants = {
        "BM": bm, "BN": bn, "BD": bd, "PAIRS": rule, "K": 2 if rule == 2 else 1, "DESC": descriptors, "UP": False,
        "GROUP": blocks.LSE_GROUP if kernel in ("lse", "exact") else blocks.GROUP, "GRAD": flag, "ONE": flag,
        "ROWS": True, "COLS": True, "PRESUM": arch == 90,
    }  # fmt: skip
    if rule == 0:
        constants |= {"row_ids": None, "col_ids": None}
    if kernel == "sigmoid" and not flag:
        constants["g"] = None
    types = {name: kind for kind, group in POINTERS.items() for name in group.split()}
    for name, block, kind in (("x", (bm, bd), dtype), ("y", (bn, bd), dtype), ("g", (bm, bn), g_dtype)):
        types[name] = f"tensordesc<{kind}[{block[0]},{block[1]}]>" if descriptors else f"*{kind}"
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types[name] for name in function.arg_names},
        constexprs=constants,
        # What the launcher would find out: storage is aligned, and widths are multiples of 16.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(function.arg_names)
            if name not in constants and (types[name][0] == "*" or name in ("D", "stride", "row_stride", "col_stride"))
        },
    )
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass)
    counted = loop_over_tiles(sass) if kernel == "lse" else re.findall(r"/\*[0-9a-f]{4,5}\*/\s+([^;]*);", sass)
    count = lambda pattern: sum(bool(re.search(pattern, text)) for text in counted)  # noqa: E731
    shared = compiled.metadata.shared
    return {
        "kernel": kernel,
        "arch": arch,
        "dtypes": [dtype, g_dtype],
        "config": [bm, bn, bd, warps, stages, registers],
        "rule": rule,
        "flag": flag,
        "registers": used,
        "stack": stack,
        "shared": shared,
        "programs": min(65_536 // (used * warps * 32), SHARED_LIMIT[arch][1] // (shared + 1024)),
        "spills": sum(name in ("STL", "LDL") for name in instructions),
        "tensor_core": sum(bool(re.match(r"HGMMA|HMMA|UTC\w*MMA", name)) for name in instructions),
        "async_copy": len(re.findall(r"cp\.async\.(?:bulk\.tensor|c[ag])", compiled.asm["ptx"])),
        "instructions": len(counted) - count(r"\bNOP\b"),
        "exponentials": count(r"MUFU\.EX2"),
        "divisions": count(r"MUFU\.RCP"),
        "shuffles": count(r"\bSHFL"),
        "barriers": count(r"\bBAR\b"),
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
    kernel, arch, (bm, bn, _, warps, _, _) = result["kernel"], result["arch"], result["config"]
    assert result["stack"] == 0, result
    assert result["spills"] == 0, result
    assert result["registers"] * warps * 32 <= 65_536, result
    assert result["shared"] <= SHARED_LIMIT[arch][0], result
    assert result["tensor_core"] > 0, result
    assert result["async_copy"] > 0, result
    name = "ids" if result["rule"] else "fp32" if result["dtypes"][1] == "fp32" else kernel
    if kernel == "grad" and name == kernel:
        name = "grad one" if result["flag"] else "grad two"
    per_thread = bm * bn // (warps * 32)
    assert result["instructions"] <= BUDGET[name if name in BUDGET else kernel][arch] * per_thread, result
    if kernel in ("lse", "sigmoid") or name == "grad one":
        # One exponential per logit; two more bring the column sums to a new reference.
        assert result["exponentials"] <= per_thread + (2 if kernel == "lse" else 0), result


def test_default_hopper_kernels_fit_their_budgets(tmp_path):
    pytest.importorskip("triton")
    results = compiled(tmp_path)
    assert {result["kernel"] for result in results} == {"lse", "grad", "sigmoid"}
    for result in results:
        check(result)
        # Exponentials of one program hide behind the products of the other.
        assert result["programs"] >= 2, result
        if result["kernel"] == "lse":
            assert result["shuffles"] <= 20, result
            assert result["barriers"] <= 18, result
        if result["kernel"] == "grad":
            assert result["shuffles"] == 0, result
        assert result["divisions"] <= 2, result


@pytest.mark.slow
def test_every_shipped_configuration_fits_its_budget(tmp_path):
    pytest.importorskip("triton")
    results = compiled(tmp_path, "all")
    assert {result["arch"] for result in results} == {80, 90, 100}
    for result in results:
        check(result)


if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
