// A recorded list of operator calls on fixed tensors, replayed without the interpreter: its lock is released for as many repeats as asked.
// Packing of weights that no call changes is done once, before them.
#include "program.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <pybind11/stl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cpu/pool.h"

namespace dwa_fast {
namespace {

namespace py = pybind11;

// Stands for the value in a slot wherever Python hands over the arguments of a call.
struct Slot {
  int64_t index;
};

class Program {
 public:
  Program() = default;
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    values_.clear();
    release_pool();
  }

  // A tensor that every repeat reads or changes in place.
  Slot hold(const at::Tensor& tensor) {
    values_.emplace_back(tensor);
    held_.push_back(true);
    return Slot{static_cast<int64_t>(values_.size()) - 1};
  }

  // One call with all arguments of the schema in order; gives the slots of its results. Made `once`, it belongs to `refresh`.
  std::vector<Slot> call(const std::string& name, const std::string& overload, const py::list& arguments, int64_t results, bool once) {
    Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, {}};
    const auto& schema = call.op.schema();
    TORCH_CHECK(arguments.size() == schema.arguments().size(), name, " takes ", schema.arguments().size(), " arguments, got ",
                arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) call.arguments.push_back(argument(arguments[i], schema.arguments()[i].real_type()));
    std::vector<Slot> slots;
    for (int64_t i = 0; i < results; ++i) {
      slots.push_back(Slot{static_cast<int64_t>(values_.size())});
      call.results.push_back(slots.back().index);
      values_.emplace_back();
      held_.push_back(once);
    }
    (once ? packing_calls_ : calls_).push_back(std::move(call));
    return slots;
  }

  // After the last call: a result is dropped right after its last use, so that memory is what an eager step would take.
  void seal() {
    std::vector<int64_t> last(values_.size(), -1);
    for (size_t i = 0; i < calls_.size(); ++i) {
      for (const auto& argument : calls_[i].arguments)
        for (const int64_t slot : argument.slots)
          if (slot >= 0) last[slot] = static_cast<int64_t>(i);
      for (const int64_t slot : calls_[i].results) last[slot] = std::max(last[slot], static_cast<int64_t>(i));
    }
    for (size_t slot = 0; slot < last.size(); ++slot)
      if (!held_[slot] && last[slot] >= 0) calls_[last[slot]].dropped.push_back(static_cast<int64_t>(slot));
  }

  // Makes the calls that pack weights; before the first repeat, and whenever the weights have changed. Not in the pool: see PoolGuard.
  void refresh() {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (const auto& call : packing_calls_) execute(call);
  }

  // Autograd has been recorded, not repeated: the calls below it are all there is to do.
  void run(int64_t times) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const PoolGuard pool;
    for (int64_t repeat = 0; repeat < times; ++repeat)
      for (const auto& call : calls_) execute(call);
  }

  int64_t size() const { return static_cast<int64_t>(calls_.size()); }  // calls of a repeat

 private:
  enum class Kind { kConstant, kValue, kTensors, kOptionalTensors };

  struct Argument {
    Kind kind;
    c10::IValue constant;
    std::vector<int64_t> slots;  // −1: None inside a list of optional tensors
  };

  struct Call {
    c10::OperatorHandle op;
    std::vector<Argument> arguments;
    std::vector<int64_t> results;
    std::vector<int64_t> dropped;
  };

  static Argument argument(const py::handle& given, const c10::TypePtr& type) {
    if (py::isinstance<Slot>(given)) return {Kind::kValue, {}, {given.cast<Slot>().index}};
    if (py::isinstance<py::list>(given) || py::isinstance<py::tuple>(given)) {
      std::vector<int64_t> slots;
      bool any = false;
      for (const auto& item : given) {
        const bool is_slot = py::isinstance<Slot>(item);
        any = any || is_slot;
        slots.push_back(is_slot ? item.cast<Slot>().index : -1);
      }
      if (any) {
        const auto element = type->castRaw<c10::ListType>()->getElementType();
        return {element->kind() == c10::TypeKind::OptionalType ? Kind::kOptionalTensors : Kind::kTensors, {}, std::move(slots)};
      }
    }
    if (type->kind() == c10::TypeKind::TensorType && (py::isinstance<py::float_>(given) || py::isinstance<py::int_>(given))) {
      // Python's numbers stand for tensors too; as such they leave the type of the other operand alone.
      at::Tensor number = at::scalar_to_tensor(torch::jit::toIValue(given, c10::NumberType::get()).toScalar());
      number.unsafeGetTensorImpl()->set_wrapped_number(true);
      return {Kind::kConstant, number, {}};
    }
    return {Kind::kConstant, torch::jit::toIValue(given, type), {}};
  }

  c10::IValue value(const Argument& argument) const {
    switch (argument.kind) {
      case Kind::kConstant:
        return argument.constant;
      case Kind::kValue:
        return values_[argument.slots[0]];
      case Kind::kTensors: {
        c10::List<at::Tensor> list;
        for (const int64_t slot : argument.slots) list.push_back(values_[slot].toTensor());
        return list;
      }
      case Kind::kOptionalTensors: {
        c10::List<std::optional<at::Tensor>> list;
        for (const int64_t slot : argument.slots)
          list.push_back(slot < 0 ? std::nullopt : std::optional<at::Tensor>(values_[slot].toTensor()));
        return list;
      }
    }
    return {};
  }

  void execute(const Call& call) {
    torch::jit::Stack stack;
    stack.reserve(std::max(call.arguments.size(), call.results.size()));
    for (const auto& argument : call.arguments) stack.push_back(value(argument));
    call.op.callBoxed(stack);
    if (stack.size() == 1 && stack[0].isTensorList()) {
      const auto list = stack[0].toTensorVector();
      stack.assign(list.begin(), list.end());
    }
    for (size_t i = 0; i < call.results.size(); ++i) values_[call.results[i]] = std::move(stack[i]);
    for (const int64_t slot : call.dropped) values_[slot] = c10::IValue();
  }

  std::vector<c10::IValue> values_;
  std::vector<bool> held_;
  std::vector<Call> packing_calls_;
  std::vector<Call> calls_;
};

}  // namespace

void register_program(pybind11::module& m) {
  m.def("pool_in_use", &pool_in_use, "Number of blocks of the pool of memory that are handed out.");
  m.def("enter_pool", &enter_pool, "From now on tensors that this thread makes on the CPU take their memory from the pool.");
  m.def("leave_pool", &leave_pool, "Undo one enter_pool of this thread.");
  m.def("release_pool", &release_pool, "Give the pool's unused memory back to the system.");
  py::class_<Slot>(m, "Slot", "The place of a value in a Program.");
  py::class_<Program>(m, "Program", "Operator calls on fixed tensors, repeated without the interpreter.")
      .def(py::init<>())
      .def("hold", &Program::hold, "A tensor that every repeat reads or changes in place.")
      .def("call", &Program::call, "Append one call; gives the slots of its results.")
      .def("seal", &Program::seal, "Decide when each result is dropped; after the last call.")
      .def("refresh", &Program::refresh, py::call_guard<py::gil_scoped_release>(), "Make the calls that pack weights anew.")
      .def("run", &Program::run, py::call_guard<py::gil_scoped_release>(), "Repeat all calls that many times.")
      .def_property_readonly("size", &Program::size, "Number of calls of a repeat.");
}

}  // namespace dwa_fast
