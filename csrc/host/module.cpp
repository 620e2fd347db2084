// Python module `_host`: what the engine does on the CPU at every step, without torch.
//
//   BlockPool, OutOfBlocks       block_pool.h
//   extend_block_hashes          block_hash.h, appended to a request's own list
//   DecodeLoop, DecodePacker     decode_loop.h
//   propose_ngram                ngram.h
//
// Token lists stay Python lists and are read in place: a call touches only the tokens it needs, so
// the cost of a decode step does not grow with the length of the sequence.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_pool.h"
#include "decode_loop.h"
#include "ngram.h"
#include "python_lists.h"

namespace py = pybind11;
using fastinfer::host::BlockPool;
using fastinfer::host::DecodeLoop;
using fastinfer::host::DecodePacker;
using fastinfer::host::from_hash;
using fastinfer::host::Hash;
using fastinfer::host::to_hash;
using fastinfer::host::token_at;

namespace {

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
  m.doc() = "Host side of the engine in C++: block pool, block hashes, decode loop, n-gram search.";
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

  py::class_<DecodeLoop>(m, "DecodeLoop")
      .def(py::init<py::type, py::type, py::type, py::object, py::object, int64_t>(),
           py::arg("request"), py::arg("metrics"), py::arg("chunk"), py::arg("running"),
           py::arg("pool"), py::arg("block_size"))
      .def("plan", &DecodeLoop::plan, py::arg("running"), py::arg("begin"), py::arg("budget"),
           py::arg("chunks"))
      .def("commit", &DecodeLoop::commit, py::arg("chunks"), py::arg("sampled"), py::arg("begin"),
           py::arg("now"), py::arg("caching"), py::arg("updated"));
  py::class_<DecodePacker>(m, "DecodePacker")
      .def(py::init<py::type, py::type>(), py::arg("request"), py::arg("chunk"))
      .def("plain", &DecodePacker::plain, py::arg("chunks"))
      .def("pack", &DecodePacker::pack, py::arg("chunks"), py::arg("rows").noconvert(),
           py::arg("starts").noconvert(), py::arg("ids").noconvert(), py::arg("tables").noconvert(),
           py::arg("news"))
      .def_static("fill", &DecodePacker::fill, py::arg("rows").noconvert(),
                  py::arg("starts").noconvert(), py::arg("ids").noconvert(),
                  py::arg("own").noconvert(), py::arg("drawn_at").noconvert(),
                  py::arg("tables").noconvert(), py::arg("temperatures").noconvert(),
                  py::arg("block_size"), py::arg("columns"))
      .def_static("gather", &DecodePacker::gather, py::arg("tables").noconvert(),
                  py::arg("rows").noconvert(), py::arg("width"), py::arg("out").noconvert());

  m.def("extend_block_hashes", &fastinfer::host::extend_block_hashes, py::arg("tokens"),
        py::arg("block_size"), py::arg("hashes"), py::arg("salt") = py::bytes());
  m.def("propose_ngram", &propose_ngram, py::arg("tokens"), py::arg("max_n"), py::arg("min_n"),
        py::arg("k"));
}
