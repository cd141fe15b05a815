"""A procedural world of captioned clips, and a checker that reads a clip back in closed form.

A scene is one or two groups of equal objects that cross a moving background. Everything is a function of time in
[0, 1] and of positions in units of half the frame height, so a scene can be rendered at any size and length. Objects
are the only saturated colours: the checker finds them by hue, whatever the light.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

COUNTS = ("a", "two", "three")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "spotted")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
VERBS = ("drift", "move", "rush", "weave")
DIRECTIONS = ("left", "right", "up", "down")
PATTERNS = ("striped", "checkered", "dotted", "wavy", "cloudy")
CAMERAS = ("stays still", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")
LIGHTS = ("steady", "fading", "growing")
COLOURS = {
    "red": (0.93, 0.07, 0.07),
    "orange": (0.95, 0.50, 0.05),
    "yellow": (0.95, 0.90, 0.06),
    "green": (0.08, 0.80, 0.14),
    "cyan": (0.06, 0.85, 0.88),
    "blue": (0.10, 0.28, 0.95),
    "magenta": (0.90, 0.10, 0.80),
}
BACKGROUNDS = {
    "grey": (0.48, 0.48, 0.48),
    "navy": (0.26, 0.30, 0.42),
    "brown": (0.46, 0.36, 0.29),
    "olive": (0.40, 0.43, 0.28),
    "teal": (0.27, 0.42, 0.42),
    "plum": (0.42, 0.30, 0.41),
}
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
DISPLACEMENT = {"drift": 0.6, "move": 0.9, "rush": 1.3, "weave": 0.9}
RADIUS = {"small": 0.22, "large": 0.36}
UNIT_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

# A background is below this saturation and an object above it; texture and light scale a colour, so they keep it.
OBJECT_SATURATION = 0.62


@dataclass(frozen=True)
class Group:
    """Equal objects that move together. An attribute that a caption leaves out is None."""

    colour: str
    shape: str
    count: int = 1
    size: str | None = None
    texture: str | None = None
    verb: str | None = None
    direction: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption says. The first group is in front of the second."""

    groups: tuple[Group, ...]
    background: str | None = None
    pattern: str | None = None
    camera: str | None = None
    light: str | None = None


@dataclass(frozen=True)
class SceneBatch:
    """Scenes with the numbers that captions do not fix: nuisance [B, NUISANCES] uniform in [0, 1)."""

    scenes: tuple[Scene, ...]
    nuisance: torch.Tensor

    def __len__(self) -> int:
        return len(self.scenes)


@dataclass(frozen=True)
class GroupScore:
    """One group of one clip, found by hue. displacement is in half heights over the clip, (x right, y down)."""

    colour: bool
    shape: bool
    direction: bool
    size: bool
    count: bool
    shape_seen: str | None
    count_seen: int
    displacement: tuple[float, float]


SLOTS = 3
NUISANCES = 8 + 4 * SLOTS


def sample_scenes(batch: int, generator: torch.Generator, two_groups: float = 0.45) -> SceneBatch:
    """Draw scenes from a CPU generator: the same generator state gives the same scenes on every machine.

    two_groups is the share of scenes with a second group, where there is room for one.
    """
    # One table of uniforms per batch, then arithmetic: no draw depends on an earlier one.
    picks = torch.rand(batch, 32, generator=generator).tolist()
    nuisance = torch.rand(batch, NUISANCES, generator=generator)
    return SceneBatch(tuple(_scene(iter(row), two_groups) for row in picks), nuisance)


def _scene(uniform, share: float) -> Scene:
    def pick(options):
        options = tuple(options)
        return options[int(next(uniform) * len(options))]

    two_groups = next(uniform) < share
    first_count = (1, 1, 1, 1, 1, 1, 1, 2, 2, 3)[int(next(uniform) * 10)]
    second_count = 2 if next(uniform) < 0.2 and first_count == 1 else 1
    two_groups = two_groups and first_count + second_count <= SLOTS
    colours = list(COLOURS)
    groups = []
    for count in (first_count, second_count)[: 1 + two_groups]:
        colour = pick(colours)
        colours.remove(colour)
        size = "small" if count == 3 else pick(SIZES)
        texture = ("plain", "plain", "striped", "spotted")[int(next(uniform) * 4)]
        groups.append(Group(colour, pick(SHAPES), count, size, texture, pick(VERBS), pick(DIRECTIONS)))
    camera = "stays still" if next(uniform) < 0.25 else pick(CAMERAS[1:])
    light = "steady" if next(uniform) < 0.5 else pick(LIGHTS[1:])
    return Scene(tuple(groups), pick(BACKGROUNDS), pick(PATTERNS), camera, light)


