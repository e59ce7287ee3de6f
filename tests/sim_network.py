"""Links that can be cut, one direction each, in the shapes in which real networks break.

Rule 1: a shape only adds cuts; ``heal`` takes all away. Shapes may overlap, as failures do.
Rule 2: a cut ends by itself, or a few of them would end all that the cluster could do wrong.

Used by ``sim_faults.py`` and ``sim_cluster.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from raft_types import MemberId
from tests.sim_world import CALM, World

Link = tuple[MemberId, MemberId]  # sender, receiver


def both_ways(one: MemberId, others: Iterable[MemberId]) -> list[Link]:
    """The links between it and these."""
    return [link for other in others for link in ((one, other), (other, one))]


class Network:
    """Which links work."""

    def __init__(self, world: World, on_mended: Callable[[MemberId], None]) -> None:
        """``on_mended``: whose links have been cut hears that they work again."""
        self._world = world
        self._on_mended = on_mended
        self._cuts: dict[Link, float] = {}  # until when

    def is_cut(self, sender: MemberId, to: MemberId) -> bool:
        """Whether nothing gets from the one to the other."""
        return self._cuts.get((sender, to), 0) > self._world.now

    def heal(self) -> None:
        """All links work."""
        self._world.say("all links work")
        self._cuts.clear()

    def cut(self, links: Iterable[Link], ticks: float) -> None:
        """Nothing gets over these for so long."""
        links = list(links)
        until = self._world.now + ticks
        for link in links:
            self._cuts[link] = max(until, self._cuts.get(link, 0))
        self._world.at(ticks, self._mended, links)

    def _mended(self, links: list[Link]) -> None:
        """Two that could not reach each other make a new connection."""
        mended = [link for link in links if not self.is_cut(*link) and self._cuts.pop(link, 0)]
        for name in dict.fromkeys(name for link in mended for name in link):
            self._on_mended(name)

    def isolate(self, name: MemberId, names: Iterable[MemberId], ticks: float) -> None:
        """One is alone."""
        self._note("one alone", [name], ticks)
        self.cut(both_ways(name, names), ticks)

    def silence(
        self, name: MemberId, others: Iterable[MemberId], ticks: float, *, is_deaf: bool
    ) -> None:
        """It hears nobody and is heard, or the other way round."""
        self._note("deaf" if is_deaf else "mute", [name], ticks)
        self.cut([(other, name) if is_deaf else (name, other) for other in others], ticks)

    # ---- Shapes ----

    def break_somehow(self, names: list[MemberId], ticks: float) -> None:
        """One of the shapes that leave nobody in particular alone, for so long."""
        shapes: list[Callable[[list[MemberId], float], None]] = [
            *(self._one_way, self._deaf, self._split, self._split, self._chain, self._ring),
            *(self._bridge, self._swizzle),
        ]
        if len(names) > 1:
            self._world.rng.choice(shapes)(self._world.rng.sample(names, len(names)), ticks)

    def _note(self, shape: str, names: Iterable[MemberId], ticks: float) -> None:
        self._world.say(f"cut: {shape} {' '.join(names)}, for {ticks:.1f}")
        self._world.counts[f"cut: {shape}"] += 1

    def _one_way(self, names: list[MemberId], ticks: float) -> None:
        self._note("one way", names[:2], ticks)
        self.cut([(names[0], names[1])], ticks)

    def _deaf(self, names: list[MemberId], ticks: float) -> None:
        first, *others = names
        self.silence(first, others, ticks, is_deaf=self._world.chance(0.5))

    def _split(self, names: list[MemberId], ticks: float) -> None:
        """A minority from a majority."""
        left, right = names[: len(names) // 2], names[len(names) // 2 :]
        self._note("split", left, ticks)
        for name in left:
            self.cut(both_ways(name, right), ticks)

    def _chain(self, names: list[MemberId], ticks: float) -> None:
        """Each speaks with the next one only."""
        self._note("chain", names, ticks)
        for place, name in enumerate(names):
            self.cut(both_ways(name, names[place + 2 :]), ticks)

    def _ring(self, names: list[MemberId], ticks: float) -> None:
        """Each sees its neighbours: of five servers each sees another majority."""
        self._note("ring", names, ticks)
        for place, name in enumerate(names):
            far = names[place + 2 : len(names) - (place == 0)]
            self.cut(both_ways(name, far), ticks)

    def _bridge(self, names: list[MemberId], ticks: float) -> None:
        """Two halves that only the first server sees both of."""
        self._note("bridge", names[:1], ticks)
        middle = len(names) // 2 + 1
        for name in names[1:middle]:
            self.cut(both_ways(name, names[middle:]), ticks)

    def _swizzle(self, names: list[MemberId], ticks: float) -> None:
        """One after the other is cut off, then they come back in another order."""
        self._note("swizzle", names, ticks)
        world = self._world
        for name in names[: world.rng.randint(1, len(names))]:
            cut_after, mended_after = world.rng.uniform(0, ticks / 2), world.rng.uniform(0.5, 1)
            span = mended_after * ticks - cut_after
            world.at(cut_after, self._cut_later, both_ways(name, names), span)

    def _cut_later(self, links: list[Link], ticks: float) -> None:
        if self._world.weather is not CALM:
            self.cut(links, ticks)
