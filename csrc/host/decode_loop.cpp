// See decode_loop.h. Borrowed references throughout: nothing here runs Python code while it holds
// one, but for the hashes of a block that has just become full.
#include "decode_loop.h"

#include <structmember.h>

#include <string>

#include "python_lists.h"

namespace fastinfer::host {
namespace {

[[noreturn]] void wrong_type(const std::string& what, py::handle got) {
  throw py::type_error("DecodeLoop: " + what + ", got " + std::string(py::repr(got)));
}

void append(PyObject* list, PyObject* value) {  // takes over the reference
  const int failed = PyList_Append(list, value);
  Py_DECREF(value);
  if (failed) throw py::error_already_set();
}

// list[i], which must be of the type.
PyObject* item(const py::list& list, int64_t i, const py::type& type) {
  PyObject* object = PyList_GET_ITEM(list.ptr(), i);
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type.ptr())))
    wrong_type("the list must hold objects of " + std::string(py::str(py::handle(type))), object);
  return object;
}

PyObject* owned(PyObject* value) {
  if (value == nullptr) throw py::error_already_set();
  return value;
}

// Requests lie all over the heap, and by the next step other programs have had the caches: some 20
// lines of each come from memory. The loops ask for them so many requests ahead, in as many rounds
// as pointers have to be followed.
constexpr int64_t kFar = 12, kMiddle = 8, kNear = 4;

void fetch(const void* address) { __builtin_prefetch(address); }

void fetch(PyObject* object, Py_ssize_t size) {
  const char* begin = reinterpret_cast<const char*>(object);
  for (Py_ssize_t i = 0; i < size; i += 64) fetch(begin + i);
}

// Where the next item of a list will be written.
void fetch_end(PyObject* list) {
  if (list != nullptr && PyList_Check(list))
    fetch(reinterpret_cast<PyListObject*>(list)->ob_item + PyList_GET_SIZE(list));
}

PyObject* item_of(const py::list& list, int64_t i, const py::type& type) {
  if (i >= static_cast<int64_t>(list.size())) return nullptr;
  PyObject* object = PyList_GET_ITEM(list.ptr(), i);
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(type.ptr()) ? object : nullptr;
}

}  // namespace

Slot::Slot(py::handle type, const char* name) : name_(name) {
  const py::object found = py::getattr(type, name, py::none());
  if (!Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type))
    wrong_type(std::string(name) + " must be one of the __slots__", type);
  const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
  if (member->type != T_OBJECT_EX) wrong_type(std::string(name) + " must hold an object", type);
  offset_ = member->offset;
}

PyObject* Slot::get(PyObject* object) const {
  PyObject* value = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  if (value == nullptr)
    wrong_type(std::string(name_) + " must be set", py::type::handle_of(object));
  return value;
}

