"""What a user may choose."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dit_sparse import schedule

if TYPE_CHECKING:
    from dit_sparse.layout import Layout, TokenGrid

Method = Literal[
    "anchor", "tail", "reshape", "rectify", "none", "topp", "svg", "sta", "radial", "ditfastattn", "dense"
]
Order = Literal["hilbert", "tile", "raster", "pixel"]
Storage = Literal["bf16", "fp8", "int4"]
Precision = Literal["full", "8bit"]
Routing = Literal["mass", "error", "fine"]

# Methods that choose blocks by what they hold. The others but dense go by a pattern, see dit_sparse.patterns.
_ROUTED = ("anchor", "tail", "reshape", "rectify", "none", "topp")

# Options that mean something to some methods only: setting one for another method is an error, not a no-op.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "top_p": (*_ROUTED[:-1], "dense"),
    "key_block": ("anchor", "tail", "reshape", "none"),
    "order": (*_ROUTED, "dense"),
    "routing": (*_ROUTED, "dense"),
    "neighbours": (*_ROUTED, "dense"),
    "anchor_density": ("anchor",),
    "stagger": ("anchor",),
    "residual": ("anchor", "reshape", "ditfastattn"),
    "max_state_gib": ("anchor", "reshape", "ditfastattn"),
    "second_order": ("anchor", "tail"),
    "second_order_limit": ("anchor", "tail"),
    "ramp": ("reshape",),
    "clamp": ("reshape",),
    "keep_mass": ("reshape",),
    "critical_mass": ("rectify",),
    "share_plan": ("anchor", "reshape"),
    "precision": get_args(Method)[:-1],
}
# What a profile does not decide.
_BESIDE_PROFILE = ("profile", "precision", "strict", "max_state_gib", "share_plan")


@dataclass(frozen=True)
class SparseConfig:
    """How attention is made sparse; every field has a working default, and unknown or pointless settings raise."""

    method: Method = "anchor"
    """What stands in for the blocks left out. anchor: pooled tail plus what it got wrong at the last dense step;
    tail: pooled tail; reshape: Re-ttention; rectify: Rectified SpaAttn; none: nothing; topp: nothing, and the blocks
    are shared out over heads and rows by mass; svg, sta, radial, ditfastattn: patterns of these papers, which go by
    where tokens lie; dense: no sparsity."""
    density: float = 0.1
    """Share of key blocks computed exactly for each query block, at most (top-k), before forced blocks."""
    top_p: float | None = None
    """Also keep the best blocks until they hold at least this share of the row's estimated score."""
    block: int | Literal["auto"] = "auto"
    """Tokens per block: 16, 32, 64 or 128; auto takes the largest that still gives 128 key blocks."""
    key_block: int | Literal["auto"] = "auto"
    """Tokens per block of keys, where it is less than that of queries; auto takes the same. Smaller ones find more of
    what counts at equal density, and pooled keys of the tail are as many times more."""
    order: Order = "hilbert"
    """How tokens are laid out before they are cut into blocks: hilbert (space-filling curve), tile, raster, or pixel
    (all frames of one pixel side by side)."""
    tile: tuple[int, int, int] = (4, 4, 8)
    """Frames, rows and columns of one tile of order "tile"."""
    routing: Literal["auto"] | Routing = "auto"
    """Keep the blocks with most mass, by mean queries and keys of blocks (mass) or by every key and mean queries of a
    quarter block (fine), or where the pooled stand-in errs most (error). auto is fine for what routes at anchors only,
    since it takes longest, else error with a tail and mass without."""
    neighbours: bool = False
    """Also keep blocks that touch the query block in space and time, as Rectified SpaAttn does."""
    first_frame: bool = False
    """Also keep the blocks that hold tokens of the first frame."""
    dense_steps: schedule.Span = 0.15
    """Steps computed dense: a count from the start, a share of the scheduler's steps, or ranges such as "0-2,19"."""
    dense_layers: schedule.Span = 0
    """Layers computed dense at every step, written like dense_steps."""
    refresh_every: int | None = None
    """After the dense steps, every so many steps are computed dense (4 for anchor, 5 for reshape, else never)."""
    anchor_density: float | None = None
    """Density of the anchors after the first one ("soft anchors"); dense if not given."""
    stagger: bool = False
    """Spread the anchors after the first over the layers, so that no step is all anchor."""
    share_plan: bool = True
    """At an anchor all branches of guidance keep the blocks of the first one, where each is a forward of its own:
    guidance subtracts what they get wrong alike."""
    residual: Literal["auto"] | Storage = "auto"
    """Storage of what an anchor remembers; auto takes the finest that fits."""
    max_state_gib: float | None = None
    """Memory the remembered state may take, in GiB; what is free if not given."""
    second_order: bool = True
    """Tail: weigh a block by the variance of its keys too."""
    second_order_limit: float = 2.0
    """Tail: the most that the variance may add to a block's logit. The plain formula (inf) is for logits that spread
    like a Gaussian inside a block, and puts too much weight on blocks where they spread far."""
    ramp: float = 0.0
    """Re-ttention's lambda, added to rho at each step after a refresh; the paper uses 0.04."""
    clamp: bool = True
    """Re-ttention: never let rho exceed 1."""
    keep_mass: bool = False
    """Re-ttention: weigh the residual so that each row's attention sums to 1."""
    critical_mass: bool = False
    """Rectified SpaAttn: scale by the kept mass alone, as the paper describes, not as the code does."""
    precision: Precision = "full"
    """Products of sparse attention: full, or 8bit (int8 for queries and keys, e4m3 for probabilities and values),
    which is faster on Hopper and errs by a percent or two, told in the run report."""
    profile: str | None = None
    """File written by `dit-sparse fit`, which then chooses method, density, anchors and storage for each head and
    step, and leaves only precision, max_state_gib, share_plan and strict to choose."""
    strict: bool = False
    """Raise where attention would otherwise fall back to dense, and on NaN or Inf in q, k or v."""

    def __post_init__(self) -> None:
        for name, kind in (("method", Method), ("order", Order)):
            _one_of(name, getattr(self, name), get_args(kind))
        _one_of("routing", self.routing, ("auto", *get_args(Routing)))
        _one_of("precision", self.precision, get_args(Precision))
        _one_of("residual", self.residual, ("auto", *get_args(Storage)))
        for name in ("block", "key_block"):
            _one_of(name, getattr(self, name), ("auto", 16, 32, 64, 128))
        if self.block != "auto":
            self._fit_together(self.block)
        for name in ("density", "top_p", "anchor_density"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 < value <= 1):
                raise ValueError(f"{name} is a share above 0 and at most 1, not {value!r}.")
        if self.anchor_density is not None and self.anchor_density <= self.density:
            raise ValueError(f"anchor_density must exceed density {self.density}, or the anchor knows no more: "
                             f"{self.anchor_density!r} does not.")  # fmt: skip
        every = self.refresh_every
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"refresh_every is a number of steps from 1 on, not {self.refresh_every!r}.")
        if self.max_state_gib is not None and (not _is_number(self.max_state_gib) or self.max_state_gib <= 0):
            raise ValueError(f"max_state_gib is a positive number of GiB, not {self.max_state_gib!r}.")
        if not _is_number(self.second_order_limit) or not self.second_order_limit > 0:
            raise ValueError(f"second_order_limit is a positive number, or inf, not {self.second_order_limit!r}.")
        if not _is_number(self.ramp) or not 0 <= self.ramp < 1:
            raise ValueError(f"ramp is at least 0 and below 1, not {self.ramp!r}.")
        if self.profile is not None and not isinstance(self.profile, str):
            raise ValueError(f"profile is the path of a file as text, not {self.profile!r}.")
        tile = self.tile
        if not isinstance(tile, tuple) or len(tile) != 3 or not all(isinstance(n, int) and n >= 1 for n in tile):
            raise ValueError(f"tile is a tuple of three positive numbers (frames, rows, columns), not {tile!r}.")
        for name in ("dense_steps", "dense_layers"):
            try:
                schedule.check(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if tile != SparseConfig.tile and self.order != "tile":
            raise ValueError(f"tile only means something to order 'tile', not to {self.order!r}.")
        for field in fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{field.name} is True or False, not {getattr(self, field.name)!r}.")
            if self.profile is not None and field.name not in _BESIDE_PROFILE:
                if getattr(self, field.name) != field.default:
                    raise ValueError(f"A profile decides on {field.name}: leave out either of the two.")
                continue
            if not takes(self.method, field.name) and getattr(self, field.name) != field.default:
                methods = " or ".join(_ONLY_FOR[field.name])
                raise ValueError(f"{field.name} only means something to method {methods}, not to {self.method!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SparseConfig":
        """The config with these fields; an unknown key raises ValueError with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
                raise ValueError(f"Unknown option {key!r}: {hint}")
        values = dict(values)
        if isinstance(values.get("profile"), Path):
            values["profile"] = str(values["profile"])
        if isinstance(values.get("tile"), list):
            values["tile"] = tuple(values["tile"])
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SparseConfig":
        """The config in a YAML file of option: value lines."""
        import yaml

        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{path} should hold option: value lines, but it holds a {type(values).__name__}.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def interval(self) -> int | None:
        """Steps from one refresh to the next, with the method's default; None is no refresh."""
        return self.refresh_every or {"anchor": 4, "ditfastattn": 4, "reshape": 5}.get(self.method)

    @property
    def learns(self) -> bool:
        """Whether the method goes by what it found at a dense step before."""
        return self.method in ("anchor", "reshape", "ditfastattn", "svg")

    @property
    def keeps_rows(self) -> bool:
        """Whether it keeps a residual row for each token."""
        return self.learns and self.method != "svg"

    @property
    def has_pattern(self) -> bool:
        """Whether blocks are chosen by where tokens lie alone."""
        return self.method not in (*_ROUTED, "dense")

    @property
    def has_tail(self) -> bool:
        return self.method in ("anchor", "tail")

    @property
    def routes_by(self) -> Routing:
        """Error-aware routing helps where a tail stands in for the rest, and hurts where nothing does. To ask every
        key is better yet, where that is not done at each step."""
        if self.routing != "auto":
            return self.routing
        return "fine" if self.learns else "error" if self.has_tail else "mass"

    def block_size(self, tokens: int) -> int:
        """Tokens per block for a sequence of `tokens`."""
        if self.block != "auto":
            return self.block
        return next((size for size in (128, 64, 32) if tokens >= 128 * size), 16)

    def key_block_size(self, tokens: int) -> int:
        """Tokens per block of keys; raises ValueError where that is more than a block of queries."""
        block = self.block_size(tokens)
        self._fit_together(block)
        return block if self.key_block == "auto" else self.key_block

    def layout(self, grid: "TokenGrid", text: int = 0) -> "Layout":
        """The blocks of an attention call; raises ValueError where key_block is more than a block of queries."""
        # Torch comes with it, and a config alone does without.
        from dit_sparse.layout import Layout

        return Layout(grid, text, self.block_size(grid.tokens), self.key_block_size(grid.tokens))

    def _fit_together(self, block: int) -> None:
        if self.key_block != "auto" and self.key_block > block:
            raise ValueError(f"key_block is at most the block of {block} tokens, not {self.key_block}.")


def takes(method: str, option: str) -> bool:
    """Whether an option of the config means something to a method."""
    return method in _ONLY_FOR.get(option, get_args(Method))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted or isinstance(value, float):
        raise ValueError(f"Unknown {name} {value!r}: choose from {', '.join(map(str, accepted))}.")
