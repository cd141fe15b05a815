import json

import imageio.v3 as iio
import numpy as np
import pytest

from dit_sparse.calibration.metrics import flicker, ms_ssim, psnr, ssim
from dit_sparse.cli import main
from dit_sparse.video import read_video, write_video


def clip(frames: int = 4, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (frames, height, width)), indexing="ij")
    smooth = np.stack([x, y, (t + x) / 2], -1)
    return np.clip(smooth + 0.05 * np.random.default_rng(seed).standard_normal(smooth.shape), 0, 1)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("dit-sparse: ")
    return said


def test_scores_of_two_series_of_pictures(here, capsys):
    write_video(here / "a.png", clip(seed=1), fps=8)
    write_video(here / "b.png", clip(seed=2), fps=8)
    assert main(["metrics", "a.png", "b.png", "--output_file", "scores.json"]) == 0
    found = json.loads((here / "scores.json").read_text())
    a, b = ((clip(seed=seed) * 255).round() / 255 for seed in (1, 2))
    assert found["psnr_db"] == pytest.approx(psnr(a, b), abs=1e-5)
    assert found["ssim"] == pytest.approx(ssim(a, b), abs=1e-5)
    assert found["ms_ssim"] == pytest.approx(ms_ssim(a, b), abs=1e-5) and found["ms_ssim_scales"] == 2
    assert found["flicker"] == pytest.approx(flicker(a, b), abs=1e-5)
    out = capsys.readouterr().out
    assert f"PSNR dB    {found['psnr_db']:.6g}" in out and "2 of its 5 scales" in out


def test_every_kind_of_file_is_read(here):
    frames = clip()
    folder = here / "frames"
    folder.mkdir()
    write_video(folder / "x.png", frames, fps=8)
    write_video(here / "one.png", frames[:1], fps=8)
    iio.imwrite(here / "grey.png", (frames[0, ..., 0] * 255).round().astype(np.uint8))
    iio.imwrite(here / "deep.png", (frames[0, ..., 0] * 65535).round().astype(np.uint16))
    for kind in ("mp4", "gif"):
        write_video(here / f"a.{kind}", frames, fps=8)
        assert read_video(here / f"a.{kind}").shape == (4, 32, 48, 3)
    assert np.abs(read_video(folder) - frames).max() <= 0.5 / 255 + 1e-6
    assert np.abs(read_video(here / "one.png") - frames[:1]).max() <= 0.5 / 255 + 1e-6
    assert np.abs(read_video(here / "grey.png")[0, ..., 1] - frames[0, ..., 0]).max() <= 0.5 / 255 + 1e-6
    assert np.abs(read_video(here / "deep.png")[0, ..., 2] - frames[0, ..., 0]).max() <= 1e-4


def test_equal_files_score_perfectly_and_the_record_is_json(here, capsys):
    write_video(here / "a.mp4", clip(), fps=8)
    assert main(["metrics", "a.mp4", "a.mp4", "--output_file", "s.json"]) == 0
    found = json.loads((here / "s.json").read_text())
    assert found["psnr_db"] == "inf" and found["ssim"] == pytest.approx(1) and found["flicker"] == 0


def test_one_frame_has_no_flicker(here, capsys):
    write_video(here / "a.png", clip()[:1], fps=8)
    assert main(["metrics", "a.png", "a.png"]) == 0
    assert "flicker    -" in capsys.readouterr().out


def test_frames_too_small_for_ssim_still_have_psnr(here, capsys):
    write_video(here / "a.png", clip(height=8), fps=8)
    write_video(here / "b.png", clip(height=8, seed=1), fps=8)
    assert main(["metrics", "a.png", "b.png"]) == 0
    out = capsys.readouterr().out
    assert "SSIM       -" in out and "MS-SSIM    -" in out and "PSNR dB    2" in out


def test_what_cannot_be_scored_is_said_in_one_sentence(here, capsys):
    write_video(here / "a.mp4", clip(), fps=8)
    write_video(here / "short.mp4", clip(3), fps=8)
    write_video(here / "wide.mp4", clip(width=64), fps=8)
    (here / "text.mp4").write_text("no video at all")
    (here / "nothing.mp4").write_bytes(b"")
    (here / "torn.mp4").write_bytes((here / "a.mp4").read_bytes()[:400])
    (here / "empty").mkdir()
    (here / "mixed").mkdir()
    write_video(here / "mixed" / "a.png", clip()[:1], fps=8)
    write_video(here / "mixed" / "b.png", clip(height=16)[:1], fps=8)
    assert "short.mp4 has 3 frames and a.mp4 has 4: compare equally many." in refused(
        capsys, "metrics", "short.mp4", "a.mp4"
    )
    assert "wide.mp4 is 32x64 pixels and a.mp4 is 32x48: compare equal sizes." in refused(
        capsys, "metrics", "wide.mp4", "a.mp4"
    )
    for name in ("text.mp4", "nothing.mp4", "torn.mp4"):
        assert f"'{name}' cannot be read as a video: " in refused(capsys, "metrics", name, "a.mp4")
    for name in ("gone.mp4", "gone.png", "empty"):
        assert f"'{name}' is no video: give an mp4" in refused(capsys, "metrics", "a.mp4", name)
    assert "'mixed' holds frames of different sizes: 16x48 and 32x48." in refused(capsys, "metrics", "mixed", "a.mp4")
    assert "metrics takes two files" in refused(capsys, "metrics", "a.mp4")
    assert "'c.mp4' stands where an option should" in refused(capsys, "metrics", "a.mp4", "a.mp4", "c.mp4")
    assert "in no directory that exists" in refused(
        capsys, "metrics", "a.mp4", "a.mp4", "--output_file", "gone/s.json"
    )
