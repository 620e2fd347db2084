// int4_linear, int8_linear: checks, then on the CPU per block of kTokenBlock tokens: stage x as
// fp32 (act-order gather, padding, group sums) or int8, run the kernel over blocks of output
// channels.
#include "../cpu/linear.h"

#include <memory>

#include "linear_checks.h"
#include "linear_choice.h"

namespace fastinfer {

void check_perm_values(const char* op, const void* host, int64_t k) {
  const int32_t* p = static_cast<const int32_t*>(host);
  for (int64_t i = 0; i < k; ++i)
    FI_CHECK(p[i] >= 0 && p[i] < k, op, ": perm must hold column numbers in [0, ", k, "), got ",
             p[i], " at position ", i);
}

void check_perm(const char* op, const OptTensor& perm, int64_t k, bool values) {
  if (!perm) return;
  check_dtype(op, "perm", *perm, {DType::i32});
  check_shape(op, "perm", *perm, {k});
  check_contiguous(op, "perm", *perm);
  if (values && perm->is_cpu()) check_perm_values(op, perm->const_data_ptr(), k);
}

PackedLayout check_packed(const char* op, const Tensor& qweight, const Tensor& scales,
                          const OptTensor& zeros, int bits, int64_t group_size, int64_t n,
                          int64_t k) {
  check_bits(op, bits);
  check_group_size(op, group_size);
  check_dtype(op, "qweight", qweight, {DType::i32});
  check_dim(op, "qweight", qweight, 3);
  check_contiguous(op, "qweight", qweight);
  check_contiguous(op, "scales", scales);
  const PackedLayout layout{qweight.size(2) != 16, bits, n, k};
  const bool fits = qweight.size(0) == layout.blocks() && qweight.size(1) == layout.steps() &&
                    qweight.size(2) == layout.inner();
  FI_CHECK(fits, op, ": qweight must be ", bits, "-bit weights packed for ", n, " x ", k,
           " (out_features x in_features), [", layout.blocks(), ", ", layout.steps(), ", ",
           layout.inner(), "], got ", describe(qweight), "; make it with pack_weight(bits=", bits,
           ")");
  const int64_t groups = div_up(k, group_columns(group_size, k));
  const auto shape = [&](const char* arg, const Tensor& t) {
    if (layout.cuda)
      check_shape(op, arg, t, {groups, layout.blocks(), 8, 8});
    else
      check_shape(op, arg, t, {groups, layout.n_pad()});
    check_contiguous(op, arg, t);
  };
  shape("scales", scales);
  if (zeros) shape("zeros", *zeros);
  if (layout.cuda) {
    check_dtype(op, "scales", scales, {DType::f32, DType::f16, DType::bf16});
    if (zeros) check_dtype(op, "zeros", *zeros, {DType::u8, DType::f32, DType::f16, DType::bf16});
  } else {
    check_dtype(op, "scales", scales, {DType::f32});
    if (zeros) check_dtype(op, "zeros", *zeros, {DType::u8, DType::f32});
  }
  return layout;
}

namespace {

// Staged activations of one block stay in the second-level cache while all channels pass by.
constexpr int64_t kTokenBlock = 64;

// FASTINFER_CPU_INT8_ACTIVATIONS=1: quantise x to int8 too, read at every call.
bool int8_activations() {
  const char* v = std::getenv("FASTINFER_CPU_INT8_ACTIVATIONS");
  return v && v[0] == '1';
}

// What both CPU paths know about a call.
struct Call {
  const Tensor &x, &qweight, &scales;
  const OptTensor &zeros, &bias, &perm;
  const Tensor& out;
  const PackedLayout& layout;
  int64_t columns, groups;  // per group, of groups

  int64_t block_tokens(int64_t m0) const {
    const int64_t left = x.size(0) - m0;
    return left < kTokenBlock ? left : kTokenBlock;
  }
  bool float_zeros() const { return zeros && dtype_of(*zeros) != DType::u8; }
  const char* row(int64_t m) const {
    return static_cast<const char*>(x.const_data_ptr()) +
           m * row_stride(x) * dtype_size(dtype_of(x));
  }
  const int32_t* permutation() const { return static_cast<const int32_t*>(data(perm)); }

