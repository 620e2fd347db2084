// Finding words of a row (row.cuh) by rank or by mass, without sorting the vocabulary.
//
//   group_bound  a key that at least n logits reach: in every CTA the ceil(n / CTAs)-th largest of
//                its threads' maxima, of those the smallest
//   gather       collects all words of a range, if they are few, in the first CTA's shared memory
//   narrow       histogram over 2048 bins of a range of words; the range becomes the bin in which
//                the running count or mass, from the largest word down, reaches the target
//   select       the word where that happens: narrow until gather succeeds, then sort and scan
//
// Counts, masses and maxima are integers, so the result depends neither on how many CTAs share the
// row nor on the order of their atomics. Every function is called by all threads of the cluster.
#pragma once

#include "../common/reduce.cuh"
#include "../ptx/cluster.cuh"
#include "row.cuh"

namespace fastinfer::cuda {

constexpr int kListSize = 1024;
constexpr int kBins = 2048;
constexpr int kMaxCtas = 8;       // the largest portable cluster
constexpr int kRankSorted = 256;  // lists up to here are sorted by counting larger elements
constexpr int kBoundBins = 1024;  // of group_bound
constexpr int kSlots = 8;         // per thread; gather looks again only into slots that reach it

struct Message {
  uint64_t a, b;
};

struct Shared {
  uint64_t list[kListSize], sorted[kListSize];
  // A bin is a 64-bit sum in two halves. The low one wraps; whoever sees it wrap carries.
  alignas(16) uint32_t low[kBins], high[kBins];
  Message outbox[2], inbox[2][kMaxCtas];
  uint64_t scratch[32];
  Message found;
  uint32_t count;
  uint32_t threshold;  // bits of the best score of the CTA so far
  float draft_weight;
};

// The CTA's shared memory. Not passed around: behind a pointer every access would be a generic one,
// and a generic atomic first has to find out where it points.
__device__ __forceinline__ Shared& shared() {
  __shared__ Shared s;
  return s;
}

struct Cluster {
  const int rank, size;
  int parity;

  __device__ Cluster() : rank(cluster_rank()), size(cluster_size()), parity(0) {}

  // Every CTA may then read what the others wrote into their own shared memory. The last access to
  // another CTA's memory must be followed by one: none may leave earlier.
  __device__ __forceinline__ void sync() {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_sync_shared();
    }
  }

  // Every CTA gives (a, b), as warp 0 has them, and gets all CTAs' messages in order, valid until
  // the next but one exchange.
  __device__ __forceinline__ const Message* exchange(uint64_t a, uint64_t b) {
    Shared& s = shared();
    parity ^= 1;
    if (size == 1) {
      if (threadIdx.x == 0) s.inbox[parity][0] = {a, b};
      __syncthreads();
      return s.inbox[parity];
    }
    if (threadIdx.x == 0) s.outbox[parity] = {a, b};
    sync();
    const int from = threadIdx.x;
    if (from < size)
      s.inbox[parity][from] = {cluster_load(&s.outbox[parity].a, from),
                               cluster_load(&s.outbox[parity].b, from)};
    __syncthreads();
    return s.inbox[parity];
  }
  template <class Op>
  __device__ __forceinline__ uint64_t all_reduce(uint64_t x) {
    const Message* m = exchange(block_reduce<Op, kThreads>(x, shared().scratch), 0);
    x = m[0].a;
    for (int c = 1; c < size; ++c) x = Op::combine(x, m[c].a);
    return x;
  }
};

// Inclusive prefix sum over the threads of the CTA.
__device__ __forceinline__ uint64_t block_scan(uint64_t x, uint64_t& total) {
  uint64_t* scratch = shared().scratch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint64_t y = __shfl_up_sync(kAllLanes, x, d);
    if (lane >= d) x += y;
  }
  if (lane == 31) scratch[warp] = x;
  __syncthreads();
  total = 0;
  uint64_t before = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w == warp) before = total;
    total += scratch[w];
  }
  __syncthreads();
  return before + x;
}

