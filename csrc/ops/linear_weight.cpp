// quantize_weight, pack_weight, dequantize_weight, quantize_per_token: checks, then rows in
// parallel. Packing and unpacking are plain index arithmetic over linear_layout.h, compiled once.
#include "../cpu/quantize.h"
#include "../cpu/simd.h"
#ifdef FASTINFER_WITH_CUDA
#include "../cuda/linear/dequantize.h"
#include "../cuda/linear/pack.h"
#include "../cuda/linear/quantize_rows.h"
#include "../cuda/linear/quantize_weight.h"
#include "cuda_shim.h"
#endif
#include "linear_checks.h"
#include "linear_pack.h"

namespace fastinfer {
namespace {

void quantize_weight(Tensor weight, int64_t bits, int64_t group_size, Tensor codes, Tensor scales,
                     OptTensor zeros) {
  const char* op = "quantize_weight";
  check_dtype(op, "weight", weight, {DType::f32, DType::f16, DType::bf16});
  check_dim(op, "weight", weight, 2);
  check_last_dim(op, "weight", weight);
  check_bits(op, bits);
  check_group_size(op, group_size);
  const int64_t n = weight.size(0), k = weight.size(1), columns = group_columns(group_size, k);
  const int64_t groups = div_up(k, columns);
  check_dtype(op, "codes", codes, {DType::u8});
  check_shape(op, "codes", codes, {n, k});
  check_contiguous(op, "codes", codes);
  check_dtype(op, "scales", scales, {DType::f32, DType::f16, DType::bf16});
  check_shape(op, "scales", scales, {n, groups});
  check_contiguous(op, "scales", scales);
  if (zeros) {
    check_dtype(op, "zeros", *zeros, {DType::u8});
    check_shape(op, "zeros", *zeros, {n, groups});
    check_contiguous(op, "zeros", *zeros);
  }
  check_device(op, weight, {{"codes", &codes}, {"scales", &scales}, {"zeros", ptr(zeros)}});
  if (n == 0 || k == 0) return;
  const cpu::QuantizeWeightParams p{
      weight.const_data_ptr(),
      row_stride(weight),
      dtype_of(weight),
      k,
      columns,
      groups,
      static_cast<int>(bits),
      static_cast<uint8_t*>(codes.mutable_data_ptr()),
      scales.mutable_data_ptr(),
      dtype_of(scales),
      zeros ? static_cast<uint8_t*>(zeros->mutable_data_ptr()) : nullptr,
  };
  if (!weight.is_cpu()) {
    FI_CUDA(op, weight, cuda::quantize_weight(p, n, stream));
    return;
  }
  torch::stable::parallel_for(0, n, grain(k * 2), [&](int64_t begin, int64_t end) {
    FI_PICK(quantize_weight_rows)(p, begin, end);
  });
}

float get_float(DType t, const void* p, int64_t i) {
  float v = 0.0f;
  cpu::with_float(t, [&](auto e) { v = decltype(e)::get(p, i); });
  return v;
}
void set_float(DType t, void* p, int64_t i, float v) {
  cpu::with_float(t, [&](auto e) { decltype(e)::set(p, i, v); });
}

// scales or float zeros [N,G] -> packed order; padding is 0.
void pack_floats(const Tensor& from, const Tensor& to, const PackedLayout& layout, int64_t groups) {
  const DType source = dtype_of(from), target = dtype_of(to);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t n = 0; n < layout.n_pad(); ++n)
      set_float(target, to.mutable_data_ptr(), layout.scale(g, n),
                n < layout.n ? get_float(source, from.const_data_ptr(), n * groups + g) : 0.0f);
}

// Every 4-bit code is below 16; p: the codes on the host.
void check_codes(const char* op, const Tensor& codes, const void* host) {
  const uint8_t* p = static_cast<const uint8_t*>(host);
  for (int64_t r = 0; r < codes.size(0); ++r) {
    const uint8_t* row = p + r * row_stride(codes);
    uint8_t all = 0;
    for (int64_t c = 0; c < codes.size(1); ++c) all |= row[c];
    for (int64_t c = 0; all > 15 && c < codes.size(1); ++c)
      FI_CHECK(row[c] <= 15, op, ": codes must lie in [0, 15] for bits=4, got ", int{row[c]},
               " at [", r, ", ", c, "]");
  }
}

void pack_weight(Tensor codes, Tensor scales, OptTensor zeros, int64_t bits, int64_t group_size,
                 Tensor qweight, Tensor packed_scales, OptTensor packed_zeros) {
  const char* op = "pack_weight";
  check_dtype(op, "codes", codes, {DType::u8});
  check_dim(op, "codes", codes, 2);
  check_last_dim(op, "codes", codes);
  const int64_t n = codes.size(0), k = codes.size(1);
  const PackedLayout layout = check_packed(op, qweight, packed_scales, packed_zeros,
                                           static_cast<int>(bits), group_size, n, k);
  const int64_t columns = group_columns(group_size, k), groups = div_up(k, columns);
  check_dtype(op, "scales", scales, {DType::f32, DType::f16, DType::bf16});
  check_shape(op, "scales", scales, {n, groups});
  check_contiguous(op, "scales", scales);
  FI_CHECK(zeros.has_value() == packed_zeros.has_value(), op,
           ": packed_zeros must be given exactly when zeros is");
  const bool int_zeros = zeros && dtype_of(*zeros) == DType::u8;
  if (zeros) {
    check_dtype(op, "zeros", *zeros, {DType::u8, DType::f32, DType::f16, DType::bf16});
    check_shape(op, "zeros", *zeros, {n, groups});
    check_contiguous(op, "zeros", *zeros);
    FI_CHECK(int_zeros == (dtype_of(*packed_zeros) == DType::u8), op,
             ": packed_zeros must be torch.uint8 exactly when zeros is, got ",
             describe(*packed_zeros), " for ", describe(*zeros));
  }
  check_device(op, codes,
               {{"scales", &scales},
                {"zeros", ptr(zeros)},
                {"qweight", &qweight},
                {"packed_scales", &packed_scales},
                {"packed_zeros", ptr(packed_zeros)}});
  if (qweight.numel() == 0) return;
  if (!codes.is_cpu()) {
#ifdef FASTINFER_WITH_CUDA
    if (bits == 4 && validate_data()) {
      const CudaLaunch device(codes);
      check_codes(op, codes, HostCopy(op, "codes", codes, device.stream()).data());
    }
    const cuda::PackWeight p{
        layout,
        static_cast<const uint8_t*>(codes.const_data_ptr()),
        row_stride(codes),
        scales.const_data_ptr(),
        data(zeros),
        dtype_of(scales),
        zeros ? dtype_of(*zeros) : DType::other,
        columns,
        groups,
        static_cast<uint32_t*>(qweight.mutable_data_ptr()),
        packed_scales.mutable_data_ptr(),
        zeros ? packed_zeros->mutable_data_ptr() : nullptr,
        dtype_of(packed_scales),
        zeros ? dtype_of(*packed_zeros) : DType::other,
    };
#endif
    FI_CUDA(op, codes, cuda::pack_weight(p, stream));
    return;
  }
  const uint8_t* source = static_cast<const uint8_t*>(codes.const_data_ptr());
  const uint8_t* zero = int_zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  const uint8_t middle = static_cast<uint8_t>(1 << (bits - 1));
  if (bits == 4) check_codes(op, codes, codes.const_data_ptr());
  pack_floats(scales, packed_scales, layout, groups);
  if (int_zeros) {
    uint8_t* to = static_cast<uint8_t*>(packed_zeros->mutable_data_ptr());
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t r = 0; r < layout.n_pad(); ++r)
        to[layout.scale(g, r)] = r < n ? zero[r * groups + g] : middle;
  } else if (zeros) {
    pack_floats(*zeros, *packed_zeros, layout, groups);
  }
  uint32_t* words = static_cast<uint32_t*>(qweight.mutable_data_ptr());
  const int64_t stride = row_stride(codes), rows = layout.rows_per_block(), k_pad = layout.k_pad();
  torch::stable::parallel_for(0, layout.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> block(rows * k_pad);
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = b * rows + i;
        uint8_t* to = block.data() + i * k_pad;
        std::memset(to, middle, k_pad);
        if (r >= n) continue;
        if (k > 0) std::memcpy(to, source + r * stride, k);
        for (int64_t c = k; zero && c < k_pad; ++c)
          to[c] = zero[r * groups + (c / columns < groups ? c / columns : groups - 1)];
      }
      uint32_t* to = words + b * layout.block_words();
      layout.cuda ? pack_cuda_block(layout, block.data(), to)
                  : pack_cpu_block(layout, block.data(), to);
    }
  });
}

