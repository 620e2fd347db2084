// One row of logits as a CTA of its cluster sees it: penalties applied, in packs of 16 bytes.
//
// A token is also a word: its logit's order_key in the upper half, ~id in the lower. Words are
// unique and descend in the order everything is defined by: larger logit first, then lower id. The
// CTAs of a cluster take packs in turn; thread t of CTA c has packs c * kThreads + t + n * step.
#pragma once

#include "../../cpu/sampling.h"
#include "../../cpu/sampling_math.h"
#include "../common/vec.cuh"

namespace fastinfer::cuda {

constexpr int kThreads = 512;
constexpr float kInf = __builtin_inff();

struct Task {
  const void* logits;  // [rows, positions, V]
  int64_t row_stride, position_stride;
  int vocab, positions;  // positions: k + 1 of verify_draft, 1 of sample
  cpu::SamplingRules rules;
  const float *repetition, *presence, *frequency;
  const uint8_t* prompt_mask;
  int64_t mask_stride;
  const int32_t* output_counts;
  int64_t counts_stride;
  int64_t* token_ids;
  float* logprobs;
  int64_t* top_ids;
  float* top_logprobs;
  int num_top;
  bool verify;
  const void* draft_ids;
  DType draft_type;
  int64_t draft_stride;
  const float* draft_probs;
  int64_t probs_batch_stride, probs_position_stride;
  const void* num_draft_tokens;
  DType num_type;
};

// NaN -> -inf, -0 -> +0: what order_key needs.
__device__ __forceinline__ float normalised(float x) { return x == x ? __fadd_rn(x, 0.0f) : -kInf; }

// x is normalised.
__device__ __forceinline__ uint64_t word_of(float x, int id) {
  return static_cast<uint64_t>(order_key(x)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ float logit_of(uint64_t word) {
  return from_order_key(static_cast<uint32_t>(word >> 32));
}
__device__ __forceinline__ int id_of(uint64_t word) {
  return static_cast<int>(~static_cast<uint32_t>(word));
}

// The operations of the CPU kernel in its order, none fused.
struct Penalties {
  const uint8_t* prompt;
  const int32_t* counts;
  float repetition, frequency, presence;

  __device__ __forceinline__ Penalties(const Task& t, int64_t r)
      : prompt(t.prompt_mask ? t.prompt_mask + r * t.mask_stride : nullptr),
        counts(t.output_counts ? t.output_counts + r * t.counts_stride : nullptr),
        repetition(t.repetition ? t.repetition[r] : 1.0f),
        frequency(t.frequency ? t.frequency[r] : 0.0f),
        presence(t.presence ? t.presence[r] : 0.0f) {}

  __device__ __forceinline__ float apply(float x, int count, bool in_prompt) const {
    count = max(count, 0);
    if (count == 0 && !in_prompt) return x;
    if (repetition != 1.0f) x = x > 0.0f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
    if (count > 0)
      x = __fsub_rn(__fsub_rn(x, __fmul_rn(frequency, static_cast<float>(count))), presence);
    return x;
  }
};

template <class T>
struct Row {
  static constexpr int kPack = Pack<T>::kSize;
  struct Values {
    float v[kPack];
  };

  const Task* task;
  const T* logits;
  int64_t r;
  int vocab, packs, first, step;
  bool aligned, penalised;

  __device__ Row(const Task& t, int64_t r, int position, int rank, int size)
      : task(&t),
        logits(static_cast<const T*>(t.logits) + r * t.row_stride + position * t.position_stride),
        r(r),
        vocab(t.vocab),
        packs((t.vocab + kPack - 1) / kPack),
        first(rank * kThreads + threadIdx.x),
        step(size * kThreads),
        aligned(reinterpret_cast<uintptr_t>(logits) % 16 == 0),
        penalised((t.repetition && t.repetition[r] != 1.0f) ||
                  (t.frequency && t.frequency[r] != 0.0f) ||
                  (t.presence && t.presence[r] != 0.0f)) {}

  // Logit of one token, normalised.
  __device__ float at(int id) const {
    float x = to_float(logits[id]);
    if (penalised) {
      const Penalties p(*task, r);
      x = p.apply(x, p.counts ? p.counts[id] : 0, p.prompt && p.prompt[id]);
    }
    return normalised(x);
  }

  __device__ __forceinline__ void load(int pack, Pack<T>& raw) const {
    const int i = pack * kPack;
    if (aligned && i + kPack <= vocab) {
      *reinterpret_cast<uint4*>(&raw) = *reinterpret_cast<const uint4*>(logits + i);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        raw.v[j] = i + j < vocab ? logits[i + j] : from_float<T>(-kInf);
    }
  }

  __device__ __forceinline__ Values values(int pack, const Pack<T>& raw) const {
    Values x;
#pragma unroll
    for (int j = 0; j < kPack; ++j) x.v[j] = to_float(raw.v[j]);
    if (penalised && pack < packs) x = penalise(*task, r, pack, x);
    return x;
  }

  // Out of line: rows with penalties are the exception, and every pass over a row may need it.
  static __device__ __noinline__ Values penalise(const Task& t, int64_t r, int pack, Values x) {
    const Penalties p(t, r);
    const int i = pack * kPack;
    const bool whole = i + kPack <= t.vocab;
    alignas(16) int count[kPack] = {};
    alignas(4) uint8_t seen[kPack] = {};
    if (p.counts && whole && reinterpret_cast<uintptr_t>(p.counts) % 16 == 0) {
#pragma unroll
      for (int j = 0; j < kPack; j += 4)
        *reinterpret_cast<int4*>(count + j) = *reinterpret_cast<const int4*>(p.counts + i + j);
    } else if (p.counts) {
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (i + j < t.vocab) count[j] = p.counts[i + j];
    }
    if (p.prompt && whole && reinterpret_cast<uintptr_t>(p.prompt) % 4 == 0) {
#pragma unroll
      for (int j = 0; j < kPack; j += 4)
        *reinterpret_cast<uchar4*>(seen + j) = *reinterpret_cast<const uchar4*>(p.prompt + i + j);
    } else if (p.prompt) {
#pragma unroll
      for (int j = 0; j < kPack; ++j)
        if (i + j < t.vocab) seen[j] = p.prompt[i + j];
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) x.v[j] = p.apply(x.v[j], count[j], seen[j] != 0);
    return x;
  }

  // f(first id, x, u) for every pack of this thread, the u-th of kUnroll loads in flight; x may
  // hold NaN, and -inf past the end of the row. All lanes of a warp make the same number of calls.
  template <int kUnroll, class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int base = first; base - static_cast<int>(threadIdx.x % 32) < packs;
         base += kUnroll * step) {
      Pack<T> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int pack = base + u * step;
        if (pack < packs) {
          load(pack, raw[u]);
        } else {
#pragma unroll
          for (int j = 0; j < kPack; ++j) raw[u].v[j] = from_float<T>(-kInf);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int pack = base + u * step;
        if (pack - static_cast<int>(threadIdx.x % 32) >= packs) break;
        const Values x = values(pack, raw[u]);
        f(pack * kPack, x.v, u);
      }
    }
  }
};

// f(j, x[j]) for all j in a loop of kStep: bodies of a hundred instructions, unrolled over a pack
// at every place they are used, would not fit the instruction cache. (x moves through the
// registers: an index that is not constant would put it into local memory.)
template <int kStep, int N, class F>
__device__ __forceinline__ void rolled(const float (&x)[N], F&& f) {
  static_assert(N % kStep == 0, "whole steps");
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = x[i];
#pragma unroll 1
  for (int j = 0; j < N; j += kStep) {
#pragma unroll
    for (int i = 0; i < kStep; ++i) f(j + i, y[i]);
#pragma unroll
    for (int i = 0; i + kStep < N; ++i) y[i] = y[i + kStep];
  }
}

struct Rule {
  float temperature, top_p, min_p;
  int64_t top_k, seed, step;

