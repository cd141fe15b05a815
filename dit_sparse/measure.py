"""The command that scores one video file against another."""

from dataclasses import dataclass
from pathlib import Path

from dit_sparse import options
from dit_sparse.video import check_place, read_video, write_record


@dataclass(frozen=True)
class MetricsOptions:
    """Score a video against a reference: dit-sparse metrics VIDEO REFERENCE.

    Each is an mp4, a gif, a png, or a directory of pngs, and both have the same frames and size. PSNR is of the mean
    squared error over all frames. SSIM and MS-SSIM are 1 for equal frames. LPIPS is 0 for equal frames. Flicker is the
    mean difference of their frame-to-frame changes, as a share of the range of a pixel. An mp4 is lossy: a video
    differs from its own copy in mp4.
    """

    video: Path | None = None
    """The file to score; may also be given without the name of the option."""
    reference: Path | None = None
    """What it should look like; may also be given without the name of the option."""
    output_file: Path | None = None
    """Also write the scores here, as JSON."""


def run(arguments: list[str]) -> int:
    """Exit code of `dit-sparse metrics ARGUMENTS`. Raises ValueError for files that cannot be compared."""
    named = []
    for name in ("video", "reference"):
        if arguments and not arguments[0].startswith("-"):
            named += [f"--{name}", arguments[0]]
            arguments = arguments[1:]
    told = options.parse(MetricsOptions, [*named, *arguments], "dit-sparse metrics")
    if told.video is None or told.reference is None:
        raise ValueError("metrics takes two files, the video and its reference: dit-sparse metrics a.mp4 b.mp4.")
    if told.output_file is not None:
        check_place(told.output_file)
    from dit_sparse.calibration import metrics
    from dit_sparse.calibration.perceptual import lpips_or_reason
    from dit_sparse.calibration.scores import MEASURES, check_pair, scores

    video, reference = read_video(told.video), read_video(told.reference)
    check_pair(str(told.video), video, str(told.reference), reference)
    lpips, missing = lpips_or_reason()
    found = scores(video, reference, lpips)
    for name, (title, _) in MEASURES.items():
        value = found[name]
        print(f"{title:10} {'-' if value is None else f'{value:.6g}'}")
    scales = metrics.ms_ssim_scales(*video.shape[1:3])
    if 0 < scales < 5:
        print(f"MS-SSIM is over {scales} of its 5 scales: frames of 176 pixels and more have room for all.")
    if missing:
        print(missing)
    if told.output_file is not None:
        record = {name: str(value) if value == float("inf") else value for name, value in found.items()}
        write_record(told.output_file, record | {"ms_ssim_scales": scales})
    return 0
