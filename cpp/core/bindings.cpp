// pop_ext._core: the Python binding of the torch-free core. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <type_traits>
#include <vector>

#include "core/bind_interrupts.h"
#include "core/cost.h"
#include "core/model_spec.h"
#include "core/plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace pop {

namespace {

py::tuple as_tuple(const std::vector<int64_t>& values) { return py::tuple(py::cast(values)); }

py::tuple as_ranges(const std::vector<LayerRange>& runs) {
  const py::object range = py::module_::import("builtins").attr("range");
  py::list ranges;
  for (const LayerRange& run : runs) ranges.append(range(run.begin, run.end));
  return py::tuple(ranges);
}

// Sets a field from a Python object; TypeError for an object of another type.
template <class T>
void assign(const char* name, T& field, const py::handle& value) {
  try {
    if constexpr (std::is_same_v<T, DType>) {
      field = parse_dtype(value.cast<std::string>());
    } else if constexpr (std::is_same_v<T, Activation>) {
      field = parse_activation(value.cast<std::string>());
    } else if constexpr (std::is_same_v<T, RouterScores>) {
      field = parse_router_scores(value.cast<std::string>());
    } else {
      field = value.cast<T>();
    }
  } catch (const py::cast_error&) {
    constexpr const char* expected = std::is_same_v<T, int64_t>                ? "an integer"
                                     : std::is_same_v<T, double>               ? "a number"
                                     : std::is_same_v<T, bool>                 ? "a bool"
                                     : std::is_same_v<T, std::vector<int64_t>> ? "a sequence of integers"
                                                                               : "a str";
    throw py::type_error(std::string(name) + ": expected " + expected + ", got " + std::string(py::repr(value)));
  }
}

ModelSpec make_spec(const py::kwargs& given) {
  ModelSpec spec;
  std::vector<std::string> derived;
  size_t known = 0;
  ModelSpec::for_each_field([&](const char* name, auto member, Default default_value, Range) {
    const bool is_given = given.contains(name);
    known += is_given ? 1 : 0;
    if (is_given && !(default_value == Default::derived && given[name].is_none())) {
      assign(name, spec.*member, given[name]);
    } else if (default_value == Default::none) {
      throw py::type_error(std::string("ModelSpec: ") + name + ": expected a value, got none");
    } else if (default_value == Default::derived) {
      derived.push_back(name);
    }
  });
  if (known != given.size()) {
    for (const auto& [key, value] : given) {
      const std::string name = py::str(key);
      bool is_field = false;
      ModelSpec::for_each_field([&](const char* field, auto, Default, Range) { is_field = is_field || name == field; });
      if (!is_field) throw py::type_error("ModelSpec: expected the name of a field, got " + name);
    }
  }
  for (const std::string& name : derived) spec.fill_derived(name);
  spec.validate();
  return spec;
}

// The Python value of a field: enums become their names, lists become tuples.
template <class T>
py::object as_python(const T& value) {
  if constexpr (std::is_enum_v<T>) {
    return py::str(to_string(value));
  } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
    return as_tuple(value);
  } else {
    return py::cast(value);
  }
}

void bind_model_spec(py::module_& m) {
  py::class_<ModelSpec> cls(m, "ModelSpec", "The shape of a decoder-only transformer.");
  ModelSpec::for_each_field([&](const char* name, auto member, Default, Range) {
    cls.def_property_readonly(name, [member](const ModelSpec& spec) { return as_python(spec.*member); });
  });
  cls.def(py::init(&make_spec), "Make a spec from its fields, by name. ValueError names a field that is out of range.")
      .def_property_readonly("q_dim", &ModelSpec::q_dim)
      .def_property_readonly("kv_dim", &ModelSpec::kv_dim)
      .def("weight_slots",
           [](const ModelSpec& spec) {
             py::list slots;
             for (const WeightSlot& slot : spec.weight_slots()) {
               slots.append(py::make_tuple(slot.name, slot.layer, as_tuple(slot.shape)));
             }
             return slots;
           })
      .def("to_json", &ModelSpec::to_json)
      .def_static("from_json", &ModelSpec::from_json, "text"_a)
      .def("__repr__", [](const ModelSpec& spec) { return "ModelSpec(" + spec.to_json() + ")"; })
      .def(
          "__eq__", [](const ModelSpec& a, const ModelSpec& b) { return a.to_json() == b.to_json(); },
          py::is_operator())
      .def("__hash__", [](const ModelSpec& spec) { return py::hash(py::str(spec.to_json())); })
      .def(py::pickle([](const ModelSpec& spec) { return spec.to_json(); }, &ModelSpec::from_json));
}

