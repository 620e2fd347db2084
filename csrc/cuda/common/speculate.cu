// Speculation between two model calls, on the device: which drafts stand, and the inputs of what
// runs next. The steps of a burst follow each other without the host (engine/bursts.py, which has
// the same struct and a twin of this code; called through ctypes while a step is captured).
//
//   advance    compare what the check drew with the drafts, note the tokens that stand, and prepare
//              the next step: its drafts (n-gram) or the inputs of the draft model
//   prepare    the second half alone, in front of the first step
//   rows       the inputs of the check, from what the draft model drew
//
// One CTA per request. A request of `length` tokens may write keys and values at positions below
// `capacity`; it stands still once length > capacity. No kernel here triggers its dependents early,
// and what reads its writes waits for all of it: torch's embedding, or the copy of `out`.
#include <cstdint>

#include "launch.cuh"

extern "C" {

struct FastinferSpeculation {
  int64_t rows;
  int64_t drafts;  // k: the check runs k + 1 tokens of each request
  int64_t block_size;
  int64_t vocab_size;
  int64_t min_n, max_n;  // of n-grams
  int64_t table_width;
  int64_t history_width;
  int64_t max_rounds;     // that `out` holds, in turn
  void* length;           // int32 [rows], all its tokens; read and written
  void* capacity;         // int32 [rows]; -1: no request
  void* num_prompt;       // int32 [rows]
  void* round;            // int32 [rows], where in `out` the next one goes
  void* tail;             // int64 [rows, 2], the last two tokens
  void* tables;           // int32 [rows, table_width]
  void* history_row;      // int32 [rows]
  void* history;          // int32 [any, history_width], the tokens; null: a draft model drafts
  void* count;            // int32 [rows], drafts of the check
  void* input_ids;        // int64 [rows, k + 1], of the check; padding in front
  void* positions;        // int64 [rows, k + 1]
  void* slots;            // int64 [rows, k + 1]
  void* steps;            // int64 [rows, k + 1]
  void* seq_lens;         // int32 [rows]
  void* drawn;            // int64 [rows, k + 1]
  void* draft_positions;  // int64 [rows, 2], then [k - 1, rows]
  void* draft_slots;      // the same
  void* draft_steps;      // int64 [k, rows]
  void* draft_seq_lens;   // int32 [k, rows]
  void* draft_drawn;      // int64 [k, rows]
  void* out;              // int32 [any, rows, k + 3]: drafts checked, tokens that stand, and these
};

}  // extern "C"

namespace fastinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxDrafts = 16;

enum What : int { kPrepare = 0, kAdvance = 1, kRows = 2 };

struct Row {
  FastinferSpeculation s;
  int64_t row;
  template <class T>
  __device__ T* at(void* base, int64_t index) const {
    return static_cast<T*>(base) + index;
  }
  __device__ int32_t length() const { return *at<int32_t>(s.length, row); }
  __device__ int32_t capacity() const { return *at<int32_t>(s.capacity, row); }
  __device__ int64_t slot(int64_t position) const {
    const int32_t block = *at<int32_t>(s.tables, row * s.table_width + position / s.block_size);
    return int64_t{block} * s.block_size + position % s.block_size;
  }
};

