// sample and verify_draft: one row of logits (verify_draft: one position of a row) per cluster.
//
//   1  every CTA reads its share of the row once: the largest word, and per thread the largest
//   logit 2  greedy: done. top-k: a bound from the threads' maxima leaves a few hundred candidates,
//   which
//      CTA 0 sorts; the other CTAs leave. Otherwise thresholds are searched in the row (search.cuh)
//   3  exponential race over what is kept (draw.cuh)
//
// The random numbers and the fixed arithmetic are those of the CPU kernel (sampling_math.h): same
// tokens. How many CTAs share a row depends on the batch and changes no bit: whatever is combined
// over threads or CTAs is a maximum or a sum of integers. verify_draft treats all positions at
// once, as if each were reached; a second kernel cuts every row at its first rejection. No
// workspace: what CTAs tell each other goes through distributed shared memory (sm_90). For older
// architectures a row has one CTA.
#include "../common/launch.cuh"
#include "draw.cuh"
#include "sampling.h"

namespace fastinfer::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sampling_kernel(const __grid_constant__ Task task) {
  grid_wait();
  Cluster c;
  const int64_t unit = blockIdx.x / c.size, r = unit / task.positions;
  const int position = static_cast<int>(unit % task.positions);
  int drafts = 0;
  if (task.verify) {
    const int64_t k = task.positions - 1;
    const int64_t n = task.num_draft_tokens ? index_at(task.num_draft_tokens, task.num_type, r) : k;
    drafts = static_cast<int>(n < 0 ? 0 : n > k ? k : n);
    if (position > drafts) return;  // the whole cluster
  }
  const Row<T> row(task, r, position, c.rank, c.size);
  Rule rule(task.rules, r);

  float best = -kInf;
  int best_id = 0;
  float slot[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) slot[i] = -kInf;
  row.template each<kSlots>([&](int first, const float(&x)[Row<T>::kPack], int u) {
    float most = x[0];
#pragma unroll
    for (int j = 1; j < Row<T>::kPack; ++j) most = fmaxf(most, x[j]);  // drops NaN
    slot[u] = fmaxf(slot[u], most);
    if (most > best) {
      best = most;
#pragma unroll
      for (int j = Row<T>::kPack - 1; j >= 0; --j)
        if (x[j] == most) best_id = first + j;
    }
  });
  grid_launch_dependents();
  best = normalised(best);
  Search<T> search{c, row, order_key(best), {}};
#pragma unroll
  for (int i = 0; i < kSlots; ++i) search.slot[i] = slot[i];

  bool greedy = !(rule.temperature > 0.0f);
  const bool by_rank = !greedy && rule.top_k > 0 && rule.top_k < task.vocab;
  const uint64_t mine = block_reduce<Max, kThreads>(word_of(best, best_id), shared().scratch);
  const uint32_t my_bound =
      by_rank ? search.group_bound(max(rule.top_k, static_cast<int64_t>(task.num_top)),
                                   static_cast<uint32_t>(mine >> 32))
              : 0;
  const Message* m = c.exchange(mine, my_bound);
  uint64_t top_word = m[0].a, bound = m[0].b;
  for (int i = 1; i < c.size; ++i) {
    top_word = max(top_word, m[i].a);
    bound = min(bound, m[i].b);
  }
  const float largest = logit_of(top_word);
  // Nothing has any probability: the answer is defined as token 0.
  if (largest == -kInf) {
    top_word = word_of(-kInf, 0);
    greedy = true;
  }
  const int argmax = id_of(top_word);
  Draw<T> draw{search,
               task,
               Law(largest, greedy ? 1.0f : rule.temperature),
               Kept(),
               philox_key(rule.seed, static_cast<int64_t>(static_cast<uint64_t>(rule.step) +
                                                          static_cast<uint64_t>(position))),
               r,
               position,
               drafts};
  if (greedy) {
    if (!task.verify) {
      draw.sample_from_row(argmax, true, top_word);
    } else if (draw.leads()) {
      draw.write_token(argmax, position < drafts && draw.draft() == argmax);
    }
  } else {
    if (rule.min_p > 0.0f) draw.kept.least = fminf(rule.min_p, 1.0f);
    if (by_rank) {
      if (bound != 0) {
        const int n = draw.search.gather(bound << 32, top_word);
        if (n <= kThreads) {
          if (c.rank == 0) draw.from_list(n, rule);
          return;
        }
      }
      const uint64_t kth = draw.search.template select<false>(bound << 32, top_word, rule.top_k,
                                                              task.vocab, draw.law);
      draw.kept.word = kth >> 32 << 32;
    }
    if (rule.top_p < 1.0f) draw.kept.word = draw.nucleus(rule.top_p);
    if (task.verify) {
      draw.verify_from_row(argmax);
    } else {
      draw.sample_from_row(argmax, false, top_word);
    }
  }
  c.sync();
}

