// sample and verify_draft over ranges of batch rows; the maths of one row is in sampling_row.h.
//
// verify_draft (Leviathan et al. 2023; Chen et al. 2023): with target p and draft q, position by
// position, accept x when u * q(x) < p(x), u ~ U(0, 1); at the first rejection draw from
// normalize(max(p - q, 0)) and stop; with every draft accepted draw one more token from p. The
// output is distributed as p. A temperature-0 row accepts while x is the argmax. Position i of a
// row uses step + i, so a row without drafts gives the token that sample gives.
#include "sampling_row.h"

namespace fastinfer::cpu::FI_ISA {
namespace {

Row make_row(const SamplingScratch& scratch, int64_t vocab) {
  const int64_t groups = (vocab + kGroup - 1) / kGroup;
  return {scratch.logits,
          scratch.weights,
          scratch.group_max,
          scratch.list_logits,
          scratch.list_weights,
          vocab,
          groups * kGroup,
          groups,
          0.0f};
}

void penalise(const SampleParams& p, int64_t r, float* x) {
  const uint8_t* prompt = p.prompt_mask ? p.prompt_mask + r * p.mask_stride : nullptr;
  const int32_t* counts = p.output_counts ? p.output_counts + r * p.counts_stride : nullptr;
  const float repetition = p.repetition ? p.repetition[r] : 1.0f;
  const float frequency = p.frequency ? p.frequency[r] : 0.0f;
  const float presence = p.presence ? p.presence[r] : 0.0f;
  if (repetition == 1.0f && frequency == 0.0f && presence == 0.0f) return;
  for (int64_t i = 0; i < p.vocab; ++i) {
    const int32_t count = counts && counts[i] > 0 ? counts[i] : 0;
    if (count == 0 && !(prompt && prompt[i])) continue;
    float y = x[i];
    if (repetition != 1.0f) y = y > 0.0f ? y / repetition : y * repetition;
    if (count > 0) y = (y - frequency * (float)count) - presence;
    x[i] = y;
  }
}

// The n best tokens by descending logit, then ascending id, as (key, ~id) words in that order.
void best_tokens(const Row& row, int64_t n, uint64_t* best) {
  const float at = kth_largest(row, n);
  auto word = [&](int64_t i) {
    return (uint64_t)order_key(row.logits[i]) << 32 | (0xFFFFFFFFu - (uint32_t)i);
  };
  int64_t count = 0;
  for (int pass = 0; pass < 2; ++pass)  // those above the n-th value, then its ties by id
    for (int64_t g = 0; g < row.groups && count < n; ++g) {
      if (row.group_max[g] < at) continue;
      for (int64_t i = g * kGroup; i < (g + 1) * kGroup && count < n; ++i)
        if (pass == 0 ? row.logits[i] > at : row.logits[i] == at) best[count++] = word(i);
    }
  // Heap sort, smallest at the root, so that the result is in descending order.
  auto sift = [&](int64_t root, int64_t size) {
    for (int64_t child; (child = 2 * root + 1) < size; root = child) {
      if (child + 1 < size && best[child + 1] < best[child]) ++child;
      if (best[root] <= best[child]) return;
      const uint64_t t = best[root];
      best[root] = best[child];
      best[child] = t;
    }
  };
  for (int64_t i = n / 2; i-- > 0;) sift(i, n);
  for (int64_t size = n; --size > 0;) {
    const uint64_t t = best[0];
    best[0] = best[size];
    best[size] = t;
    sift(0, size);
  }
}

struct Normaliser {
  double temperature, log_total;
};

float logprob(const Row& row, const Normaliser& z, int64_t i) {
  const float x = row.logits[i];
  if (x == -kInf) return -kInf;
  const double d = x == row.max ? 0.0 : (double)x - (double)row.max;
  return (float)(d / z.temperature - z.log_total);
}

void write_logprobs(const SampleParams& p, int64_t r, const Row& row, const Kept& kept,
                    float temperature, int64_t token, uint64_t* best) {
  const Normaliser z{temperature, __builtin_log((double)total_mass(row) * 0x1p-40)};
  if (p.logprobs) p.logprobs[r] = logprob(row, z, token);
  if (p.num_top == 0) return;
  best_tokens(row, p.num_top, best);
  for (int64_t j = 0; j < p.num_top; ++j) {
    const uint32_t key = (uint32_t)(best[j] >> 32);
    const int64_t id = 0xFFFFFFFFu - (uint32_t)best[j];
    const bool in = (key > kept.key || (key == kept.key && id <= kept.last_tie)) &&
                    (!kept.positive || row.weights[id] > 0.0f);
    p.top_ids[r * p.num_top + j] = id;
    p.top_logprobs[r * p.num_top + j] = in ? logprob(row, z, id) : -kInf;
  }
}

// Row `row.max` is -inf: no token has any probability; the answer is defined as token 0.
bool greedy(const Row& row, const Rule& rule) {
  return !(rule.temperature > 0.0f) || row.max == -kInf;
}

}  // namespace

void sample_rows(const SampleParams& p, const SamplingScratch& scratch, int64_t begin,
                 int64_t end) {
  const bool penalties = p.repetition || p.frequency || p.presence;
  const bool wants_logprobs = p.logprobs || p.num_top > 0;
  for (int64_t r = begin; r < end; ++r) {
    Row row = make_row(scratch, p.vocab);
    Rule rule = rule_of(p.rules, r);
    load_row(row, p.logits, p.dtype, r * p.row_stride);
    if (penalties) penalise(p, r, row.logits);
    scan(row);
    Kept kept;
    if (greedy(row, rule)) {
      p.token_ids[r] = argmax(row);
      rule.temperature = 1.0f;
      if (wants_logprobs) compute_weights(row, 1.0f, -kInf);
    } else {
      kept = process(row, rule);
      p.token_ids[r] =
          race(row.weights, row.padded, philox_key(rule.seed, rule.step), kStreamSample);
    }
    if (wants_logprobs)
      write_logprobs(p, r, row, kept, rule.temperature, p.token_ids[r], scratch.best);
  }
}

namespace {

// The replacement of a rejected draft: residual weights max(p - q, 0), written over row.logits. If
// rounding leaves nothing (q = p), p itself.
int64_t resample(Row& row, const float* q, int64_t draft, uint64_t total, const PhiloxKey& key) {
  float* residual = row.logits;
  const float scale = (float)(0x1p40 / (double)total);
  for (int64_t i = 0; i < row.vocab; ++i) {
    const float r = q ? row.weights[i] * scale - q[i] : row.weights[i];
    residual[i] = r > 0.0f ? r : 0.0f;
  }
  for (int64_t i = row.vocab; i < row.padded; ++i) residual[i] = 0.0f;
  if (!q && draft >= 0 && draft < row.vocab) residual[draft] = 0.0f;
  const int64_t token = race(residual, row.padded, key, kStreamResample);
  return token >= 0 ? token : race(row.weights, row.padded, key, kStreamResample);
}

bool accepts(const Row& row, const float* q, int64_t draft, uint64_t total, const PhiloxKey& key) {
  if (draft < 0 || draft >= row.vocab) return false;
  const double u = ((double)philox(key, 0, kStreamAccept).word[0] + 0.5) * 0x1p-32;
  const double draft_mass = q ? (double)q[draft] * (double)total : (double)total;
  return u * draft_mass < (double)mass_of(row.weights[draft]);
}

}  // namespace

void verify_rows(const VerifyParams& p, const SamplingScratch& scratch, int64_t begin,
                 int64_t end) {
  const int64_t k = p.num_drafts;
  for (int64_t b = begin; b < end; ++b) {
    const Rule rule = rule_of(p.rules, b);
    int64_t n = p.num_draft_tokens ? index_at(p.num_draft_tokens, p.num_type, b) : k;
    n = n < 0 ? 0 : n > k ? k : n;
    int64_t* out = p.token_ids + b * (k + 1);
    int64_t i = 0;
    for (bool accepted = true; accepted; i += accepted) {
      Row row = make_row(scratch, p.vocab);
      load_row(row, p.logits, p.dtype, b * p.batch_stride + i * p.position_stride);
      scan(row);
      const bool is_greedy = greedy(row, rule);
      const PhiloxKey key = philox_key(rule.seed, (int64_t)((uint64_t)rule.step + (uint64_t)i));
      if (!is_greedy) process(row, rule);
      if (i == n) {
        out[i] = is_greedy ? argmax(row) : race(row.weights, row.padded, key, kStreamSample);
        break;
      }
      const int64_t draft = index_at(p.draft_ids, p.draft_type, b * p.draft_stride + i);
      if (is_greedy) {
        out[i] = argmax(row);
        accepted = out[i] == draft;
        continue;
      }
      const float* q = p.draft_probs
                           ? p.draft_probs + b * p.probs_batch_stride + i * p.probs_position_stride
                           : nullptr;
      const uint64_t total = total_mass(row);
      accepted = accepts(row, q, draft, total, key);
      out[i] = accepted ? draft : resample(row, q, draft, total, key);
    }
    p.num_accepted[b] = (int32_t)i;
    for (int64_t j = i + 1; j <= k; ++j) out[j] = -1;
  }
}

}  // namespace fastinfer::cpu::FI_ISA