// The tokens that stand, by the first warp. Returns the new length to all of it.
__device__ int accept(const Row& r, int length, int lane) {
  const FastinferSpeculation& s = r.s;
  const int64_t width = s.drafts + 1, first = r.row * width;
  const int count = *r.at<int32_t>(s.count, r.row);
  int32_t* round = r.at<int32_t>(s.round, r.row);
  const int64_t now = *round;
  int32_t* out = r.at<int32_t>(s.out, (now * s.rows + r.row) * (s.drafts + 3));
  const bool runs = length <= r.capacity();
  const int64_t last = width - 1 - count;  // place of the last token, in front of the drafts
  bool same = false;
  if (runs && lane < count)
    same = *r.at<int64_t>(s.drawn, first + last + lane) ==
           *r.at<int64_t>(s.input_ids, first + last + lane + 1);
  const unsigned equal = __ballot_sync(~0u, same);
  const int yielded = runs ? __ffs(~equal) : 0;  // leading ones, and one token more
  int64_t token = 0;
  if (lane < yielded) {
    token = *r.at<int64_t>(s.drawn, first + last + lane);
    out[2 + lane] = static_cast<int32_t>(token);
    if (s.history != nullptr)
      *r.at<int32_t>(s.history, *r.at<int32_t>(s.history_row, r.row) * s.history_width + length +
                                    lane) = static_cast<int32_t>(token);
  }
  const int64_t newest = __shfl_sync(~0u, token, yielded > 0 ? yielded - 1 : 0);
  const int64_t before = __shfl_sync(~0u, token, yielded > 1 ? yielded - 2 : 0);
  __syncwarp();
  if (lane == 0) {
    int64_t* tail = r.at<int64_t>(s.tail, 2 * r.row);
    if (yielded > 0) {
      tail[0] = yielded > 1 ? before : tail[1];
      tail[1] = newest;
    }
    out[0] = runs ? count : 0;
    out[1] = yielded;
    *round = now + 1 < s.max_rounds ? static_cast<int32_t>(now + 1) : 0;
    *r.at<int32_t>(s.length, r.row) = length + yielded;
  }
  return length + yielded;
}

// Where the longest ending of min_n to max_n tokens occurred before, the latest of equals: the
// position right after it in the low half, or 0. One end per thread and round.
__device__ unsigned long long match(const Row& r, int length, int thread) {
  const FastinferSpeculation& s = r.s;
  const int32_t* tokens =
      r.at<int32_t>(s.history, *r.at<int32_t>(s.history_row, r.row) * s.history_width);
  unsigned long long best = 0;
  for (int end = 1 + thread; end < length; end += kThreads) {
    int n = 0;
    while (n < s.max_n && n < end && tokens[end - 1 - n] == tokens[length - 1 - n]) ++n;
    const unsigned long long key =
        static_cast<unsigned long long>(n) << 32 | static_cast<unsigned>(end);
    if (n >= s.min_n && key > best) best = key;
  }
  return best;
}

// One row of the check: `count` drafts behind the last token, by threads that own places of it.
__device__ void write_rows(const Row& r, int length, int count, int thread) {
  const FastinferSpeculation& s = r.s;
  const int64_t width = s.drafts + 1;
  const bool runs = length <= r.capacity();
  if (thread < width) {
    const int64_t at = r.row * width + thread;
    const int ahead = thread - static_cast<int>(s.drafts) + count;  // 0: the last token
    const bool real = runs && ahead >= 0;
    const int64_t position = real ? int64_t{length} - 1 + ahead : 0;
    *r.at<int64_t>(s.positions, at) = position;
    *r.at<int64_t>(s.slots, at) = real ? r.slot(position) : -1;
    const int done = length - *r.at<int32_t>(s.num_prompt, r.row) + (ahead > 0 ? ahead : 0);
    *r.at<int64_t>(s.steps, at) = runs ? done : 0;
    if (!real || ahead == 0)
      *r.at<int64_t>(s.input_ids, at) = real ? *r.at<int64_t>(s.tail, 2 * r.row + 1) : 0;
  }
  if (thread == 0) {
    *r.at<int32_t>(s.count, r.row) = count;
    *r.at<int32_t>(s.seq_lens, r.row) = runs ? length + count : 0;
  }
}

__device__ int most_drafts(const Row& r, int length) {
  const int left = r.capacity() - length;
  return left < 0 ? 0 : left < r.s.drafts ? left : static_cast<int>(r.s.drafts);
}

