// 16-bit instances of the skinny kernel: bf16 and fp16, up to 16 tokens.
#include "skinny_launch.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kSlot = 4 * 512;

// Tokens per launch: 16, or fewer where x would not fit (of a batch-invariant call whatever M is);
// 0: not even one.
template <bool kBf16>
int plan_tokens(const DenseLinear& p) {
  const bool most = p.batch_invariant || p.m > kSkinnyTokens;
  for (int tokens = most ? kSkinnyTokens : static_cast<int>(p.m); tokens > 0; tokens /= 2)
    if (plan_skinny(skinny_instance_for<kBf16, 16, false>(tokens), p.n, p.k, tokens, kSlot)
            .split.ranks > 0)
      return tokens;
  return 0;
}

template <bool kBf16>
int run(const DenseLinear& p, void* stream) {
  const int tokens = plan_tokens<kBf16>(p);
  if (tokens == 0) return cudaErrorInvalidConfiguration;
  SkinnyParams s{};
  s.x_stride = p.x_stride;
  s.w = p.w, s.w_stride = p.w_stride;
  s.out_stride = p.out_stride, s.bias = p.bias;
  s.n = static_cast<int>(p.n), s.k = static_cast<int>(p.k);
  s.groups = 1, s.slot_bytes = kSlot;
  for (int64_t m0 = 0; m0 < p.m; m0 += tokens) {
    s.x = static_cast<const char*>(p.x) + m0 * p.x_stride * 2;
    s.out = static_cast<char*>(p.out) + m0 * p.out_stride * 2;
    s.m = static_cast<int>(p.m - m0 < tokens ? p.m - m0 : tokens);
    s.x_packs = packs_fit(s.x, 0, 2, {p.x_stride});
    const int planned = p.batch_invariant ? tokens : s.m;
    const int error =
        launch_skinny(s, planned, skinny_instance_for<kBf16, 16, false>(planned), stream);
    if (error) return error;
  }
  return 0;
}

}  // namespace

bool skinny_dense_fits(const DenseLinear& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return false;
  if (p.k == 0 || p.k > INT32_MAX / 2 || p.n > INT32_MAX / 2) return false;
  if (p.k % 8 != 0 || !packs_fit(p.w, p.k, 2, {p.w_stride})) return false;
  return p.dtype == DType::bf16 ? plan_tokens<true>(p) > 0 : plan_tokens<false>(p) > 0;
}

int skinny_dense(const DenseLinear& p, void* stream) {
  return p.dtype == DType::bf16 ? run<true>(p, stream) : run<false>(p, stream);
}

}  // namespace fastinfer::cuda
