"""dit-sparse on the command line: one sentence and exit code 2 for input that cannot work, 130 when interrupted."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

import tyro

from dit_sparse import __version__, models, options, predict
from dit_sparse.config import SparseConfig

USAGE = """\
dit-sparse: training-free sparse attention for diffusion transformers, on stock diffusers.

  dit-sparse generate   make a video or an image, with the demo model if no other is given
  dit-sparse calibrate  measure a model in a dense run, and write a profile
  dit-sparse fit        choose from a profile what each head does at each step, to a quality, a speed or a memory
  dit-sparse profile    show or compare profiles, or draw what was measured
  dit-sparse compare    make videos dense and with several methods, score and time them, and report on one page
  dit-sparse visualize  draw which blocks the heads of a layer keep at a step, and where in the frames these lie
  dit-sparse metrics    score a video file against another: PSNR, SSIM, MS-SSIM, LPIPS, flicker
  dit-sparse plan       say from shapes alone what sparse attention can gain for a model and a size
  dit-sparse info       show the device, the kernels chosen for it, and the models known
  dit-sparse bench      time attention, the whole sparse operator or a forward beside dense attention

dit-sparse COMMAND --help lists a command's options and says what each means; --version prints the version.
An error is one sentence; with --debug anywhere its traceback is shown."""


# Pixels along the longer side; nobody generates more at once.
LARGEST = 8192


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
    """Instead of model_id, a published model such as wan2.1-14b or flux.1-dev; `dit-sparse info` lists them."""
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


@dataclass(frozen=True)
class InfoOptions:
    """Show the device, the kernels chosen for it, and the models known."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `dit-sparse ARGUMENTS`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    debug = "--debug" in arguments
    command, *rest = [token for token in arguments if token != "--debug"] or [""]
    try:
        try:
            return _dispatch(command, rest)
        finally:
            # A reader that has gone is found out here, not when the interpreter ends.
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted: what was finished is kept, and nothing is left half-written.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and the interpreter would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_users(error):
            raise
        print(f"dit-sparse: {_one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(command: str, arguments: list[str]) -> int:
    """Imports a command's module only when asked for it, since some need seconds."""
    match command:
        case "generate":
            from dit_sparse import generate

            return generate.run(options.parse(generate.GenerateOptions, arguments, "dit-sparse generate"))
        case "calibrate":
            from dit_sparse import calibrate

            return calibrate.calibrate(options.parse(calibrate.CalibrateOptions, arguments, "dit-sparse calibrate"))
        case "fit":
            from dit_sparse import calibrate

            return calibrate.fit(options.parse(calibrate.FitOptions, arguments, "dit-sparse fit"))
        case "profile":
            from dit_sparse import inspect_profile

            return inspect_profile.run(arguments)
        case "compare":
            from dit_sparse import compare

            return compare.run(options.parse(compare.CompareOptions, arguments, "dit-sparse compare"))
        case "visualize":
            from dit_sparse import visualize

            return visualize.run(options.parse(visualize.VisualizeOptions, arguments, "dit-sparse visualize"))
        case "metrics":
            from dit_sparse import measure

            return measure.run(arguments)
        case "plan":
            return plan(options.parse(PlanOptions, arguments, "dit-sparse plan"))
        case "info":
            return info(options.parse(InfoOptions, arguments, "dit-sparse info"))
        case "bench":
            return _bench(arguments)
    known = (
        "generate", "calibrate", "fit", "profile", "compare", "visualize", "metrics", "plan", "info", "bench",
    )  # fmt: skip
    near = get_close_matches(command, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
    raise ValueError(f"Unknown command {command!r}: {hint}")


def _bench(arguments: list[str]) -> int:
    from dit_sparse import bench

    kinds = get_args(get_type_hints(bench.run)["what"])
    what: Any = arguments[0] if arguments else ""
    if what not in (*kinds, "-h", "--help"):
        raise ValueError(f"bench takes {' or '.join(kinds)} first, not {what!r}.")
    told = options.parse(bench.BenchOptions, arguments[what in kinds :], f"dit-sparse bench {{{','.join(kinds)}}}")
    return bench.run(what, told)


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

    from dit_sparse.kernels.block_attention import chosen_impl
    from dit_sparse.kernels.dense_attention import LONG, dense_backend
    from dit_sparse.kernels.implementation import Inputs
    from dit_sparse.pipelines.session import FAMILIES
    from dit_sparse.plan import BlockPlan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"dit-sparse {__version__}, torch {torch.__version__}")
    print(f"device            {device.type} ({name})")
    row = torch.empty(1, 1, 1, 128, device=device, dtype=dtype)
    kernel = chosen_impl("auto", Inputs(row, row, row, BlockPlan.full(1, 1, 1, 1, device), 128, 128))
    print(f"sparse kernel     {kernel} for {dtype}, 128 channels a head, blocks of 128")
    lengths = (1, LONG, 8 * LONG)
    found = [dense_backend(device, dtype, 128, tokens, 24) for tokens in lengths]
    dense = [found[0]] + [
        f"{now} from {tokens} tokens on"
        for before, now, tokens in zip(found[:-1], found[1:], lengths[1:], strict=True)
        if now != before
    ]
    print(f"dense kernel      {', '.join(dense)}, {dtype}, 24 heads of 128 channels")
    print(f"transformers      {', '.join(sorted(FAMILIES))}")
    print(f"plan --family     {', '.join(models.PUBLISHED)}")
    demo = models.demo_directory()
    print(f"demo model        {demo if (demo / 'model_index.json').is_file() else f'not at {demo}'}")
    return 0


def plan(chosen: PlanOptions) -> int:
    if (chosen.model_id is None) == (chosen.family is None):
        raise ValueError(f"Give either --model_id or --family, one of {', '.join(models.PUBLISHED)}.")
    if chosen.sparse.profile is not None:
        raise ValueError(
            "plan goes by shapes alone, so it takes no profile: dit-sparse profile show says what it predicts."
        )
    if chosen.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is at least 1, not {chosen.num_inference_steps}.")
    from dit_sparse.pipelines.session import FAMILIES

    height, width, num_frames = chosen.height, chosen.width, chosen.num_frames
    if chosen.family is not None:
        model = models.published(chosen.family)
        class_name, transformer, vae = model.class_name, model.transformer, model.vae
        height = model.height if height is None else height
        width = model.width if width is None else width
        num_frames = model.num_frames if num_frames is None else num_frames
    else:
        files = models.find(chosen.model_id)
        models.check_known(files, FAMILIES)
        class_name, transformer = next(iter(files.transformers.values()))
        vae = files.vae
    family = FAMILIES[class_name]
    size = family.size(transformer, vae)
    if size.frames is None and num_frames is None:
        num_frames = 1
    if height is None or width is None or num_frames is None:
        raise ValueError(f"Give --height, --width and --num_frames to plan for {chosen.model_id}.")
    models.check_size(size, height, width, num_frames)
    # What has guidance as an input runs once a step.
    branches = 2 if chosen.guidance_scale > 1 and not transformer.get("guidance_embeds") else 1

    def at(height: int, width: int) -> predict.ModelShape:
        shape = family.shape(transformer, height, width, num_frames, vae)
        return replace(shape, branches=branches)

    said = predict.predict(at(height, width), chosen.sparse, chosen.num_inference_steps)
    print("\n".join(_told(chosen, at(height, width), said)))
    from_size = _pays_from(chosen, at, size.pixels, height, width)
    what = "images" if size.frames is None else f"videos of {num_frames} frames"
    if from_size is None:
        print(f"pays from         no size up to {LARGEST} pixels along a side, for {what} of this shape")
    else:
        print(f"pays from         {from_size[0]} x {from_size[1]} pixels, for {what} of this shape")
    return 0


def _pays_from(
    chosen: PlanOptions, at: Callable[[int, int], predict.ModelShape], multiple: int, height: int, width: int
) -> tuple[int, int] | None:
    """The smallest height and width, near to the proportion of those given, from which sparse attention pays."""

    def sides(short: int) -> tuple[int, int]:
        long = max(round(short * max(height, width) / min(height, width) / multiple), 1) * multiple
        return (short, long) if height <= width else (long, short)

    for short in range(multiple, LARGEST + 1, multiple):
        high, wide = sides(short)
        if max(high, wide) > LARGEST:
            return None
        if predict.predict(at(high, wide), chosen.sparse, chosen.num_inference_steps).pays:
            return high, wide
    return None


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
