// One row of logits -> processed distribution -> one drawn token.
//
//   x_i = logit after penalties (NaN -> -inf),  w_i = e^((x_i - max x) / T),  p_i = w_i / sum w
//   kept tokens: x_i >= k-th largest x (all that tie with it)                          top-k
//                the fewest tokens, by descending x then ascending id, with mass >= p  top-p
//                w_i >= min_p                                                          min-p
//   draw = argmax over kept tokens of w_i / e_i, e_i ~ Exp(1) of token i: exactly p (an exponential
//   race). Ties go to the lowest id everywhere.
//
// The vocabulary is never sorted: thresholds come from a radix search over the ordered bits of x
// (11 + 11 + 10 bits), with counts for top-k and integer masses (mass_of) for top-p. Integers and
// the fixed arithmetic of sampling_math.h make the result the same at every vector width.
#pragma once

// Before anything with code in it: no fused multiply-add in this translation unit.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "sampling.h"
#include "sampling_math.h"
#include "simd.h"

namespace fastinfer::cpu {
namespace {

constexpr float kInf = __builtin_inff();

FI_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  uint64_t half[2];
  __builtin_memcpy(half, &mask, 16);
  return (half[0] | half[1]) != 0;
#endif
}

struct Rule {
  float temperature, top_p, min_p;
  int64_t top_k, seed, step;
};

FI_INLINE int64_t index_at(const void* p, DType type, int64_t i) {
  return type == DType::i64 ? ((const int64_t*)p)[i] : ((const int32_t*)p)[i];
}

FI_INLINE Rule rule_of(const SamplingRules& r, int64_t row) {
  return {r.temperature ? r.temperature[row] : 1.0f,
          r.top_p ? r.top_p[row] : 1.0f,
          r.min_p ? r.min_p[row] : 0.0f,
          r.top_k ? index_at(r.top_k, r.top_k_type, row) : 0,
          r.seeds ? r.seeds[row] : 0,
          r.steps ? r.steps[row] : 0};
}

struct Row {
  float *logits, *weights, *group_max, *list_logits, *list_weights;
  int64_t vocab, padded, groups;  // padded = groups * kGroup
  float max;
};

// A token is in the kept set when its key is above `key`, or equal with id <= last_tie, and, if
// `positive`, its weight survived (min-p zeroed the others).
struct Kept {
  uint32_t key = kKeyLowest;
  int64_t last_tie = INT64_MAX;
  bool positive = false;
};

template <class E>
void load_logits(Row& row, const void* source) {
  const int64_t full = row.vocab / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) store_raw(row.logits + i, E::load(source, i));
  for (int64_t i = full; i < row.vocab; ++i) row.logits[i] = E::get(source, i);
  for (int64_t i = row.vocab; i < row.padded; ++i) row.logits[i] = -kInf;
}

// NaN -> -inf, -0 -> +0 (both would break the order of keys), and the maxima.
void scan(Row& row) {
  vf best = splat(-kInf);
  for (int64_t g = 0; g < row.groups; ++g) {
    float* x = row.logits + g * kGroup;
    vf top = splat(-kInf);
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      vf v = load_raw<vf>(x + i);
      v = (v == v ? v : splat(-kInf)) + 0.0f;
      store_raw(x + i, v);
      top = vmax(top, v);
    }
    row.group_max[g] = max(top);
    best = vmax(best, top);
  }
  row.max = max(best);
  for (int64_t g = row.groups; g % 16 != 0; ++g) row.group_max[g] = -kInf;
}

void load_row(Row& row, const void* logits, DType dtype, int64_t offset) {
  const char* source = (const char*)logits + offset * dtype_size(dtype);
  with_float(dtype, [&](auto e) { load_logits<decltype(e)>(row, source); });
}

int64_t argmax(const Row& row) {
  int64_t g = 0, i = 0;
  while (row.group_max[g] != row.max) ++g;
  while (row.logits[g * kGroup + i] != row.max) ++i;
  return g * kGroup + i;
}