// Mass that top-p asks for, of `total`: at least 1.
__device__ __forceinline__ uint64_t mass_target(float top_p, uint64_t total) {
  const double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  const uint64_t target = wanted > 1.0 ? static_cast<uint64_t>(wanted) : 1;
  return target < total ? target : total;
}

// s.list[0, n) -> s.sorted[0, n), descending. Words are unique.
__device__ __noinline__ void sort_list(int n) {
  Shared& s = shared();
  const int tid = threadIdx.x;
  if (n <= kRankSorted) {
    int width = 32;  // threads per round: a power of two, so that a warp reads one word at a time
    while (width < n) width *= 2;
    if (tid < kRankSorted) s.low[tid] = 0;
    __syncthreads();
    const int mine = tid & (width - 1);
    if (mine < n) {
      const uint64_t word = s.list[mine];
      uint32_t larger = 0;
      for (int j = tid / width; j < n; j += kThreads / width) larger += s.list[j] > word;
      atomicAdd(&s.low[mine], larger);
    }
    __syncthreads();
    if (tid < n) s.sorted[s.low[tid]] = s.list[tid];
    __syncthreads();
    return;
  }
  int m = 2 * kRankSorted;  // bitonic, padded with words that no token has
  while (m < n) m *= 2;
  for (int i = tid; i < m; i += kThreads) s.sorted[i] = i < n ? s.list[i] : 0;
  __syncthreads();
  for (int run = 2; run <= m; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int t = tid; t < m / 2; t += kThreads) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const uint64_t a = s.sorted[i], b = s.sorted[j];
        if ((a < b) == ((i & run) == 0)) {
          s.sorted[i] = b;
          s.sorted[j] = a;
        }
      }
      __syncthreads();
    }
}

__device__ __forceinline__ void clear_bins() {
  Shared& s = shared();
  for (int i = threadIdx.x; i < kBins; i += kThreads) s.low[i] = s.high[i] = 0;
  __syncthreads();
}

