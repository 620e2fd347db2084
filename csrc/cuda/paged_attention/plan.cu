// plan_decode: the running cost of the sequences of one step, for find_slot() of the decode kernel.
// Layout and costs: csrc/ops/paged_attention.cpp. One CTA; each thread owns a run of sequences.
#include "../common/launch.cuh"
#include "work.cuh"

namespace fastinfer::cuda {
namespace {

constexpr int kPlanThreads = 1024;

struct PlanParams {
  const int32_t* lengths;
  int64_t stride;
  int32_t* plan;
  int batch, heads_kv, q_len, append, window_left, num_slots;
  bool invariant;
};

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  __shared__ int sums[32];
  grid_wait();
  const int tid = threadIdx.x, each = (p.batch + kPlanThreads - 1) / kPlanThreads;
  const int from = min(tid * each, p.batch), to = min(from + each, p.batch);
  auto cost = [&](int b) {
    return sequence_cost(p.lengths[b * p.stride] + p.append, p.q_len, p.window_left);
  };
  int own = 0;
  for (int b = from; b < to; ++b) own += cost(b);
  int sum = own;
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, lane);
    if (tid % 32 >= lane) sum += other;
  }
  if (tid % 32 == 31) sums[tid / 32] = sum;
  __syncthreads();
  int before = sum - own, total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < tid / 32) before += sums[w];
    total += sums[w];
  }
  int32_t* out = p.plan + kPlanHeader;
  for (int b = from; b < to; ++b) {
    out[b] = before;
    before += cost(b);
  }
  if (tid == 0) {
    out[p.batch] = total;
    const int64_t work = static_cast<int64_t>(p.heads_kv) * total;
    const int64_t share = (work + p.num_slots - 1) / p.num_slots;
    p.plan[0] = 1;
    p.plan[1] = p.batch;
    p.plan[2] = p.heads_kv;
    p.plan[3] = p.q_len;
    p.plan[4] = p.append;
    p.plan[5] = kPlanTile;
    p.plan[6] = p.num_slots;
    p.plan[7] = p.invariant ? 0 : static_cast<int>(share < 1 ? 1 : share);
  }
}

}  // namespace

int launch_plan(const int32_t* lengths, int64_t stride, int64_t batch, int64_t heads_kv,
                int64_t q_len, int64_t append, int64_t window_left, int64_t num_slots,
                bool invariant, int32_t* plan, void* stream) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x < INT32_MAX / 2 ? x : INT32_MAX / 2); };
  const PlanParams p{lengths,        stride,         plan,
                     narrow(batch),  narrow(heads_kv), narrow(q_len),
                     narrow(append), narrow(window_left), narrow(num_slots),
                     invariant};
  return launch(plan_kernel, dim3(1), dim3(kPlanThreads), 0, stream, p);
}

}  // namespace fastinfer::cuda