def caption(scene: Scene) -> str:
    """Say what the scene fixes; what is None stays unsaid."""
    text = " and ".join(_say_group(group) for group in scene.groups)
    if scene.background is not None:
        text += f" over a {scene.background} {scene.pattern} background"
    if scene.camera is not None:
        text += f" while the camera {scene.camera}"
    if scene.light is not None:
        text += f" in {scene.light} light"
    return text


def _say_group(group: Group) -> str:
    plural = group.count > 1
    words = [COUNTS[group.count - 1], group.size, group.texture, group.colour]
    words.append(PLURALS[group.shape] if plural else group.shape)
    if group.verb is not None:
        words += [group.verb if plural else _third_person(group.verb), group.direction]
    return " ".join(word for word in words if word is not None)


def _third_person(verb: str) -> str:
    return verb + ("es" if verb.endswith("sh") else "s")


def parse(text: str) -> Scene:
    """The scene that a caption says, the inverse of caption()."""
    rest, light = _split_tail(text, " in ", " light")
    rest, camera = _split_tail(rest, " while the camera ", "")
    rest, ground = _split_tail(rest, " over a ", " background")
    background, pattern = ground.split(" ") if ground is not None else (None, None)
    groups = tuple(_parse_group(part) for part in rest.split(" and "))
    for value, known in ((light, LIGHTS), (camera, CAMERAS), (background, BACKGROUNDS), (pattern, PATTERNS)):
        if value is not None and value not in known:
            raise ValueError(f"{value!r} in {text!r} is none of {', '.join(known)}.")
    return Scene(groups, background, pattern, camera, light)


def _split_tail(text: str, start: str, end: str) -> tuple[str, str | None]:
    head, found, tail = text.rpartition(start)
    if not found or not tail.endswith(end):
        return text, None
    return head, tail[: len(tail) - len(end)]


def _parse_group(text: str) -> Group:
    words = text.split(" ")
    singular = {plural: shape for shape, plural in PLURALS.items()} | {shape: shape for shape in SHAPES}
    verbs = {_third_person(verb): verb for verb in VERBS} | {verb: verb for verb in VERBS}
    found = {}
    for word in words[1:]:
        for name, table in (
            ("size", {w: w for w in SIZES}),
            ("texture", {w: w for w in TEXTURES}),
            ("colour", {w: w for w in COLOURS}),
            ("shape", singular),
            ("verb", verbs),
            ("direction", {w: w for w in DIRECTIONS}),
        ):
            if word in table:
                found[name] = table[word]
                break
        else:
            raise ValueError(f"{word!r} in {text!r} is not a word of the captions.")
    if words[0] not in COUNTS or "colour" not in found or "shape" not in found:
        raise ValueError(f"{text!r} must begin with one of {', '.join(COUNTS)} and name a colour and a shape.")
    return Group(count=COUNTS.index(words[0]) + 1, **found)


def vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, in a fixed order."""
    words: list[str] = list(COUNTS + SIZES + TEXTURES) + list(COLOURS)
    words += [*SHAPES, *PLURALS.values(), *VERBS, *(_third_person(verb) for verb in VERBS), *DIRECTIONS]
    words += [*BACKGROUNDS, *PATTERNS, *(word for camera in CAMERAS for word in camera.split(" ")), *LIGHTS]
    words += ["and", "over", "background", "while", "the", "camera", "in", "light"]
    return tuple(dict.fromkeys(words))


@dataclass(frozen=True)
class SceneTensors:
    """Scenes as numbers, to render on any device. Slot tensors are [B, SLOTS, ...]; an empty slot has radius 0."""

    shape: torch.Tensor
    texture: torch.Tensor
    colour: torch.Tensor
    radius: torch.Tensor
    start: torch.Tensor
    step: torch.Tensor
    sway: torch.Tensor
    pattern: torch.Tensor
    ground: torch.Tensor
    pan: torch.Tensor
    zoom: torch.Tensor
    light: torch.Tensor
    nuisance: torch.Tensor

    def to(self, device: torch.device | str) -> "SceneTensors":
        return SceneTensors(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def scene_tensors(batch: SceneBatch, aspect: float) -> SceneTensors:
    """Place every object: the whole path of each stays inside a frame that is `aspect` times as wide as high."""
    rows: dict[str, list] = {name: [] for name in ("shape", "texture", "colour", "radius", "start", "step", "sway")}
    for scene, numbers in zip(batch.scenes, batch.nuisance.tolist(), strict=True):
        slots = [
            _slot(group, member, numbers[8 + 4 * index :], numbers[8 + 4 * (index - member) :], aspect)
            for index, (group, member) in enumerate(
                (group, member) for group in scene.groups for member in range(group.count)
            )
        ]
        slots += [(0, 0, (0.0, 0.0, 0.0), 0.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0))] * (SLOTS - len(slots))
        for name, values in zip(rows, zip(*slots, strict=True), strict=True):
            rows[name].append(values)

    pans = {"pans left": (-1, 0), "pans right": (1, 0), "pans up": (0, -1), "pans down": (0, 1)}
    zooms = {"zooms in": -0.45, "zooms out": 0.45}
    lights = {"steady": (1.0, 0.0), "fading": (1.0, -0.5), "growing": (0.5, 0.5)}
    scenes = batch.scenes
    return SceneTensors(
        **{name: torch.tensor(values) for name, values in rows.items()},
        pattern=torch.tensor([PATTERNS.index(scene.pattern) for scene in scenes]),
        ground=torch.tensor([BACKGROUNDS[scene.background] for scene in scenes]),
        pan=torch.tensor([pans.get(scene.camera, (0, 0)) for scene in scenes], dtype=torch.float32),
        zoom=torch.tensor([zooms.get(scene.camera, 0.0) for scene in scenes]),
        light=torch.tensor([lights[scene.light] for scene in scenes]),
        nuisance=batch.nuisance,
    )


def _slot(group: Group, member: int, own: list[float], first: list[float], aspect: float) -> tuple:
    """One object. The members of a group share the first one's path and stand side by side across it."""
    radius = RADIUS[group.size] * (0.92 + 0.16 * first[0])
    step_x, step_y = UNIT_STEP[group.direction]
    along_x = step_x != 0
    along_half, across_half = (aspect, 1.0) if along_x else (1.0, aspect)
    length = min(DISPLACEMENT[group.verb] * (0.92 + 0.16 * first[1]), 2 * (along_half - radius - 0.04))
    free = 2 * (along_half - radius - 0.04) - length
    sign = step_x + step_y
    begin = -sign * length / 2 + (first[2] - 0.5) * free
    if group.count > 1:
        begin += (own[2] - 0.5) * min(0.1, free) * (member > 0)
    sway = 0.1 if group.verb == "weave" else 0.0
    lane = (2 * member + 1) / group.count - 1
    room = max(across_half / group.count - radius - sway - 0.04, 0.0)
    across = lane * across_half + (2 * own[3] - 1) * room
    start = (begin, across) if along_x else (across, begin)
    swing = (0.0, sway) if along_x else (sway, 0.0)
    step = (step_x * length, step_y * length)
    return SHAPES.index(group.shape), TEXTURES.index(group.texture), COLOURS[group.colour], radius, start, step, swing


def render(scenes: SceneTensors, frames: int, height: int, width: int) -> torch.Tensor:
    """Clips [B, 3, frames, height, width] in [-1, 1], on the device of `scenes`."""
    device = scenes.radius.device
    # [B, T, H, W] grids throughout; pixel is the size of one pixel, for edges one pixel soft.
    pixel = 2.0 / height
    time = torch.linspace(0, 1, frames, device=device).view(1, frames, 1, 1)
    y = ((torch.arange(height, device=device) + 0.5) * pixel - 1).view(1, 1, height, 1)
    x = ((torch.arange(width, device=device) + 0.5) * pixel - width / height).view(1, 1, 1, width)

    image = _background(scenes, time, x, y, pixel)
    for slot in reversed(range(SLOTS)):
        radius = scenes.radius[:, slot].view(-1, 1, 1, 1)
        dx, dy = _from_centre(scenes, slot, time, x, y)
        shape = scenes.shape[:, slot].view(-1, 1, 1, 1)
        present = (radius > 0).float()
        shadow = 0.32 * torch.sigmoid(-signed_distance(shape, dx - 0.05, dy - 0.07, radius) / 0.02) * present
        image = image * (1 - shadow).unsqueeze(1)
        cover = (0.5 - signed_distance(shape, dx, dy, radius) / pixel).clamp(0, 1) * present
        shade = (1 - 0.16 * (dx + dy) / radius.clamp_min(0.1)).clamp(0.75, 1.04)
        texture = scenes.texture[:, slot].view(-1, 1, 1, 1)
        stripes = (0.5 + torch.sin((dx + dy) * (7.0 / radius.clamp_min(0.1))) * 0.14 * radius / pixel).clamp(0, 1)
        cell = 0.8 * radius.clamp_min(0.1)
        spot_x, spot_y = torch.remainder(dx, cell) - cell / 2, torch.remainder(dy, cell) - cell / 2
        spots = (0.5 - ((spot_x**2 + spot_y**2).sqrt() - 0.3 * cell) / pixel).clamp(0, 1)
        dark = torch.where(texture == 1, stripes, torch.where(texture == 2, spots, torch.zeros_like(spots)))
        paint = scenes.colour[:, slot].view(-1, 3, 1, 1, 1) * (shade * (1 - 0.38 * dark)).unsqueeze(1)
        image = image + cover.unsqueeze(1) * (paint - image)
    gain = scenes.light[:, 0].view(-1, 1, 1, 1) + scenes.light[:, 1].view(-1, 1, 1, 1) * time
    return (image * gain.unsqueeze(1)).clamp(0, 1) * 2 - 1


