"""What a user installs: the wheel is built, listed, imported and tested away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder in the checkout -> package in the wheel.
PACKAGES = {
    "dit_sparse": "dit_sparse",
    "kernels": "dit_sparse/kernels",
    "pipelines": "dit_sparse/pipelines",
    "calibration": "dit_sparse/calibration",
    "samples": "dit_sparse/samples",
    "samples/demo": "dit_sparse/demo",
}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="a wheel is built from a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since setuptools leaves its traces in the tree it builds."""
    tree = tmp_path_factory.mktemp("tree") / "checkout"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "out")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [built] = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a fresh environment that has the wheel, and sees this one's packages behind it."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-index", "--no-deps"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [packages] = (home / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return interpreter


def run(python: Path, folder: Path, *arguments: str) -> str:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True, env=outside)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def in_tree() -> set[str]:
    """What the wheel should hold: every file of the packages' folders that is not made by running them."""
    listed = set()
    for folder, package in PACKAGES.items():
        inner = [
            ROOT / other for other in PACKAGES if other != folder and (ROOT / other).is_relative_to(ROOT / folder)
        ]
        for file in (ROOT / folder).rglob("*"):
            # A node for ComfyUI is copied there, and is no part of the package.
            if folder == "samples" and (file.parent != ROOT / folder or file.suffix != ".py"):
                continue
            made = "__pycache__" in file.parts or any(part.startswith(".") for part in file.relative_to(ROOT).parts)
            if file.is_file() and not made and not any(file.is_relative_to(other) for other in inner):
                listed.add(f"{package}/{file.relative_to(ROOT / folder).as_posix()}")
    return listed


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == in_tree()
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_importing_it_needs_no_diffusers_and_no_checkout(python, tmp_path):
    script = """
import sys
import dit_sparse
assert len(dit_sparse.__path__) == 1, dit_sparse.__path__
dit_sparse.SparseConfig()
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
import dit_sparse.calibration.metrics, dit_sparse.kernels.reference, dit_sparse.attention
assert "diffusers" not in sys.modules
dit_sparse.sparsify
assert "diffusers" in sys.modules
print(dit_sparse.__file__)
"""
    assert Path(run(python, tmp_path, "-c", script).strip()).is_relative_to(python.parents[1])


def test_the_command_is_installed(python, tmp_path):
    done = subprocess.run([python.parent / "dit-sparse", "info"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    demo = next(line for line in done.stdout.splitlines() if line.startswith("demo model"))
    assert Path(demo.split()[-1]).is_relative_to(python.parents[1]) and "not at" not in demo


def test_tests_pass_on_what_was_installed(python, tmp_path):
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    chosen = ["test_options.py", "test_models.py", "test_predict.py", "test_video.py", "calibration/test_metrics.py"]
    arguments = ["--import-mode=importlib", "-q", "-m", "not slow and not gpu", "-p", "no:cacheprovider"]
    out = run(python, tmp_path, "-m", "pytest", *arguments, *(f"tests/{name}" for name in chosen))
    assert " passed" in out and "skipped" not in out


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith("-m pytest") and f"\n    {command}\n" in (ROOT / "README.md").read_text()
