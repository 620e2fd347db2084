// Python module `_host`: what the engine does on the CPU at every step, without torch.
//
//   BlockPool, OutOfBlocks       block_pool.h
//   extend_block_hashes          block_hash.h, appended to a request's own list
//   propose_ngram                ngram.h
//
// Token lists stay Python lists and are read in place: a call touches only the tokens it needs, so
// the cost of a decode step does not grow with the length of the sequence.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "block_hash.h"
#include "block_pool.h"
#include "ngram.h"

namespace py = pybind11;
using fastinfer::host::BlockPool;
using fastinfer::host::Hash;

namespace {

Hash to_hash(const char* call, py::handle value) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (!PyBytes_Check(value.ptr()) || PyBytes_AsStringAndSize(value.ptr(), &data, &size) != 0 ||
      size != 32) {
    PyErr_Clear();
    throw py::value_error(std::string(call) + ": a hash must be bytes of length 32, got " +
                          std::string(py::repr(value)));
  }
  Hash hash;
  std::memcpy(hash.data(), data, hash.size());
  return hash;
}

py::bytes from_hash(const Hash& hash) {
  return py::bytes(reinterpret_cast<const char*>(hash.data()), hash.size());
}

int64_t token_at(const char* call, const py::list& tokens, int64_t i) {
  const int64_t token = PyLong_AsLongLong(PyList_GET_ITEM(tokens.ptr(), i));
  const bool failed = token == -1 && PyErr_Occurred();
  if (failed) PyErr_Clear();
  if (failed || token < 0 || token > std::numeric_limits<int32_t>::max()) {
    throw py::value_error(std::string(call) + ": token ids must be integers in [0, 2^31), got " +
                          std::string(py::repr(tokens[i])));
  }
  return token;
}

void extend_block_hashes(const py::list& tokens, int64_t block_size, py::list hashes,
                         const py::bytes& salt) {
  const char* call = "extend_block_hashes";
  if (block_size < 1) {
    throw py::value_error("extend_block_hashes: block_size must be at least 1, got " +
                          std::to_string(block_size));
  }
  const auto full = static_cast<int64_t>(tokens.size()) / block_size;
  auto block = static_cast<int64_t>(hashes.size());
  if (block >= full) return;
  Hash hash = block > 0 ? to_hash(call, hashes[block - 1]) : fastinfer::host::root_hash(salt);
  std::vector<int32_t> ids(block_size);
  std::vector<Hash> added;  // appended at the end, so that a bad token leaves the list alone
  for (; block < full; ++block) {
    for (int64_t i = 0; i < block_size; ++i) {
      ids[i] = static_cast<int32_t>(token_at(call, tokens, block * block_size + i));
    }
    hash = fastinfer::host::block_hash(hash, ids.data(), ids.size());
    added.push_back(hash);
  }
  for (const Hash& each : added) hashes.append(from_hash(each));
}

py::list propose_ngram(const py::list& tokens, int64_t max_n, int64_t min_n, int64_t k) {
  if (min_n < 1 || max_n < min_n || k < 0) {
    throw py::value_error("propose_ngram: expected 1 <= min_n <= max_n and k >= 0, got min_n=" +
                          std::to_string(min_n) + ", max_n=" + std::to_string(max_n) +
                          ", k=" + std::to_string(k));
  }
  const auto length = static_cast<int64_t>(tokens.size());
  const auto get = [&](int64_t i) { return token_at("propose_ngram", tokens, i); };
  const int64_t after = fastinfer::host::find_ngram(length, max_n, min_n, get);
  py::list proposal;
  if (after < 0) return proposal;
  for (int64_t i = after; i < length && i - after < k; ++i) proposal.append(py::int_(get(i)));
  return proposal;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of the engine in C++: block pool, block hashes, n-gram search.";
  py::register_exception<fastinfer::host::OutOfBlocks>(m, "OutOfBlocks", PyExc_RuntimeError);

  py::class_<BlockPool>(m, "BlockPool")
      .def(py::init<int64_t>(), py::arg("num_blocks"))
      .def_property_readonly("num_blocks", &BlockPool::num_blocks)
      .def_property_readonly("num_free", &BlockPool::num_free)
      .def_property_readonly("num_used", &BlockPool::num_used)
      .def_property_readonly("num_cached", &BlockPool::num_cached)
      .def("allocate", &BlockPool::allocate, py::arg("n"))
      .def("acquire", &BlockPool::acquire, py::arg("blocks"))
      .def("release", &BlockPool::release, py::arg("blocks"))
      .def(
          "register_hash",
          [](BlockPool& pool, int64_t block, py::handle hash) {
            return pool.register_hash(block, to_hash("BlockPool.register_hash", hash));
          },
          py::arg("block"), py::arg("hash"))
      .def(
          "match",
          [](const BlockPool& pool, const py::list& hashes, int64_t max_blocks) {
            std::vector<Hash> chain;
            for (py::handle hash : hashes) {
              if (max_blocks >= 0 && static_cast<int64_t>(chain.size()) >= max_blocks) break;
              chain.push_back(to_hash("BlockPool.match", hash));
            }
            return pool.match(chain, max_blocks);
          },
          py::arg("hashes"), py::arg("max_blocks") = -1)
      .def("clear_cache", &BlockPool::clear_cache)
      .def("ref_count", &BlockPool::ref_count, py::arg("block"))
      .def(
          "hash_of",
          [](const BlockPool& pool, int64_t block) -> py::object {
            const Hash* hash = pool.hash_of(block);
            if (hash == nullptr) return py::none();
            return from_hash(*hash);
          },
          py::arg("block"))
      .def("count_free", &BlockPool::count_free, py::arg("blocks"))
      .def("check_invariants", &BlockPool::check_invariants);

  m.def("extend_block_hashes", &extend_block_hashes, py::arg("tokens"), py::arg("block_size"),
        py::arg("hashes"), py::arg("salt") = py::bytes());
  m.def("propose_ngram", &propose_ngram, py::arg("tokens"), py::arg("max_n"), py::arg("min_n"),
        py::arg("k"));
}