// Inputs of the draft model's k calls: [token before the last, last], then one draft each.
__device__ void prepare_drafts(const Row& r, int length, int thread) {
  const FastinferSpeculation& s = r.s;
  const int count = most_drafts(r, length);
  const bool runs = length <= r.capacity();
  if (thread <= s.drafts) {  // place 0: the token before the last one
    const int64_t position = int64_t{length} - 2 + thread;
    const bool live = runs && position >= 0 && (thread <= 1 || thread - 1 < count);
    const int64_t at =
        thread <= 1 ? 2 * r.row + thread : 2 * s.rows + (thread - 2) * s.rows + r.row;
    *r.at<int64_t>(s.draft_positions, at) = live ? position : 0;
    *r.at<int64_t>(s.draft_slots, at) = live ? r.slot(position) : -1;
  }
  if (thread < s.drafts) {
    const int64_t at = thread * s.rows + r.row;
    const int most = count > 1 ? count - 1 : 0;
    *r.at<int32_t>(s.draft_seq_lens, at) = runs ? length + (thread < most ? thread : most) : 0;
    *r.at<int64_t>(s.draft_steps, at) =
        runs ? length - *r.at<int32_t>(s.num_prompt, r.row) + thread : 0;
  }
}

__global__ void __launch_bounds__(kThreads) speculate(FastinferSpeculation s, int what) {
  grid_wait();
  const Row r{s, blockIdx.x};
  const int thread = threadIdx.x, lane = thread & 31;
  __shared__ int new_length;
  __shared__ unsigned long long best;
  int length = r.length();
  if (what == kRows) {
    int count = most_drafts(r, length);
    if (thread < 32) {
      int64_t token = 0;
      if (lane < count) token = *r.at<int64_t>(s.draft_drawn, lane * s.rows + r.row);
      const unsigned bad = __ballot_sync(~0u, lane < count && (token < 0 || token >= s.vocab_size));
      if (bad != 0) count = __ffs(bad) - 1;
      if (lane < count)
        *r.at<int64_t>(s.input_ids, (r.row + 1) * (s.drafts + 1) - count + lane) = token;
      write_rows(r, length, count, thread);
    }
    return;
  }
  __syncthreads();  // everybody has read the length
  if (thread == 0) best = 0;
  if (what == kAdvance && thread < 32) {
    length = accept(r, length, lane);
    if (lane == 0) new_length = length;
  } else if (thread == 0) {
    new_length = length;
  }
  __syncthreads();
  length = new_length;
  if (s.history == nullptr) {
    prepare_drafts(r, length, thread);
    return;
  }
  int count = most_drafts(r, length);
  if (count > 0) {
    const unsigned long long mine = match(r, length, thread);
    if (mine != 0) atomicMax(&best, mine);
  }
  __syncthreads();
  const int after = static_cast<int>(best & 0xffffffffu);
  if (after == 0) count = 0;
  if (thread < count) {  // a repetition shorter than the draft is continued
    const int32_t* tokens =
        r.at<int32_t>(s.history, *r.at<int32_t>(s.history_row, r.row) * s.history_width);
    *r.at<int64_t>(s.input_ids, (r.row + 1) * (s.drafts + 1) - count + thread) =
        tokens[after + thread % (length - after)];
  }
  write_rows(r, length, count, thread);
}

}  // namespace
}  // namespace fastinfer::cuda

extern "C" {

// `what`: 0 prepare, 1 advance, 2 rows. Returns a CUDA error code.
__attribute__((visibility("default"))) int fastinfer_speculate(const FastinferSpeculation* s,
                                                               int64_t what, void* stream) {
  if (s->rows <= 0) return 0;
  if (s->drafts < 1 || s->drafts > fastinfer::cuda::kMaxDrafts) return cudaErrorInvalidValue;
  return fastinfer::cuda::launch(fastinfer::cuda::speculate, dim3(static_cast<unsigned>(s->rows)),
                                 dim3(fastinfer::cuda::kThreads), 0, stream, *s,
                                 static_cast<int>(what));
}

}  // extern "C"
