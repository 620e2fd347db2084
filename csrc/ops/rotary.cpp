// apply_rotary, apply_rotary_inplace, apply_rotary_and_cache: checks, then tokens in parallel.
//
//   q [T, Hq, D] or [B, S, Hq, D], k likewise with Hkv heads: any outer strides
//   cos, sin [max_pos, rotary_dim / 2], fp32 or q's dtype; rotary_dim <= D
//   positions [T] or [B, S], int32 or int64; absent: 0 .. S - 1 (T - 1)
//
// apply_rotary_and_cache takes packed tokens and runs, range of tokens by range, exactly the
// rotation in place and the cache write of reshape_and_cache.
#include "../cpu/rotary.h"

#ifdef FASTINFER_WITH_CUDA
#include "../cuda/rotary/rotary.h"
#include "cuda_shim.h"
#endif
#include "common.h"
#include "kv_cache.h"
#include "same_call.h"

namespace fastinfer {
namespace {

using cpu::RotaryParams;
using cpu::RotaryTensor;

RotaryTensor view(const Tensor& in, const Tensor& out) {
  const int64_t n = in.dim();  // 3 or 4
  return {in.const_data_ptr(), out.mutable_data_ptr(), n == 4 ? in.stride(0) : 0,
          in.stride(n - 3),    in.stride(n - 2),       n == 4 ? out.stride(0) : 0,
          out.stride(n - 3),   out.stride(n - 2),      in.size(n - 2)};
}

void check_out(const char* op, const char* arg, const Tensor& out, const char* like_arg,
               const Tensor& like) {
  check_same_dtype(op, arg, out, like_arg, like);
  FI_CHECK(out.sizes() == like.sizes(), op, ": ", arg, " must have the shape of ", like_arg, " (",
           shape_of(like), "), got ", describe(out));
  check_written(op, arg, out);
}

// q_out, k_out: where the result goes; q and k themselves for the in-place forms.
RotaryParams params(const char* op, const Tensor& q, const Tensor* k, const Tensor& cos,
                    const Tensor& sin, const Tensor* positions, bool interleaved,
                    const Tensor& q_out, const Tensor* k_out) {
  check_dtype(op, "q", q, {DType::f32, DType::f16, DType::bf16});
  const int64_t n = q.dim();
  FI_CHECK(n == 3 || n == 4, op, ": q must have shape [T, Hq, D] or [B, S, Hq, D], got ",
           describe(q));
  check_last_dim(op, "q", q);
  check_device(op, q,
               {{"k", k},
                {"cos", &cos},
                {"sin", &sin},
                {"positions", positions},
                {"q_out", &q_out},
                {"k_out", k_out}});
  const int64_t dim = q.size(n - 1), batch = n == 4 ? q.size(0) : 1, seq = q.size(n - 3);
  if (k) {
    check_same_dtype(op, "k", *k, "q", q);
    if (n == 4) {
      check_shape(op, "k", *k, {batch, seq, -1, dim});
    } else {
      check_shape(op, "k", *k, {seq, -1, dim});
    }
    check_last_dim(op, "k", *k);
  }
  FI_CHECK((k == nullptr) == (k_out == nullptr), op, ": k_out must be given exactly when k is");
  check_out(op, "q_out", q_out, "q", q);
  if (k) check_out(op, "k_out", *k_out, "k", *k);
  check_dtype(op, "cos", cos, {DType::f32, dtype_of(q)});
  check_dim(op, "cos", cos, 2);
  FI_CHECK(2 * cos.size(1) <= dim, op,
           ": cos must have shape [max_pos, rotary_dim / 2] with rotary_dim <= ", dim,
           " (the head dimension), got ", describe(cos));
  check_same_dtype(op, "sin", sin, "cos", cos);
  check_shape(op, "sin", sin, {cos.size(0), cos.size(1)});
  check_last_dim(op, "cos", cos);
  check_last_dim(op, "sin", sin);
  RotaryParams p{};
  if (positions) {
    if (n == 4) {
      check_index(op, "positions", *positions, {batch, seq});
    } else {
      check_index(op, "positions", *positions, {seq});
    }
    p.positions = positions->const_data_ptr();
    p.position_dtype = dtype_of(*positions);
    p.position_batch = n == 4 ? positions->stride(0) : 0;
    p.position_token = positions->stride(n - 3);
  } else {
    FI_CHECK(seq <= cos.size(0), op, ": cos must hold a row for each of the ", seq,
             " positions, got ", describe(cos), "; build a longer table or pass positions");
  }
  p.q = view(q, q_out);
  if (k) p.k = view(*k, *k_out);
  p.cos = cos.const_data_ptr(), p.sin = sin.const_data_ptr();
  p.cos_stride = cos.stride(0), p.sin_stride = sin.stride(0);
  p.dtype = dtype_of(q), p.table_dtype = dtype_of(cos);
  p.seq = seq, p.dim = dim, p.half = cos.size(1);
  p.interleaved = interleaved;
  return p;
}

// CPU: a position outside the table would read past it.
void check_positions(const char* op, const RotaryParams& p, int64_t batch, int64_t max_pos) {
  if (!p.positions) return;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t s = 0; s < p.seq; ++s) {
      const int64_t position =
          index_at(p.positions, p.position_dtype, b * p.position_batch + s * p.position_token);
      FI_CHECK(position >= 0 && position < max_pos, op, ": positions must be from 0 to ",
               max_pos - 1, " (rows of cos), got ", position, " at index ", b * p.seq + s,
               "; build longer cos and sin tables");
    }
}

// CUDA: only with FASTINFER_VALIDATE=1, on a copy.
void check_positions_on_device([[maybe_unused]] const char* op,
                               [[maybe_unused]] const RotaryParams& p,
                               [[maybe_unused]] const Tensor* positions,
                               [[maybe_unused]] int64_t batch, [[maybe_unused]] int64_t max_pos) {
#ifdef FASTINFER_WITH_CUDA
  if (!positions) return;
  const CudaLaunch device(*positions);
  const HostCopy host(op, "positions", *positions, device.stream());
  RotaryParams copied = p;
  copied.positions = host.data();
  check_positions(op, copied, batch, max_pos);
#endif
}

int64_t token_cost(const RotaryParams& p) { return (p.q.heads + p.k.heads) * p.dim * 4; }

void run(const char* op, const RotaryParams& p, const Tensor& q, const Tensor* k, const Tensor& cos,
         const Tensor* positions) {
  if (q.numel() == 0 && (!k || k->numel() == 0)) return;
  const int64_t batch = q.dim() == 4 ? q.size(0) : 1;
  if (!q.is_cpu()) {
    if (validate_data()) check_positions_on_device(op, p, positions, batch, cos.size(0));
    FI_CUDA(op, q, cuda::rotary(p, nullptr, batch * p.seq, stream));
    return;
  }
  check_positions(op, p, batch, cos.size(0));
  torch::stable::parallel_for(0, batch * p.seq, grain(token_cost(p)),
                              [&](int64_t begin, int64_t end) { FI_PICK(rotary)(p, begin, end); });
}

void apply_rotary(const Tensor& q, const OptTensor& k, const Tensor& cos, const Tensor& sin,
                  const OptTensor& positions, bool interleaved, const Tensor& q_out,
                  const OptTensor& k_out) {
  const char* op = "apply_rotary";
  const RotaryParams p =  // checks cos before its size is asked for
      params(op, q, ptr(k), cos, sin, ptr(positions), interleaved, q_out, ptr(k_out));
  run(op, p, q, ptr(k), cos, ptr(positions));
}

void apply_rotary_inplace(const Tensor& q, const OptTensor& k, const Tensor& cos, const Tensor& sin,
                          const OptTensor& positions, bool interleaved) {
  const char* op = "apply_rotary";
  const RotaryParams p = params(op, q, ptr(k), cos, sin, ptr(positions), interleaved, q, ptr(k));
  run(op, p, q, ptr(k), cos, ptr(positions));
}

void apply_rotary_and_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                            const Tensor& sin, const Tensor& positions, const Tensor& key_cache,
                            const Tensor& value_cache, const Tensor& slot_mapping, bool interleaved,
                            const OptTensor& k_scale, const OptTensor& v_scale) {
  const char* op = "apply_rotary_and_cache";
  struct Checked {
    CallShape<11> call;
    RotaryParams rotary;
    cpu::CacheWriteParams write;
  };
  static thread_local Checked last;  // zeros at first
  CallShape<11> call;
  const bool known =
      call.read(interleaved, {&q, &k, &v, &cos, &sin, &positions, &key_cache, &value_cache,
                              &slot_mapping, ptr(k_scale), ptr(v_scale)}) &&
      call == last.call;
  if (!known) {
    last.call.count = 0;
    check_dim(op, "q", q, 3);
    last.rotary = params(op, q, &k, cos, sin, &positions, interleaved, q, &k);
    last.write = cache_write_params(op, "k", "v", k, v, key_cache, value_cache, slot_mapping,
                                    k_scale, v_scale);
    last.call = call;
  }
  RotaryParams rotary = last.rotary;
  cpu::CacheWriteParams write = last.write;
  if (known) {
    rotary.q.in = rotary.q.out = q.mutable_data_ptr();
    rotary.k.in = rotary.k.out = k.mutable_data_ptr();
    rotary.cos = cos.const_data_ptr(), rotary.sin = sin.const_data_ptr();
    rotary.positions = positions.const_data_ptr();
    set_addresses(write, rotary.k.in, v, key_cache, value_cache, slot_mapping, k_scale, v_scale);
  }
  if (rotary.seq * rotary.dim * (rotary.q.heads + rotary.k.heads) == 0) return;
  const int64_t num_slots = key_cache.size(0) * key_cache.size(1);
  if (!q.is_cpu()) {
    if (validate_data()) {
      check_positions_on_device(op, rotary, &positions, 1, cos.size(0));
      check_slots_on_device(op, write, rotary.seq, num_slots, slot_mapping, k_scale, v_scale);
    }
    FI_CUDA(op, q, cuda::rotary(rotary, &write, rotary.seq, stream));
    return;
  }
  check_positions(op, rotary, 1, cos.size(0));
  check_slots(op, write, rotary.seq, num_slots);
  torch::stable::parallel_for(0, rotary.seq, grain(2 * token_cost(rotary)),
                              [&](int64_t begin, int64_t end) {
                                FI_PICK(rotary)(rotary, begin, end);
                                FI_PICK(write_cache)(write, begin, end);
                              });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("apply_rotary", TORCH_BOX(&apply_rotary));
  m.impl("apply_rotary_inplace", TORCH_BOX(&apply_rotary_inplace));
  m.impl("apply_rotary_and_cache", TORCH_BOX(&apply_rotary_and_cache));
})

}  // namespace fastinfer
