// BlockPool: see block_pool.h for the rules.
#include "block_pool.h"

namespace fastinfer::host {

namespace {

std::string text(int64_t value) { return std::to_string(value); }

}  // namespace

BlockPool::BlockPool(int64_t num_blocks) : num_blocks_(num_blocks) {
  if (num_blocks < 1) {
    throw std::invalid_argument("BlockPool: num_blocks must be at least 1, got " +
                                text(num_blocks));
  }
  ref_.assign(num_blocks, 0);
  hash_.resize(num_blocks);
  has_hash_.assign(num_blocks, 0);
  prev_.assign(num_blocks + 1, num_blocks);
  next_.assign(num_blocks + 1, num_blocks);
  for (int64_t block = 0; block < num_blocks; ++block) link_before(num_blocks, block);
}

void BlockPool::check_id(const char* call, int64_t block) const {
  if (block < 0 || block >= num_blocks_) {
    throw std::invalid_argument(std::string("BlockPool.") + call + ": block must be in [0, " +
                                text(num_blocks_) + "), got " + text(block));
  }
}

void BlockPool::unlink(int64_t block) {
  next_[prev_[block]] = next_[block];
  prev_[next_[block]] = prev_[block];
  --num_free_;
}

void BlockPool::link_before(int64_t next, int64_t block) {
  const int64_t prev = prev_[next];
  prev_[block] = prev;
  next_[block] = next;
  next_[prev] = block;
  prev_[next] = block;
  ++num_free_;
}

void BlockPool::forget(int64_t block) {
  if (!has_hash_[block]) return;
  block_of_.erase(hash_[block]);
  has_hash_[block] = 0;
}

std::vector<int64_t> BlockPool::allocate(int64_t n) {
  if (n < 0) {
    throw std::invalid_argument("BlockPool.allocate: n must not be negative, got " + text(n));
  }
  if (n > num_free_) {
    throw OutOfBlocks("BlockPool.allocate: " + text(n) + " blocks wanted, " + text(num_free_) +
                      " of " + text(num_blocks_) + " are free");
  }
  std::vector<int64_t> blocks(n);
  for (int64_t& block : blocks) {
    block = next_[num_blocks_];
    unlink(block);
    forget(block);
    ref_[block] = 1;
  }
  return blocks;
}

void BlockPool::acquire(const std::vector<int64_t>& blocks) {
  for (int64_t block : blocks) {
    check_id("acquire", block);
    if (ref_[block] == 0 && !has_hash_[block]) {
      throw std::invalid_argument("BlockPool.acquire: block " + text(block) +
                                  " is free and holds no cached content");
    }
  }
  for (int64_t block : blocks) {
    if (ref_[block]++ == 0) unlink(block);
  }
}

void BlockPool::release(const std::vector<int64_t>& blocks) {
  std::vector<int64_t> freed;
  freed.reserve(blocks.size());  // nothing below may throw once a count has changed
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t block = blocks[i];
    const bool known = block >= 0 && block < num_blocks_;
    if (!known || ref_[block] == 0) {
      for (size_t j = 0; j < i; ++j) ++ref_[blocks[j]];
      check_id("release", block);
      throw std::invalid_argument("BlockPool.release: block " + text(block) +
                                  " has no reference left (freed twice?)");
    }
    if (--ref_[block] == 0) freed.push_back(block);
  }
  for (int64_t block : freed) {
    link_before(has_hash_[block] ? num_blocks_ : next_[num_blocks_], block);
  }
}

bool BlockPool::register_hash(int64_t block, const Hash& hash) {
  check_id("register_hash", block);
  if (ref_[block] == 0) {
    throw std::invalid_argument("BlockPool.register_hash: block " + text(block) + " is not in use");
  }
  const auto found = block_of_.find(hash);
  if (found != block_of_.end()) return found->second == block;
  if (has_hash_[block]) {
    throw std::invalid_argument("BlockPool.register_hash: block " + text(block) +
                                " already holds other content");
  }
  block_of_.emplace(hash, block);
  hash_[block] = hash;
  has_hash_[block] = 1;
  return true;
}

std::vector<int64_t> BlockPool::match(const std::vector<Hash>& hashes, int64_t max_blocks) const {
  std::vector<int64_t> blocks;
  for (const Hash& hash : hashes) {
    if (max_blocks >= 0 && static_cast<int64_t>(blocks.size()) >= max_blocks) break;
    const auto found = block_of_.find(hash);
    if (found == block_of_.end()) break;
    blocks.push_back(found->second);
  }
  return blocks;
}

void BlockPool::clear_cache() {
  block_of_.clear();
  has_hash_.assign(num_blocks_, 0);
}

int64_t BlockPool::ref_count(int64_t block) const {
  check_id("ref_count", block);
  return ref_[block];
}

const Hash* BlockPool::hash_of(int64_t block) const {
  check_id("hash_of", block);
  return has_hash_[block] ? &hash_[block] : nullptr;
}

int64_t BlockPool::count_free(const std::vector<int64_t>& blocks) const {
  int64_t count = 0;
  for (int64_t block : blocks) {
    check_id("count_free", block);
    count += ref_[block] == 0;
  }
  return count;
}

void BlockPool::check_invariants() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("BlockPool: broken invariant: ") + what);
  };
  int64_t length = 0;
  std::vector<char> seen(num_blocks_, 0);
  for (int64_t block = next_[num_blocks_]; block != num_blocks_; block = next_[block]) {
    require(!seen[block], "a block is in the free list twice");
    require(ref_[block] == 0, "a block in the free list has references");
    require(prev_[next_[block]] == block, "the free list's links disagree");
    seen[block] = 1;
    ++length;
  }
  require(length == num_free_, "the free list and the free count disagree");
  int64_t hashed = 0;
  for (int64_t block = 0; block < num_blocks_; ++block) {
    require(ref_[block] >= 0, "a reference count is negative");
    require(seen[block] || ref_[block] > 0, "a block without references is not free");
    if (!has_hash_[block]) continue;
    const auto found = block_of_.find(hash_[block]);
    require(found != block_of_.end() && found->second == block, "a hash points elsewhere");
    ++hashed;
  }
  require(hashed == num_cached(), "the hash map holds a hash that no block has");
}

}  // namespace fastinfer::host
