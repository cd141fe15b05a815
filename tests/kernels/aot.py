"""Triton and Gluon kernels compiled ahead of time, with no GPU: the registers, stack and shared memory they take."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread, spilled bytes a thread, shared bytes a program."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    sass: str


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    fn          a triton.jit or gluon.jit function at the top level of an importable module
    signature   the arguments that are not constexpr, by name: "*bf16", "fp32", "i32", "i1", or a tuple of such for a
                tuple argument, with ":16" behind for what launches find divisible by 16 ("*bf16:16", "i32:16");
                a tensor descriptor as Gluon writes it, "tensordesc<bf16[1,1,128,64],NVMMASharedLayout(...)>"
    constexprs  every constexpr, and every argument a launch specialises: a stride of 1, or None for a pointer
    capability  80, 90 or 100
    """

    fn: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any] = field(default_factory=dict)
    capability: int = 90
    num_warps: int = 4
    num_stages: int = 3


def compile_kernel(
    fn: Any, signature: dict[str, Any], constexprs: dict[str, Any], capability: int, num_warps: int, num_stages: int
) -> Resources:
    """One kernel compiled; see Build for the arguments. Several at once are faster through compile_kernels."""
    return compile_kernels([Build(fn, signature, constexprs, capability, num_warps, num_stages)])[0]


def compile_kernels(builds: Sequence[Build]) -> list[Resources]:
    """Compile in a fresh interpreter, because a process that has chosen Triton's interpreter cannot."""
    # Both a compiled and an interpreted kernel keep the Python function it was made from.
    plain = [{**vars(build), "fn": (build.fn.fn.__module__, build.fn.fn.__name__)} for build in builds]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # The checkout need not be installed.
    clean["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # -P: this folder holds modules that must not hide others.
    done = subprocess.run(
        [sys.executable, "-P", __file__], input=json.dumps(plain), env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Resources(**resources) for resources in json.loads(done.stdout)]


def _compile(build: dict[str, Any]) -> Resources:
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget

    module, name = build["fn"]
    fn = getattr(import_module(module), name)
    constexprs = {name: tuple(x) if isinstance(x, list) else x for name, x in build["constexprs"].items()}
    signature, attrs, constants = {}, {}, {}
    for place, argument in enumerate(fn.arg_names):
        if argument in constexprs:
            signature[argument], constants[place,] = "constexpr", constexprs[argument]
        else:
            signature[argument] = _typed(build["signature"][argument], (place,), attrs, constants)
    unknown = {*build["signature"], *constexprs} - set(fn.arg_names)
    assert not unknown, f"{name} has no arguments {sorted(unknown)}"
    source = triton.compiler.ASTSource
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    compiled = triton.compile(
        source(fn, signature, constants, attrs),
        target=GPUTarget("cuda", build["capability"], 32),
        options={"num_warps": build["num_warps"], "num_stages": build["num_stages"]},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, sass)


def _typed(kind: Any, place: tuple[int, ...], attrs: dict, constants: dict) -> Any:
    """The type without its ":16", which goes to attrs; a number in a tuple is a constant there."""
    if isinstance(kind, list):
        return tuple(_typed(item, (*place, i), attrs, constants) for i, item in enumerate(kind))
    if not isinstance(kind, str):
        constants[place] = kind
        return "constexpr"
    if kind.startswith("tensordesc"):
        return kind
    kind, _, divisor = kind.partition(":")
    if divisor:
        attrs[place] = [["tt.divisibility", int(divisor)]]
    return kind


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(build)) for build in json.load(sys.stdin)]))
