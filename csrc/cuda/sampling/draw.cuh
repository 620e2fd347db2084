// What happens once the largest logit of a row is known: the kept set, the draw, the outputs.
//
// From a list: with top-k the kept tokens usually are among a few hundred words that one CTA holds
// sorted, and everything left is a prefix of them. From the row: every CTA goes over its share.
//
// The race over a row (argmax of w / e, e ~ Exp(1)) computes exact scores only for tokens that can
// still win: e >= u, so w / u bounds the score, and u >= 2^-33, so that tokens with w * 2^33 below
// the best score need no random number. The bounds have slack for their own rounding; what wins is
// decided by exact scores, so skipping does not change it.
#pragma once

#include "search.cuh"

namespace fastinfer::cuda {

constexpr float kSlack = 0.998f;
constexpr float kNoMass = -41.5f;  // log2 below which a weight has no mass (2^-40), with slack

// A score and its token in one integer: larger score first, then lower id. 0 = nobody.
__device__ __forceinline__ uint64_t entry_of(float score, int id) {
  return score > 0.0f
             ? static_cast<uint64_t>(__float_as_uint(score)) << 32 | ~static_cast<uint32_t>(id)
             : 0;
}

__device__ __forceinline__ float score_of(float weight, uint32_t bits) {
  return __fdiv_rn(weight, exponential<float, uint32_t>(to_float(bits), to_float(~bits)));
}

__device__ __noinline__ uint32_t random_word(PhiloxKey key, int id, uint32_t stream) {
  const PhiloxWords r = philox(key, static_cast<uint32_t>(id) / 4, stream);
  const int i = id % 4;
  return i < 2 ? (i == 0 ? r.word[0] : r.word[1]) : (i == 2 ? r.word[2] : r.word[3]);
}

// What is drawn from: weights of the kept tokens, or what verify_draft leaves of them.
struct Kept {
  uint64_t word = 0;   // the last token kept by top-k and top-p
  float least = 0.0f;  // min-p

  __device__ __forceinline__ bool has(uint64_t w, float weight) const {
    return w >= word && weight >= least;
  }
};
struct Residual {
  const float* q = nullptr;  // draft probabilities
  int without = -1;          // a draft of probability 1
  float scale = 1.0f;

  __device__ __forceinline__ float operator()(float weight, int id) const {
    if (id == without) return 0.0f;
    if (!q) return weight;
    const float r = __fsub_rn(__fmul_rn(weight, scale), q[id]);
    return r > 0.0f ? r : 0.0f;
  }
};

template <class T>
struct Draw {
  static constexpr int kPack = Row<T>::kPack;
  Search<T> search;
  const Task& task;
  Law law;
  Kept kept;
  PhiloxKey key;
  int64_t r;     // batch row
  int position;  // of verify_draft
  int drafts;

  __device__ bool leads() const { return search.c.rank == 0 && threadIdx.x == 0; }

  // ---- outputs
  __device__ float logprob(float x, double log_total) const {
    if (x == -kInf) return -kInf;
    const double d = x == law.max ? 0.0 : static_cast<double>(x) - static_cast<double>(law.max);
    return static_cast<float>(d / static_cast<double>(law.temperature) - log_total);
  }
  __device__ static double log_of(uint64_t total) {
    return log(static_cast<double>(total) * 0x1p-40);
  }
  __device__ bool wants_logprobs() const { return task.logprobs || task.num_top > 0; }
  // A verified position says in bit 40 whether its draft stands; finish_verify reads it.
  __device__ void write_token(int token, bool accepted = false) const {
    task.token_ids[r * task.positions + position] =
        static_cast<int64_t>(token) | static_cast<int64_t>(accepted) << 40;
  }
  __device__ int64_t draft() const {
    return index_at(task.draft_ids, task.draft_type, r * task.draft_stride + position);
  }
  __device__ const float* draft_probs() const {
    return task.draft_probs ? task.draft_probs + r * task.probs_batch_stride +
                                  position * task.probs_position_stride
                            : nullptr;
  }
  __device__ bool accepts(const float* q, int64_t id, float weight, uint64_t total) const {
    if (id < 0 || id >= task.vocab) return false;
    const double u = (static_cast<double>(philox(key, 0, kStreamAccept).word[0]) + 0.5) * 0x1p-32;
    const double mass =
        q ? static_cast<double>(q[id]) * static_cast<double>(total) : static_cast<double>(total);
    return u * mass < static_cast<double>(mass_of(weight));
  }
  __device__ Residual residual(const float* q, int64_t id, uint64_t total) const {
    Residual left;
    left.q = q;
    if (q) left.scale = static_cast<float>(0x1p40 / static_cast<double>(total));
    if (!q && id >= 0 && id < task.vocab) left.without = static_cast<int>(id);
    return left;
  }