// pop_ext.Plan derives from this class and adds conversions, presets and files.
void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", "The layers that prefill omits, and the number of boundary rows that run at full depth.")
      .def(py::init([](int64_t num_layers, std::vector<int64_t> omit, int64_t boundary, int64_t min_tokens) {
             Plan plan{num_layers, std::move(omit), boundary, min_tokens};
             plan.validate();
             return plan;
           }),
           "num_layers"_a, "omit"_a, "boundary"_a = 1, "min_tokens"_a = 0)
      .def_readonly("num_layers", &Plan::num_layers)
      .def_property_readonly("omit", [](const Plan& plan) { return as_tuple(plan.omit); })
      .def_readonly("boundary", &Plan::boundary)
      .def_readonly("min_tokens", &Plan::min_tokens)
      .def_property_readonly("runs", [](const Plan& plan) { return as_ranges(plan.runs()); })
      .def_property_readonly("projected_runs", [](const Plan& plan) { return as_ranges(plan.projected_runs()); })
      .def("to_json", &Plan::to_json)
      .def_static("from_json", &Plan::from_json, "text"_a);
}

py::dict as_dict(const Cost& cost) { return py::dict("flops"_a = cost.flops, "bytes"_a = cost.bytes); }

py::dict as_dict(const std::vector<StageCost>& stages) {
  py::dict by_stage;
  for (const StageCost& stage : stages) by_stage[py::str(stage.stage)] = as_dict(stage.cost);
  py::dict result = as_dict(total(stages));
  result["stages"] = by_stage;
  return result;
}

void bind_cost(py::module_& m) {
  py::class_<SequenceShape>(m, "SequenceShape", "The lengths of one sequence of a batch, in tokens.")
      .def(py::init([](int64_t tokens, int64_t past, int64_t boundary, int64_t logits_to_keep) {
             return SequenceShape{tokens, past, boundary, logits_to_keep};
           }),
           "tokens"_a, py::kw_only(), "past"_a = 0, "boundary"_a = 1, "logits_to_keep"_a = 1)
      .def_readonly("tokens", &SequenceShape::tokens)
      .def_readonly("past", &SequenceShape::past)
      .def_readonly("boundary", &SequenceShape::boundary)
      .def_readonly("logits_to_keep", &SequenceShape::logits_to_keep);

  m.def(
      "stock_cost",
      [](const ModelSpec& spec, const std::vector<SequenceShape>& batch) { return as_dict(stock_cost(spec, batch)); },
      "spec"_a, "batch"_a,
      "Return the work of Hugging Face's full prefill: {flops, bytes, stages: {name: {flops, bytes}}}.");
  m.def(
      "plan_cost",
      [](const ModelSpec& spec, const Plan& plan, const std::vector<SequenceShape>& batch) {
        return as_dict(plan_cost(spec, plan, batch));
      },
      "spec"_a, "plan"_a, "batch"_a, "Return the work of the native runtime for a plan, in the form of stock_cost.");
}

}  // namespace

}  // namespace pop

PYBIND11_MODULE(_core, m) {
  m.doc() = "The torch-free core of pop_ext: model specs, plans and what they cost.";
  m.attr("__version__") = POP_VERSION;
  m.def(
      "build_info",
      [] {
        return py::dict("version"_a = POP_VERSION, "torch_headers"_a = POP_TORCH_HEADERS, "cuda"_a = POP_CUDA_VERSION,
                        "compiler"_a = POP_COMPILER);
      },
      "Return the versions of the build; \"cuda\" is empty in a build without CUDA kernels.");
  pop::bind_model_spec(m);
  pop::bind_plan(m);
  pop::bind_cost(m);
  pop::bind_interrupts(m);
}
