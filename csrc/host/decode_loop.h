// The loops of a decode step that run once per request.
//
// Requests stay Python objects and hold the truth; their `__slots__` are read and written in place,
// so that a request costs tens of nanoseconds instead of microseconds. Only the plain case is
// handled here: one token, no drafts, no end in sight. A call stops at the first request that is
// anything else and says where; python/fastinfer/engine/scheduler.py, which has the rules, takes
// that one and calls again. Every method may thus stop at any request, and the Python twin
// (python/fastinfer/_host_py.py) stops at the first.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "block_pool.h"

namespace fastinfer::host {

namespace py = pybind11;

// One of the `__slots__` of a Python class.
class Slot {
 public:
  Slot(py::handle type, const char* name);

  PyObject* get(PyObject* object) const;  // borrowed
  // The same without an error: null where it is not set.
  PyObject* peek(PyObject* object) const {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }
  int64_t integer(PyObject* object) const;
  Py_ssize_t length(PyObject* object) const;          // of a list
  void put(PyObject* object, PyObject* value) const;  // takes over the reference
  void put(PyObject* object, int64_t value) const;

 private:
  Py_ssize_t offset_;
  const char* name_;
};

class DecodeLoop {
 public:
  // The classes Request, RequestMetrics and ScheduledChunk, and the status of a running request.
  DecodeLoop(py::type request, py::type metrics, py::type chunk, py::object running,
             py::object pool, int64_t block_size);

  // Plans one token for each of running[begin:], at most `budget`, each with the block it needs.
  // Returns where it stopped and how many it planned; requests whose last token is in flight are
  // passed over.
  py::tuple plan(const py::list& running, int64_t begin, int64_t budget, const py::list& chunks);

  // Takes the tokens that chunks[begin:] drew, each a number or a list; returns where it stopped.
  // Requests that somebody follows go to `updated`.
  int64_t commit(const py::list& chunks, const py::list& sampled, int64_t begin, double now,
                 bool caching, const py::list& updated);

 private:
  void register_blocks(PyObject* request, int64_t computed);
  PyObject* next_chunk();  // borrowed
  void fetch_for_plan(const py::list& running, int64_t i) const;
  void fetch_for_commit(const py::list& chunks, int64_t i) const;

  py::type request_type_, metrics_type_, chunk_type_;
  py::object running_, pool_object_;
  BlockPool& pool_;
  int64_t block_size_;
  // The chunks of the last two plans, used again when nobody else holds them: making and freeing
  // them costs more than filling them, and a round of garbage collection every few steps. Two,
  // because one plan is in flight while the next is made.
  std::vector<py::object> chunks_[2];
  size_t turn_ = 0, next_ = 0;
  // of Request
  Slot tokens_, num_computed_, block_table_, block_hashes_, num_registered_, draft_tokens_,
      in_flight_, status_, max_total_, stop_ids_, metrics_, followed_;
  Slot token_times_, token_counts_;                      // of RequestMetrics
  Slot request_, start_, count_, num_drafts_, samples_;  // of ScheduledChunk
};

class DecodePacker {
 public:
  DecodePacker(py::type request, py::type chunk);

  // Whether each chunk is one token that is sampled from, of a request that wants only tokens.
  bool plain(const py::list& chunks) const;

  // Row, position and input token (-1: still on the device) of every chunk, each of one token.
  // Brings the rows of `tables` up to date with block tables that have changed since they were last
  // sent; requests of which nothing was sent yet go to `news` instead. Returns the length of the
  // longest table, and how many rows were written.
  py::tuple pack(const py::list& chunks, py::array_t<int64_t> rows, py::array_t<int64_t> starts,
                 py::array_t<int64_t> ids, py::array_t<int32_t> tables, const py::list& news) const;

  // Turns that into the columns of the step, in one pass: the input token or where the device has
  // it (`drawn_at` of the row; else `own`), position, slot of the cache, length. From now on the
  // row's token is drawn at its place in this step. Returns whether every temperature is 0.
  static bool fill(const py::array_t<int64_t>& rows, const py::array_t<int64_t>& starts,
                   const py::array_t<int64_t>& ids, const py::array_t<int64_t>& own,
                   py::array_t<int64_t> drawn_at, const py::array_t<int32_t>& tables,
                   const py::array_t<float>& temperatures, int64_t block_size,
                   const py::dict& columns);

  // The first `width` entries of these rows of `tables`, one after the other, to `out`.
  static void gather(const py::array_t<int32_t>& tables, const py::array_t<int64_t>& rows,
                     int64_t width, py::array_t<int32_t> out);

 private:
  py::type request_type_, chunk_type_;
  Slot tokens_, block_table_, in_flight_, row_, blocks_sent_, wants_only_tokens_;  // of Request
  Slot request_, start_, count_, num_drafts_, samples_;  // of ScheduledChunk
};

}  // namespace fastinfer::host