// w = e^((x - max) / T) where x >= floor, 0 elsewhere.
void compute_weights(const Row& row, float temperature, float floor) {
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const vf x = load_raw<vf>(row.logits + i);
    vf w{};
    if (any(x >= floor)) {
      const vf d = x == row.max ? vf{} : x - row.max;  // infinity - infinity is 0 here
      w = weight<vf, vu>(d / temperature);
      w = x >= floor ? w : vf{};
      w = x == -kInf ? vf{} : w;
    }
    store_raw(row.weights + i, w);
  }
}

uint64_t total_mass(const Row& row) {
  uint64_t total = 0;
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    if (!any(load_raw<vf>(row.weights + i) > 0.0f)) continue;
    for (int64_t j = 0; j < kLanes; ++j) total += mass_of(row.weights[i + j]);
  }
  return total;
}

struct Selected {
  uint32_t key;    // largest key such that the elements >= it reach the target
  uint64_t above;  // what the elements > key sum up to
};

// Radix search for the key where the running sum, from the largest value down, reaches `target`
// (>= 1): every element counts 1, or its mass when weights are given. Elements < floor are known
// not to matter. n is a multiple of kLanes; target <= sum over all.
template <bool kMass>
Selected select(const float* x, const float* w, int64_t n, float floor, uint64_t target) {
  uint64_t histogram[2048];
  uint32_t low = order_key(floor), high = kKeyHighest, prefix = 0;
  uint64_t above = 0;
  const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = shifts[pass], bins = 1 << widths[pass];
    for (int b = 0; b < bins; ++b) histogram[b] = 0;
    const float x_low = from_order_key(low), x_high = from_order_key(high);
    for (int64_t i = 0; i < n; i += kLanes) {
      const vf v = load_raw<vf>(x + i);
      if (!any((v >= x_low) & (v <= x_high))) continue;
      for (int64_t j = i; j < i + kLanes; ++j) {
        const uint32_t key = order_key(x[j]);
        if (key < low || key > high) continue;
        histogram[(key >> shift) & (bins - 1)] += kMass ? mass_of(w[j]) : 1;
      }
    }
    int b = bins - 1;
    while (b > 0 && above + histogram[b] < target) above += histogram[b--];
    prefix |= (uint32_t)b << shift;
    const uint32_t last = prefix | ((1u << shift) - 1u);
    low = prefix > low ? prefix : low;
    high = last < high ? last : high;
  }
  return {prefix, above};
}

// Value of the k-th largest logit, 1 <= k <= vocab.
float kth_largest(const Row& row, int64_t k) {
  // k groups whose maxima are >= b hold k values >= b, so the k-th largest maximum bounds from
  // below; usually few other values pass it.
  float bound = -kInf;
  const int64_t padded_groups = (row.groups + 15) / 16 * 16;
  if (k <= row.groups)
    bound = from_order_key(select<false>(row.group_max, nullptr, padded_groups, -kInf, k).key);
  return from_order_key(select<false>(row.logits, nullptr, row.padded, bound, k).key);
}