__device__ __forceinline__ void add_to_bin(int bin, uint64_t x) {
  Shared& s = shared();
  const uint32_t low = static_cast<uint32_t>(x), old = atomicAdd(&s.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(x >> 32) + (old + low < old);
  if (high != 0) atomicAdd(&s.high[bin], high);
}

struct Found {
  uint64_t rest;  // of the target: what is still to be reached inside the bin
  int bin;
  uint64_t sum;  // of the bin, capped at 2^32 - 1
};

// The bin, counted over all CTAs, in which the sum from bin 0 on reaches `target`, or, where top_p
// is given, that part of the whole.
__device__ __noinline__ Found find_bin(Cluster& c, uint64_t target, const float* top_p) {
  Shared& s = shared();
  c.sync();
  if (c.rank == 0) {
    constexpr int kEach = kBins / kThreads;
    static_assert(kEach == 4, "four bins per thread, one uint4");
    const int first = kEach * threadIdx.x;
    uint64_t bins[kEach] = {}, sum = 0, total;
    for (int r = 0; r < c.size; ++r) {
      const uint4 low = cluster_load(reinterpret_cast<const uint4*>(s.low + first), r);
      const uint4 high = cluster_load(reinterpret_cast<const uint4*>(s.high + first), r);
      bins[0] += static_cast<uint64_t>(high.x) << 32 | low.x;
      bins[1] += static_cast<uint64_t>(high.y) << 32 | low.y;
      bins[2] += static_cast<uint64_t>(high.z) << 32 | low.z;
      bins[3] += static_cast<uint64_t>(high.w) << 32 | low.w;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += bins[i];
    uint64_t before = block_scan(sum, total) - sum;
    if (top_p) target = mass_target(*top_p, total);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (before < target && target <= before + bins[i]) {
        const uint64_t some = bins[i] < 0xFFFFFFFFu ? bins[i] : 0xFFFFFFFFu;
        s.found = {target - before, some << 32 | static_cast<uint32_t>(first + i)};
      }
      before += bins[i];
    }
    __syncthreads();
  }
  const Message m = c.exchange(s.found.a, s.found.b)[0];
  return {m.a, static_cast<int>(m.b & 0xFFFFFFFFu), m.b >> 32};
}

template <class T>
struct Search {
  static constexpr int kPack = Row<T>::kPack;
  Cluster& c;
  const Row<T>& row;
  uint32_t group_key;  // of the largest logit among this thread's tokens
  float slot[kSlots];  // the largest logit of every kSlots-th of this thread's packs

  // This CTA's part of the bound on the n-th largest key, in warp 0 (which sends it to the others);
  // 0 bounds nothing. Distances from the CTA's largest key are counted in bins of 1/32 of their
  // magnitude, so that one pass with one barrier does.
  __device__ __forceinline__ uint32_t group_bound(int64_t n, uint32_t largest) const {
    Shared& s = shared();
    const int64_t mine = (n + c.size - 1) / c.size;
    if (mine > kThreads) return 0;
    static_assert(kBoundBins == 2 * kThreads && kBoundBins == 32 * 32,
                  "two per thread, 32 per lane");
    reinterpret_cast<uint2*>(s.low)[threadIdx.x] = make_uint2(0, 0);
    __syncthreads();
    const uint32_t distance = largest - group_key;
    const int shift = max(0, 26 - __clz(distance));
    atomicAdd(&s.low[32 * shift + (distance >> shift)], 1u);
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    const uint4* bins = reinterpret_cast<const uint4*>(s.low) + 8 * threadIdx.x;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += bins[i].x + bins[i].y + bins[i].z + bins[i].w;
    uint32_t reached = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t y = __shfl_up_sync(kAllLanes, reached, d);
      if (threadIdx.x >= d) reached += y;
    }
    const uint32_t lanes = __ballot_sync(kAllLanes, reached >= mine);  // lane 31 reaches kThreads
    const int lane = __ffs(lanes) - 1;
    const uint32_t before = __shfl_sync(kAllLanes, reached - sum, lane);
    uint32_t count = s.low[32 * lane + threadIdx.x];
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t y = __shfl_up_sync(kAllLanes, count, d);
      if (threadIdx.x >= d) count += y;
    }
    const int bin = 32 * lane + __ffs(__ballot_sync(kAllLanes, before + count >= mine)) - 1;
    const int size = bin < 64 ? 0 : bin / 32 - 1;  // the shift of that bin
    const uint32_t part = bin - 32 * size;
    const uint64_t farthest = (static_cast<uint64_t>(part + 1) << size) - 1;
    return farthest < largest ? largest - static_cast<uint32_t>(farthest) : 1;
  }

  // Number of words in [low, high] of the whole row. If they are at most kListSize, CTA 0 has them
  // in s.list.
  __device__ __noinline__ int gather(uint64_t low, uint64_t high) {
    Shared& s = shared();
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    if (group_key >= static_cast<uint32_t>(low >> 32)) {
      const float at = from_order_key(max(static_cast<uint32_t>(low >> 32), kKeyLowest));
      const float up = from_order_key(static_cast<uint32_t>(high >> 32));
      const Row<T> local = row;
      uint32_t slots = 0;  // those worth another look: with few words wanted, hardly any
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
        if (slot[i] >= at) slots |= 1u << i;
      const int stride = kSlots * local.step;
      for (; slots != 0; slots &= slots - 1) {
        const int first = local.first + (__ffs(slots) - 1) * local.step;
        for (int base = first; base < local.packs; base += 4 * stride)
          gather_packs(local, base, stride, at, up, low, high);
      }
    }
    __syncthreads();
    const Message* m = c.exchange(s.count, 0);
    uint64_t n = 0;
    for (int r = 0; r < c.size; ++r) n += m[r].a;
    if (n <= kListSize && c.rank == 0 && c.size > 1) {  // from each other CTA, a warp or more
      const int r = threadIdx.x / 32 % c.size, share = threadIdx.x / 32 / c.size * 32;
      int at = 0;
      for (int i = 0; i < r; ++i) at += static_cast<int>(m[i].a);
      const int some = r == 0 ? 0 : static_cast<int>(m[r].a);
      for (int i = share + threadIdx.x % 32; i < some; i += kThreads / c.size)
        s.list[at + i] = cluster_load(s.list + i, r);
    }
    c.sync();
    return static_cast<int>(n);
  }

  __device__ __forceinline__ void gather_packs(const Row<T>& row, int base, int stride, float at,
                                               float up, uint64_t low, uint64_t high) {
    Shared& s = shared();
    Pack<T> raw[4];
#pragma unroll
    for (int u = 0; u < 4; ++u)
      if (base + u * stride < row.packs) row.load(base + u * stride, raw[u]);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int pack = base + u * stride;
      if (pack >= row.packs) break;
      const typename Row<T>::Values x = row.values(pack, raw[u]);
      uint32_t hits = 0;
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (!(x.v[j] < at) && !(x.v[j] > up)) hits |= 1u << j;  // (NaN too)
      for (; hits != 0; hits &= hits - 1) {
        const int j = __ffs(hits) - 1, id = pack * kPack + j;
        float v = x.v[0];
#pragma unroll
        for (int i = 1; i < kPack; ++i) v = i == j ? x.v[i] : v;
        const uint64_t word = word_of(normalised(v), id);
        if (word < low || word > high || id >= row.vocab) continue;
        const uint32_t slot = atomicAdd(&s.count, 1u);
        if (slot < kListSize) s.list[slot] = word;
      }
    }
  }

  // One step of the search by count (kMass = false) or mass. Returns the sum of the new range.
  template <bool kMass>
  __device__ __forceinline__ uint64_t narrow(uint64_t& low, uint64_t& high, uint64_t& target,
                                             const Law& law) {
    const uint64_t span = high - low;
    const int shift = span < kBins ? 0 : 64 - __clzll(span) - 11;
    const float at = from_order_key(max(static_cast<uint32_t>(low >> 32), kKeyLowest));
    const float up = from_order_key(static_cast<uint32_t>(high >> 32));
    clear_bins();
    const Row<T> local = row;
    local.template each<1>(
        [&, vocab = local.vocab, low, high](int first, const float(&x)[kPack], int) {
          rolled<4>(x, [&](int j, float v) {
            if (v < at || v > up) return;
            v = normalised(v);
            const uint64_t word = word_of(v, first + j);
            if (word < low || word > high || first + j >= vocab) return;
            const uint64_t amount = kMass ? mass_of(law.weight(v)) : 1;
            if (amount != 0) add_to_bin(static_cast<int>((high - word) >> shift), amount);
          });
        });
    const Found f = find_bin(c, target, nullptr);
    target = f.rest;
    high -= static_cast<uint64_t>(f.bin) << shift;
    const uint64_t last = (uint64_t{1} << shift) - 1;  // of the bin: never below the range
    if (high - low > last) low = high - last;
    return f.sum;
  }

  // The word of [low, high] where the running sum reaches `target`; at most all of the range.
  // `some`: how many words are in the range, or 0 where that is not known.
  template <bool kMass>
  __device__ __noinline__ uint64_t select(uint64_t low, uint64_t high, uint64_t target,
                                          uint64_t some, Law law) {
    Shared& s = shared();
    int n;
    for (;;) {
      if (some <= kListSize) {
        n = gather(low, high);
        if (n <= kListSize) break;
      }
      some = narrow<kMass>(low, high, target, law);
      if (kMass) some = 0;
    }
    if (c.rank == 0) {
      sort_list(n);
      const int i = 2 * threadIdx.x;
      if (kMass) {
        uint64_t m[2], total;
        for (int e = 0; e < 2; ++e)
          m[e] = i + e < n ? mass_of(law.weight(logit_of(s.sorted[i + e]))) : 0;
        const uint64_t sum = block_scan(m[0] + m[1], total), before = sum - m[0] - m[1];
        if (before < target && target <= sum)
          s.found.a = s.sorted[before + m[0] >= target ? i : i + 1];
      } else if (i == 0) {
        s.found.a = s.sorted[target - 1];
      }
      __syncthreads();
    }
    return c.exchange(s.found.a, 0)[0].a;
  }
};

}  // namespace fastinfer::cuda
