"""How often a block of keys must come from memory again, by where each tile of the Hopper kernel begins its list.

A simulation, no measurement: programs take the next tile of a head when they are done with one, some a little faster
than others, and go through its list of blocks; a cache holds what was copied last. kernels/README.md says more.

    python samples/cache_misses.py --tokens 118800 --density 0.5
"""

import argparse
import heapq
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

BLOCK = 128


@dataclass(frozen=True)
class Setting:
    """tokens of a head of head_dim channels in 16 bits; counts of a head are up to `spread` times the fewest,
    less, and of a lower density, where that would be more than there are."""

    tokens: int
    density: float
    spread: float = 1.0
    heads: int = 4
    head_dim: int = 128
    cache_mib: float = 25.0
    programs: int = 132
    uneven: float = 0.02
    seed: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK)

    def counts(self) -> np.ndarray:
        """Listed blocks of a head's tiles, the longest first."""
        keep = max(1, int(self.density * self.blocks))
        fewest, most = 2 * keep / (1 + self.spread), 2 * keep * self.spread / (1 + self.spread)
        return np.linspace(most, fewest, self.blocks).round().clip(1, self.blocks).astype(int)


def misses(setting: Setting, *, turned: bool, apart: bool) -> float:
    """Share of copied blocks that the cache does not hold: lists `turned`, programs that start `apart`."""
    random, counts, programs = np.random.default_rng(setting.seed), setting.counts(), setting.programs
    pace = 1 + setting.uneven * random.standard_normal(programs)
    held: OrderedDict[int, None] = OrderedDict()
    room = int(setting.cache_mib * 2**20 / (2 * 2 * BLOCK * setting.head_dim))
    # When a program is where: its next block's time, its number, the blocks it has yet to copy, and its pace.
    going: list[tuple[float, int, list[int], float]] = []
    given = copied = missed = 0

    def take(program: int, now: float) -> None:
        nonlocal given
        head, place = divmod(given, setting.blocks)
        if head == setting.heads:
            return
        given += 1
        count = counts[place]
        listed = np.sort(random.choice(setting.blocks, count, replace=False)) + head * setting.blocks
        if turned:
            listed = np.roll(listed, -int(place % programs / programs * counts[-1] / counts[0] * (count - 1)))
        own = pace[program] * (1 + setting.uneven * random.standard_normal())
        heapq.heappush(going, (now, program, listed[::-1].tolist(), own))

    for program in range(programs):
        take(program, program / programs * counts[-1] if apart else random.random())
    while going:
        now, program, left, own = heapq.heappop(going)
        block = left.pop()
        copied += 1
        if block in held:
            held.move_to_end(block)
        else:
            missed += 1
            held[block] = None
            if len(held) > room:
                held.popitem(last=False)
        if left:
            heapq.heappush(going, (now + own, program, left, own))
        else:
            take(program, now + own)
    return missed / copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=118_800)
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--spread", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    parser.add_argument("--heads", type=int, default=4, help="as many are simulated")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--cache_mib", type=float, default=25.0)
    args = parser.parse_args()
    print("density  counts apart  from the start  turned  turned, programs apart")
    for density in args.density:
        for spread in args.spread:
            setting = Setting(args.tokens, density, spread, args.heads, args.head_dim, args.cache_mib)
            found = [misses(setting, turned=t, apart=a) for t, a in ((False, False), (True, False), (True, True))]
            start, turned, apart = found
            print(f"{density:7g}  {spread:12g}  {start:14.3f}  {turned:6.3f}  {apart:22.3f}")


if __name__ == "__main__":
    main()