  cpu::PackedParams params(int64_t m0, const float* staged, const float* sums) const {
    return {
        staged,
        sums,
        static_cast<const uint32_t*>(qweight.const_data_ptr()),
        static_cast<const float*>(scales.const_data_ptr()),
        float_zeros() ? nullptr : static_cast<const uint8_t*>(data(zeros)),
        float_zeros() ? static_cast<const float*>(data(zeros)) : nullptr,
        layout.bits,
        block_tokens(m0),
        layout.n,
        layout.n_pad(),
        layout.steps(),
        layout.k_pad(),
        div_up(columns, layout.per_word()) * layout.per_word(),
        groups,
        {static_cast<char*>(out.mutable_data_ptr()) +
             m0 * row_stride(out) * dtype_size(dtype_of(out)),
         row_stride(out), dtype_of(out), data(bias)},
    };
  }
};

void run_cpu(const Call& c) {
  const int64_t m = c.x.size(0), k = c.layout.k, k_pad = c.layout.k_pad();
  const int64_t most = c.block_tokens(0), room = (most + cpu::kTokenTile) * k_pad;
  const std::unique_ptr<float[]> staged(new float[room + (c.float_zeros() ? most * c.groups : 0)]);
  float* sums = c.float_zeros() ? staged.get() + room : nullptr;
  for (int64_t m0 = 0; m0 < m; m0 += kTokenBlock) {
    const int64_t tokens = c.block_tokens(m0);
    const cpu::StageParams stage{
        c.row(m0),       row_stride(c.x), dtype_of(c.x), tokens,    k,        k_pad,
        c.permutation(), staged.get(),    sums,          c.columns, c.groups,
    };
    torch::stable::parallel_for(
        0, div_up(tokens, cpu::kTokenTile), grain(k * cpu::kTokenTile),
        [&](int64_t begin, int64_t end) { FI_PICK(linear_stage)(stage, begin, end); });
    const cpu::PackedParams p = c.params(m0, staged.get(), sums);
    torch::stable::parallel_for(
        0, div_up(c.layout.n, cpu::kPackedBlock), grain(tokens * k * cpu::kPackedBlock / 8),
        [&](int64_t begin, int64_t end) { FI_PICK(linear_packed)(p, begin, end); });
  }
}

void run_cpu_int8(const Call& c) {
  const int64_t m = c.x.size(0), k = c.layout.k, k_pad = c.layout.k_pad();
  const int64_t most = c.block_tokens(0), room = (most + cpu::kTokenTile) * k_pad;
  const int64_t runs = c.groups * div_up(c.columns, cpu::kRunInt8);
  const std::unique_ptr<float[]> floats(new float[most * (runs + (c.perm ? k : 0))]);
  const std::unique_ptr<int32_t[]> sums(new int32_t[most * runs]);
  const std::unique_ptr<int8_t[]> bytes(new int8_t[room + most * k_pad]);
  for (int64_t m0 = 0; m0 < m; m0 += kTokenBlock) {
    const int64_t tokens = c.block_tokens(m0);
    const cpu::StageInt8Params stage{
        c.row(m0),
        row_stride(c.x),
        dtype_of(c.x),
        tokens,
        k,
        k_pad,
        c.permutation(),
        c.layout.bits,
        c.columns,
        c.groups,
        runs,
        floats.get() + most * runs,
        bytes.get() + room,
        bytes.get(),
        floats.get(),
        sums.get(),
    };
    torch::stable::parallel_for(
        0, div_up(tokens, cpu::kTokenTile), grain(k * cpu::kTokenTile),
        [&](int64_t begin, int64_t end) { FI_PICK(linear_stage_int8)(stage, begin, end); });
    const cpu::PackedInt8Params p{c.params(m0, nullptr, nullptr), bytes.get(), floats.get(),
                                  sums.get(), runs};
    torch::stable::parallel_for(
        0, div_up(c.layout.n, cpu::kPackedBlock), grain(tokens * k * cpu::kPackedBlock / 16),
        [&](int64_t begin, int64_t end) { FI_PICK_VNNI(linear_packed_int8)(p, begin, end); });
  }
}

void packed_linear(const char* op, int bits, const Tensor& x, const Tensor& qweight,
                   const Tensor& scales, const OptTensor& zeros, const OptTensor& bias,
                   int64_t group_size, const OptTensor& perm, bool batch_invariant,
                   const Tensor& out, const OptTensor& workspace) {
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  check_dim(op, "x", x, 2);
  check_last_dim(op, "x", x);
  check_dim(op, "out", out, 2);
  const int64_t m = x.size(0), k = x.size(1), n = out.size(1);
  const PackedLayout layout = check_packed(op, qweight, scales, zeros, bits, group_size, n, k);
  check_same_dtype(op, "out", out, "x", x);
  check_out(op, out, m, n);
  check_bias(op, bias, out, n);
  check_perm(op, perm, k, true);  // always on the CPU: it steers reads
  check_device(op, x,
               {{"qweight", &qweight},
                {"scales", &scales},
                {"zeros", ptr(zeros)},
                {"bias", ptr(bias)},
                {"perm", ptr(perm)},
                {"out", &out}});
  check_apart(op, "out", out,
              {{"x", &x}, {"qweight", &qweight}, {"scales", &scales}, {"bias", ptr(bias)}});
  FI_CHECK(layout.cuda == !x.is_cpu(), op, ": qweight is packed for ",
           layout.cuda ? "CUDA" : "the CPU", " but x is not there, got ", describe(qweight),
           "; repack it with pack_weight(layout=\"", x.is_cpu() ? "cpu" : "cuda", "\")");
  if (m == 0 || n == 0) return;
  const int64_t columns = group_columns(group_size, k), groups = div_up(k, columns);
  if (!x.is_cpu())
    return packed_linear_cuda(op, x, qweight, scales, zeros, bias, layout, columns, groups, perm,
                              batch_invariant, out, workspace);
  const Call call{x, qweight, scales, zeros, bias, perm, out, layout, columns, groups};
  if (int8_activations())
    run_cpu_int8(call);
  else
    run_cpu(call);
}

void int4_linear(Tensor x, Tensor qweight, Tensor scales, OptTensor zeros, OptTensor bias,
                 int64_t group_size, OptTensor perm, bool batch_invariant, Tensor out,
                 OptTensor workspace) {
  packed_linear("int4_linear", 4, x, qweight, scales, zeros, bias, group_size, perm,
                batch_invariant, out, workspace);
}

void int8_linear(Tensor x, Tensor qweight, Tensor scales, OptTensor zeros, OptTensor bias,
                 int64_t group_size, OptTensor perm, bool batch_invariant, Tensor out,
                 OptTensor workspace) {
  packed_linear("int8_linear", 8, x, qweight, scales, zeros, bias, group_size, perm,
                batch_invariant, out, workspace);
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
})

}  // namespace fastinfer