  __device__ Rule(const cpu::SamplingRules& r, int64_t row) {
    temperature = r.temperature ? r.temperature[row] : 1.0f;
    top_p = r.top_p ? r.top_p[row] : 1.0f;
    min_p = r.min_p ? r.min_p[row] : 0.0f;
    top_k = r.top_k ? index_at(r.top_k, r.top_k_type, row) : 0;
    seed = r.seeds ? r.seeds[row] : 0;
    step = r.steps ? r.steps[row] : 0;
  }
};

// w(x) = e^((x - max) / T), the bits of the CPU kernel.
struct Law {
  float max, temperature, per_log2;  // per_log2: log2(e) / T, for bounds only

  __device__ Law(float max, float temperature)
      : max(max), temperature(temperature), per_log2(fminf(1.44269504f / temperature, 1e38f)) {}

  __device__ __forceinline__ float weight(float x) const {
    if (!(x > -kInf)) return 0.0f;
    const float d = x == max ? 0.0f : __fsub_rn(x, max);
    return fastinfer::weight<float, uint32_t>(temperature == 1.0f ? d : __fdiv_rn(d, temperature));
  }
  // Exponent of two of the weight, to within 1e-4 or larger than it is; NaN only where the weight
  // is 0.
  __device__ __forceinline__ float log2_weight(float x) const {
    return x == max ? 0.0f : (x - max) * per_log2;
  }
};

}  // namespace fastinfer::cuda
