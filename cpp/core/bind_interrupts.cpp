#include "core/bind_interrupts.h"

#include <cstdint>

namespace py = pybind11;

namespace pop {

namespace {

unsigned long main_thread = 0;  // Python runs signal handlers in no other
PyObject* raised = nullptr;     // by a handler; the interpreter's lock guards it

// For callers of a raw operator, which see a RuntimeError: raises the exception itself at the next bytecode of the main
// thread, unless Python's wrappers have taken it.
int raise_later(void*) {
  PyObject* exception = raised;
  if (exception == nullptr) return 0;
  raised = nullptr;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception)), exception);
  Py_DECREF(exception);
  return -1;
}

// Runs the handlers of signals that have arrived. Not 0: one of them raised an exception, which is kept in `raised`.
int check_interrupt() {
  if (PyThread_get_thread_ident() != main_thread) return 0;
  const PyGILState_STATE state = PyGILState_Ensure();
  const int failed = PyErr_CheckSignals();
  if (failed != 0) {
    PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    Py_XDECREF(raised);
    raised = value;
    Py_AddPendingCall(&raise_later, nullptr);
  }
  PyGILState_Release(state);
  return failed;
}

}  // namespace

void bind_interrupts(py::module_& m) {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  m.def(
      "interrupt_check", [] { return reinterpret_cast<int64_t>(&check_interrupt); },
      "Return the address of the function that operators poll during a long call.");
  m.def(
      "take_interrupt",
      [] {
        PyObject* taken = raised;
        raised = nullptr;
        return taken == nullptr ? py::object(py::none()) : py::reinterpret_steal<py::object>(taken);
      },
      "Return the exception that a signal handler raised during the latest operator call that it ended, once.");
}

}  // namespace pop