// Top-p in two steps: masses by distance from the maximum in equal steps of T / 128 (rounding keeps
// the order), then a radix search inside the one bucket that holds the threshold.
void apply_top_p(const Row& row, const Rule& rule, Kept& kept) {
  constexpr int kBuckets = 2048;
  uint64_t histogram[kBuckets];
  for (int b = 0; b < kBuckets; ++b) histogram[b] = 0;
  const float steps = 128.0f / rule.temperature, scale = steps < 1e30f ? steps : 1e30f;
  auto buckets = [&](vf x) {
    const vf d = x == row.max ? vf{} : row.max - x;
    return __builtin_convertvector(vmin(d * scale, splat(kBuckets - 1.0f)), vi);
  };
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    if (!any(load_raw<vf>(row.weights + i) > 0.0f)) continue;
    int32_t b[kLanes];
    store_raw(b, buckets(load_raw<vf>(row.logits + i)));
    for (int j = 0; j < kLanes; ++j) histogram[b[j]] += mass_of(row.weights[i + j]);
  }
  uint64_t total = 0, above = 0;
  for (int b = 0; b < kBuckets; ++b) total += histogram[b];
  const double wanted = __builtin_ceil((double)rule.top_p * (double)total);
  uint64_t target = wanted > 1.0 ? (uint64_t)wanted : 1;
  target = target < total ? target : total;
  int bucket = 0;
  while (bucket < kBuckets - 1 && above + histogram[bucket] < target) above += histogram[bucket++];

  int64_t n = 0;
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const vi b = buckets(load_raw<vf>(row.logits + i));
    if (!any((b == bucket) & (load_raw<vf>(row.weights + i) > 0.0f))) continue;
    for (int j = 0; j < kLanes; ++j)
      if (b[j] == bucket && row.weights[i + j] > 0.0f) {
        row.list_logits[n] = row.logits[i + j];
        row.list_weights[n++] = row.weights[i + j];
      }
  }
  for (; n % kLanes != 0; ++n) {
    row.list_logits[n] = -kInf;
    row.list_weights[n] = 0.0f;
  }
  const Selected s = select<true>(row.list_logits, row.list_weights, n, -kInf, target - above);
  const float at = from_order_key(s.key);
  uint64_t reached = above + s.above;
  kept.key = s.key;
  kept.last_tie = -1;
  for (int64_t i = 0; i < row.padded; i += kLanes) {
    const vf x = load_raw<vf>(row.logits + i), w = load_raw<vf>(row.weights + i);
    store_raw(row.weights + i, x >= at ? w : vf{});
    if (!any(x == at)) continue;
    for (int64_t j = i; j < i + kLanes; ++j) {
      if (row.logits[j] != at) continue;
      if (reached < target) {
        reached += mass_of(row.weights[j]);
        kept.last_tie = j;
      } else {
        row.weights[j] = 0.0f;
      }
    }
  }
}

// Weights of the kept tokens, 0 for the others.
Kept process(const Row& row, const Rule& rule) {
  Kept kept;
  float floor = -kInf;
  if (rule.top_k > 0 && rule.top_k < row.vocab) {
    floor = kth_largest(row, rule.top_k);
    kept.key = order_key(floor);
  }
  compute_weights(row, rule.temperature, floor);
  if (rule.top_p < 1.0f) apply_top_p(row, rule, kept);
  if (rule.min_p > 0.0f) {
    const float least = rule.min_p < 1.0f ? rule.min_p : 1.0f;
    for (int64_t i = 0; i < row.padded; i += kLanes) {
      const vf w = load_raw<vf>(row.weights + i);
      store_raw(row.weights + i, w >= least ? w : vf{});
    }
    kept.positive = true;
  }
  return kept;
}

// argmax of weight / Exp(1); -1 when every weight is 0. Blocks of 16 tokens = 4 Philox counters,
// whatever the vector width.
int64_t race(const float* weights, int64_t padded, const PhiloxKey& key, uint32_t stream) {
  vf best{};
  vi best_block = vi{} - 1;
  for (int64_t base = 0; base < padded; base += 16) {
    vi mask{};
    for (int i = 0; i < 16; i += kLanes) mask |= load_raw<vf>(weights + base + i) > 0.0f;
    if (!any(mask)) continue;
    float bits[16], flipped[16];
    for (int q = 0; q < 4; ++q) {
      const PhiloxWords r = philox(key, (uint32_t)(base / 4 + q), stream);
      for (int i = 0; i < 4; ++i) {
        bits[4 * q + i] = to_float(r.word[i]);
        flipped[4 * q + i] = to_float(~r.word[i]);
      }
    }
    for (int i = 0; i < 16; i += kLanes) {
      const vf e = exponential<vf, vu>(load_raw<vf>(bits + i), load_raw<vf>(flipped + i));
      const vf score = load_raw<vf>(weights + base + i) / e;
      const vi better = score > best;
      best = better ? score : best;
      best_block = better ? vi{} + (int32_t)(base + i) : best_block;
    }
  }
  float top = 0.0f;
  int64_t token = -1;
  for (int j = 0; j < kLanes; ++j) {
    const int64_t candidate = best_block[j] + j;
    if (best_block[j] >= 0 && (best[j] > top || (best[j] == top && candidate < token))) {
      top = best[j];
      token = candidate;
    }
  }
  return token;
}

}  // namespace
}  // namespace fastinfer::cpu