  // ---- from a list: CTA 0 alone, s.list[0, n) holds every token that top-k keeps, one per thread
  __device__ __noinline__ void from_list(int n, const Rule& rule) {
    Shared& s = shared();
    sort_list(n);
    const Law law = this->law;
    const int j = threadIdx.x;
    const uint64_t word = j < n ? s.sorted[j] : 0;
    const float x = j < n ? logit_of(word) : -kInf;
    const int id = id_of(word);
    bool in = j < n && word >> 32 >= s.sorted[rule.top_k - 1] >> 32;
    float w = in ? law.weight(x) : 0.0f;
    uint64_t total;
    if (rule.top_p < 1.0f) {
      const uint64_t m = mass_of(w), before = block_scan(m, total) - m;
      in = in && before < mass_target(rule.top_p, total);
    }
    in = in && w >= kept.least;
    if (!in) w = 0.0f;
    const bool wants_total = task.verify || wants_logprobs();
    if (wants_total) total = block_reduce<Sum, kThreads>(mass_of(w), s.scratch);

    Residual left;
    uint32_t stream = kStreamSample;
    if (task.verify && position < drafts) {
      const int64_t proposed = draft();
      const float* q = draft_probs();
      if (j == 0) s.draft_weight = 0.0f;
      __syncthreads();
      if (in && id == proposed) s.draft_weight = w;
      __syncthreads();
      if (accepts(q, proposed, s.draft_weight, total)) {
        if (j == 0) write_token(static_cast<int>(proposed), true);
        return;
      }
      left = residual(q, proposed, total);
      stream = kStreamResample;
    }
    const uint32_t bits = w > 0.0f ? random_word(key, id, stream) : 0;
    uint64_t best;
    do {
      const float weight = w > 0.0f ? left(w, id) : 0.0f;
      best = weight > 0.0f ? entry_of(score_of(weight, bits), id) : 0;
      best = block_reduce<Max, kThreads>(best, s.scratch);
      left = Residual();  // where nothing is left of p - q, p itself
    } while (best == 0);
    if (j == 0) write_token(id_of(best));
    if (task.verify || !wants_total) return;
    const double log_total = log_of(total);
    const float value = in ? logprob(x, log_total) : -kInf;
    if (task.logprobs && in && id == id_of(best)) task.logprobs[r] = value;
    if (j >= task.num_top) return;
    task.top_ids[r * task.num_top + j] = id;
    task.top_logprobs[r * task.num_top + j] = value;
  }

  // ---- from the row: all CTAs of the cluster
  __device__ __forceinline__ float floor() const {
    return from_order_key(max(static_cast<uint32_t>(kept.word >> 32), kKeyLowest));
  }

  // Bin of a logit in the first histogram of top-p: steps of T / 128 down from the maximum.
  // Rounding keeps the order, so a bin is a range of logits.
  static __device__ __forceinline__ int bin_of(const Law& law, float x, float scale) {
    const float d = x == law.max ? 0.0f : __fsub_rn(law.max, x);
    return static_cast<int>(fminf(__fmul_rn(d, scale), kBins - 1.0f));
  }
  // Smallest key whose bin is <= b; every warp finds it for itself, 31 parts at a time.
  __device__ uint32_t lowest_key(int b, float scale) const {
    uint32_t low = kKeyLowest, high = order_key(law.max);
    while (low < high) {
      const uint32_t step = (high - low + 30) / 31, lane = threadIdx.x % 32;
      const uint32_t mid = high - low < lane * step ? high : low + lane * step;
      const uint32_t yes = __ballot_sync(kAllLanes, bin_of(law, from_order_key(mid), scale) <= b);
      const int at = __ffs(yes) - 1;  // lane 31 is at `high`, where it holds
      const uint32_t found = __shfl_sync(kAllLanes, mid, at);
      low = at == 0 ? found : __shfl_sync(kAllLanes, mid, max(at - 1, 0)) + 1;
      high = found;
    }
    return low;
  }

