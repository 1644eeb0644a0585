"""What the owners of one plan report: the sums of the fragments, and whose inputs they lack. IO-free.

Owns one plan's results until they become a record, and who is left out of the next plan. Never asks anybody and never
judges values: ``gossip.merge_proposer`` does the one, and has the other done. Every plan begins with nothing, for sums
of one list of contributors say nothing about another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from gossip.merge_record import RecordRefused, owners, require
from gossip.messages import MergeResults, ShardRef, SignedContribution
from p2p.transport import PeerId


class Sums:
    """The sums of ``contributors``, sorted by peer, that their owners are asked for; ``fragment_bytes`` long each."""

    def __init__(
        self,
        contributors: Sequence[SignedContribution],
        *,
        parent: bytes,
        fragment_bytes: Sequence[int],
        replicas: int,
    ) -> None:
        self.contributors = list(contributors)
        self._fragment_bytes = fragment_bytes
        names = [PeerId(contribution.peer) for contribution in contributors]
        self._owners = owners(parent, names, len(fragment_bytes), replicas)
        self._sums: list[dict[PeerId, ShardRef]] = [{} for _ in fragment_bytes]
        self._missing: set[tuple[PeerId, PeerId]] = set()
        """(owner, contributor): this owner could not get or use that contributor's inputs."""
        self._settled: dict[int, ShardRef] = {}

    def owners(self) -> set[PeerId]:
        """Everybody who is asked for a sum."""
        return {owner for per_fragment in self._owners for owner in per_fragment}

    def take(self, owner: PeerId, results: MergeResults) -> None:
        """What ``owner`` reports. Raises RecordRefused for what it was not asked for."""
        contributors = {contribution.peer for contribution in self.contributors}
        require(contributors.issuperset(results.missing), "malformed", "a stranger reported missing")
        for result in results.results:
            owned = result.fragment < len(self._owners) and owner in self._owners[result.fragment]
            require(owned, "malformed", "a result for another owner's fragment")
            if result.shard.size != self._fragment_bytes[result.fragment]:
                raise RecordRefused("shape", f"a sum of fragment {result.fragment} of the wrong size")
        self._missing |= {(owner, PeerId(peer)) for peer in results.missing if peer != owner}
        for result in results.results:
            self._sums[result.fragment][owner] = result.shard

    def complete(self) -> bool:
        """Whether every fragment has a sum that counts.

        One does not where another owner of the fragment lacks the inputs of whoever gave it: nobody could compare it.
        """
        return all(map(self._counts, self._owners, self._sums))

    def _counts(self, chosen: Sequence[PeerId], sums: Collection[PeerId]) -> bool:
        lacked = {peer for owner, peer in self._missing if owner in chosen}
        return any(giver not in lacked for giver in sums)

    def disputed(self) -> list[int]:
        """Fragments about which owners disagree, ascending."""
        return [fragment for fragment, sums in enumerate(self._sums) if len(set(sums.values())) > 1]

    def settle(self, fragment: int, result: ShardRef) -> bool:
        """The right sum of a disputed fragment; returns whether all are settled."""
        self._settled[fragment] = result
        return len(self._settled) == len(self.disputed())

    def wrong(self) -> list[tuple[PeerId, int]]:
        """Whose sum of which disputed fragment was another one, by fragment, then by owner."""
        return [
            (owner, fragment)
            for fragment, right in sorted(self._settled.items())
            for owner, result in sorted(self._sums[fragment].items())
            if result != right
        ]

    def results(self) -> list[ShardRef]:
        """One sum of each fragment, in order."""
        return [
            self._settled.get(fragment) or next(iter(sums.values()))
            for fragment, sums in enumerate(self._sums)
        ]

    def givers(self, fragment: int) -> list[PeerId]:
        """Who reported the sum of ``fragment`` that ``results`` has, sorted."""
        result = self.results()[fragment]
        return sorted(peer for peer, given in self._sums[fragment].items() if given == result)

    def reliable(self) -> list[SignedContribution]:
        """The contributors of the next plan where this one is not complete: strictly fewer."""
        dropped = {
            owner
            for fragment, per_fragment in enumerate(self._owners)
            for owner in per_fragment
            # Nothing delivered and nobody to blame for it: the owner itself did not answer.
            if owner not in self._sums[fragment]
            and not any(owner == reporter for reporter, _ in self._missing)
        }
        return self.without(dropped | cover(edge for edge in self._missing if not dropped.intersection(edge)))

    def without(self, dropped: set[PeerId]) -> list[SignedContribution]:
        """The contributors but for ``dropped``."""
        return [contribution for contribution in self.contributors if contribution.peer not in dropped]


def cover(edges: Iterable[tuple[PeerId, PeerId]]) -> set[PeerId]:
    """Peers that together touch every (reporter, missing) edge, found greedily: whoever is in most edges first.

    One report against many is the reporter's trouble, many reports against one that one's; a single report is
    held against the peer that was missing.
    """
    left = set(edges)
    chosen: set[PeerId] = set()
    while left:
        reports = Counter(peer for edge in left for peer in edge)
        accused = Counter(missing for _, missing in left)
        worst = max(sorted(reports), key=lambda peer: (reports[peer], accused[peer]))
        chosen.add(worst)
        left = {edge for edge in left if worst not in edge}
    return chosen
