"""Speculative decoding: who proposes tokens for whom, and which of them stand.

A drafter guesses the next tokens x_1..x_k of a request; one step then runs [last token, x_1..x_k]
and draws a token after each of the k + 1: t_1..t_{k+1}, from the target's distribution, with the
request's parameters and at the places of its random stream that they would have had anyway. As long
as t_i == x_i, what t_{i+1} was drawn from is what plain decoding would have seen, so

    t_1 .. t_{a+1}    with a = number of leading i with t_i == x_i

are exactly the tokens of plain decoding, greedy or sampled, whatever the drafter says: a seed gives
the same tokens with and without drafts. A draft model draws its guesses with the same random
numbers, so the two agree wherever their distributions do. For a certain guess (n-gram) the chance
of acceptance, p(x), is that of rejection sampling (Leviathan et al. 2023, Chen et al. 2023).

Keys and values of rejected drafts are overwritten by the next step; `num_computed` says what
counts, and only tokens that stand are ever registered in the prefix index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .._host_loader import load_host
from .config import EngineConfig
from .pace import Pace
from .request import Request, RequestStatus
from .scheduler import Scheduler
from .step_plan import SchedulePlan

if TYPE_CHECKING:
    from .bursts import Bursts

PAPER_STEPS, PAPER_TOKENS = 8, 2048  # steps between guesses on paper; one more per so many tokens
PAPER_MOST = 8  # guesses that wait for the tokens they are compared with


class Drafter(Protocol):
    """Guesses tokens. What it returns is checked: it may be wrong, too long or nonsense.

    Attributes:
        uses_blocks: Whether it writes keys and values of the drafts into the request's blocks. One
            that does not works on the host: what it guesses costs no step.
    """

    uses_blocks: bool

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """For each request at most so many tokens that may follow its own."""
        ...


class NGramDrafter:
    """What followed the latest occurrence of the text that now ends the sequence.

    Args:
        min_n, max_n: Shortest and longest ending to look for; a longer one beats a later one.

    A repetition shorter than the draft is continued: after "a b a b" come "a b a b ...".
    Reference: Saxena, "Prompt Lookup Decoding" (2023).
    """

    uses_blocks = False

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self._search = load_host().propose_ngram

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """One search per request."""
        found = []
        for request, count in wanted:
            tokens = self._search(request.tokens, self.max_n, self.min_n, count)
            if tokens:
                tokens = (tokens * -(-count // len(tokens)))[:count]
            found.append(tokens)
        return found


class Speculator:
    """Gives the running requests their drafts before a step is planned.

    Args:
        config: num_speculative_tokens and the token budget of a step.
        drafter: Where drafts come from.
        vocab_size: Of the target; a draft ends before the first id that is not in it.
        max_rows: With more running requests nothing is drafted.
    """

    def __init__(
        self, config: EngineConfig, drafter: Drafter, vocab_size: int, max_rows: int
    ) -> None:
        self.max_rows = max_rows if config.num_speculative_tokens else 0
        self.drafter = drafter
        self.max_drafts = config.num_speculative_tokens
        self.budget = config.max_num_batched_tokens
        self.vocab_size = vocab_size
        self.pace: Pace | None = None
        if config.adaptive_speculation:
            self.pace = Pace(self.max_drafts, on_paper=not drafter.uses_blocks)
        # (request, tokens it had, what was guessed to follow)
        self._paper: list[tuple[Request, int, list[int]]] = []
        self._until_paper = self._turn = 0
        self.num_draft_tokens = 0  # checked so far
        self.num_accepted_tokens = 0
        self.num_verifications = 0  # requests times steps
        self._drafts = self.max_drafts  # per request, in the next step
        self._asked: list[Request] = []
        self.bursts: Bursts | None = None
        self.burst: tuple[int, int] | None = None  # of the next step: (steps, drafts per step)
        self.burst_steps: int | None = None  # None: by the time of a step
        self._seconds: dict[int, float] = {}  # of a step, by power of two of requests
        self._yield = 1.0 + self.max_drafts  # tokens of a request per step of the latest burst

    def wants(self, running: Sequence[Request]) -> bool:
        """Whether the next step may have drafts: then the tokens of this one are needed first."""
        if not running or not 0 < len(running) <= self.max_rows:
            return False
        self._drafts = self.max_drafts if self.pace is None else self.pace.drafts(running)
        return self._drafts > 0

    def propose(self, scheduler: Scheduler) -> None:
        """Set `draft_tokens` of the requests that decode next."""
        running = scheduler.running
        self.burst = None
        if self._starts_burst(scheduler):
            return
        room = self.budget - len(running)  # a draft never takes the place of somebody's token
        wanted: list[tuple[Request, int]] = []
        for request in running:
            left = request.max_total_tokens - len(request.tokens) - 1
            count = min(self._drafts, left, room)
            if count > 0 and _decodes_next(request):
                if self.drafter.uses_blocks:
                    count = scheduler.look_ahead(request, count)
                if count <= 0:
                    continue
                wanted.append((request, count))
                room -= count
        self._asked = [request for request, _ in wanted]
        if not wanted:
            return
        drafts = self.drafter.propose(wanted)
        for (request, count), tokens in zip(wanted, drafts, strict=True):
            request.draft_tokens = self._valid(tokens[:count])

    def _starts_burst(self, scheduler: Scheduler) -> bool:
        """Whether the next step is a burst: the drafts are then placeholders."""
        running, bursts = scheduler.running, self.bursts
        if bursts is None or scheduler.waiting or not 0 < len(running) <= bursts.max_rows:
            return False
        if self.burst_steps is None:
            steps = bursts.steps(self._seconds.get((len(running) - 1).bit_length(), 1.0))
        else:
            steps = bursts.at_most(self.burst_steps)
        if not all(_decodes_next(r) and _wants_only_tokens(r) for r in running):
            return False
        drafts = bursts.drafts(self._drafts)
        left = [request.max_total_tokens - len(request.tokens) for request in running]
        steps = min(steps, max(left))
        if steps < 2:
            return False
        most = steps * (drafts + 1)
        if len(running) * most > self.budget or not bursts.ready(running, most):
            return False
        for request, few in zip(running, left, strict=True):
            request.draft_tokens = [0] * (min(most, few) - 1)
        self.burst = steps, drafts
        return True

    def goes_on(self, scheduler: Scheduler, plan: SchedulePlan) -> list[int] | None:
        """Whether another burst is launched behind one whose tokens are not known yet.

        Returns:
            How many tokens of each request there is room for; None: it is not.
        """
        running, bursts = scheduler.running, self.bursts
        if bursts is None or plan.burst is None or scheduler.waiting or not running:
            return None
        steps, drafts = plan.burst
        requests = [chunk.request for chunk in plan.chunks]
        if set(map(id, requests)) != set(map(id, running)) or bursts.drafts(self._drafts) != drafts:
            return None
        left = [request.max_total_tokens - len(request.tokens) for request in requests]
        if max(left) <= steps * self._yield:  # they will all have ended
            return None
        most = 2 * steps * (drafts + 1)  # of both bursts
        if not bursts.reaches(requests, most):
            return None
        room = [len(r.tokens) + min(most, few) - 1 for r, few in zip(requests, left, strict=True)]
        pairs = zip(requests, room, strict=True)
        return room if all(scheduler.make_room(*pair) for pair in pairs) else None

    def learn(
        self,
        plan: SchedulePlan,
        tokens: Sequence[int | list[int]],
        seconds: float,
        checks: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """Note what a step yielded, before the scheduler takes it.

        Args:
            plan: What was run.
            tokens: Per chunk, see `tokens_that_stand`.
            seconds: Since the results of the step before; 0 if there was none just before.
            checks: Of a burst, per chunk and step: drafts checked, and how many stand.
        """
        if checks is not None and plan.burst is not None:
            self._learn_burst(plan, plan.burst, seconds, checks)
            return
        asked, self._asked = self._asked, []
        longest, decodes = 1, True
        if len(plan.chunks) == plan.num_tokens:  # every chunk is one token
            if self.pace is not None and self.pace.rests:
                self._guess_on_paper(plan, self.pace)
                return
        else:
            for chunk, yielded in zip(plan.chunks, tokens, strict=True):
                if chunk.num_drafts and isinstance(yielded, list):
                    self._record(chunk.request, chunk.num_drafts, len(yielded) - 1)
            longest = max(chunk.count for chunk in plan.chunks)
            decodes = all(chunk.count == 1 + chunk.num_drafts for chunk in plan.chunks)
        if seconds > 0 and decodes:
            self._seconds[(len(plan.chunks) - 1).bit_length()] = seconds
        if self.pace is None:
            return
        if seconds > 0 and decodes:
            self.pace.observe(len(plan.chunks), longest, bool(asked), seconds)
        for request in asked:
            if not request.draft_tokens:
                self.pace.learn(request, 0, 0)
        if not asked and decodes:
            self._guess_on_paper(plan, self.pace)

    def _guess_on_paper(self, plan: SchedulePlan, pace: Pace) -> None:
        """Now and then guess for one of the requests of a plain step, and learn of earlier guesses
        whose tokens are known by now."""
        self._until_paper -= 1
        if self._until_paper > 0 or not pace.on_paper or len(plan.chunks) > self.max_rows:
            return
        waiting = []
        for request, at, guess in self._paper:
            got = request.tokens[at : at + len(guess)]
            if len(got) == len(guess):
                pairs = zip(got, guess, strict=True)
                wrong = (i for i, (token, guessed) in enumerate(pairs) if token != guessed)
                pace.learn(request, len(guess), next(wrong, len(guess)))
            elif not request.finished:
                waiting.append((request, at, guess))
        self._paper = waiting
        self._turn += 1
        request = plan.chunks[self._turn % len(plan.chunks)].request
        self._until_paper = len(request.tokens) // PAPER_TOKENS
        self._until_paper += PAPER_STEPS if pace.knows else 1
        if request.finished or len(waiting) >= PAPER_MOST:
            return
        (guess,) = self.drafter.propose([(request, self.max_drafts)])
        guess = self._valid(guess[: self.max_drafts])
        if guess:
            waiting.append((request, len(request.tokens), guess))
        else:
            pace.learn(request, 0, 0)

    def _learn_burst(
        self,
        plan: SchedulePlan,
        burst: tuple[int, int],
        seconds: float,
        checks: Sequence[Sequence[tuple[int, int]]],
    ) -> None:
        steps, drafts = burst
        if all(chunk.request.finished for chunk in plan.chunks):
            return
        yielded = sum(accepted + 1 for each in checks for _, accepted in each)
        self._yield = max(yielded / (steps * len(checks)), 1.0)
        if seconds > 0:
            self._seconds[(len(plan.chunks) - 1).bit_length()] = seconds / steps
        if seconds > 0 and self.pace is not None:
            self.pace.observe(len(plan.chunks), drafts + 1, True, seconds / steps, steps)
        for chunk, each in zip(plan.chunks, checks, strict=True):
            for proposed, accepted in () if chunk.request.finished else each:
                if proposed:
                    self._record(chunk.request, proposed, accepted)
                elif self.pace is not None:
                    self.pace.learn(chunk.request, 0, 0)

    def _record(self, request: Request, proposed: int, accepted: int) -> None:
        request.metrics.record_drafts(proposed, accepted)
        self.num_draft_tokens += proposed
        self.num_accepted_tokens += accepted
        self.num_verifications += 1
        if self.pace is not None:
            self.pace.learn(request, proposed, accepted)

    def _valid(self, tokens: list[int]) -> list[int]:
        for at, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                return tokens[:at]
        return tokens


def _decodes_next(request: Request) -> bool:
    return (
        request.status is RequestStatus.RUNNING
        and request.in_flight == 0
        and request.num_computed == len(request.tokens) - 1
    )


def _wants_only_tokens(request: Request) -> bool:
    params = request.sampling
    return request.wants_only_tokens or (
        params.logprobs is None
        and not params.has_penalties
        and request.num_output >= params.min_tokens
    )


def tokens_that_stand(
    plan: SchedulePlan, drawn: list[int], first_rows: Sequence[int]
) -> list[list[int]]:
    """What each chunk of a step with drafts yielded.

    Args:
        plan: What was run.
        drawn: A token per row; for each chunk that samples one row after its last token and one
            after each of its drafts.
        first_rows: Where the rows of these chunks begin.
    """
    tokens: list[list[int]] = []
    rows = iter(first_rows)
    for chunk in plan.chunks:
        if not chunk.samples:
            tokens.append([])
            continue
        first, accepted, drafts = next(rows), 0, chunk.request.draft_tokens
        count = min(chunk.num_drafts, len(drafts))  # none of an aborted, preempted request
        while accepted < count and drawn[first + accepted] == drafts[accepted]:
            accepted += 1
        tokens.append(drawn[first : first + accepted + 1])
    return tokens
