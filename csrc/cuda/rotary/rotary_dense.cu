// The form of rotary.cu for the tensors that models have: 16-bit elements, whole heads rotated,
// heads next to each other, everything aligned, a power of two of packs per head, tokens in one
// stride, and caches of one layout. There is less to decide per thread, and less code in front of
// its first load.
//
// As in rotary.cu a head belongs to `lanes` neighbouring lanes with two packs of 16 bytes each, and
// heads are numbered q, k, v within a token; each thread has one head, or (much work) two, with a
// cache three, which share cos and sin. With three, every thread of a 32 / 8 model has two heads of
// q and one of k or v, so that all have the same to do.
#include "../common/prefetch.cuh"
#include "rotary_dense.cuh"
#include "rotary_few.cuh"

namespace fastinfer::cuda {
namespace {

// Tokens between the one of a block and the one whose rows it asks for, per SM.
constexpr int kAheadPerSm = 3;

constexpr int kCachedHeads = 3, kCachedThreads = 128;

// kHeads: of a thread, at most. V: what it loads and stores at a time. kCodes: the cache holds
// codes.
template <class E, class A, class V, int kHeads, bool kCodes = false>
__global__ void __launch_bounds__(kRotaryThreads, A::kCached ? 3 : 4)
    rotary_dense_kernel(const __grid_constant__ A a) {
  constexpr int kSize = Part<E, V>::kSize;
  const int lanes = 1 << a.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int group = (blockIdx.y * blockDim.x + threadIdx.x) >> a.lane_bits;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int dim = 2 * kSize * lanes, heads = a.q_heads + (A::kCached ? 2 : 1) * a.k_heads;
  const int at_first = a.interleaved ? 2 * lane * kSize : lane * kSize;
  const int at_second = a.interleaved ? at_first + kSize : at_first + dim / 2;
  const bool live = t < a.tokens && group < a.groups;
  grid_launch_dependents();
  grid_wait();
  int64_t position = t, slot = -1;
  if (a.positions && live)
    position = index_of(a.positions, a.wide_positions, t * a.position_stride);
  if constexpr (A::kCached) {
    if (live) slot = index_of(a.slots, a.wide_slots, t * a.slot_stride);
  }

  Part<E, V> part[kHeads] = {};
  int head[kHeads], which[kHeads];  // 0, 1, 2: q, k, v; 3: none
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    const int h = group + j * a.groups;
    head[j] = h, which[j] = 0;
    const E* from = static_cast<const E*>(a.q) + t * a.q_token;
    if (h >= a.q_heads) {
      head[j] = h - a.q_heads, which[j] = 1;
      from = static_cast<const E*>(a.k) + t * a.k_token;
      if constexpr (A::kCached) {
        if (head[j] >= a.k_heads) {
          head[j] -= a.k_heads, which[j] = 2;
          from = static_cast<const E*>(a.v) + t * a.v_token;
        }
      }
    }
    if (!live || h >= heads) which[j] = 3;
    if (which[j] == 3) continue;
    from += head[j] * dim;
    part[j].first = *reinterpret_cast<const V*>(from + at_first);
    part[j].second = *reinterpret_cast<const V*>(from + at_second);
  }
  int64_t later = -1;          // position of a token whose rows of cos and sin are asked for
  if constexpr (A::kCached) {  // behind the block's own loads
    const int64_t token = t + a.ahead;
    if (blockIdx.y == 0 && token < a.tokens) {
      if (threadIdx.x == 0) {
        const uint32_t head = dim * sizeof(E);
        prefetch_l2(static_cast<const E*>(a.q) + token * a.q_token, a.q_heads * head);
        prefetch_l2(static_cast<const E*>(a.k) + token * a.k_token, a.k_heads * head);
        prefetch_l2(static_cast<const E*>(a.v) + token * a.v_token, a.k_heads * head);
      }
      if (threadIdx.x == blockDim.x - 1 && a.positions)
        later = index_of(a.positions, a.wide_positions, token * a.position_stride);
    }
  }
  float c[kSize], sine[kSize];
  if (which[0] < 2) {  // the first head of a thread is the one of the lower number
    const int64_t row = position * a.table_stride;
    load_table<E>(c, a.cos, a.table_is_float, row, lane * kSize);
    load_table<E>(sine, a.sin, a.table_is_float, row, lane * kSize);
  }
#pragma unroll
  for (int j = 0; j < kHeads; ++j) {
    if (which[j] < 2) {
      part[j].rotate_by(c, sine, a.interleaved);
      E* to = a.template target<E>(which[j], t) + head[j] * dim;
      *reinterpret_cast<V*>(to + at_first) = part[j].first;
      *reinterpret_cast<V*>(to + at_second) = part[j].second;
    }
  }
  if constexpr (A::kCached) {
    if (later >= 0) {
      const uint32_t size = a.table_is_float ? 4 : 2;
      const int64_t at = later * a.table_stride * size;
      prefetch_l2(static_cast<const char*>(a.cos) + at, dim / 2 * size);
      prefetch_l2(static_cast<const char*>(a.sin) + at, dim / 2 * size);
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      const Target target = target_of<E, kCodes>(a, which[j], slot, head[j], dim);
      cache_head<kCodes>(a, target, part[j], at_first, at_second, lane);
    }
  }
}

// ---- host
constexpr int64_t kMaxInt = INT32_MAX;

// Of a power of two, or of the next one.
int log2_of(int64_t n) {
  int log2 = 0;
  while (int64_t{1} << log2 < n) ++log2;
  return log2;
}

bool small(std::initializer_list<int64_t> values) {
  for (const int64_t v : values)
    if (v < 0 || v > kMaxInt) return false;
  return true;
}

// Tokens of all batches in one stride, heads next to each other?
bool one_stride(const cpu::RotaryTensor& t, const cpu::RotaryParams& p, int64_t tokens) {
  const bool folds =
      tokens <= p.seq || (t.in_batch == p.seq * t.in_token && t.out_batch == p.seq * t.out_token);
  return folds && (t.heads == 1 || (t.in_head == p.dim && t.out_head == p.dim)) &&
         t.heads <= UINT16_MAX;
}

template <class A>
void fill(A& a, const cpu::RotaryParams& p, int64_t tokens, int lane_bits, int groups) {
  a.cos = p.cos, a.sin = p.sin, a.positions = p.positions;
  a.q = p.q.in, a.k = p.k.in;
  a.q_token = p.q.in_token, a.k_token = p.k.in_token;
  a.tokens = static_cast<int32_t>(tokens), a.groups = groups;
  a.position_stride = static_cast<int32_t>(p.position_token);
  a.table_stride = static_cast<int32_t>(p.cos_stride);
  a.q_heads = static_cast<uint16_t>(p.q.heads), a.k_heads = static_cast<uint16_t>(p.k.heads);
  a.lane_bits = static_cast<uint8_t>(lane_bits);
  a.interleaved = p.interleaved, a.table_is_float = p.table_dtype == DType::f32;
  a.wide_positions = p.position_dtype == DType::i64;
}

// Caches and scales of one layout for both sides?
bool one_layout(const cpu::CacheWriteParams& w) {
  const cpu::CacheSide &k = w.key, &v = w.value;
  const cpu::ScaleView &a = k.scale, &b = v.scale;
  return k.block_stride == v.block_stride && k.position_stride == v.position_stride &&
         k.head_stride == v.head_stride && (w.heads == 1 || k.head_stride == w.dim) &&
         a.dynamic == b.dynamic && a.block == b.block && a.position == b.position &&
         a.head == b.head && a.block == a.position * w.block_size &&
         small({k.position_stride, w.block_size, a.position, a.head, w.slot_stride});
}

template <class E>
bool run(const cpu::RotaryParams& p, const cpu::CacheWriteParams* write, int64_t tokens,
         const RotaryFit& fit, void* stream, int& error) {
  constexpr int kSize = Pack<E>::kSize;
  int64_t lanes = p.half / kSize;
  if (!fit.packs || !fit.table_packs || p.dim != 2 * p.half || lanes > 32 ||
      (lanes & (lanes - 1)) != 0)
    return false;
  const bool batched = tokens > p.seq;
  if (batched && (!p.positions || p.position_batch != p.seq * p.position_token)) return false;
  if (!one_stride(p.q, p, tokens) || (p.k.in && !one_stride(p.k, p, tokens)) ||
      p.cos_stride != p.sin_stride || !small({tokens, p.cos_stride, p.position_token}))
    return false;
  const int64_t heads = p.q.heads + p.k.heads + (write ? write->heads : 0);
  const int sms = device_facts().sms;
  RotaryLayout layout = write ? rotary_layout(tokens, heads, static_cast<int>(lanes), sms,
                                              kCachedHeads, kCachedThreads)
                              : rotary_layout(tokens, heads, static_cast<int>(lanes), sms);
  const bool few = !write && layout.groups == heads && lanes <= 16;
  if (few) {  // twice the lanes, each with half as much
    lanes *= 2;
    layout = rotary_layout(1, heads, static_cast<int>(lanes), sms);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, layout.tokens)),
                  static_cast<unsigned>(layout.parts));
  const dim3 block(layout.width, layout.tokens);
  if (!write) {
    DenseRotary a{};
    fill(a, p, tokens, log2_of(lanes), layout.groups);
    a.q_out = p.q.out, a.k_out = p.k.out;
    a.q_out_token = p.q.out_token, a.k_out_token = p.k.out_token;
    error = launch(few ? rotary_dense_kernel<E, DenseRotary, uint2, 1>
                       : rotary_dense_kernel<E, DenseRotary, uint4, kRotaryHeads>,
                   grid, block, 0, stream, a);
    return true;
  }
  const cpu::CacheSide& v = write->value;
  if (!fit.cache_packs || !one_layout(*write) || p.q.in != p.q.out || p.k.in != p.k.out ||
      p.q.in_token != p.q.out_token || p.k.in_token != p.k.out_token ||
      (write->heads > 1 && v.token_head_stride != p.dim))
    return false;
  DenseRotaryCache a{};
  fill(a, p, tokens, log2_of(lanes), layout.groups);
  a.v = v.tokens, a.v_token = v.token_stride;
  a.slots = write->slots, a.slot_stride = static_cast<int32_t>(write->slot_stride);
  a.wide_slots = write->slot_dtype == DType::i64;
  a.key_cache = static_cast<char*>(write->key.cache), a.value_cache = static_cast<char*>(v.cache);
  a.k_scale = write->key.scale.data, a.v_scale = v.scale.data;
  a.block_stride = v.block_stride;
  a.block_size = static_cast<int32_t>(write->block_size);
  a.cache_position = static_cast<int32_t>(v.position_stride);
  a.scale_slot = static_cast<int32_t>(v.scale.position);
  a.scale_head = static_cast<int32_t>(v.scale.head);
  a.codes = v.scale.data != nullptr, a.fp8 = write->cache_dtype == DType::f8e4m3;
  a.soft = fit.soft, a.dynamic = v.scale.dynamic;
  a.ahead = kAheadPerSm * sms;
  a.block_shift = static_cast<int8_t>(
      (write->block_size & (write->block_size - 1)) == 0 ? log2_of(write->block_size) : -1);
  const int64_t few_lanes = p.half / 2, few_threads = heads * few_lanes;
  if (few_lanes <= 32 && tokens * few_threads <= int64_t{kFewPerSm} * sms) {
    a.lane_bits = static_cast<uint8_t>(log2_of(few_lanes));
    const dim3 few_grid(static_cast<unsigned>(tokens),
                        static_cast<unsigned>(ceil_div(few_threads, kFewThreads)));
    error = launch(rotary_few_kernel<E>, few_grid, kFewThreads, 0, stream, a);
    return true;
  }
  error = launch(a.codes ? rotary_dense_kernel<E, DenseRotaryCache, uint4, kCachedHeads, true>
                         : rotary_dense_kernel<E, DenseRotaryCache, uint4, kCachedHeads>,
                 grid, block, 0, stream, a);
  return true;
}

}  // namespace

bool rotary_dense(const cpu::RotaryParams& p, const cpu::CacheWriteParams* write, int64_t tokens,
                  const RotaryFit& fit, void* stream, int& error) {
  if (p.dtype == DType::f16) return run<__half>(p, write, tokens, fit, stream, error);
  if (p.dtype == DType::bf16) return run<__nv_bfloat16>(p, write, tokens, fit, stream, error);
  return false;
}

}  // namespace fastinfer::cuda
