// The attention core: one work item = up to kMaxRows packed query rows of one (sequence, key head).
//
// Scores live in the log2 domain: q is scaled by softmax_scale * log2(e) (and a per-head K scale)
// as it is loaded, so that p = 2^(s - max). Per tile of 64 keys: K is transposed once, S = Q K^T
// for all rows, online softmax, then O = O * 2^(old max - new max) + P V (Dao et al. 2022). All
// arithmetic is fp32. A masked key has p = 0 exactly, so tiles that are skipped for one row and
// visited for another give the same bits. See attention.h for layouts and for chunks.
#include "attention.h"

#include "attention_math.h"
#include "attention_rows.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

// Online softmax state of an item's rows: max (log2 domain), sum, and unnormalised output.
struct State {
  float* max;
  float* sum;
  float* out;  // [rows][padded_dim]
};

constexpr int kFewRows = 4;  // up to here an item is bound by memory, not by arithmetic

struct Scratch {
  alignas(64) float q[kMaxRows * kMaxHeadDim];
  alignas(64) float out[2][kMaxRows * kMaxHeadDim];
  alignas(64) float keys[kTile * kMaxHeadDim];    // rows of K as they are, then of V as fp32
  alignas(64) float keys_t[kTile * kMaxHeadDim];  // [D][kTile]
  alignas(64) float scores[kMaxRows * kTile];
  alignas(64) float key_scales[kTile];
  float max[2][kMaxRows], sum[2][kMaxRows], keep[kMaxRows], slope[kMaxRows];
  int64_t position[kMaxRows];             // of the row among the keys
  int64_t low[kMaxRows], high[kMaxRows];  // visible keys of a row: [low, high)
};

alignas(64) const float kIota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

FI_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// What the scores of one row pass through after the dot product.
struct ScoreMap {
  float cap;        // softcap * log2(e), 0: none
  float slope;      // ALiBi slope * log2(e)
  float distance;   // position of the row minus first key of the tile
  float low, high;  // visible part of the tile
};

// s[kTile] becomes 2^(s - new max); returns what the old output has to be multiplied by.
float softmax_row(float* s, const ScoreMap& map, float& max_so_far, float& sum_so_far) {
  vf top = splat(-kInf);
  const bool masked = map.low > 0 || map.high < kTile;
  for (int i = 0; i < kTile; i += kLanes) {
    vf x = load_raw<vf>(s + i);
    if (map.cap != 0) x = vtanh(x) * map.cap;
    const vf key = load_raw<vf>(kIota) + (float)i;
    if (map.slope != 0) x -= vabs(map.distance - key) * map.slope;
    if (masked) {
      x = key < map.low ? splat(-kInf) : x;
      x = key < map.high ? x : splat(-kInf);
    }
    store_raw(s + i, x);
    top = vmax(top, x);
  }
  const float tile_max = reduce_max(top);
  const float new_max = tile_max > max_so_far ? tile_max : max_so_far;
  const float origin = new_max == -kInf ? 0.0f : new_max;  // no key seen yet: keep 2^-inf = 0
  const float keep = max_so_far == new_max ? (new_max == -kInf ? 0.0f : 1.0f)
                                           : exp2_neg(splat(max_so_far - origin))[0];
  vf total{};
  for (int i = 0; i < kTile; i += kLanes) {
    const vf e = exp2_neg(load_raw<vf>(s + i) - origin);
    store_raw(s + i, e);
    total += e;
  }
  sum_so_far = sum_so_far * keep + reduce_sum(total);
  max_so_far = new_max;
  return keep;
}

// a = a followed by b, two chunks of keys.
void merge_states(int64_t rows, int64_t dim, const State& a, const State& b) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = a.max[r] > b.max[r] ? a.max[r] : b.max[r];
    const float origin = top == -kInf ? 0.0f : top;
    const float wa = exp2_neg(splat(a.max[r] - origin))[0];
    const float wb = exp2_neg(splat(b.max[r] - origin))[0];
    a.max[r] = top;
    a.sum[r] = a.sum[r] * wa + b.sum[r] * wb;
    float* x = a.out + r * dim;
    const float* y = b.out + r * dim;
    for (int64_t i = 0; i < dim; i += kLanes)
      store_raw(x + i, load_raw<vf>(x + i) * wa + load_raw<vf>(y + i) * wb);
  }
}

float head_scale(const KeyValue& t, int64_t head) {
  return t.scale && !t.scale_per_token ? t.scale[head * t.scale_head] : 1.0f;
}

// The rows of an item and how they leave.
struct Rows {
  const AttentionParams& p;
  const AttentionItem& item;
  const AttentionSequence& seq;
  const int64_t dim = padded_dim(p.head_dim);

  int64_t token(int64_t r) const { return (item.row + r) / p.group; }
  int64_t head(int64_t r) const { return item.kv_head * p.group + (item.row + r) % p.group; }