  // The last word that top-p keeps among those that top-k left.
  __device__ __noinline__ uint64_t nucleus(float top_p) {
    Shared& s = shared();
    const float scale = fminf(__fdiv_rn(128.0f, law.temperature), 1e30f);
    const float at = floor();
    clear_bins();
    const Row<T> row = search.row;
    const Law law = this->law;
    row.template each<1>([&](int, const float(&x)[kPack], int) {
      rolled<4>(x, [&](int, float v) {
        if (!(v >= at) || law.log2_weight(v) < kNoMass) return;
        const uint64_t m = mass_of(law.weight(v));
        if (m != 0) add_to_bin(bin_of(law, v, scale), m);
      });
    });
    const Found f = find_bin(search.c, 0, &top_p);
    const uint32_t low = lowest_key(f.bin, scale);
    const uint32_t high = f.bin == 0 ? order_key(law.max) : lowest_key(f.bin - 1, scale) - 1;
    return search.template select<true>(max(kept.word, static_cast<uint64_t>(low) << 32),
                                        static_cast<uint64_t>(high) << 32 | 0xFFFFFFFFu, f.rest, 0,
                                        law);
  }

  __device__ __noinline__ uint64_t total_mass() {
    const float at = floor();
    uint64_t total = 0;
    const Row<T> row = search.row;
    const Law law = this->law;
    const Kept kept = this->kept;
    row.template each<1>([&](int first, const float(&x)[kPack], int) {
      rolled<4>(x, [&](int j, float v) {
        if (!(v >= at) || law.log2_weight(v) < kNoMass) return;
        const float w = law.weight(v);
        if (kept.has(word_of(normalised(v), first + j), w)) total += mass_of(w);
      });
    });
    return search.c.template all_reduce<Sum>(total);
  }

  // Exact score of a token of the row.
  static __device__ __noinline__ uint64_t entry(Law law, Kept kept, Residual left, float x, int id,
                                                uint32_t bits) {
    const float w = law.weight(x);
    if (!(w > 0.0f) || !kept.has(word_of(normalised(x), id), w)) return 0;
    const float weight = left(w, id);
    return weight > 0.0f ? entry_of(score_of(weight, bits), id) : 0;
  }