def _from_centre(
    scenes: SceneTensors, slot: int, time: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets (dx, dy) of every position from where the object of a slot is at every time."""
    swing = torch.sin(4 * math.pi * time)
    centre_x, centre_y = (
        scenes.start[:, slot, axis].view(-1, 1, 1, 1)
        + scenes.step[:, slot, axis].view(-1, 1, 1, 1) * time
        + scenes.sway[:, slot, axis].view(-1, 1, 1, 1) * swing
        for axis in (0, 1)
    )
    return x - centre_x, y - centre_y


# What label() tells of each place: 0 is background, then colours, shapes and directions in their order.
LABELS = (len(COLOURS) + 1, len(SHAPES) + 1, len(DIRECTIONS) + 1)


def label(scenes: SceneTensors, frames: int, rows: int, columns: int) -> torch.Tensor:
    """What lies at the middle of every cell of a grid: int64 [B, 3, frames, rows, columns], below LABELS[...]."""
    device = scenes.radius.device
    time = torch.linspace(0, 1, frames, device=device).view(1, frames, 1, 1)
    y = ((torch.arange(rows, device=device) + 0.5) * (2.0 / rows) - 1).view(1, 1, rows, 1)
    x = ((torch.arange(columns, device=device) + 0.5) * (2.0 / rows) - columns / rows).view(1, 1, 1, columns)
    paints = torch.tensor(list(COLOURS.values()), device=device)
    steps = torch.tensor([UNIT_STEP[name] for name in DIRECTIONS], device=device)
    found = torch.zeros(len(scenes.radius), 3, frames, rows, columns, dtype=torch.long, device=device)
    for slot in reversed(range(SLOTS)):
        radius = scenes.radius[:, slot].view(-1, 1, 1, 1)
        shape = scenes.shape[:, slot]
        dx, dy = _from_centre(scenes, slot, time, x, y)
        inside = (signed_distance(shape.view(-1, 1, 1, 1), dx, dy, radius) < 0) & (radius > 0)
        colour = (scenes.colour[:, slot].unsqueeze(1) - paints).abs().sum(-1).argmin(-1)
        direction = (scenes.step[:, slot] @ steps.T).argmax(-1)
        told = 1 + torch.stack([colour, shape, direction], 1)
        found = torch.where(inside.unsqueeze(1), told.view(-1, 3, 1, 1, 1), found)
    return found


def _background(
    scenes: SceneTensors, time: torch.Tensor, x: torch.Tensor, y: torch.Tensor, pixel: float
) -> torch.Tensor:
    number = [scenes.nuisance[:, index].view(-1, 1, 1, 1) for index in range(8)]
    zoom = torch.exp(scenes.zoom.view(-1, 1, 1, 1) * (time - 0.5))
    distance = 0.6 + 0.3 * number[0]
    u = x * zoom + scenes.pan[:, 0].view(-1, 1, 1, 1) * distance * time + 4 * number[1]
    v = y * zoom + scenes.pan[:, 1].view(-1, 1, 1, 1) * distance * time + 4 * number[2]
    period = 0.42 + 0.22 * number[3]
    rate = 2 * math.pi / period

    def wave(position: torch.Tensor) -> torch.Tensor:
        return (0.5 + torch.sin(rate * position) / (rate * pixel)).clamp(0, 1)

    quarter = torch.floor(number[4] * 4) * (math.pi / 4)
    striped = wave(u * torch.cos(quarter) + v * torch.sin(quarter))
    across, down = wave(u), wave(v)
    checkered = across + down - 2 * across * down
    dot_u, dot_v = torch.remainder(u, period) - period / 2, torch.remainder(v, period) - period / 2
    dotted = (0.5 - ((dot_u**2 + dot_v**2).sqrt() - 0.3 * period) / pixel).clamp(0, 1)
    wavy = wave(v + 0.22 * period * torch.sin(rate * 0.7 * u))
    cloudy = 0.5
    for index in range(4):
        angle = 2 * math.pi * (number[5] + index * (0.19 + 0.1 * number[6]))
        cloudy = cloudy + 0.15 * torch.sin(
            (3.1 + 1.7 * index) * (u * torch.cos(angle) + v * torch.sin(angle)) + 6.28 * index * number[7]
        )
    pattern = scenes.pattern.view(-1, 1, 1, 1)
    weight = striped
    for index, field in ((1, checkered), (2, dotted), (3, wavy), (4, cloudy)):
        weight = torch.where(pattern == index, field, weight)
    tone = 0.72 + 0.5 * weight - 0.06 * y
    return scenes.ground.view(-1, 3, 1, 1, 1) * tone.unsqueeze(1)


def signed_distance(shape: torch.Tensor, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance to the outline of SHAPES[shape], negative inside; (dx, dy) from the centre, dy down."""
    length = (dx * dx + dy * dy).clamp_min(1e-8).sqrt()
    ax, ay = dx.abs(), dy.abs()
    circle = length - radius
    square = torch.maximum(ax, ay) - 0.87 * radius
    triangle = torch.maximum(ax * 0.866 - dy * 0.5, dy) - 0.62 * radius
    cross = torch.minimum(
        torch.maximum(ax - 0.36 * radius, ay - radius), torch.maximum(ay - 0.36 * radius, ax - radius)
    )
    ring = (length - 0.74 * radius).abs() - 0.28 * radius
    distance = circle
    for index, field in ((1, square), (2, triangle), (3, cross), (4, ring)):
        distance = torch.where(shape == index, field, distance)
    return distance


def score(frames: torch.Tensor, scene: Scene) -> tuple[GroupScore, ...]:
    """Read a clip [T, H, W, 3] in [0, 1] against what its caption asked, one score per group."""
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"score() takes frames [T, H, W, 3], not {tuple(frames.shape)}.")
    frames = frames.float()
    return tuple(_score_group(frames, group) for group in scene.groups)


