// Around the attention core: new keys and values written into a cache (rotary, quantisation), and
// the merge of two attention results over disjoint keys.
//
//   merge: m = max(lse_a, lse_b), w_x = e^(lse_x - m), out = (w_a a + w_b b) / (w_a + w_b),
//   lse = m + ln(w_a + w_b); a side whose LSE is -inf (or +inf, as some kernels mark it) holds no
//   keys: its output is not read.
#include "attention.h"
#include "attention_rows.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

constexpr float kInf = __builtin_inff();

// One row of a cache from fp32. 8-bit codes: x / scale, rounded to nearest even, saturating; with
// a scale per token and head that scale is computed here, largest magnitude / largest code.
void write_row(const AppendParams& p, const KeyValue& layout, void* cache, float* scale,
               int64_t offset, int64_t scale_offset, int64_t head, const float* x) {
  if (p.cache_dtype == p.dtype) {
    with_float(p.dtype, [&](auto e) {
      using E = decltype(e);
      store_row<E>((char*)cache + offset * E::size, p.head_dim, 1.0f, x);
    });
    return;
  }
  const bool int8 = p.cache_dtype == DType::i8;
  float unit = 1.0f;
  if (layout.scale_per_token) {
    float largest = 0;
    for (int64_t i = 0; i < p.head_dim; ++i) {
      const float a = __builtin_fabsf(x[i]);
      largest = a > largest ? a : largest;
    }
    unit = largest > 0 ? largest / (int8 ? 127.0f : 448.0f) : 1.0f;
    scale[scale_offset + head * layout.scale_head] = unit;
  } else if (scale) {
    unit = scale[head * layout.scale_head];
  }
  char* codes = (char*)cache + offset;
  for (int64_t i = 0; i < p.head_dim; ++i) {
    if (int8)
      Elem<DType::i8>::set(codes, i, x[i] / unit);
    else
      Elem<DType::f8e4m3>::set(codes, i, x[i] / unit);
  }
}

}  // namespace

void attention_append(const AppendParams& p, int64_t begin, int64_t end) {
  float x[kMaxHeadDim];
  for (int64_t r = begin; r < end; ++r) {
    const int64_t b = r / p.tokens, token = r % p.tokens;
    const AttentionSequence& seq = p.sequences[b];
    const int64_t position = p.first_position[b] + token;
    const int64_t page = position / p.page_size, slot = position % p.page_size;
    const int64_t block = seq.pages ? seq.pages[page] : 0;
    auto write = [&](const void* source, int64_t from, const KeyValue& layout, void* cache,
                     float* scale, int64_t base, int64_t scale_base, int64_t h, bool rotate) {
      with_float(p.dtype, [&](auto e) {
        using E = decltype(e);
        load_row<E>((const char*)source + from * E::size, p.head_dim, 1.0f, x);
        if (rotate) {
          rotate_row(p.rotary, position, x);
          round_row<E>(p.head_dim, x);
        }
      });
      write_row(p, layout, cache, scale,
                base + block * layout.page + slot * layout.token + h * layout.head,
                scale_base + block * layout.scale_page + slot * layout.scale_token, h, x);
    };
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      write(p.k, b * p.k_batch + token * p.k_token + h * p.k_head, p.k_layout, p.k_cache, p.k_scale,
            seq.k, seq.k_scale, h, p.rotary.cos != nullptr);
      write(p.v, b * p.v_batch + token * p.v_token + h * p.v_head, p.v_layout, p.v_cache, p.v_scale,
            seq.v, seq.v_scale, h, false);
    }
  }
}

// Rows (batch, token, head), head fastest.
void merge_attn_states(const MergeStatesParams& p, int64_t begin, int64_t end) {
  with_float(p.dtype, [&](auto e) {
    using E = decltype(e);
    const int64_t full = p.head_dim / kLanes * kLanes;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at[3] = {r / p.heads / p.tokens, r / p.heads % p.tokens, r % p.heads};
      auto offset = [&](const int64_t* stride) {
        return at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2];
      };
      const float a = p.prefix_lse[offset(p.prefix_lse_stride)];
      const float b = p.suffix_lse[offset(p.suffix_lse_stride)];
      const bool no_a = a == kInf || a == -kInf, no_b = b == kInf || b == -kInf;
      const float top = no_a ? b : no_b ? a : a > b ? a : b;
      const float ea = no_a ? 0.0f : no_b ? 1.0f : __builtin_expf(a - top);
      const float eb = no_b ? 0.0f : no_a ? 1.0f : __builtin_expf(b - top);
      const float total = ea + eb, wa = no_a ? 0.0f : ea / total, wb = no_b ? 0.0f : eb / total;
      if (p.out_lse)
        p.out_lse[offset(p.out_lse_stride)] = no_a && no_b ? -kInf
                                              : no_a       ? b
                                              : no_b       ? a
                                                           : top + __builtin_logf(total);
      const char* x = (const char*)p.prefix + offset(p.prefix_stride) * E::size;
      const char* y = (const char*)p.suffix + offset(p.suffix_stride) * E::size;
      char* o = (char*)p.out + offset(p.out_stride) * E::size;
      const vf zero{};
      for (int64_t i = 0; i < full; i += kLanes)
        E::store(o, i, (no_a ? zero : E::load(x, i) * wa) + (no_b ? zero : E::load(y, i) * wb));
      for (int64_t i = full; i < p.head_dim; ++i)
        E::set(o, i, (no_a ? 0.0f : E::get(x, i) * wa) + (no_b ? 0.0f : E::get(y, i) * wb));
    }
  });
}

}  // namespace fastinfer::cpu::FI_ISA
