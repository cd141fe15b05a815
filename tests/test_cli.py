import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch

from dit_sparse import __version__, cli, generate, models
from dit_sparse.cli import main
from dit_sparse.config import Method, SparseConfig
from dit_sparse.kernels import dense_attention
from tests.tiny import tiny_wan


def refused(capsys, *arguments: str) -> str:
    """What is said on standard error, which must be one line; nothing goes to standard output."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("dit-sparse: ")
    return err.removeprefix("dit-sparse: ").strip()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_usage_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(
        f"dit-sparse {name}" in out for name in ("generate", "calibrate", "fit", "profile", "plan", "info", "bench")
    )


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_unknown_commands_are_named(capsys):
    assert refused(capsys, "plna") == "Unknown command 'plna': did you mean plan?"
    said = refused(capsys, "--qqq")
    assert (
        "'--qqq': choose from generate, calibrate, fit, profile, compare, visualize, metrics, plan, info, bench."
        in said
    )


@pytest.mark.parametrize("command", ["generate", "calibrate", "fit", "visualize", "plan", "info", "bench"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert f"usage: dit-sparse {command}" in capsys.readouterr().out


@pytest.mark.parametrize("term", ["density", "anchor", "dense", "token", "fallback", "work", "blocks"])
def test_help_of_generate_defines_the_terms(capsys, term):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    head = capsys.readouterr().out.partition("─ options ─")[0]
    assert term in head.lower()


def test_bench_says_what_it_can_time(capsys):
    assert refused(capsys, "bench", "speed").startswith("bench takes attention or operator")
    assert "first, not ''." in refused(capsys, "bench")
    assert "Unknown option '--cas': did you mean --case?" in refused(capsys, "bench", "attention", "--cas", "small")
    assert "density takes one or more values (a number)" in refused(capsys, "bench", "attention", "--density", "x")


def test_bench_runs_what_it_is_told(monkeypatch):
    from dit_sparse import bench

    told = []

    def run(what: Literal["attention", "operator"], options: bench.BenchOptions) -> int:
        told.append((what, options.case, options.density))
        return 1

    monkeypatch.setattr(bench, "run", run)
    assert main(["bench", "operator", "--case", "small", "--density", "0.1", "0.2"]) == 1
    assert told == [("operator", ("small",), (0.1, 0.2))]


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="Unknown family 'flux'"):
        main(["plan", "--family", "flux", "--debug"])


def test_a_fault_of_the_program_is_not_dressed_up(monkeypatch):
    def broken(_: object) -> int:
        raise KeyError("a fault")

    monkeypatch.setattr(cli, "info", broken)
    with pytest.raises(KeyError):
        main(["info"])


def test_interrupting_is_said_and_has_its_exit_code(capsys, monkeypatch):
    def stopped(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", stopped)
    assert main(["info"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_running_out_of_memory_says_what_needs_less(capsys, monkeypatch):
    def full(_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(generate, "run", full)
    said = refused(capsys, "generate")
    assert "smaller size, --offload or --residual int4" in said and "Tried to allocate 2 GiB." in said


@pytest.mark.parametrize("arguments", [["plan", "--help"], ["plan", "--family", "wan2.1-14b"]])
def test_a_reader_that_has_enough_is_no_error(arguments):
    command = [sys.executable, "-m", "dit_sparse", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    # Packages that diffusers imports may have something to say.
    assert "Traceback" not in said and "BrokenPipeError" not in said
    assert process.returncode == 0


def test_info_tells_device_kernels_and_models(capsys):
    assert main(["info"]) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert told["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert {"sparse", "dense", "demo"} < set(told)
    assert "WanTransformer3DModel" in told["transformers"]


def test_info_tells_from_where_on_another_dense_kernel_is_faster(capsys, monkeypatch):
    def backend(device, dtype, head_dim, tokens, heads):
        return "cudnn" if tokens < dense_attention.LONG else "block"

    monkeypatch.setattr(dense_attention, "dense_backend", backend)
    assert main(["info"]) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dense kernel")]
    assert told.split(None, 2)[2].startswith(f"cudnn, block from {dense_attention.LONG} tokens on, torch.")


def test_plan_from_a_published_shape(capsys):
    assert main(["plan", "--family", "wan2.1-14b"]) == 0
    out = capsys.readouterr().out
    assert "75600 (21 x 45 x 80), 591 blocks of 128" in out
    assert "attention share   71.8%" in out and "best possible     3.54x" in out
    assert "58.1 GiB in bf16, 30.2 GiB in fp8, 15.8 GiB in int4" in out
    assert "sparse attention  pays" in out


def test_plan_follows_its_options(capsys):
    small = ["plan", "--family", "wan2.1-14b", "--height", "128", "--width", "128", "--num_frames", "5"]
    assert main(small) == 0
    out = capsys.readouterr().out
    assert "128 (2 x 8 x 8), 8 blocks of 16" in out and "does not pay" in out
    assert main(["plan", "--family", "wan2.1-14b", "--guidance_scale", "1", "--num-inference-steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "29.1 GiB in bf16" in out and "3 dense, 5 anchor, 12 sparse" in out
    assert main(["plan", "--family", "wan2.1-14b", "--method", "tail"]) == 0
    assert "state             none" in capsys.readouterr().out


def test_plan_says_from_which_size_it_pays(capsys):
    """Of images of the shape asked for, the next smaller one does not pay."""
    assert main(["plan", "--family", "flux.1-dev", "--height", "1024", "--width", "1536"]) == 0
    out = capsys.readouterr().out
    assert "6144 (1 x 64 x 96)" in out
    said = re.search(r"pays from +(\d+) x (\d+) pixels, for images of this shape", out)
    height, width = int(said[1]), int(said[2])
    assert height % 16 == width % 16 == 0 and width / height == pytest.approx(1.5, rel=0.02)
    for step, verdict in ((0, "  pays:"), (-16, "does not pay:")):
        sides = ["--height", str(height + step), "--width", str(round((height + step) * 1.5 / 16) * 16)]
        assert main(["plan", "--family", "flux.1-dev", *sides]) == 0
        assert verdict in capsys.readouterr().out
    assert main(["plan", "--family", "flux.1-dev", "--method", "dense"]) == 0
    assert "pays from         no size up to 8192 pixels along a side" in capsys.readouterr().out
    assert "num_frames is 1 for this model, which makes images" in refused(
        capsys, "plan", "--family", "flux.1-dev", "--num_frames", "5"
    )


def test_what_has_guidance_as_an_input_keeps_the_state_of_one_branch(capsys):
    for scale in ("1", "5"):
        assert main(["plan", "--family", "hunyuan-video", "--guidance_scale", scale]) == 0
    one, two = (line for line in capsys.readouterr().out.splitlines() if line.startswith("state"))
    assert one == two


def test_plan_reads_a_directory(capsys, tmp_path):
    tiny_wan(vae="8x4").save_pretrained(tmp_path / "wan")
    where = ["plan", "--model_id", str(tmp_path / "wan")]
    assert main([*where, "--height", "64", "--width", "64", "--num_frames", "9"]) == 0
    assert "48 (3 x 4 x 4), 3 blocks of 16" in capsys.readouterr().out
    assert "Give --height, --width and --num_frames" in refused(capsys, *where)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Give either --model_id or --family, one of wan2.1-1.3b"),
        (("--family", "wan2.1-14b", "--model_id", "x"), "Give either --model_id or --family"),
        (("--family", "wan2.1-14b", "--height", "490"), "not 490: nearest are 480 and 496."),
        (("--family", "wan2.1-14b", "--height", "0"), "height is a multiple of 16 for this model, not 0"),
        (("--family", "wan2.1-14b", "--num_inference_steps", "0"), "num_inference_steps is at least 1, not 0."),
        (("--family", "wan2.1-14b", "--dense_steps", "60-70"), "dense_steps: '60-70' in '60-70' lies outside 0..49."),
        (("--family", "wan2.1-14b", "--dense_layers", "40,1"), "dense_layers: '40' in '40,1' lies outside 0..39."),
        (("--family", "wan2.1-14b", "--density", "7"), "density is a share above 0 and at most 1, not 7.0."),
    ],
)
def test_plan_refuses_in_one_sentence(capsys, arguments, said):
    assert said in refused(capsys, "plan", *arguments)


def test_the_demo_that_is_not_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "demo_directory", lambda: tmp_path)
    assert "The demo model is not at" in refused(capsys, "generate")


README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.skipif(not README.is_file(), reason="the README stays in the checkout")
def test_the_readme_explains_every_option_and_method():
    text = README.read_text()
    for field in fields(SparseConfig):
        assert field.name == "method" or f"\n| `{field.name}` |" in text, field.name
    for method in get_args(Method):
        assert f"\n| `{method}` |" in text, method


@pytest.mark.skipif(not README.is_file(), reason="the README stays in the checkout")
def test_the_python_of_the_readme_runs(tmp_path, capsys):
    tiny_wan(vae="8x4").save_pretrained(tmp_path / "wan")
    code = README.read_text().partition("```python\n")[2].partition("```")[0]
    small = "height=32, width=32, num_frames=5, num_inference_steps=4, prompt="
    for wanted, instead in {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": str(tmp_path / "wan"),
        '.to("cuda")': "",
        "pipe(": f"pipe({small}",
        "torch.bfloat16": "torch.float32",
    }.items():
        assert wanted in code
        code = code.replace(wanted, instead)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["video"].shape == (5, 32, 32, 3)
    assert "density=" in capsys.readouterr().out