// (code - zero) * s (+ zf) for one group of one row; two roundings with zf, as in the reference.
void dequantize_run(const uint8_t* codes, int64_t count, float zero, float s, const float* zf,
                    float* w) {
  if (!zf) {
    for (int64_t i = 0; i < count; ++i) w[i] = (static_cast<float>(codes[i]) - zero) * s;
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    volatile float product = (static_cast<float>(codes[i]) - zero) * s;  // never one fma
    w[i] = product + *zf;
  }
}

void dequantize_weight(Tensor qweight, Tensor scales, OptTensor zeros, int64_t bits,
                       int64_t group_size, OptTensor perm, Tensor out) {
  const char* op = "dequantize_weight";
  check_dtype(op, "out", out, {DType::f32, DType::f16, DType::bf16});
  check_dim(op, "out", out, 2);
  check_written(op, "out", out);
  const int64_t n = out.size(0), k = out.size(1);
  const PackedLayout layout =
      check_packed(op, qweight, scales, zeros, static_cast<int>(bits), group_size, n, k);
  check_perm(op, perm, k,
             true);  // values too: it steers writes (on CUDA those out of range do not)
  check_device(op, qweight,
               {{"scales", &scales}, {"zeros", ptr(zeros)}, {"perm", ptr(perm)}, {"out", &out}});
  if (n == 0 || k == 0) return;
  const int64_t columns = group_columns(group_size, k), stride = row_stride(out);
  const uint32_t* words = static_cast<const uint32_t*>(qweight.const_data_ptr());
  const int32_t* order = static_cast<const int32_t*>(data(perm));
  const DType scale_type = dtype_of(scales), out_type = dtype_of(out);
  const DType zero_type = zeros ? dtype_of(*zeros) : DType::other;
  const void *scale_data = scales.const_data_ptr(), *zero_data = data(zeros);
  void* to = out.mutable_data_ptr();
  if (!qweight.is_cpu()) {
#ifdef FASTINFER_WITH_CUDA
    if (perm && validate_data()) {
      const CudaLaunch device(qweight);
      check_perm_values(op, HostCopy(op, "perm", *perm, device.stream()).data(), k);
    }
    const cuda::DequantizePacked p{
        layout,  words, scale_data, scale_type, zero_data, zero_type,
        columns, order, to,         stride,     out_type,
    };
#endif
    FI_CUDA(op, qweight, cuda::dequantize_packed(p, stream));
    return;
  }
  const int64_t rows = layout.rows_per_block(), k_pad = layout.k_pad();
  torch::stable::parallel_for(0, layout.blocks(), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(rows * k_pad);
    std::vector<float> packed(k), original(order ? k : 0);
    for (int64_t b = begin; b < end; ++b) {
      const uint32_t* from = words + b * layout.block_words();
      layout.cuda ? unpack_cuda_block(layout, from, codes.data())
                  : unpack_cpu_block(layout, from, codes.data());
      for (int64_t r = b * rows; r < n && r < (b + 1) * rows; ++r) {
        for (int64_t g = 0; g * columns < k; ++g) {
          const int64_t slot = layout.scale(g, r), c = g * columns;
          float zero = bits == 8 ? 128.0f : 8.0f, zf = 0.0f;
          if (zero_type == DType::u8)
            zero = static_cast<const uint8_t*>(zero_data)[slot];
          else if (zeros)
            zf = get_float(zero_type, zero_data, slot);
          dequantize_run(codes.data() + (r - b * rows) * k_pad + c,
                         k - c < columns ? k - c : columns, zero,
                         get_float(scale_type, scale_data, slot),
                         zeros && zero_type != DType::u8 ? &zf : nullptr, packed.data() + c);
        }
        for (int64_t c = 0; order && c < k; ++c) original[order[c]] = packed[c];
        const float* row = order ? original.data() : packed.data();
        cpu::with_float(out_type, [&](auto e) {
          using E = decltype(e);
          int64_t c = 0;
          for (; c + cpu::kLanes <= k; c += cpu::kLanes)
            E::store(to, r * stride + c, cpu::load_raw<cpu::vf>(row + c));
          for (; c < k; ++c) E::set(to, r * stride + c, row[c]);
        });
      }
    }
  });
}