int64_t Slot::integer(PyObject* object) const {
  const int64_t value = PyLong_AsLongLong(get(object));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

Py_ssize_t Slot::length(PyObject* object) const {
  PyObject* list = get(object);
  if (!PyList_Check(list)) wrong_type(std::string(name_) + " must be a list", list);
  return PyList_GET_SIZE(list);
}

void Slot::put(PyObject* object, PyObject* value) const {
  auto& slot = *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  PyObject* before = slot;
  slot = owned(value);
  Py_XDECREF(before);
}

void Slot::put(PyObject* object, int64_t value) const { put(object, PyLong_FromLongLong(value)); }

DecodeLoop::DecodeLoop(py::type request, py::type metrics, py::type chunk, py::object running,
                       py::object pool, int64_t block_size)
    : request_type_(request),
      metrics_type_(metrics),
      chunk_type_(chunk),
      running_(std::move(running)),
      pool_object_(pool),
      pool_(pool.cast<BlockPool&>()),
      block_size_(block_size),
      tokens_(request, "tokens"),
      num_computed_(request, "num_computed"),
      block_table_(request, "block_table"),
      block_hashes_(request, "block_hashes"),
      num_registered_(request, "num_registered"),
      draft_tokens_(request, "draft_tokens"),
      in_flight_(request, "in_flight"),
      status_(request, "status"),
      max_total_(request, "max_total_tokens"),
      stop_ids_(request, "stop_ids"),
      metrics_(request, "metrics"),
      followed_(request, "followed"),
      token_times_(metrics, "token_times"),
      token_counts_(metrics, "token_counts"),
      request_(chunk, "request"),
      start_(chunk, "start"),
      count_(chunk, "count"),
      num_drafts_(chunk, "num_drafts"),
      samples_(chunk, "samples") {}

py::tuple DecodeLoop::plan(const py::list& running, int64_t begin, int64_t budget,
                           const py::list& chunks) {
  const auto size = static_cast<int64_t>(running.size());
  int64_t planned = 0, i = begin;
  if (begin == 0) turn_ ^= 1, next_ = 0;  // a new plan
  for (int64_t first = begin - kFar; first < begin; ++first) fetch_for_plan(running, first);
  for (; i < size && planned < budget; ++i) {
    fetch_for_plan(running, i);
    PyObject* request = item(running, i, request_type_);
    if (status_.get(request) != running_.ptr() || draft_tokens_.length(request) != 0) break;
    const int64_t in_flight = in_flight_.integer(request);
    const int64_t known = tokens_.length(request) + in_flight;
    if (known >= max_total_.integer(request)) continue;
    const int64_t computed = num_computed_.integer(request);
    if (known - computed != 1) break;
    if (computed >= block_table_.length(request) * block_size_) {
      if (pool_.num_free() < 1) break;
      append(block_table_.get(request), owned(PyLong_FromLongLong(pool_.allocate(1)[0])));
    }
    PyObject* chunk = next_chunk();
    request_.put(chunk, Py_NewRef(request));
    start_.put(chunk, Py_NewRef(num_computed_.get(request)));
    count_.put(chunk, 1);
    num_drafts_.put(chunk, int64_t{0});
    samples_.put(chunk, Py_NewRef(Py_True));
    append(chunks.ptr(), Py_NewRef(chunk));
    num_computed_.put(request, known);
    in_flight_.put(request, in_flight + 1);
    ++planned;
  }
  return py::make_tuple(i, planned);
}

PyObject* DecodeLoop::next_chunk() {
  std::vector<py::object>& made = chunks_[turn_];
  if (next_ == made.size()) made.emplace_back();
  py::object& chunk = made[next_++];
  if (!chunk || Py_REFCNT(chunk.ptr()) != 1) {
    auto* type = reinterpret_cast<PyTypeObject*>(chunk_type_.ptr());
    chunk = py::reinterpret_steal<py::object>(owned(type->tp_alloc(type, 0)));
  }
  return chunk.ptr();
}

int64_t DecodeLoop::commit(const py::list& chunks, const py::list& sampled, int64_t begin,
                           double now, bool caching, const py::list& updated) {
  const auto size = static_cast<int64_t>(chunks.size());
  if (static_cast<int64_t>(sampled.size()) != size)
    throw py::value_error("DecodeLoop.commit: there must be tokens for every chunk");
  const py::object time = py::float_(now), one = py::int_(1);
  int64_t i = begin;
  for (int64_t first = begin - kFar; first < begin; ++first) fetch_for_commit(chunks, first);
  for (; i < size; ++i) {
    fetch_for_commit(chunks, i);
    PyObject* chunk = item(chunks, i, chunk_type_);
    PyObject* request = request_.get(chunk);
    PyObject* token = PyList_GET_ITEM(sampled.ptr(), i);
    if (PyList_Check(token)) {
      if (PyList_GET_SIZE(token) != 1) break;
      token = PyList_GET_ITEM(token, 0);
    }
    if (status_.get(request) != running_.ptr() || samples_.get(chunk) != Py_True ||
        num_drafts_.integer(chunk) != 0 || draft_tokens_.length(request) != 0)
      break;
    if (tokens_.length(request) + 1 >= max_total_.integer(request)) break;
    const int stops = PyDict_Contains(stop_ids_.get(request), token);
    if (stops < 0) throw py::error_already_set();
    if (stops) break;
    append(tokens_.get(request), Py_NewRef(token));
    in_flight_.put(request, in_flight_.integer(request) - 1);
    PyObject* metrics = metrics_.get(request);
    append(token_times_.get(metrics), Py_NewRef(time.ptr()));
    append(token_counts_.get(metrics), Py_NewRef(one.ptr()));
    const int64_t computed = start_.integer(chunk) + count_.integer(chunk);
    if (caching && computed >= (num_registered_.integer(request) + 1) * block_size_)
      register_blocks(request, computed);
    if (followed_.get(request) == Py_True) append(updated.ptr(), Py_NewRef(request));
  }
  return i;
}

void DecodeLoop::fetch_for_plan(const py::list& running, int64_t i) const {
  if (i + kFar >= 0 && i + kFar < static_cast<int64_t>(running.size()))
    fetch(PyList_GET_ITEM(running.ptr(), i + kFar),
          reinterpret_cast<PyTypeObject*>(request_type_.ptr())->tp_basicsize);
  if (i + kMiddle < 0) return;
  PyObject* request = item_of(running, i + kMiddle, request_type_);
  if (request == nullptr) return;
  for (const Slot* slot : {&tokens_, &block_table_, &draft_tokens_, &num_computed_, &max_total_,
                           &stop_ids_, &metrics_})
    fetch(slot->peek(request));
}

void DecodeLoop::fetch_for_commit(const py::list& chunks, int64_t i) const {
  const auto request_at = [&](int64_t at) -> PyObject* {
    PyObject* chunk = at < 0 ? nullptr : item_of(chunks, at, chunk_type_);
    PyObject* request = chunk == nullptr ? nullptr : request_.peek(chunk);
    const auto* type = reinterpret_cast<PyTypeObject*>(request_type_.ptr());
    return request != nullptr && Py_TYPE(request) == type ? request : nullptr;
  };
  const auto metrics_at = [&](PyObject* request) -> PyObject* {
    PyObject* metrics = request == nullptr ? nullptr : metrics_.peek(request);
    const auto* type = reinterpret_cast<PyTypeObject*>(metrics_type_.ptr());
    return metrics != nullptr && Py_TYPE(metrics) == type ? metrics : nullptr;
  };
  PyObject* far = request_at(i + kFar);
  if (far != nullptr) {
    fetch_end(tokens_.peek(far));
    fetch(stop_ids_.peek(far));
    fetch(metrics_.peek(far), reinterpret_cast<PyTypeObject*>(metrics_type_.ptr())->tp_basicsize);
  }
  if (PyObject* metrics = metrics_at(request_at(i + kMiddle))) {
    fetch(token_times_.peek(metrics));
    fetch(token_counts_.peek(metrics));
  }
  if (PyObject* metrics = metrics_at(request_at(i + kNear))) {
    fetch_end(token_times_.peek(metrics));
    fetch_end(token_counts_.peek(metrics));
  }
}

void DecodeLoop::register_blocks(PyObject* request, int64_t computed) {
  const auto list = [&](const Slot& slot) {
    slot.length(request);  // (that it is a list)
    return py::reinterpret_borrow<py::list>(slot.get(request));
  };
  const py::list hashes = list(block_hashes_), table = list(block_table_);
  extend_block_hashes(list(tokens_), block_size_, hashes, py::bytes());
  const int64_t full = computed / block_size_;
  for (int64_t i = num_registered_.integer(request); i < full; ++i)
    pool_.register_hash(table[i].cast<int64_t>(),
                        to_hash("DecodeLoop.commit", py::object(hashes[i])));
  num_registered_.put(request, full);
}

DecodePacker::DecodePacker(py::type request, py::type chunk)
    : request_type_(request),
      chunk_type_(chunk),
      tokens_(request, "tokens"),
      block_table_(request, "block_table"),
      in_flight_(request, "in_flight"),
      row_(request, "row"),
      blocks_sent_(request, "blocks_sent"),
      wants_only_tokens_(request, "wants_only_tokens"),
      request_(chunk, "request"),
      start_(chunk, "start"),
      count_(chunk, "count"),
      num_drafts_(chunk, "num_drafts"),
      samples_(chunk, "samples") {}

bool DecodePacker::plain(const py::list& chunks) const {
  const auto size = static_cast<int64_t>(chunks.size());
  for (int64_t i = 0; i < size; ++i) {
    PyObject* chunk = item(chunks, i, chunk_type_);
    if (count_.integer(chunk) != 1 || num_drafts_.integer(chunk) != 0 ||
        samples_.get(chunk) != Py_True || wants_only_tokens_.get(request_.get(chunk)) != Py_True)
      return false;
  }
  return true;
}

py::tuple DecodePacker::pack(const py::list& chunks, py::array_t<int64_t> rows,
                             py::array_t<int64_t> starts, py::array_t<int64_t> ids,
                             py::array_t<int32_t> tables, const py::list& news) const {
  const auto size = static_cast<int64_t>(chunks.size());
  if (rows.size() < size || starts.size() < size || ids.size() < size)
    throw py::value_error("DecodePacker.pack: the arrays must hold one number per chunk");
  int64_t *row = rows.mutable_data(), *start = starts.mutable_data(), *id = ids.mutable_data();
  auto table = tables.mutable_unchecked<2>();
  int64_t width = 0, written = 0;
  for (int64_t i = 0; i < size; ++i) {
    PyObject* chunk = item(chunks, i, chunk_type_);
    PyObject* request = request_.get(chunk);
    row[i] = row_.integer(request);
    start[i] = start_.integer(chunk);
    // A second token in flight is this step's own; the first is on the device only.
    const int64_t known = tokens_.length(request);
    id[i] = -1;
    if (in_flight_.integer(request) <= 1 && known > 0) {
      id[i] = PyLong_AsLongLong(PyList_GET_ITEM(tokens_.get(request), known - 1));
      if (id[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    }
    const int64_t have = block_table_.length(request), sent = blocks_sent_.integer(request);
    if (have > width) width = have;
    if (have == sent) continue;
    if (sent == 0) {
      append(news.ptr(), Py_NewRef(request));
      continue;
    }
    if (row[i] < 0 || row[i] >= table.shape(0) || sent < 0 || have > table.shape(1))
      throw py::value_error("DecodePacker.pack: a row or block table is not in the tables");
    for (int64_t at = sent; at < have; ++at) {
      const int64_t block = PyLong_AsLongLong(PyList_GET_ITEM(block_table_.get(request), at));
      if (block == -1 && PyErr_Occurred()) throw py::error_already_set();
      table(row[i], at) = static_cast<int32_t>(block);
    }
    blocks_sent_.put(request, have);
    ++written;
  }
  return py::make_tuple(width, written);
}

namespace {

// columns[name], for at least `count` numbers; written to, so no copy is made.
template <class T>
T* column(const py::dict& columns, const char* name, int64_t count) {
  const py::object found = columns[name];
  if (!py::isinstance<py::array_t<T>>(found))
    wrong_type(std::string("column ") + name + " must be an array of its type", found);
  auto array = py::reinterpret_borrow<py::array_t<T>>(found);
  if (array.ndim() != 1 || array.size() < count || array.strides(0) != sizeof(T))
    throw py::value_error(std::string("DecodePacker.fill: column ") + name +
                          " must hold one number per chunk");
  return array.mutable_data();
}

}  // namespace

bool DecodePacker::fill(const py::array_t<int64_t>& rows, const py::array_t<int64_t>& starts,
                        const py::array_t<int64_t>& ids, const py::array_t<int64_t>& own,
                        py::array_t<int64_t> drawn_at, const py::array_t<int32_t>& tables,
                        const py::array_t<float>& temperatures, int64_t block_size,
                        const py::dict& columns) {
  const int64_t count = rows.size();
  if (starts.size() < count || ids.size() < count || own.size() < count)
    throw py::value_error("DecodePacker.fill: the arrays must hold one number per chunk");
  const auto row = rows.unchecked<1>(), start = starts.unchecked<1>(), id = ids.unchecked<1>(),
             mine = own.unchecked<1>();
  auto drawn = drawn_at.mutable_unchecked<1>();
  const auto table = tables.unchecked<2>();
  const auto temperature = temperatures.unchecked<1>();
  int64_t* input_ids = column<int64_t>(columns, "input_ids", count);
  int64_t* source = column<int64_t>(columns, "source", count);
  int64_t* positions = column<int64_t>(columns, "positions", count);
  int64_t* slots = column<int64_t>(columns, "slots", count);
  int32_t* seq_lens = column<int32_t>(columns, "seq_lens", count);
  float* temperature_of = column<float>(columns, "temperature", count);
  bool greedy = true;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = row(i), at = start(i), block = at / block_size;
    if (r < 0 || r >= drawn.shape(0) || r >= table.shape(0) || r >= temperature.shape(0) ||
        at < 0 || block >= table.shape(1))
      throw py::value_error("DecodePacker.fill: a row or position is not in the tables");
    input_ids[i] = id(i);
    source[i] = id(i) < 0 ? drawn(r) : mine(i);
    positions[i] = at;
    slots[i] = int64_t{table(r, block)} * block_size + at % block_size;
    seq_lens[i] = static_cast<int32_t>(at + 1);
    temperature_of[i] = temperature(r);
    greedy = greedy && temperature(r) == 0;
  }
  for (int64_t i = 0; i < count; ++i) drawn(row(i)) = i;
  return greedy;
}

void DecodePacker::gather(const py::array_t<int32_t>& tables, const py::array_t<int64_t>& rows,
                          int64_t width, py::array_t<int32_t> out) {
  const int64_t count = rows.size();
  const auto row = rows.unchecked<1>();
  const auto table = tables.unchecked<2>();
  auto to = out.mutable_unchecked<1>();
  if (width < 0 || width > table.shape(1) || count * width > to.shape(0))
    throw py::value_error("DecodePacker.gather: the tables or their target are too small");
  for (int64_t i = 0; i < count; ++i) {
    if (row(i) < 0 || row(i) >= table.shape(0))
      throw py::value_error("DecodePacker.gather: a row is not in the tables");
    for (int64_t at = 0; at < width; ++at) to(i * width + at) = table(row(i), at);
  }
}

}  // namespace fastinfer::host
