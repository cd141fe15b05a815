"""dit-sparse on the command line: one sentence and exit code 2 for input that cannot work, 130 when interrupted."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import tyro

from dit_sparse import __version__, models, options, predict
from dit_sparse.config import SparseConfig

USAGE = """\
dit-sparse: training-free sparse attention for diffusion transformers, on stock diffusers.

  dit-sparse generate   make a video, with the demo model if no other is given
  dit-sparse plan       say from shapes alone what sparse attention can gain for a model and a size
  dit-sparse info       show the device, the kernels chosen for it, and the models known
  dit-sparse bench      time attention, an operator or a transformer, dense and sparse

dit-sparse COMMAND --help lists a command's options and says what each means; --version prints the version.
Errors are one sentence; --debug shows where they come from."""


@dataclass(frozen=True)
class PlanOptions:
    """Say beforehand, from shapes alone, what sparse attention can gain; no weights are needed.

    Attention share is self-attention's part of the floating-point operations of one forward. The best possible
    speed-up is of a transformer whose self-attention takes no time. Attention work is relative to computing every step
    dense. State is what a method remembers from step to step, in each of its storages.
    """

    model_id: str | None = None
    """Directory saved by diffusers, or a Hugging Face id, of which only the configuration is fetched."""
    family: str | None = None
    """Instead of model_id, a published model: wan2.1-1.3b, wan2.1-14b, wan2.2-a14b or wan2.2-ti2v-5b."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    num_frames: int | None = None
    """Frames."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Above 1 the model runs twice a step, and state is kept for both branches."""
    sparse: tyro.conf.OmitArgPrefixes[SparseConfig] = SparseConfig()
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class InfoOptions:
    """Show the device, the kernels chosen for it, and the models known."""

    debug: bool = False
    """Show the traceback of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `dit-sparse ARGUMENTS`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        return _dispatch(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("Interrupted: what was finished is kept, and nothing is left half-written.", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments or not _is_users(error):
            raise
        print(f"dit-sparse: {_one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(command: str, arguments: list[str]) -> int:
    kind, run = _command(command)
    return run(options.parse(kind, arguments, f"dit-sparse {command}"))


def _command(name: str) -> tuple[type, Callable[[Any], int]]:
    """The options and the function of a command; imported only when asked for, since some need seconds."""
    match name:
        case "generate":
            from dit_sparse import generate

            return generate.GenerateOptions, generate.run
        case "plan":
            return PlanOptions, plan
        case "info":
            return InfoOptions, info
        case "bench":
            from dit_sparse import bench

            return bench.BenchOptions, bench.run
    known = ("generate", "plan", "info", "bench")
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
    raise ValueError(f"Unknown command {name!r}: {hint}")


def _is_users(error: Exception) -> bool:
    """Whether an error is about what was asked for, rather than a fault of the program."""
    import torch

    return isinstance(error, ValueError | OSError | torch.OutOfMemoryError)


def _one_line(error: Exception) -> str:
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"The GPU is out of memory; a smaller size, --offload or --residual int4 needs less: {text}"
    return text


def info(_options: InfoOptions) -> int:
    import torch

    from dit_sparse.kernels.dense_attention import dense_backend
    from dit_sparse.kernels.implementation import resolve
    from dit_sparse.pipelines.session import FAMILIES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"dit-sparse {__version__}, torch {torch.__version__}")
    print(f"device            {device.type} ({name})")
    print(f"sparse kernel     {resolve('auto', torch.empty(0, device=device, dtype=dtype))} for {dtype}")
    print(f"dense kernel      {dense_backend(device, dtype, 128)} for {dtype}, 128 channels a head")
    print(f"transformers      {', '.join(sorted(FAMILIES))}")
    print(f"plan --family     {', '.join(models.PUBLISHED)}")
    demo = models.demo_directory()
    print(f"demo model        {demo if (demo / 'model_index.json').is_file() else f'not at {demo}'}")
    return 0


def plan(chosen: PlanOptions) -> int:
    if (chosen.model_id is None) == (chosen.family is None):
        raise ValueError(f"Give either --model_id or --family, one of {', '.join(models.PUBLISHED)}.")
    if chosen.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is at least 1, not {chosen.num_inference_steps}.")
    if chosen.family is not None:
        model = models.published(chosen.family)
        class_name, transformer, vae, count = model.class_name, model.transformer, model.vae, model.transformers
        asked = (chosen.height, chosen.width, chosen.num_frames)
        usual = (model.height, model.width, model.num_frames)
        size = tuple(b if a is None else a for a, b in zip(asked, usual, strict=True))
    else:
        files = models.find(chosen.model_id)
        if None in (chosen.height, chosen.width, chosen.num_frames):
            raise ValueError(f"Give --height, --width and --num_frames to plan for {files.source}.")
        size = (chosen.height, chosen.width, chosen.num_frames)
    from dit_sparse.pipelines.session import FAMILIES

    if chosen.family is None:
        models.check_known(files, FAMILIES)
        class_name, transformer = next(iter(files.transformers.values()))
        vae, count = files.vae, len(files.transformers)
    models.check_size(transformer, vae, *size)
    shape = FAMILIES[class_name].shape(transformer, *size, vae)
    shape = replace(shape, branches=2 if chosen.guidance_scale > 1 else 1, transformers=count)
    prediction = predict.predict(shape, chosen.sparse, chosen.num_inference_steps)
    print("\n".join(_told(chosen, shape, prediction)))
    return 0


def _told(chosen: PlanOptions, shape: predict.ModelShape, said: predict.Prediction) -> list[str]:
    grid, config = shape.grid, chosen.sparse
    lines = [
        f"tokens            {said.tokens} ({grid.frames} x {grid.height} x {grid.width}), "
        f"{said.blocks} blocks of {said.block}",
        f"attention share   {said.attention_share:.1%} of one forward's operations",
        f"best possible     {said.ceiling:.2f}x, if attention took no time and matrix products were all else",
        f"steps             {', '.join(f'{said.phases.count(p)} {p}' for p in dict.fromkeys(said.phases))}",
        f"attention work    {said.work:.1%} of dense, with {config.method} at density {config.density:g}",
        f"speed-up          {said.best:.2f}x at most, {said.expected:.2f}x expected, of the transformer",
    ]
    state = ", ".join(f"{size / 2**30:.3g} GiB in {kind}" for kind, size in said.state.items())
    lines.append(f"state             {state or 'none'}")
    verdict = "pays" if said.pays else "does not pay"
    lines.append(f"sparse attention  {verdict}: it does where the speed-up expected is at least {predict.WORTH}x")
    return lines