  void finish(const State& state) const {
    const float v_scale = head_scale(p.v, item.kv_head);
    with_float(p.dtype, [&](auto e) {
      using E = decltype(e);
      for (int64_t r = 0; r < item.rows; ++r) {
        const int64_t t = token(r), h = head(r);
        float top = state.max[r], sum = state.sum[r], weight = v_scale;
        if (p.sinks && sum != 0) {  // one more term in the denominator
          float sink = 0;
          with_float(p.sinks_dtype, [&](auto s) {
            sink = decltype(s)::get(p.sinks, h * p.sinks_stride) * kLog2e;
          });
          const float higher = sink > top ? sink : top;
          const float shrink = __builtin_exp2f(top - higher);
          sum = sum * shrink + __builtin_exp2f(sink - higher);
          weight *= shrink;
          top = higher;
        }
        const bool empty = sum == 0;
        store_row<E>((char*)p.out + (seq.out + t * p.out_token + h * p.out_head) * E::size,
                     p.head_dim, empty ? 0.0f : weight / sum, state.out + r * dim);
        if (p.lse)
          p.lse[seq.lse + t * p.lse_token + h * p.lse_head] =
              empty ? -kInf : top * kLn2 + __builtin_logf(sum);
      }
    });
  }
};

struct Worker : Rows {
  Scratch& mem;
  const int64_t shift = seq.len_k - seq.len_q;  // key position of query token 0

