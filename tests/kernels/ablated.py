"""The 8-bit Hopper kernel without parts of its softmax, which says what each costs, at the size of Wan 14B, 720p, on a
GPU: python tests/kernels/ablated.py

What these kernels compute is wrong on purpose; only how long they take is of use.
"""

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch

from dit_sparse.bench import CASES, Bench, BenchOptions, random_plan
from dit_sparse.kernels import block_attention_hopper, block_attention_hopper8
from dit_sparse.plan import Correction

# What is written instead of a part of a step, and a maximum that exponents of any step bear.
PARTS = {
    "exponentials": (
        ("e = gl.exp2(s.to(gl.float32, bitcast=True) * unit[:, None] - shift)",
         "e = s.to(gl.float32, bitcast=True) * unit[:, None] - shift"),
        ("e = gl.exp2(gl.convert_layout(xa, quarter_layout, assert_trivial=True))",
         "e = gl.convert_layout(xa, quarter_layout, assert_trivial=True)"),
        ("e = gl.exp2(gl.convert_layout(xb, quarter_layout, assert_trivial=True))",
         "e = gl.convert_layout(xb, quarter_layout, assert_trivial=True)"),
    ),
    "maxima": (
        ("    top = top_of(m, gl.maximum(most, thread_maxima(s2)), unit)\n", "    top = m\n"),
        ("        most = thread_maxima(s)\n    mbarrier.arrive(v", "    mbarrier.arrive(v"),
        ('m = gl.full([ROWS], float("-inf"), gl.float32, s_rows)', "m = gl.full([ROWS], 8.0, gl.float32, s_rows)"),
    ),
    "sums": (
        ("    l = shrunk(l, shrink) + thread_sums(e)\n    p = probabilities(e, ROWS, HALF, o_layout)\n    if not LAST",
         "    p = probabilities(e, ROWS, HALF, o_layout)\n    if not LAST"),
        ("    l += gl.convert_layout(thread_sums(e), l.type.layout)\n", ""),
    ),
    "outputs added in float32": (
        ("values(p, gl.zeros([ROWS, D], gl.float32, o_layout), v_ring, v_slot, 0, HALF, False)",
         "values(p, o, v_ring, v_slot, 0, HALF, True)"),
        ("    o = o * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None] + part\n", "    o = part\n"),
    ),
}  # fmt: skip


def without(parts: tuple[str, ...], folder: Path) -> ModuleType:
    """The kernel's module without some of its PARTS."""
    text = Path(block_attention_hopper8.__file__).read_text(encoding="utf-8")
    for part in parts:
        for old, new in PARTS[part]:
            assert old in text, f"{part}: the kernel has no {old!r} any more"
            text = text.replace(old, new)
    name = "without_" + "_".join(part.split()[0] for part in parts)
    file = folder / f"{name}.py"
    file.write_text(text, encoding="utf-8")
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    bench, case = Bench(BenchOptions(repeats=3)), CASES["wan-14b-720p"]
    q, k, v = bench.qkv(case)
    every = torch.arange(-(-q.shape[2] // block_attention_hopper.BLOCK), dtype=torch.int32, device=bench.device)
    left_out = [
        (),
        *((part,) for part in PARTS),
        tuple(part for part in PARTS if part != "exponentials"),
        tuple(PARTS),
    ]
    rest = {"scale": case.head_dim**-0.5, "text_mask": None, "text": 0, "every": every, "scatter": None}
    print(torch.cuda.get_device_name(), torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        kernels = {
            f"without {', '.join(parts) or 'nothing'}": without(parts, Path(folder)).attend for parts in left_out
        }
        kernels["in 16 bits"] = partial(block_attention_hopper.attend, key_block=block_attention_hopper.BLOCK)
        for density in (0.1, 1.0):
            plan = random_plan(case, density, bench.device)
            calls = [partial(attend, q, k, v, plan, correction=Correction(), **rest) for attend in kernels.values()]
            with ThreadPoolExecutor() as pool:
                # Kernels are compiled side by side.
                list(pool.map(lambda call: call(), calls))
            for name, ms in zip(kernels, bench.milliseconds(*calls), strict=True):
                print(f"{density:4.0%} {name}: {ms:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