// Rows of verify_draft: tokens up to the first draft that did not stand, then -1.
__global__ void __launch_bounds__(256)
    finish_verify(const __grid_constant__ Task task, int64_t batch, int32_t* num_accepted) {
  grid_wait();
  const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= batch) return;
  int64_t* ids = task.token_ids + r * task.positions;
  int i = 0;
  for (bool accepted = true; accepted; i += accepted) {
    const int64_t v = ids[i];
    accepted = v >> 40 & 1;
    ids[i] = v & 0xFFFFFFFF;
  }
  num_accepted[r] = i;
  for (int j = i + 1; j < task.positions; ++j) ids[j] = -1;
}

template <class T>
int launch_rows(const Task& task, int64_t rows, void* stream) {
  const int ctas = clusters_work<sampling_kernel<T>>()
                       ? sampling_ctas_per_row(rows, task.vocab, device_facts().sms)
                       : 1;
  return launch_clusters(sampling_kernel<T>, ctas, static_cast<unsigned>(rows * ctas), kThreads, 0,
                         stream, task);
}

int launch_task(const Task& task, DType dtype, int64_t rows, void* stream) {
  return with_float(dtype, [&](auto t) { return launch_rows<decltype(t)>(task, rows, stream); });
}

}  // namespace

int sampling_ctas_per_row(int64_t rows, int64_t vocab, int sms) {
  constexpr int64_t kLeast = 4096;  // tokens per CTA worth a CTA
  int ctas = 1;
  while (ctas < kMaxCtas && 2 * ctas * rows <= sms && 2 * ctas * kLeast <= vocab) ctas *= 2;
  return ctas;
}

int launch_sample(const cpu::SampleParams& p, int64_t batch, void* stream) {
  Task t = {};
  t.logits = p.logits;
  t.row_stride = p.row_stride;
  t.vocab = static_cast<int>(p.vocab);
  t.positions = 1;
  t.rules = p.rules;
  t.repetition = p.repetition;
  t.presence = p.presence;
  t.frequency = p.frequency;
  t.prompt_mask = p.prompt_mask;
  t.mask_stride = p.mask_stride;
  t.output_counts = p.output_counts;
  t.counts_stride = p.counts_stride;
  t.token_ids = p.token_ids;
  t.logprobs = p.logprobs;
  t.top_ids = p.top_ids;
  t.top_logprobs = p.top_logprobs;
  t.num_top = static_cast<int>(p.num_top);
  return launch_task(t, p.dtype, batch, stream);
}

int launch_verify_draft(const cpu::VerifyParams& p, int64_t batch, void* stream) {
  Task t = {};
  t.logits = p.logits;
  t.row_stride = p.batch_stride;
  t.position_stride = p.position_stride;
  t.vocab = static_cast<int>(p.vocab);
  t.positions = static_cast<int>(p.num_drafts + 1);
  t.rules = p.rules;
  t.token_ids = p.token_ids;
  t.verify = true;
  t.draft_ids = p.draft_ids;
  t.draft_type = p.draft_type;
  t.draft_stride = p.draft_stride;
  t.draft_probs = p.draft_probs;
  t.probs_batch_stride = p.probs_batch_stride;
  t.probs_position_stride = p.probs_position_stride;
  t.num_draft_tokens = p.num_draft_tokens;
  t.num_type = p.num_type;
  const int error = launch_task(t, p.dtype, batch * t.positions, stream);
  if (error != 0) return error;
  return launch(finish_verify, dim3(static_cast<unsigned>(ceil_div(batch, 256))), dim3(256), 0,
                stream, t, batch, p.num_accepted);
}

}  // namespace fastinfer::cuda
