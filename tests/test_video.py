import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from dit_sparse import video


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth in space and time, so that lossy codecs keep it."""
    t, y, x = np.meshgrid(
        np.linspace(0, 1, frames), np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij"
    )
    return np.stack([x, y, (t + x) / 2], -1)


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def test_mp4_holds_the_frames(tmp_path):
    written = video.write_video(tmp_path / "a.mp4", clip(), fps=8)
    assert written == [tmp_path / "a.mp4"]
    back = iio.imread(written[0], plugin="FFMPEG")
    assert back.shape == (5, 32, 48, 3)
    assert np.abs(back / 255 - clip()).mean() < 0.02
    assert iio.immeta(written[0], plugin="FFMPEG")["fps"] == 8
    assert leftovers(tmp_path) == []


def test_gif_holds_the_frames(tmp_path):
    [written] = video.write_video(tmp_path / "a.gif", clip(), fps=10)
    back = iio.imread(written)
    assert back.shape == (5, 32, 48, 3)
    assert np.abs(back / 255 - clip()).mean() < 0.06
    assert iio.immeta(written)["duration"] == 100


def test_png_is_exact_and_one_file_a_frame(tmp_path):
    written = video.write_video(tmp_path / "a.png", clip(3), fps=8)
    assert [file.name for file in written] == ["a-0000.png", "a-0001.png", "a-0002.png"]
    assert np.array_equal(np.stack([iio.imread(file) for file in written]), (clip(3) * 255).round().astype(np.uint8))
    assert video.write_video(tmp_path / "b.png", clip(1), fps=8) == [tmp_path / "b.png"]


def test_colours_outside_the_range_are_clipped_and_not_wrapped(tmp_path):
    [file] = video.write_video(tmp_path / "a.png", np.full((1, 2, 2, 3), [-0.2, 0.5, 1.2]), fps=8)
    assert iio.imread(file)[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_refused(tmp_path, bad):
    frames = clip()
    frames[1, 2, 3] = bad
    with pytest.raises(ValueError, match="3 of 23040 values of the video are NaN or Inf"):
        video.write_video(tmp_path / "a.mp4", frames, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_odd_sizes_and_other_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even height and width, not 31x48"):
        video.write_video(tmp_path / "a.mp4", clip(height=31), fps=8)
    with pytest.raises(ValueError, match=r"not \[5, 32, 48\]"):
        video.write_video(tmp_path / "a.mp4", clip()[..., 0], fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, suffix):
    target = tmp_path / f"a{suffix}"
    target.write_bytes(b"old")

    def interrupted(uri, *args, **kwargs):
        Path(uri).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(iio, "imwrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(target, clip(1), fps=8)
    assert [file.name for file in tmp_path.iterdir()] == [target.name]
    assert target.read_bytes() == b"old"


def test_a_record_is_json_and_nothing_half(tmp_path):
    video.write_record(tmp_path / "a.json", {"density": 0.1, "steps": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"density": 0.1, "steps": [1, 2]}
    with pytest.raises(ValueError):
        video.write_record(tmp_path / "b.json", {"density": float("nan")})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_output_path_is_checked_without_a_trace(tmp_path):
    video.check_writable(tmp_path / "a.mp4")
    (tmp_path / "file").touch()
    for path, reason in {
        tmp_path / "a.avi": "ends in .mp4, .gif or .png, not '.avi'",
        tmp_path / "no" / "a.mp4": "in no directory that exists",
        tmp_path / "file" / "a.mp4": "in no directory that exists",
        Path("/proc/a.mp4"): "cannot be written" if Path("/proc").is_dir() else "in no directory",
    }.items():
        with pytest.raises(ValueError, match=reason):
            video.check_writable(path)
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        video.check_writable(tmp_path / "b.mp4")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.mp4", "file"]