def colour_mask(frames: torch.Tensor, colour: str) -> torch.Tensor:
    """Pixels [T, H, W] that have the hue of an object colour."""
    high, low = frames.amax(-1), frames.amin(-1)
    mask = (high - low > OBJECT_SATURATION * high) & (high > 0.15)
    mask[mask.clone()] = _nearest_colour(frames[mask]) == list(COLOURS).index(colour)
    return mask


def _nearest_colour(frames: torch.Tensor) -> torch.Tensor:
    def hue(rgb: torch.Tensor) -> torch.Tensor:
        red, green, blue = rgb.unbind(-1)
        return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)

    names = hue(torch.tensor(list(COLOURS.values()), device=frames.device))
    turn = (hue(frames).unsqueeze(-1) - names).abs()
    return torch.minimum(turn, 2 * math.pi - turn).argmin(-1)


def _score_group(frames: torch.Tensor, group: Group) -> GroupScore:
    length, height, width, _ = frames.shape
    pixel = 2.0 / height
    mask = colour_mask(frames, group.colour)
    area = mask.flatten(1).sum(1).float() * pixel * pixel
    radius = RADIUS[group.size or "small"]
    # Least area of one object of the asked size, given that the smallest shape covers 1.9 radius².
    least = 0.45 * 1.9 * radius * radius
    seen = area > least
    picks = torch.linspace(0, length - 1, min(7, length)).round().long().tolist()
    parts = [_components(mask[pick]) if seen[pick] else [] for pick in picks]
    # One solid part, not as many scattered pixels: noise has every hue.
    parts = [part for part in parts if part and part[0][1] * pixel * pixel > least]
    if len(parts) < 0.6 * len(picks):
        return GroupScore(False, False, False, False, False, None, 0, (0.0, 0.0))

    y = (torch.arange(height, device=frames.device) + 0.5) * pixel - 1
    x = (torch.arange(width, device=frames.device) + 0.5) * pixel - width / height
    weight = mask.float() / mask.flatten(1).sum(1).clamp_min(1).view(-1, 1, 1)
    centre = torch.stack([(weight * x).sum((1, 2)), (weight * y.view(-1, 1)).sum((1, 2))], -1)[seen]
    time = torch.linspace(0, 1, length, device=frames.device)[seen]
    time = time - time.mean()
    slope = (time.view(-1, 1) * centre).sum(0) / (time * time).sum().clamp_min(1e-6)
    displacement = (slope[0].item(), slope[1].item())
    direction = True
    if group.direction is not None:
        step = UNIT_STEP[group.direction]
        ahead = displacement[0] * step[0] + displacement[1] * step[1]
        aside = abs(displacement[0] * step[1]) + abs(displacement[1] * step[0])
        # Within 45 degrees of what was asked, and at least a third of the slowest motion of the world.
        direction = ahead > aside and ahead > DISPLACEMENT["drift"] / 3

    counts = sorted(sum(size > 0.35 * part[0][1] for _, size in part) for part in parts)
    count_seen = counts[len(counts) // 2]
    fits = torch.zeros(len(SHAPES), device=frames.device)
    areas = []
    for part in parts:
        for component, size in part[: group.count]:
            if size > 0.35 * part[0][1]:
                fits += _shape_fits(component, x, y, pixel)
                areas.append(size * pixel * pixel)
    shape_seen = SHAPES[int(fits.argmax())]
    size = True
    if group.size is not None:
        # Half way, in radius, between the two sizes of the shape that was seen.
        unit = _unit_area(shape_seen)
        measured = math.sqrt(sorted(areas)[len(areas) // 2] / unit)
        limit = (RADIUS["small"] + RADIUS["large"]) / 2
        size = (measured > limit) == (group.size == "large")
    return GroupScore(
        True,
        shape_seen == group.shape,
        direction,
        size,
        count_seen == group.count,
        shape_seen,
        count_seen,
        displacement,
    )


def _components(mask: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
    """The four largest connected parts of a mask [H, W], largest first, with their size in pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    inside = mask[box]
    index = torch.arange(1, inside.numel() + 1, device=mask.device, dtype=torch.float32).view(1, 1, *inside.shape)
    label = index * inside
    # Every pixel takes the largest number among its neighbours until nothing changes.
    while True:
        spread = F.max_pool2d(label, 3, 1, 1) * inside
        if torch.equal(spread, label):
            break
        label = spread
    names, sizes = label[0, 0][inside].unique(return_counts=True)
    parts = []
    for i in sizes.argsort(descending=True)[:4].tolist():
        part = torch.zeros_like(mask)
        part[box] = label[0, 0] == names[i]
        parts.append((part, float(sizes[i])))
    return parts


def _unit_area(shape: str) -> float:
    return {
        "circle": math.pi,
        "square": 4 * 0.87**2,
        "triangle": 3 * math.sqrt(3) * 0.62**2,
        "cross": 4 * (2 * 0.36 - 0.36**2),
        "ring": math.pi * ((0.74 + 0.28) ** 2 - (0.74 - 0.28) ** 2),
    }[shape]


def _shape_fits(component: torch.Tensor, x: torch.Tensor, y: torch.Tensor, pixel: float) -> torch.Tensor:
    """Overlap (intersection over union) of a part with every shape of the same area and centre, [SHAPES]."""
    weight = component.float()
    total = weight.sum()
    centre_x, centre_y = (weight * x).sum() / total, (weight * y.view(-1, 1)).sum() / total
    area = total * pixel * pixel
    index = torch.arange(len(SHAPES), device=x.device).view(-1, 1, 1)
    units = torch.tensor([_unit_area(shape) for shape in SHAPES], device=x.device).view(-1, 1, 1)
    radius = (area / units).sqrt()
    # No shape of this area, and no part like one, reaches further than this.
    near_x, near_y = ((axis - centre).abs() < 2 * radius.max() for axis, centre in ((x, centre_x), (y, centre_y)))
    outside = total - component[near_y][:, near_x].sum()
    part = component[near_y][:, near_x]
    template = signed_distance(index, x[near_x] - centre_x, y[near_y].view(-1, 1) - centre_y, radius) < 0
    return (template & part).sum((1, 2)) / ((template | part).sum((1, 2)) + outside)
