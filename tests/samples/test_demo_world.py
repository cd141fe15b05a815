import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = Path(__file__).parents[2] / "samples"


def load(name: str) -> ModuleType:
    """A script of samples/, by path: the folder is not a package."""
    spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name, and the scripts import each other by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


world = load("demo_world")


def scenes(batch: int, seed: int) -> world.SceneBatch:
    return world.sample_scenes(batch, torch.Generator().manual_seed(seed))


def clips(batch: world.SceneBatch, frames: int = 6, height: int = 112, width: int = 128) -> torch.Tensor:
    """[N, T, H, W, 3] in [0, 1]."""
    rendered = world.render(world.scene_tensors(batch, width / height), frames, height, width)
    return (rendered.permute(0, 2, 3, 4, 1) + 1) / 2


def right(score: world.GroupScore) -> bool:
    return score.colour and score.shape and score.direction and score.size and score.count


@pytest.fixture(scope="module")
def truth() -> tuple[world.SceneBatch, torch.Tensor]:
    batch = scenes(50, 3)
    return batch, clips(batch)


def test_captions_parse_back_to_their_scenes() -> None:
    batch = scenes(500, 0)
    for scene in batch.scenes:
        assert world.parse(world.caption(scene)) == scene
    assert len({world.caption(scene) for scene in batch.scenes}) > 490


def test_a_caption_may_leave_things_unsaid() -> None:
    scene = scenes(1, 1).scenes[0]
    bare = replace(
        scene,
        groups=tuple(replace(group, size=None, texture=None) for group in scene.groups),
        background=None,
        pattern=None,
        camera=None,
        light=None,
    )
    assert world.parse(world.caption(bare)) == bare


def test_every_word_of_a_caption_is_in_the_vocabulary() -> None:
    words = {word for scene in scenes(500, 2).scenes for word in world.caption(scene).split(" ")}
    assert words <= set(world.vocabulary())


@pytest.mark.parametrize("text", ["a huge red circle", "red circle", "a red circle over a pink striped background"])
def test_parse_refuses_other_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"\."):
        world.parse(text)


def test_the_checker_is_right_on_rendered_clips(truth) -> None:
    batch, rendered = truth
    scores = [world.score(clip, scene)[0] for clip, scene in zip(rendered, batch.scenes, strict=True)]
    assert sum(map(right, scores)) >= 0.98 * len(scores)


@pytest.mark.parametrize("attribute", ["colour", "shape", "direction", "size", "count"])
def test_the_checker_sees_what_differs_from_the_caption(truth, attribute: str) -> None:
    batch, rendered = truth
    others = {
        "colour": tuple(world.COLOURS),
        "shape": world.SHAPES,
        "direction": world.DIRECTIONS,
        "size": world.SIZES,
        "count": (1, 2, 3),
    }[attribute]
    wrong = tried = 0
    for clip, scene in zip(rendered[:24], batch.scenes[:24], strict=True):
        used = {getattr(group, attribute) for group in scene.groups}
        other = next((value for value in others if value not in used), None)
        if other is None:
            continue
        tried += 1
        asked = replace(scene, groups=(replace(scene.groups[0], **{attribute: other}), *scene.groups[1:]))
        wrong += not getattr(world.score(clip, asked)[0], attribute)
    assert tried >= 12
    assert wrong == tried


def test_noise_shows_nothing() -> None:
    noise = torch.rand(7, 64, 72, 3, generator=torch.Generator().manual_seed(0))
    for scene in scenes(8, 4).scenes:
        assert not any(group.colour or group.shape or group.direction for group in world.score(noise, scene))


def test_scenes_and_clips_depend_on_the_generator_alone() -> None:
    first, again, other = scenes(4, 5), scenes(4, 5), scenes(4, 6)
    assert first.scenes == again.scenes
    assert torch.equal(clips(first, 3, 32, 48), clips(again, 3, 32, 48))
    assert first.scenes != other.scenes


def test_objects_stay_inside_the_frame() -> None:
    batch = scenes(200, 7)
    tensors = world.scene_tensors(batch, 1.0)
    for time in (0.0, 1.0):
        place = tensors.start + tensors.step * time
        reach = place.abs() + tensors.radius.unsqueeze(-1)
        assert reach.max() <= 1.0


def test_the_share_of_second_groups_is_as_asked() -> None:
    def seconds(share: float) -> int:
        batch = world.sample_scenes(400, torch.Generator().manual_seed(1), share)
        return sum(len(scene.groups) == 2 for scene in batch.scenes)

    # Three of a kind leave no room for a second group.
    assert seconds(0.0) == 0 and seconds(1.0) > 340
    assert 130 < seconds(0.45) < 220


def test_labels_name_what_the_picture_shows() -> None:
    batch = scenes(40, 5)
    batch = replace(batch, scenes=tuple(replace(s, light="steady") for s in batch.scenes))
    tensors = world.scene_tensors(batch, 1.125)
    rows, columns = 16, 18
    labels = world.label(tensors, 6, rows, columns)
    assert all(int(labels[:, kind].max()) < size for kind, size in enumerate(world.LABELS))
    # An odd number of pixels to a cell: one lies at its middle.
    frames = clips(batch, 6, rows * 7, columns * 7)[:, :, 3::7, 3::7]
    for clip, label, scene in zip(frames, labels, batch.scenes, strict=True):
        for group in scene.groups:
            here = label[0] == 1 + list(world.COLOURS).index(group.colour)
            assert here.any()
            # Edges are a pixel soft, and a dark spot on them can fall below the saturation of an object.
            assert (world.colour_mask(clip, group.colour) == here).float().mean() > 0.985
            assert set(label[1][here].tolist()) == {1 + world.SHAPES.index(group.shape)}
            assert set(label[2][here].tolist()) == {1 + world.DIRECTIONS.index(group.direction)}
        assert (label[:, label[0] == 0] == 0).all()


@pytest.fixture(scope="module")
def train() -> ModuleType:
    load("check_prompts")
    return load("train_demo")


def test_the_autoencoder_in_one_pass_is_the_one_that_is_exported(train) -> None:
    trainer = train.Trainer(train.TINY, train.build_pipeline(train.TINY, 0), "cpu", 0, compiled=False)
    trainer.fit_vae()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.vae.named_parameters():
            # The closed form leaves most weights at zero, and zeros would hide a difference.
            if "norm" not in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            if "attentions" in name and "proj" in name:
                parameter.zero_()
        pixels = world.render(world.scene_tensors(scenes(1, 0), 1.5), 9, 32, 48)
        latents = train.encode(trainer.vae, pixels)
        torch.testing.assert_close(latents, trainer.vae.encode(pixels).latent_dist.mode(), atol=1e-4, rtol=1e-4)
        again = train.decode(trainer.vae, latents).clamp(-1, 1)
        torch.testing.assert_close(again, trainer.vae.decode(latents).sample, atol=1e-4, rtol=1e-4)


def test_training_resumes_bit_equal(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: str, *more: str) -> None:
        command = ["train_demo.py", "--tiny", "--device", "cpu", "--steps", "4", "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [*command, *more])
        train.main()

    run("whole")
    run("parts", "--stop_after", "2")
    run("parts", "--resume", str(tmp_path / "parts" / "checkpoint.pt"))
    for name in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        whole, parts = (load_file(tmp_path / out / "demo" / f"{name}.safetensors") for out in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
