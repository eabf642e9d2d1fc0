"""Which settings are run together: a small set in which every pair of values meets."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, product


@dataclass(frozen=True)
class Setting:
    """One way to run the same prompts."""

    size: int
    launcher: str  # local | ray | torchrun
    one_at_a_time: bool
    chunked: bool  # prompts cut by a budget of 16 tokens
    few_blocks: bool  # so few that rows are preempted
    run_ahead: int
    cache: bool

    @property
    def id(self) -> str:
        flags = [name for name in ("one_at_a_time", "chunked", "few_blocks") if getattr(self, name)]
        return "-".join(
            [
                str(self.size),
                self.launcher,
                f"ahead{self.run_ahead}",
                *flags,
                *([] if self.cache else ["nocache"]),
            ]
        )

    @property
    def cost(self) -> int:
        """The dearer of two settings that show as much is left out: recomputing everything is slow."""
        return self.size * (2 * (not self.cache) + self.one_at_a_time)

    @property
    def possible(self) -> bool:
        # One row alone has all the blocks, and without the cache no row keeps any.
        if self.few_blocks and (self.one_at_a_time or not self.cache):
            return False
        # Every token of every row in several small steps: minutes, and nothing that pairs of these do not show.
        return self.cache or not self.chunked or not (self.one_at_a_time or self.size > 2)


VALUES: dict[str, tuple[int | str | bool, ...]] = {
    "size": (1, 2, 3, 5, 9),
    "launcher": ("local", "ray", "torchrun"),
    "one_at_a_time": (False, True),
    "chunked": (False, True),
    "few_blocks": (False, True),
    "run_ahead": (0, 1),
    "cache": (True, False),
}


def pairwise_cover() -> list[Setting]:
    """Settings in which every possible pair of values of two factors occurs, greedily few."""
    candidates = [Setting(**dict(zip(VALUES, values, strict=True))) for values in product(*VALUES.values())]  # type: ignore[arg-type]
    candidates = [setting for setting in candidates if setting.possible]
    left = set().union(*(_pairs(setting) for setting in candidates))
    chosen = []
    while left:
        best = max(candidates, key=lambda setting: (len(_pairs(setting) & left), -setting.cost))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(setting: Setting) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    items: Iterable[tuple[str, object]] = asdict(setting).items()
    return set(combinations(items, 2))
