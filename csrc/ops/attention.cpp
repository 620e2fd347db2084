// Shared host side of the attention operators; see attention.h.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>

namespace fastinfer::attention {

using cpu::AttentionItem;
using cpu::AttentionMerge;
using cpu::AttentionParams;
using cpu::AttentionSequence;
using cpu::KeyValue;

void check_ints(const char* op, const char* arg, const Tensor& t, int64_t size,
                const Tensor& like) {
  check_dtype(op, arg, t, {DType::i32});
  check_shape(op, arg, t, {size});
  check_device(op, like, {{arg, &t}});
}

Ints ints(const Tensor& t) {
  return {static_cast<const int32_t*>(t.const_data_ptr()), t.dim() ? t.stride(0) : 0};
}

namespace {

KeyValue layout(const char* op, const char* name, const char* scale_name, const Tensor& t,
                const OptTensor& scale) {
  const int64_t n = t.dim(), heads = t.size(n - 2);
  KeyValue kv{t.const_data_ptr(),
              nullptr,
              n == 4 ? t.stride(0) : 0,
              t.stride(n - 3),
              t.stride(n - 2),
              false,
              0,
              0,
              0};
  if (!scale) {
    FI_CHECK(!is_8bit(dtype_of(t)), op, ": ", scale_name, " must be given for ", name, " of ",
             dtype_name(t.scalar_type()), ", got None; pass an fp32 scalar, [", heads,
             "] (one per head) or the shape of ", name, " without its last dimension");
    return kv;
  }
  const Tensor& s = *scale;
  FI_CHECK(is_8bit(dtype_of(t)), op, ": ", scale_name, " is for torch.float8_e4m3fn or torch.int8 ",
           name, " only, got ", name, " ", describe(t), "; leave it out");
  check_dtype(op, scale_name, s, {DType::f32});
  check_device(op, t, {{scale_name, &s}});
  kv.scale = static_cast<const float*>(s.const_data_ptr());
  if (s.numel() == 1 && s.dim() <= 1) return kv;
  if (s.dim() == 1 && s.size(0) == heads) {
    kv.scale_head = s.stride(0);
    return kv;
  }
  bool like_tokens = s.dim() == n - 1;
  for (int64_t i = 0; like_tokens && i < n - 1; ++i) like_tokens = s.size(i) == t.size(i);
  FI_CHECK(like_tokens, op, ": ", scale_name, " must be a scalar, [", heads, "] (one per head) or ",
           "the shape of ", name, " without its last dimension, got ", describe(s), " for ", name,
           " ", shape_of(t));
  kv.scale_per_token = true;
  if (n == 4) kv.scale_page = s.stride(0);
  kv.scale_token = s.stride(n - 3);
  kv.scale_head = s.stride(n - 2);
  return kv;
}

}  // namespace

void setup(Call& call, const Tensor& q, const Tensor& k, const Tensor& v, const char* k_name,
           const char* v_name, const Tensor& out, const OptTensor& lse,
           std::initializer_list<int64_t> lse_shape, int64_t batch, const Features& f) {
  const char* op = call.op;
  AttentionParams& p = call.p;
  const int64_t n = q.dim();
  check_dtype(op, "q", q, {DType::f32, DType::f16, DType::bf16});
  p.heads_q = q.size(n - 2);
  p.head_dim = q.size(n - 1);
  FI_CHECK(p.head_dim >= 16 && p.head_dim <= cpu::kMaxHeadDim && p.head_dim % 8 == 0, op,
           ": head_dim must be a multiple of 8 from 16 to 256, got ", describe(q),
           "; pad q, k and v with zeros and pass softmax_scale");
  p.heads_kv = k.size(k.dim() - 2);
  FI_CHECK(p.heads_kv > 0 && p.heads_q > 0 && p.heads_q % p.heads_kv == 0, op,
           ": the number of heads of q must be a multiple of that of ", k_name, ", got ", p.heads_q,
           " and ", p.heads_kv);
  p.group = p.heads_q / p.heads_kv;
  FI_CHECK(k.size(k.dim() - 1) == p.head_dim, op, ": ", k_name, " must have the head_dim of q (",
           p.head_dim, "), got ", describe(k));
  FI_CHECK(v.sizes() == k.sizes(), op, ": ", v_name, " must have the shape of ", k_name, " (",
           shape_of(k), "), got ", describe(v));
  FI_CHECK(dtype_of(k) == dtype_of(q) || is_8bit(dtype_of(k)), op, ": ", k_name,
           " must have the dtype of q (", dtype_name(q.scalar_type()),
           ") or be torch.float8_e4m3fn or torch.int8, got ", describe(k),
           "; convert it with .to(dtype)");
  check_same_dtype(op, v_name, v, k_name, k);
  check_same_dtype(op, "out", out, "q", q);
  FI_CHECK(out.sizes() == q.sizes(), op, ": out must have the shape of q (", shape_of(q), "), got ",
           describe(out));
  check_last_dim(op, "q", q);
  check_last_dim(op, k_name, k);
  check_last_dim(op, v_name, v);
  check_written(op, "out", out);
  // Whoever writes rows of the output was the only one to read these of q.
  check_apart_or_same(op, "out", out, "q", q);
  check_apart(op, "out", out, {{k_name, &k}, {v_name, &v}});
  check_device(op, q,
               {{k_name, &k},
                {v_name, &v},
                {"out", &out},
                {"lse", ptr(lse)},
                {"alibi_slopes", ptr(f.alibi_slopes)},
                {"sinks", ptr(f.sinks)},
                {"k_scale", ptr(f.k_scale)},
                {"v_scale", ptr(f.v_scale)}});
  if (lse) {
    check_dtype(op, "lse", *lse, {DType::f32});
    check_shape(op, "lse", *lse, lse_shape);
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  p.q = q.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.dtype = dtype_of(q);
  p.kv_dtype = dtype_of(k);
  p.k = layout(op, k_name, "k_scale", k, f.k_scale);
  p.v = layout(op, v_name, "v_scale", v, f.v_scale);
  p.q_head = q.stride(n - 2);
  p.q_token = q.stride(n - 3);
  p.out_head = out.stride(n - 2);
  p.out_token = out.stride(n - 3);
  p.page_size = INT64_MAX;

  FI_CHECK(f.window_left >= -1 && f.window_right >= -1, op,
           ": window_size must be two integers >= -1 (-1: unlimited), got (", f.window_left, ", ",
           f.window_right, ")");
  // No sequence is longer than this; a bound keeps sums with positions from overflowing.
  constexpr int64_t kFar = int64_t{1} << 40;
  p.window_left = std::min(f.window_left, kFar);
  p.window_right = f.causal ? 0 : std::min(f.window_right, kFar);
  FI_CHECK(f.softcap >= 0, op, ": softcap must be >= 0 (0: off), got ", f.softcap);
  p.scale = static_cast<float>(f.softmax_scale);
  p.softcap = static_cast<float>(f.softcap);
  if (f.alibi_slopes) {
    const Tensor& a = *f.alibi_slopes;
    check_dtype(op, "alibi_slopes", a, {DType::f32});
    const bool per_batch = a.dim() == 2 && a.size(0) == batch && a.size(1) == p.heads_q;
    FI_CHECK(per_batch || (a.dim() == 1 && a.size(0) == p.heads_q), op,
             ": alibi_slopes must have shape [", p.heads_q, "] or [", batch, ", ", p.heads_q,
             "], got ", describe(a));
    p.alibi = static_cast<const float*>(a.const_data_ptr());
    p.alibi_batch = per_batch ? a.stride(0) : 0;
    p.alibi_head = a.stride(per_batch ? 1 : 0);
  }
  if (f.sinks) {
    check_dtype(op, "sinks", *f.sinks, {DType::f32, DType::f16, DType::bf16});
    check_shape(op, "sinks", *f.sinks, {p.heads_q});
    p.sinks = f.sinks->const_data_ptr();
    p.sinks_dtype = dtype_of(*f.sinks);
    p.sinks_stride = f.sinks->stride(0);
  }
}

int64_t check_block_table(const char* op, const Tensor& table, const Tensor& cache, int64_t batch) {
  check_dtype(op, "block_table", table, {DType::i32});
  check_shape(op, "block_table", table, {batch, -1});
  check_last_dim(op, "block_table", table);
  check_device(op, cache, {{"block_table", &table}});
  FI_CHECK(cache.size(1) > 0, op, ": a paged cache must have a block size of at least 1, got ",
           describe(cache));
  return table.size(1) * cache.size(1);
}

KeyRange visible_keys(const AttentionParams& p, const AttentionSequence& s, int64_t first_token,
                      int64_t last_token) {
  const int64_t shift = s.len_k - s.len_q;
  const int64_t low = p.window_left < 0 ? 0 : first_token + shift - p.window_left;
  const int64_t high = p.window_right < 0 ? s.len_k : last_token + shift + p.window_right + 1;
  const KeyRange r{std::max(low, s.first_key), std::min(high, s.len_k)};
  return r.begin < r.end ? r : KeyRange{0, 0};
}

void check_blocks(const char* op, const int32_t* pages, int64_t b, int64_t begin, int64_t end,
                  int64_t page_size, int64_t num_blocks) {
  if (begin >= end) return;
  for (int64_t i = begin / page_size; i <= (end - 1) / page_size; ++i)
    FI_CHECK(pages[i] >= 0 && pages[i] < num_blocks, op, ": block_table[", b, ", ", i,
             "] must be a block id below ", num_blocks, " (it is needed for keys ", begin, " to ",
             end - 1, "), got ", pages[i]);
}

void check_plan(const char* op, const OptTensor& plan, const Tensor& q, int64_t batch,
                int64_t heads_kv, int64_t q_len, int64_t append) {
  if (!plan) return;
  const Tensor& t = *plan;
  check_dtype(op, "plan", t, {DType::i32});
  check_shape(op, "plan", t, {8 + batch + 1});
  check_last_dim(op, "plan", t);
  check_device(op, q, {{"plan", &t}});
  if (!t.is_cpu()) return;
  check_plan_header(op, static_cast<const int32_t*>(t.const_data_ptr()), batch, heads_kv, q_len,
                    append);
}

void check_plan_header(const char* op, const int32_t* h, int64_t batch, int64_t heads_kv,
                       int64_t q_len, int64_t append) {
  FI_CHECK(h[0] == 1 && h[1] == batch && h[2] == heads_kv && h[3] == q_len && h[4] == append &&
               h[5] == cpu::kTile,
           op, ": plan must be made by plan_decode for batch ", batch, ", num_heads_kv ", heads_kv,
           ", q_len ", q_len, " and append ", append, ", got one for ", h[1], ", ", h[2], ", ",
           h[3], " and ", h[4]);
}

namespace {

// Small enough to keep every thread busy, large enough to share each converted key tile among many
// rows; a multiple of the kernel's row block. The bits do not depend on it.
int64_t rows_per_item(int64_t total_rows, int64_t threads) {
  const int64_t share = total_rows / (4 * threads) / 6 * 6;
  return std::clamp<int64_t>(share, 24, cpu::kMaxRows);
}

constexpr int64_t kRowsPerLoad = 8;

struct Schedule {
  std::vector<AttentionItem> items;
  std::vector<AttentionMerge> merges;
  int64_t partial_floats = 0;
  int64_t work = 0;  // multiply-adds of a row, fetching and transposing its keys counted as 8 more
};

// More than this is not worth splitting for: the items are then large and the keys very many.
constexpr int64_t kMaxPartialFloats = int64_t{1} << 26;

Schedule schedule(const Call& call, int64_t threads) {
  const AttentionParams& p = call.p;
  Schedule out;
  int64_t total_rows = 0, count = 0;
  std::vector<std::pair<int64_t, int64_t>> order;  // (work, sequence), longest first
  for (size_t i = 0; i < call.sequences.size(); ++i) {
    const AttentionSequence& s = call.sequences[i];
    if (s.len_q == 0) continue;
    total_rows += s.len_q * p.heads_q;
    order.emplace_back(-s.len_q * (s.len_k + cpu::kTile), static_cast<int64_t>(i));
  }
  std::sort(order.begin(), order.end());
  const int64_t limit = rows_per_item(total_rows, threads);
  auto pieces = [&](const AttentionSequence& s) { return (s.len_q * p.group + limit - 1) / limit; };
  for (const auto& o : order) count += pieces(call.sequences[o.second]) * p.heads_kv;
  const bool split = count < 2 * threads;
  for (const auto& o : order) {
    const AttentionSequence& s = call.sequences[o.second];
    const int64_t rows = s.len_q * p.group, n = pieces(s);
    const int64_t step = std::min(((rows + n - 1) / n + 5) / 6 * 6, limit);
    for (int64_t h = 0; h < p.heads_kv; ++h)
      for (int64_t row = (rows - 1) / step * step; row >= 0; row -= step) {
        AttentionItem item{static_cast<int32_t>(o.second),
                           static_cast<int32_t>(h),
                           row,
                           std::min(step, rows - row),
                           0,
                           0,
                           -1};
        const KeyRange keys = visible_keys(p, s, row / p.group, (row + item.rows - 1) / p.group);
        out.work += (item.rows + kRowsPerLoad) * (keys.end - keys.begin + cpu::kTile) * p.head_dim;
        const int64_t first = keys.begin / cpu::kChunk;
        const int64_t chunks = (keys.end + cpu::kChunk - 1) / cpu::kChunk - first;
        item.key_begin = keys.begin;
        item.key_end = keys.end;
        const int64_t floats = item.rows * (2 + cpu::padded_dim(p.head_dim));
        if (!split || chunks < 2 || out.partial_floats + chunks * floats > kMaxPartialFloats) {
          out.items.push_back(item);
          continue;
        }
        out.merges.push_back({static_cast<int64_t>(out.items.size()), chunks});
        for (int64_t c = 0; c < chunks; ++c) {
          item.key_begin = std::max(keys.begin, (first + c) * cpu::kChunk);
          item.key_end = std::min(keys.end, (first + c + 1) * cpu::kChunk);
          item.partial = out.partial_floats;
          out.partial_floats += floats;
          out.items.push_back(item);
        }
      }
  }
  return out;
}

// f(0) .. f(n - 1), each thread taking the next one: items differ in length.
template <class F>
void for_each(int64_t n, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(n, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
  });
}

}  // namespace

void run_cpu(Call& call) {
  AttentionParams& p = call.p;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const Schedule s = schedule(call, threads);
  const std::unique_ptr<float[]> partials(s.partial_floats ? new float[s.partial_floats] : nullptr);
  p.sequences = call.sequences.data();
  p.items = s.items.data();
  p.partials = partials.get();
  // A second thread pays from about 10 microseconds of work on.
  const int64_t useful = std::min<int64_t>(threads, 1 + s.work / 500000);
  for_each(static_cast<int64_t>(s.items.size()), useful,
           [&](int64_t i) { FI_PICK(attention)(p, i); });
  for_each(static_cast<int64_t>(s.merges.size()), useful,
           [&](int64_t i) { FI_PICK(attention_merge)(p, s.merges[i]); });
}

}  // namespace fastinfer::attention
