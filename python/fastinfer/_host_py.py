"""Pure-Python twin of the compiled module `_host`: same names, same answers, same errors.

The rules are written once, in csrc/host/block_pool.h, block_hash.h, decode_loop.h and ngram.h; the
same tests run on both. Used where `_host` was not built, or with ``FASTINFER_HOST=python``.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import sha256
from sys import byteorder
from typing import Any


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free."""


class BlockPool:
    """Free list, reference counts and cached content of the blocks of a paged KV cache.

    Args:
        num_blocks: How many blocks there are; ids are 0 .. num_blocks - 1.

    Every call checks its arguments before it changes anything. Misuse (an unknown id, a block
    released more often than it was taken) raises ValueError.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"BlockPool: num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._ref = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, whether or not they hold cached content."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by its hash."""
        return len(self._block_of)

    def _check_id(self, call: str, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise ValueError(
                f"BlockPool.{call}: block must be in [0, {self.num_blocks}), got {block}"
            )

    def allocate(self, n: int) -> list[int]:
        """Take ``n`` free blocks, one reference each, and forget what they held; all or nothing.

        Raises:
            OutOfBlocks: Fewer than ``n`` blocks are free; nothing was taken.
        """
        if n < 0:
            raise ValueError(f"BlockPool.allocate: n must not be negative, got {n}")
        if n > len(self._free):
            raise OutOfBlocks(
                f"BlockPool.allocate: {n} blocks wanted, {len(self._free)} of {self.num_blocks} "
                "are free"
            )
        blocks = [self._free.popitem(last=False)[0] for _ in range(n)]
        for block in blocks:
            old = self._hash[block]
            if old is not None:
                del self._block_of[old]
                self._hash[block] = None
            self._ref[block] = 1
        return blocks

    def acquire(self, blocks: list[int]) -> None:
        """Add a reference to each block; a free one must hold cached content."""
        for block in blocks:
            self._check_id("acquire", block)
            if self._ref[block] == 0 and self._hash[block] is None:
                raise ValueError(
                    f"BlockPool.acquire: block {block} is free and holds no cached content"
                )
        for block in blocks:
            if self._ref[block] == 0:
                del self._free[block]
            self._ref[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Drop a reference from each block, in order.

        Give a request's blocks last one first: the tail of a prefix is then evicted before its
        head.
        """
        freed = []
        for i, block in enumerate(blocks):
            if not 0 <= block < self.num_blocks or self._ref[block] == 0:
                for done in blocks[:i]:
                    self._ref[done] += 1
                self._check_id("release", block)
                raise ValueError(
                    f"BlockPool.release: block {block} has no reference left (freed twice?)"
                )
            self._ref[block] -= 1
            if self._ref[block] == 0:
                freed.append(block)
        for block in freed:
            self._free[block] = None
            if self._hash[block] is None:
                self._free.move_to_end(block, last=False)

    def register_hash(self, block: int, hash: bytes) -> bool:
        """Say what a block in use holds; False when another block already stands for it."""
        _check_hash("BlockPool.register_hash", hash)
        self._check_id("register_hash", block)
        if self._ref[block] == 0:
            raise ValueError(f"BlockPool.register_hash: block {block} is not in use")
        if hash in self._block_of:
            return self._block_of[hash] == block
        if self._hash[block] is not None:
            raise ValueError(f"BlockPool.register_hash: block {block} already holds other content")
        self._block_of[hash] = block
        self._hash[block] = hash
        return True

    def match(self, hashes: list[bytes], max_blocks: int = -1) -> list[int]:
        """Blocks that hold the longest cached prefix of the chain; takes no reference."""
        blocks: list[int] = []
        wanted = hashes if max_blocks < 0 else hashes[:max_blocks]
        for hash in wanted:
            _check_hash("BlockPool.match", hash)
        for hash in wanted:
            block = self._block_of.get(hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def clear_cache(self) -> None:
        """Forget all cached content; references stay."""
        self._block_of.clear()
        self._hash = [None] * self.num_blocks

    def ref_count(self, block: int) -> int:
        """How many holders a block has."""
        self._check_id("ref_count", block)
        return self._ref[block]

    def hash_of(self, block: int) -> bytes | None:
        """The content hash of a block, or None."""
        self._check_id("hash_of", block)
        return self._hash[block]

    def count_free(self, blocks: list[int]) -> int:
        """How many of these blocks nobody holds."""
        for block in blocks:
            self._check_id("count_free", block)
        return sum(self._ref[block] == 0 for block in blocks)

    def check_invariants(self) -> None:
        """Raise RuntimeError when the pool contradicts itself; for tests."""

        def require(holds: bool, what: str) -> None:
            if not holds:
                raise RuntimeError(f"BlockPool: broken invariant: {what}")

        for block in range(self.num_blocks):
            require(self._ref[block] >= 0, "a reference count is negative")
            free = block in self._free
            require(free == (self._ref[block] == 0), "a block without references is not free")
            hash = self._hash[block]
            require(hash is None or self._block_of.get(hash) == block, "a hash points elsewhere")
        hashed = sum(hash is not None for hash in self._hash)
        require(hashed == len(self._block_of), "the hash map holds a hash that no block has")


def _check_hash(call: str, hash: bytes) -> None:
    if not isinstance(hash, bytes) or len(hash) != 32:
        raise ValueError(f"{call}: a hash must be bytes of length 32, got {hash!r}")


def _check_token(call: str, token: int) -> int:
    if not isinstance(token, int) or not 0 <= token < 2**31:
        raise ValueError(f"{call}: token ids must be integers in [0, 2^31), got {token!r}")
    return token


def extend_block_hashes(
    tokens: list[int], block_size: int, hashes: list[bytes], salt: bytes = b""
) -> None:
    """Append to ``hashes`` the chained hash of every full block of ``tokens`` it lacks.

    Args:
        tokens: All tokens of a sequence, from the first.
        block_size: Tokens per block.
        hashes: The sequence's chain so far, extended in place.
        salt: Keeps chains of different worlds (adapters, tenants) apart.
    """
    if block_size < 1:
        raise ValueError(f"extend_block_hashes: block_size must be at least 1, got {block_size}")
    full = len(tokens) // block_size
    if len(hashes) >= full:
        return
    if hashes:
        _check_hash("extend_block_hashes", hashes[-1])
    parent = hashes[-1] if hashes else sha256(salt).digest()
    added = []
    for block in range(len(hashes), full):
        ids = tokens[block * block_size : (block + 1) * block_size]
        for token in ids:
            _check_token("extend_block_hashes", token)
        words = array("i", ids)
        if byteorder == "big":
            words.byteswap()
        parent = sha256(parent + words.tobytes()).digest()
        added.append(parent)
    hashes.extend(added)


def propose_ngram(tokens: list[int], max_n: int, min_n: int, k: int) -> list[int]:
    """Up to ``k`` tokens that followed the most recent earlier occurrence of the sequence's end.

    Args:
        tokens: The sequence.
        max_n: Longest ending to look for; a longer match beats a more recent one.
        min_n: Shortest ending that counts.
        k: Most tokens to propose.

    Reference: Saxena, "Prompt Lookup Decoding" (2023).
    """
    if min_n < 1 or max_n < min_n or k < 0:
        raise ValueError(
            "propose_ngram: expected 1 <= min_n <= max_n and k >= 0, "
            f"got min_n={min_n}, max_n={max_n}, k={k}"
        )
    data = array("q", tokens).tobytes()
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        ending = data[-8 * n :]
        at = data.rfind(ending, 0, len(data) - 8)
        while at > 0 and at % 8:  # not at the beginning of a token
            at = data.rfind(ending, 0, at + len(ending) - 1)
        if at >= 0:
            return tokens[at // 8 + n : at // 8 + n + k]
    return []


class DecodeLoop:
    """The loops over plain decodes (csrc/host/decode_loop.h).

    A call may stop at any request, which the scheduler then takes by itself; this one stops at the
    first, so `plan` and `commit` do nothing.
    """

    def __init__(
        self,
        request: type,
        metrics: type,
        chunk: type,
        running: object,
        pool: BlockPool,
        block_size: int,
    ) -> None:
        pass

    def plan(
        self, running: list[Any], begin: int, budget: int, chunks: list[Any]
    ) -> tuple[int, int]:
        """Plan a token each for `running[begin:]`: where it stopped, how many it planned."""
        return begin, 0

    def commit(
        self,
        chunks: list[Any],
        sampled: list[Any],
        begin: int,
        now: float,
        caching: bool,
        updated: list[Any],
    ) -> int:
        """Take the tokens that `chunks[begin:]` drew, each a number or a list: where it stopped.
        Requests that somebody follows go to `updated`.
        """
        return begin


class DecodePacker:
    """What a decode step needs of its requests, as arrays (csrc/host/decode_loop.h)."""

    def __init__(self, request: type, chunk: type) -> None:
        pass

    def plain(self, chunks: list[Any]) -> bool:
        """Whether each is one token that is sampled from, of a request that wants only tokens."""
        return all(
            c.count == 1 and c.samples and not c.num_drafts and c.request.wants_only_tokens
            for c in chunks
        )

    def pack(
        self, chunks: list[Any], rows: Any, starts: Any, ids: Any, tables: Any, news: list[Any]
    ) -> tuple[int, int]:
        """Row, position and input token (-1: still on the device) of every chunk, each of one
        token. Brings the rows of `tables` up to date with block tables that have changed since they
        were last sent; requests of which nothing was sent yet go to `news` instead.

        Returns:
            The length of the longest block table, and how many rows were written.
        """
        width = written = 0
        for i, chunk in enumerate(chunks):
            request = chunk.request
            rows[i], starts[i] = request.row, chunk.start
            # A second token in flight is this step's own; the first is on the device only.
            ids[i] = -1 if request.in_flight > 1 else request.tokens[-1]
            have, sent = len(request.block_table), request.blocks_sent
            width = max(width, have)
            if have != sent and not sent:
                news.append(request)
            elif have != sent:
                tables[request.row, sent:have] = request.block_table[sent:]
                request.blocks_sent = have
                written += 1
        return width, written

    @staticmethod
    def fill(
        rows: Any,
        starts: Any,
        ids: Any,
        own: Any,
        drawn_at: Any,
        tables: Any,
        temperatures: Any,
        block_size: int,
        columns: dict[str, Any],
    ) -> bool:
        """The columns of the step from what `pack` wrote: the input token or where the device has
        it (`drawn_at` of the row; else `own`), position, slot of the cache, length. From now on the
        row's token is drawn at its place in this step.

        Returns:
            Whether every temperature is 0.
        """
        count = len(rows)
        columns["input_ids"][:count] = ids  # (what stands for a carried one is never looked at)
        carried = ids < 0
        columns["source"][:count] = own[:count]
        columns["source"][:count][carried] = drawn_at[rows[carried]]
        columns["positions"][:count] = starts
        slots = tables[rows, starts // block_size].astype(starts.dtype) * block_size
        columns["slots"][:count] = slots + starts % block_size
        columns["seq_lens"][:count] = starts + 1
        columns["temperature"][:count] = temperatures[rows]
        drawn_at[rows] = range(count)
        return not columns["temperature"][:count].any()

    @staticmethod
    def gather(tables: Any, rows: Any, width: int, out: Any) -> None:
        """The first `width` entries of these rows of `tables`, one after the other, to `out`."""
        out[: len(rows) * width] = tables[rows, :width].reshape(-1)
