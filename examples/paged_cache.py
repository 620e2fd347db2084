"""`fastinfer.PagedKVCache` in a loop of one's own: prompts of different lengths, decoding, and two
continuations of one prompt that share its blocks.

    python examples/paged_cache.py
"""

import torch

from fastinfer import PagedKVCache

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 32


def project(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stands for a layer's q, k and v of packed tokens."""
    return tuple(torch.randn(tokens, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))


# The ten lines.
cache = PagedKVCache(LAYERS, KV_HEADS, DIM, num_blocks=64, block_size=16, dtype=torch.float32)
sequences = [cache.allocate() for _ in range(3)]
for step_lengths in ([40, 7, 19], [1, 1, 1], [1, 1, 1]):  # prefill, then two decoding steps
    step = cache.append(sequences, step_lengths)
    for layer in range(LAYERS):
        q, k, v = project(sum(step_lengths))
        out = cache.attend(layer, q, k, v, step)
sequences.append(cache.fork(sequences[0]))  # shares all blocks with it
step = cache.append(sequences)  # the half-full shared block is copied now
cache.free(sequences.pop(1))

print(f"lengths {[cache.length(s) for s in sequences]}, blocks {cache.num_free_blocks} free of 64")
print(f"output {list(out.shape)}, block table {step.block_table.tolist()}")
