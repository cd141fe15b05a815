"""Training-free sparse attention for diffusion transformers."""

from pathlib import Path

# A checkout keeps kernels/, pipelines/ and calibration/ beside this package; a wheel carries them inside it.
_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

from dit_sparse.config import SparseConfig  # noqa: E402  (needs the path above)

__all__ = ["Session", "SparseAttnProcessor", "SparseConfig", "sparsify"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # These need diffusers, which takes seconds to import; the kernels do not.
    if name in ("SparseAttnProcessor", "Session", "sparsify"):
        from dit_sparse.pipelines import session

        return getattr(session, name)
    raise AttributeError(f"module 'dit_sparse' has no attribute {name!r}")