void quantize_per_token(Tensor x, OptTensor static_scale, Tensor q, Tensor scale, OptTensor zeros) {
  const char* op = "quantize_per_token";
  check_dtype(op, "x", x, {DType::f32, DType::f16, DType::bf16});
  check_dim(op, "x", x, 2);
  check_last_dim(op, "x", x);
  const int64_t m = x.size(0), k = x.size(1);
  check_dtype(op, "q", q, {DType::i8});
  check_shape(op, "q", q, {m, k});
  check_written(op, "q", q);
  check_dtype(op, "scale", scale, {DType::f32});
  check_shape(op, "scale", scale, {m});
  check_contiguous(op, "scale", scale);
  if (zeros) {
    check_dtype(op, "zeros", *zeros, {DType::i32});
    check_shape(op, "zeros", *zeros, {m});
    check_contiguous(op, "zeros", *zeros);
  }
  if (static_scale) {
    check_dtype(op, "static_scale", *static_scale, {DType::f32});
    FI_CHECK(static_scale->numel() == 1, op, ": static_scale must hold one value, got ",
             describe(*static_scale));
    FI_CHECK(!zeros, op,
             ": a static scale is symmetric, but zeros were asked for; pass symmetric=True");
  }
  check_device(
      op, x,
      {{"static_scale", ptr(static_scale)}, {"q", &q}, {"scale", &scale}, {"zeros", ptr(zeros)}});
  if (m == 0) return;
  const cpu::QuantizeRowsParams p{
      x.const_data_ptr(),
      row_stride(x),
      dtype_of(x),
      k,
      static_cast<const float*>(data(static_scale)),
      static_cast<int8_t*>(q.mutable_data_ptr()),
      row_stride(q),
      static_cast<float*>(scale.mutable_data_ptr()),
      zeros ? static_cast<int32_t*>(zeros->mutable_data_ptr()) : nullptr,
  };
  const auto check_static = [&](const void* value) {
    const float s = *static_cast<const float*>(value);
    FI_CHECK(s > 0.0f, op, ": static_scale must be positive, got ", s);
  };
  if (!x.is_cpu()) {
#ifdef FASTINFER_WITH_CUDA
    if (static_scale && validate_data()) {
      const CudaLaunch device(x);
      check_static(HostCopy(op, "static_scale", *static_scale, device.stream()).data());
    }
#endif
    FI_CUDA(op, x, cuda::quantize_rows(p, m, stream));
    return;
  }
  if (static_scale && validate_data()) check_static(static_scale->const_data_ptr());
  torch::stable::parallel_for(0, m, grain(k * 2), [&](int64_t begin, int64_t end) {
    FI_PICK(quantize_rows)(p, begin, end);
  });
}

}  // namespace

FI_REGISTER_BOTH({
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
})

}  // namespace fastinfer