  // `likely`: a token whose score is a good first threshold.
  __device__ __noinline__ uint64_t race(int likely, Residual left, uint32_t stream) {
    Shared& s = shared();
    const float at = floor();
    const Row<T> row = search.row;
    const Law law = this->law;
    const Kept kept = this->kept;
    const PhiloxKey key = this->key;
    if (threadIdx.x == 0) {
      const uint64_t e =
          entry(law, kept, left, row.at(likely), likely, random_word(key, likely, stream));
      s.threshold = static_cast<uint32_t>(e >> 32);
    }
    __syncthreads();
    uint64_t best = 0;
    row.template each<1>([&](int first, const float(&x)[kPack], int) {
      const float threshold =
          kSlack * __uint_as_float(*static_cast<volatile uint32_t*>(&s.threshold));
      float bound[kPack], most = 0.0f;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        // max(): NaN, where the weight is 0, becomes 0
        bound[j] = x[j] >= at ? fmaxf(exp2f(law.log2_weight(x[j])) * left.scale, 0.0f) : 0.0f;
        most = fmaxf(most, bound[j]);
      }
      if (!__any_sync(kAllLanes, most > 0.0f && most >= threshold * 0x1p-33f)) return;
      uint32_t bits[kPack], candidates = 0;
#pragma unroll
      for (int q = 0; q < kPack / 4; ++q) {
        const PhiloxWords words = philox(key, static_cast<uint32_t>(first / 4 + q), stream);
#pragma unroll
        for (int j = 4 * q; j < 4 * q + 4; ++j) {
          bits[j] = words.word[j % 4];
          const float u = __fmaf_rn(to_float(bits[j]), 0x1p-32f, 0x1p-33f);
          if (bound[j] > 0.0f && bound[j] >= threshold * u) candidates |= 1u << j;
        }
      }
      if (!__any_sync(kAllLanes, candidates != 0)) return;
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (candidates >> j & 1) best = max(best, entry(law, kept, left, x[j], first + j, bits[j]));
      const uint32_t score = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(best >> 32));
      if (threadIdx.x % 32 == 0 && score > s.threshold) atomicMax(&s.threshold, score);
    });
    return search.c.template all_reduce<Max>(best);
  }

  __device__ void verify_from_row(int argmax) {
    if (position == drafts) {
      const uint64_t best = race(argmax, Residual(), kStreamSample);
      if (leads()) write_token(id_of(best));
      return;
    }
    const int64_t proposed = draft();
    const float* q = draft_probs();
    const uint64_t total = total_mass();
    float w = 0.0f;
    if (proposed >= 0 && proposed < task.vocab) {
      const float x = search.row.at(static_cast<int>(proposed));
      w = law.weight(x);
      if (!kept.has(word_of(x, static_cast<int>(proposed)), w)) w = 0.0f;
    }
    if (accepts(q, proposed, w, total)) {
      if (leads()) write_token(static_cast<int>(proposed), true);
      return;
    }
    uint64_t best = race(argmax, residual(q, proposed, total), kStreamResample);
    if (best == 0) best = race(argmax, Residual(), kStreamResample);
    if (leads()) write_token(id_of(best));
  }

  // The num_top largest words, a list at a time.
  __device__ __noinline__ void write_top(uint64_t high, double log_total) {
    Cluster& c = search.c;
    const uint64_t best =
        block_reduce<Max, kThreads>(static_cast<uint64_t>(search.group_key), shared().scratch);
    const Message* m = c.exchange(search.group_bound(task.num_top, static_cast<uint32_t>(best)), 0);
    uint64_t low = m[0].a;
    for (int i = 1; i < c.size; ++i) low = min(low, m[i].a);
    low <<= 32;
    for (int done = 0; done < task.num_top;) {
      const int some = min(task.num_top - done, kListSize);
      int n = search.gather(low, high);
      if (n > kListSize) {
        low = search.template select<false>(low, high, some, static_cast<uint64_t>(n), law);
        n = search.gather(low, high);
      }
      if (c.rank == 0) {
        sort_list(n);
        for (int j = threadIdx.x; j < some; j += kThreads) {
          const uint64_t word = shared().sorted[j];
          const float x = logit_of(word);
          const int64_t to = r * task.num_top + done + j;
          task.top_ids[to] = id_of(word);
          task.top_logprobs[to] = kept.has(word, kept.least > 0.0f ? law.weight(x) : 0.0f)
                                      ? logprob(x, log_total)
                                      : -kInf;
        }
      }
      done += some;
      // Below the last one written; all CTAs learn it, and none leaves before CTA 0 has read.
      high = c.exchange(c.rank == 0 ? shared().sorted[some - 1] - 1 : 0, 0)[0].a;
      low = 0;
    }
  }

  __device__ void sample_from_row(int argmax, bool greedy, uint64_t top_word) {
    int token = argmax;
    if (!greedy) token = id_of(race(argmax, Residual(), kStreamSample));
    if (leads()) write_token(token);
    if (!wants_logprobs()) return;
    const double log_total = log_of(total_mass());
    if (task.logprobs && leads()) task.logprobs[r] = logprob(search.row.at(token), log_total);
    if (task.num_top > 0) write_top(top_word, log_total);
  }
};

}  // namespace fastinfer::cuda
