"""How many tokens to draft: from what was accepted and from what steps were measured to take.

With acceptance a per draft (independent), k drafts yield on average

    E(k) = 1 + a + a^2 + ... + a^k        tokens (Leviathan et al. 2023)

for a step that takes T(k). T(0) is the time of a plain step as the engine would run it without
drafts, overlapped with the host's work if it may; T(k) has everything in it that drafts bring: the
drafter, more tokens in the step, waiting for its results. Both are measured while the engine works,
from result to result, for each power of two of requests. k = argmax E(k) / T(k), and 0 turns
speculation off until it is tried again, after more steps each time.

Guesses that cost nothing (n-grams) are also made while it is off, on paper: for a request now and
then, to be compared with the tokens that it gets. Steps with drafts are then tried only if they
could pay were they as short as plain ones; and with many requests not even once before.

Nothing here changes a token: see drafting.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .request import Request
from .static_step import query_lengths

SAMPLES = 3  # of a time before it counts; the one before these is thrown away (first use)
HOLD = 8  # steps between decisions
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # plain steps before drafts are tried again
DEAR_WAIT = 8192  # the same at most, where a trial takes long
SHARE = 0.02  # of the time between two trials that one may cost
STAY = 0.05  # what another number of drafts has to gain: a change interrupts the steps
FEW = 3  # power of two of requests up to which a trial costs little
ENOUGH = 24  # guesses on paper before there may be a trial with more
MARGIN = 0.1  # that a step with drafts has to gain if it were as short as a plain one
RECHECK = 512  # steps with drafts before plain ones are measured again
_FRESH, _SLOW = 0.1, 0.01  # weight of a new observation: of this request, of all
HOPE = 0.7  # acceptance before anything is known


@dataclass(slots=True)
class Acceptance:
    """Of one request: chance that a draft is accepted, and that there is one to check."""

    rate: float
    found: float = 1.0

    def tokens(self, k: int) -> float:
        """That a step with k drafts yields."""
        return 1 + self.found * sum(self.rate**i for i in range(1, k + 1))


def _both(acceptance: Acceptance) -> tuple[float, float]:
    return acceptance.rate, acceptance.found


class _Time:
    """Moving average of seconds, careful with the odd slow step."""

    __slots__ = ("count", "seconds")

    def __init__(self) -> None:
        self.count = -1  # the first one is not used
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        if self.count <= SAMPLES:
            # the fastest of the first few: others may have met something else
            self.seconds = seconds if self.count <= 1 else min(self.seconds, seconds)
        else:
            seconds = min(seconds, 2 * self.seconds)
            self.seconds += _FRESH * (seconds - self.seconds)

    @property
    def known(self) -> bool:
        return self.count >= SAMPLES


class Pace:
    """Decides for the running requests.

    Args:
        max_drafts: Most drafts of a request.
        on_paper: `learn` is also told about guesses that nobody checks.
    """

    def __init__(self, max_drafts: int, *, on_paper: bool = False) -> None:
        self.max_drafts, self.on_paper = max_drafts, on_paper
        self._lengths = query_lengths(max_drafts)
        self._times: dict[tuple[int, int], _Time] = {}  # (bucket, tokens per row; 1: plain)
        self._usual = Acceptance(HOPE)  # of requests so far
        self._learned = self._looked_at = 0  # guesses, and tokens of them
        self._bucket = 0
        self._drafts = 0
        self._hold = 0
        self._wait = self._waited = 0
        self._waits: dict[int, tuple[int, int]] = {}  # of the other buckets
        self._since_plain = 0
        self._flat = False  # a step takes as long where nothing was found

    def drafts(self, running: Sequence[Request]) -> int:
        """Most drafts per request in the next step; 0 is a plain step."""
        bucket = (len(running) - 1).bit_length()
        if bucket != self._bucket:
            # What was found out for so many requests holds when as many run again.
            self._waits[self._bucket] = self._wait, self._waited
            self._bucket, self._hold = bucket, 0
            self._wait, self._waited = self._waits.get(bucket, (0, 0))
        if self._hold > 0:
            self._hold -= 1
            return self._drafts
        self._drafts = self._decide(running)
        return self._drafts

    def _decide(self, running: Sequence[Request]) -> int:
        plain = self._times.get((self._bucket, 1))
        if plain is None or not plain.known:
            return 0
        measured = [q for q in self._lengths if self._known(q)]
        few = self._bucket <= FEW
        self._hold = HOLD - 1
        if not measured and not self._known(0):
            return self._trial(few, self.max_drafts) if self._hopeful(running, few) else 0
        if self._drafts:
            self._since_plain += HOLD
            if self._since_plain >= RECHECK:
                self._since_plain = self._hold = 0
                return 0
        # (nothing was found in all the steps so far: there is nothing to measure, nor to gain)
        best = self._best(running, plain.seconds, measured) if measured else 0
        if best:
            self._wait = 0
            return best
        if not self._hopeful(running, few):
            return 0
        if not self._wait:
            self._wait, self._waited = FIRST_WAIT, 0
        self._waited += HOLD
        if self._waited < max(self._wait, self._worth(running, plain.seconds, measured)):
            return 0
        self._waited, self._wait = 0, min(2 * self._wait, LONGEST_WAIT)
        return self._trial(few, self._lengths[0] - 1)

    def _trial(self, few: bool, drafts: int) -> int:
        if few:
            return drafts
        self._hold = SAMPLES + 1  # one is not used, one is not known when the next begins
        return self._lengths[0] - 1

    @property
    def rests(self) -> bool:
        """Whether plain steps go on for a while, so that their times need not be told."""
        return self._drafts == 0 and 0 < self._hold < HOLD - 1

    @property
    def knows(self) -> bool:
        """Whether enough guesses have been seen to say how good they are."""
        return self._learned >= ENOUGH

    def _known(self, length: int) -> bool:
        time = self._times.get((self._bucket, length))
        return time is not None and time.known

    def _acceptance(self, running: Sequence[Request]) -> Acceptance:
        """Of all of them."""
        known = [r.acceptance for r in running if r.acceptance is not None]
        if not known:
            return self._usual
        rate, found = (sum(each) / len(known) for each in zip(*map(_both, known), strict=True))
        return Acceptance(rate, found)

    def _hopeful(self, running: Sequence[Request], few: bool) -> bool:
        """Whether a trial may show anything; guesses that were only made on trial do not say."""
        if not self.on_paper or (few and not self.knows):
            return True
        # of many requests few have been guessed for
        now = self._acceptance(running) if few else self._usual
        return self.knows and now.tokens(self.max_drafts) > 1 + MARGIN

    def _worth(self, running: Sequence[Request], plain: float, measured: Sequence[int]) -> float:
        """Plain steps after which a trial costs no more than its share."""
        if not measured:
            return 0
        k = self._lengths[0] - 1
        lost = self._cost(k, plain, measured) / plain - self._acceptance(running).tokens(k)
        return min(HOLD * lost / SHARE, DEAR_WAIT)

    def _best(self, running: Sequence[Request], plain: float, measured: Sequence[int]) -> int:
        now = self._acceptance(running)
        found = now.found
        idle = self._times.get((self._bucket, 0))  # drafts were wanted and there were none
        without = max(idle.seconds, plain) if idle is not None and idle.known else plain
        flat = self._flat
        speeds = [1 / plain]  # by number of drafts
        for k in range(1, self.max_drafts + 1):
            cost = self._cost(k, plain, measured)
            step = cost if flat else found * cost + (1 - found) * without
            speeds.append(now.tokens(k) / step)
        best = speeds.index(max(speeds))
        now_at = speeds[self._drafts]
        stays = best and self._drafts and speeds[best] < (1 + STAY) * now_at
        return self._drafts if stays and now_at > speeds[0] else best

    def _cost(self, k: int, plain: float, measured: Sequence[int]) -> float:
        """Seconds of a step with k drafts: measured, or on the line between neighbours."""
        length = next(q for q in self._lengths if q > k)  # longer rows are padding
        below = max((q for q in measured if q <= length), default=1)
        above = min((q for q in measured if q >= length), default=None)
        low = plain if below == 1 else self._times[self._bucket, below].seconds
        if above is None:  # beyond the longest measured one: on along the line from the plain step
            return max(low, plain + (low - plain) * (length - 1) / (below - 1))
        if above == below:
            return low
        high = self._times[self._bucket, above].seconds
        return low + (high - low) * (length - below) / (above - below)

    def observe(
        self, rows: int, longest: int, wanted: bool, seconds: float, steps: int = 1
    ) -> None:
        """A step of `rows` requests, each with its last token and up to longest - 1 drafts, took
        so long from the results of the one before to its own.

        Args:
            rows, longest, seconds: As said.
            wanted: Whether drafts were asked for.
            steps: Of a burst, which took `seconds` each.
        """
        if wanted:
            self._flat = steps > 1
            self._hold -= min(steps - 1, self._hold)
        length = next((q for q in self._lengths if q >= longest), self._lengths[-1])
        if longest == 1:
            length = 0 if wanted else 1
        key = ((rows - 1).bit_length(), length)
        self._times.setdefault(key, _Time()).add(seconds)

    def learn(self, request: Request, proposed: int, accepted: int) -> None:
        """What became of a request's drafts; with 0 proposed the drafter had none."""
        known = request.acceptance
        if known is None:
            known = request.acceptance = Acceptance(*_both(self._usual))
        self._learned += 1
        known.found += _FRESH * ((proposed > 0) - known.found)
        usual = self._usual
        usual.found += _slow(self._learned) * ((proposed > 0) - usual.found)
        for outcome in _outcomes(proposed, accepted):
            self._looked_at += 1
            known.rate += _FRESH * (outcome - known.rate)
            usual.rate += _slow(self._looked_at) * (outcome - usual.rate)


def _slow(count: int) -> float:
    """Weight of an observation of all: at first as much as what was hoped and seen before."""
    return max(_SLOW, 1 / (1 + count))


def _outcomes(proposed: int, accepted: int) -> Iterable[int]:
    """Of the drafts that were looked at: all up to the first that was rejected."""
    return [1] * accepted + [0] * (proposed > accepted)
