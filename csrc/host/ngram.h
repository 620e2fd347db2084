// N-gram search (prompt lookup): where did the text that now ends the sequence occur before?
//
// Of all earlier positions the one that shares the longest suffix with the sequence wins, at most
// max_n and at least min_n tokens; among equals the most recent. One backward scan that stops at
// the first suffix of max_n tokens: the same answer as a search for n = max_n, max_n - 1, ...,
// min_n, without the repeats. Cost O(length * max_n) at worst, O(length) on text. Occurrences may
// overlap the suffix itself. Method: Saxena, "Prompt Lookup Decoding" (2023).
#pragma once

#include <cstdint>

namespace fastinfer::host {

// get(i) is token i. Returns the position right after the match, or -1 when there is none.
template <class Get>
int64_t find_ngram(int64_t length, int64_t max_n, int64_t min_n, Get get) {
  int64_t best = 0, after = -1;
  for (int64_t end = length - 1; end > 0 && best < max_n; --end) {  // match = tokens[..end)
    int64_t n = 0;
    while (n < max_n && n < end && get(end - 1 - n) == get(length - 1 - n)) ++n;
    if (n > best) {
      best = n;
      after = end;
    }
  }
  return best >= min_n ? after : -1;
}

}  // namespace fastinfer::host
