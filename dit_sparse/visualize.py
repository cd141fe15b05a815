"""The command that draws which blocks the heads of one layer keep at one step, and where in the frames these lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from dit_sparse import generate, models, predict
from dit_sparse.config import SparseConfig
from dit_sparse.video import whole

Token = tuple[int, int, int]

# Heads drawn where the user names none.
MOST_HEADS = 6


@dataclass(frozen=True)
class VisualizeOptions:
    """Generate with sparse attention, and draw what one layer's heads keep at one step.

    Written to output_dir: blocks.png (query blocks by key blocks, of each head), frames.png (for chosen query tokens,
    the tokens whose keys are attended to, over the frames made) and routing.npz with the numbers of both. A token is
    one patch of the latent video; of guidance's two branches the first to run in a step is drawn.
    """

    model_id: str | None = None
    """Directory saved by diffusers, or a Hugging Face id; if not given, the demo model that comes with dit-sparse."""
    prompt: str | None = None
    """What to show. The demo model has one of its own."""
    negative_prompt: str | None = None
    """What to stay away from; only used where guidance_scale is above 1."""
    height: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    width: int | None = None
    """Pixels; if not given, as the model's pipeline has it."""
    num_frames: int | None = None
    """Frames; if not given, as the model's pipeline has it."""
    num_inference_steps: int | None = None
    """Denoising steps; if not given, as the model's pipeline has it."""
    guidance_scale: float | None = None
    """How strongly to follow the prompt; above 1 the model runs twice a step."""
    seed: int = 0
    """Of the noise that the video starts from."""
    step: int | None = None
    """Counted from 0; if not given, the first from the middle on that is not dense. Of an anchor, the blocks that the
    steps after it keep."""
    layer: int | str | None = None
    """Counted from 0 over all transformers, or its name, such as transformer.blocks.3.attn1; if not given, the middle
    one."""
    heads: tuple[int, ...] = ()
    """Counted from 0; if not given, the first six."""
    query: tuple[int, ...] = ()
    """Frame, row and column of a token, counted from 0 in the grid of tokens, and of more after it; if not given, the
    middle of the middle frame."""
    sparse: tyro.conf.OmitArgPrefixes[SparseConfig] = SparseConfig()
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the model; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 and so on; auto is cuda where there is one."""
    offload: Literal["none", "model", "sequential", "group"] = "none"
    """Keep weights in main memory, as in generate."""
    output_dir: Path = Path("visualize")
    """Made if it is not there."""
    config: Path | None = None
    """YAML file of option: value lines, with the same names."""


def run(options: VisualizeOptions) -> int:
    """Exit code. Raises ValueError for input that cannot work, before any model work where that can be known."""
    shared = ("model_id", "prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps",
              "guidance_scale", "seed", "sparse", "dtype", "device", "offload")  # fmt: skip
    asked = generate.GenerateOptions(**{name: getattr(options, name) for name in shared})
    files = models.find(options.model_id)
    device, dtype = generate.placement(asked)
    request = generate.request_of(asked, files)

    from dit_sparse.pipelines.session import FAMILIES, sparsify

    models.check_known(files, FAMILIES)
    generate.check(asked, request, files)
    steps = _steps(options, request.num_inference_steps)
    kind, transformer = next(iter(files.transformers.values()))
    grid = FAMILIES[kind].shape(transformer, request.height, request.width, request.num_frames, files.vae).grid
    sides = (grid.frames, grid.height, grid.width)
    queries = _queries(options.query, sides)
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{str(options.output_dir)!r} cannot be made: {error.strerror}.") from None

    from dit_sparse.calibration.probe import Look, put_in_place

    pipe = generate.load(asked, files, device, dtype)
    with sparsify(pipe, options.sparse) as session:
        layer = _layer(options.layer, [layer.name for layer in session.generation.layers])
        heads = _heads(options.heads, next(x.heads for x in session.generation.layers if x.name == layer))
        transformers = {part: m for part, m in pipe.components.items() if type(m).__name__ in FAMILIES}
        probe = put_in_place(transformers, session.generation)
        probe.look = look = Look(layer, steps)
        frames = _frames(pipe, request, files, options)
    if look.found is None:
        raise ValueError(f"{layer} was dense at {_told(steps)}, so that every block was kept: choose another layer.")

    from dit_sparse.calibration.figures import routing_blocks, routing_frames

    kept = np.stack([look.found.frames(query, heads) for query in queries], 1)
    title = f"{options.sparse.method}, step {look.at}, {layer}"
    if options.sparse.profile is not None:
        title = f"profile, step {look.at}, {layer}"
    written = [options.output_dir / name for name in ("blocks.png", "frames.png", "routing.npz")]
    for path, figure in (
        (written[0], routing_blocks(look.found.blocks[heads], heads, title)),
        (written[1], routing_frames(kept, heads, queries, frames, title)),
    ):
        with whole(path) as part:
            figure.savefig(part, dpi=130)
    with whole(written[2]) as part:
        np.savez_compressed(
            part, blocks=look.found.blocks[heads], home=look.found.home[heads], kept=kept, heads=heads,
            queries=queries, grid=sides, layer=layer, step=look.at,
        )  # fmt: skip
    shares = ", ".join(f"{share:.1%}" for share in look.found.blocks[heads].mean((1, 2)))
    print(f"{title}: heads {', '.join(map(str, heads))} keep {shares} of the block pairs")
    print(", ".join(map(str, written)))
    return 0


def _steps(options: VisualizeOptions, total: int) -> range:
    """Where to look: one step, or the first from the middle on that is not dense."""
    if options.sparse.method == "dense" and options.sparse.profile is None:
        raise ValueError("Method dense keeps every block: choose another to see which it keeps.")
    if options.step is None:
        return range(total // 2, total)
    if not 0 <= options.step < total:
        raise ValueError(f"step is from 0 to {total - 1} in a run of {total}, not {options.step}.")
    if options.sparse.profile is None:
        phases = predict.phases(options.sparse, total)
        if phases[options.step] == "dense":
            others = [step for step, phase in enumerate(phases) if phase != "dense"]
            raise ValueError(
                f"Step {options.step} is dense, so that every block is kept; not dense are {_told(others) or 'none'}."
            )
    return range(options.step, options.step + 1)


def _told(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _queries(given: tuple[int, ...], sides: Token) -> list[Token]:
    if len(given) % 3:
        raise ValueError(f"query takes frame, row and column of each token, so three numbers each, not {len(given)}.")
    if not given:
        return [(sides[0] // 2, sides[1] // 2, sides[2] // 2)]
    found = list(zip(given[::3], given[1::3], given[2::3], strict=True))
    for query in found:
        if not all(0 <= at < side for at, side in zip(query, sides, strict=True)):
            raise ValueError(
                f"There is no token {' '.join(map(str, query))}: frames go to {sides[0] - 1}, rows to {sides[1] - 1} "
                f"and columns to {sides[2] - 1}."
            )
    return found


def _layer(asked: int | str | None, names: list[str]) -> str:
    if asked is None:
        return names[len(names) // 2]
    if isinstance(asked, int) and 0 <= asked < len(names):
        return names[asked]
    if asked in names:
        return str(asked)
    raise ValueError(f"layer is from 0 to {len(names) - 1}, or a name from {names[0]} to {names[-1]}, not {asked!r}.")


def _heads(asked: tuple[int, ...], count: int) -> list[int]:
    for head in asked:
        if not 0 <= head < count:
            raise ValueError(f"heads are from 0 to {count - 1} in this model, not {head}.")
    return list(asked) or list(range(min(count, MOST_HEADS)))


def _frames(pipe: Any, request: generate.Request, files: models.ModelFiles, options: VisualizeOptions) -> np.ndarray:
    from rich.console import Console
    from rich.progress import track

    bar = iter(track(range(request.num_inference_steps), "generating", console=Console(stderr=True)))

    def step_done(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        next(bar, None)
        return {}

    return generate.frames_of(pipe, request, files, options.negative_prompt, options.seed, step_done)