  template <class E>
  void load_queries() {
    // With softcap the scores become tanh(s / cap) first, so log2(e) comes in after it.
    const float factor =
        p.scale * head_scale(p.k, item.kv_head) * (p.softcap > 0 ? 1.0f / p.softcap : kLog2e);
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t t = token(r), position = seq.rotary_position + (p.rotary_per_token ? t : 0);
      const char* row = (const char*)p.q + (seq.q + t * p.q_token + head(r) * p.q_head) * E::size;
      float* x = mem.q + r * dim;
      if (!p.rotary.cos) {
        load_row<E>(row, p.head_dim, factor, x);
        continue;
      }
      load_row<E>(row, p.head_dim, 1.0f, x);
      rotate_row(p.rotary, position, x);
      round_row<E>(p.head_dim, x);
      load_row<Elem<DType::f32>>(x, p.head_dim, factor, x);
    }
  }

  void find_visible() {
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t at = token(r) + shift;
      const int64_t low = p.window_left < 0 ? 0 : at - p.window_left;
      const int64_t high = p.window_right < 0 ? seq.len_k : at + p.window_right + 1;
      mem.low[r] = low > seq.first_key ? low : seq.first_key;
      mem.high[r] = high < seq.len_k ? high : seq.len_k;
      mem.position[r] = at;
      mem.slope[r] =
          p.alibi ? p.alibi[seq.batch * p.alibi_batch + head(r) * p.alibi_head] * kLog2e : 0.0f;
    }
  }

  KeySource source(const KeyValue& t, int64_t base, int64_t scale_base) const {
    return {t,           base,         scale_base, seq.pages,
            p.page_size, item.kv_head, p.head_dim, dtype_size(p.kv_dtype)};
  }

  // Keys [begin, end) of the tile at `start`.
  void tile(int64_t start, int64_t begin, int64_t end, const State& state) {
    const KeySource k = source(p.k, seq.k, seq.k_scale), v = source(p.v, seq.v, seq.v_scale);
    const TileRows raw = raw_tile(k, start, begin, end, (char*)mem.keys, mem.key_scales);
    with_key_type(p.kv_dtype, [&](auto e) {
      using E = decltype(e);
      transpose_tile<E>(raw.rows, raw.stride * E::size, (p.head_dim * E::size + 15) / 16 * 16,
                        p.k.scale_per_token ? mem.key_scales : nullptr, mem.keys_t);
    });
    for (int64_t row = 0; row < item.rows; row += kBlockRows) scores(start, row, state);
    with_key_type(p.kv_dtype, [&](auto e) { values<decltype(e)>(v, start, begin, end, state); });
  }

  // O += P V. Values are used where they lie, or for many rows converted to fp32 once.
  template <class E>
  void values(const KeySource& v, int64_t start, int64_t begin, int64_t end, const State& state) {
    using F32 = Elem<DType::f32>;
    const bool whole = dim == p.head_dim && !p.v.scale_per_token;
    if (whole && item.rows <= kFewRows) {
      for_runs(v, begin, end, [&](const char* row, const float*, int64_t key, int64_t n) {
        columns<E, kFewRows>({row - (key - start) * p.v.token * E::size, p.v.token}, start, key,
                             key + n, state);
        for (int64_t r = 0; r < item.rows; ++r) mem.keep[r] = 1.0f;
      });
    } else if (whole && E::size == 4 && one_page(v, begin, end)) {
      columns<F32, kBlockRows>(rows_in_place(v, start, begin), start, begin, end, state);
    } else {
      convert_tile<E>(v, start, begin, end, mem.keys);
      columns<F32, kBlockRows>({(const char*)mem.keys, dim}, start, begin, end, state);
    }
  }

  template <class E, int MAX>
  void columns(const TileRows& v, int64_t start, int64_t begin, int64_t end, const State& state) {
    constexpr int step = kBlockVectors * kLanes;
    int64_t column = 0;
    for (; column + step <= dim; column += step)
      column_block<kBlockVectors, E, MAX>(v, start, begin, end, column, state);
    for (; column < dim; column += kLanes)
      column_block<1, E, MAX>(v, start, begin, end, column, state);
  }

  template <int NV, class E, int MAX>
  void column_block(const TileRows& v, int64_t start, int64_t begin, int64_t end, int64_t column,
                    const State& state) {
    for (int64_t row = 0; row < item.rows; row += kBlockRows) {
      int64_t low, high;
      if (!block_range(start, row, low, high)) continue;
      low = low > begin - start ? low : begin - start;
      high = high < end - start ? high : end - start;
      product_rows<NV, E, MAX>(block_rows(row), mem.scores + row * kTile, kTile,
                               v.rows + column * E::size, v.stride, low, high,
                               state.out + row * dim + column, dim, mem.keep + row);
    }
  }

  int block_rows(int64_t row) const {
    return item.rows - row < kBlockRows ? (int)(item.rows - row) : kBlockRows;
  }
  // Visible part of the tile for a block of rows, as offsets; limits grow with the row.
  bool block_range(int64_t start, int64_t row, int64_t& begin, int64_t& end) const {
    begin = clamp(mem.low[row] - start, 0, kTile);
    end = clamp(mem.high[row + block_rows(row) - 1] - start, 0, kTile);
    return begin < end;
  }

  void scores(int64_t start, int64_t row, const State& state) {
    int64_t begin, end;
    if (!block_range(start, row, begin, end)) return;
    const int rows = block_rows(row);
    for (int64_t key = begin / (kBlockVectors * kLanes) * (kBlockVectors * kLanes); key < end;
         key += kBlockVectors * kLanes)
      product_rows<kBlockVectors, Elem<DType::f32>>(rows, mem.q + row * dim, dim, mem.keys_t + key,
                                                    kTile, 0, p.head_dim,
                                                    mem.scores + row * kTile + key, kTile, nullptr);
    for (int64_t r = row; r < row + rows; ++r) {
      const ScoreMap map{p.softcap * kLog2e, mem.slope[r], (float)(mem.position[r] - start),
                         (float)clamp(mem.low[r] - start, 0, kTile),
                         (float)clamp(mem.high[r] - start, 0, kTile)};
      mem.keep[r] = softmax_row(mem.scores + r * kTile, map, state.max[r], state.sum[r]);
    }
  }

  void chunk(int64_t begin, int64_t end, const State& state) {
    for (int64_t r = 0; r < item.rows; ++r) state.max[r] = -kInf, state.sum[r] = 0;
    __builtin_memset(state.out, 0, item.rows * dim * 4);
    for (int64_t start = begin / kTile * kTile; start < end; start += kTile)
      tile(start, start > begin ? start : begin, start + kTile < end ? start + kTile : end, state);
  }

  void run() {
    find_visible();
    State state{mem.max[0], mem.sum[0], mem.out[0]};
    const State next{mem.max[1], mem.sum[1], mem.out[1]};
    if (item.partial >= 0) {
      state.max = p.partials + item.partial;
      state.sum = state.max + item.rows;
      state.out = state.sum + item.rows;
    }
    int64_t begin = mem.low[0], end = mem.high[item.rows - 1];
    begin = begin > item.key_begin ? begin : item.key_begin;
    end = end < item.key_end ? end : item.key_end;
    if (begin < end) with_float(p.dtype, [&](auto e) { load_queries<decltype(e)>(); });
    int64_t stop = begin / kChunk * kChunk + kChunk;
    chunk(begin, stop < end ? stop : end, state);
    for (; stop < end; stop += kChunk) {
      chunk(stop, stop + kChunk < end ? stop + kChunk : end, next);
      merge_states(item.rows, dim, state, next);
    }
    if (item.partial < 0) finish(state);
  }
};

}  // namespace

void attention(const AttentionParams& p, int64_t index) {
  const AttentionItem& item = p.items[index];
  Scratch mem;
  Worker{{p, item, p.sequences[item.sequence]}, mem}.run();
}

void attention_merge(const AttentionParams& p, const AttentionMerge& merge) {
  const int64_t dim = padded_dim(p.head_dim);
  const AttentionItem& first = p.items[merge.first];
  auto state = [&](int64_t i) {
    float* x = p.partials + p.items[i].partial;
    return State{x, x + first.rows, x + 2 * first.rows};
  };
  for (int64_t i = 1; i < merge.count; ++i)
    merge_states(first.rows, dim, state(merge.first), state(merge.first + i));
  Rows{p, first, p.sequences[first.sequence]}.finish(state(merge.first));
}

}  // namespace fastinfer::cpu::FI_ISA
