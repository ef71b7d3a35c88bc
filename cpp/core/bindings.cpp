// pop_ext._core: what Python sees of the torch-free core. std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

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

ModelSpec make_spec(std::string architecture, const std::string& dtype, int64_t num_layers, int64_t hidden_size,
                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t intermediate_size,
                    int64_t vocab_size, std::optional<int64_t> rotary_dim, double rms_norm_eps,
                    std::optional<double> attention_scale, const std::string& activation, bool qkv_bias, bool o_bias,
                    bool mlp_bias, bool qk_norm, bool qk_norm_over_heads, double norm_weight_offset, bool input_norms,
                    bool output_norms, double embed_scale, double attention_softcap,
                    std::optional<std::vector<int64_t>> window, std::optional<std::vector<int64_t>> rope_table,
                    std::optional<std::vector<int64_t>> sparse, int64_t num_experts, int64_t experts_per_token,
                    int64_t moe_intermediate_size, bool norm_topk) {
  ModelSpec spec;
  spec.architecture = std::move(architecture);
  spec.dtype = parse_dtype(dtype);
  spec.num_layers = num_layers;
  spec.hidden_size = hidden_size;
  spec.num_heads = num_heads;
  spec.num_kv_heads = num_kv_heads;
  spec.head_dim = head_dim;
  spec.intermediate_size = intermediate_size;
  spec.vocab_size = vocab_size;
  spec.rotary_dim = rotary_dim.value_or(head_dim);
  spec.rms_norm_eps = rms_norm_eps;
  spec.attention_scale = attention_scale.value_or(std::pow(static_cast<double>(head_dim), -0.5));
  spec.activation = parse_activation(activation);
  spec.qkv_bias = qkv_bias;
  spec.o_bias = o_bias;
  spec.mlp_bias = mlp_bias;
  spec.qk_norm = qk_norm;
  spec.qk_norm_over_heads = qk_norm_over_heads;
  spec.norm_weight_offset = norm_weight_offset;
  spec.input_norms = input_norms;
  spec.output_norms = output_norms;
  spec.embed_scale = embed_scale;
  spec.attention_softcap = attention_softcap;
  const std::vector<int64_t> zeros(num_layers > 0 ? num_layers : 0, 0);
  spec.window = window ? *std::move(window) : zeros;
  spec.rope_table = rope_table ? *std::move(rope_table) : zeros;
  spec.sparse = sparse ? *std::move(sparse) : zeros;
  spec.num_experts = num_experts;
  spec.experts_per_token = experts_per_token;
  spec.moe_intermediate_size = moe_intermediate_size;
  spec.norm_topk = norm_topk;
  spec.validate();
  return spec;
}

void bind_model_spec(py::module_& m) {
  py::class_<ModelSpec>(m, "ModelSpec", "What a decoder-only transformer looks like.")
      .def(py::init(&make_spec), py::kw_only(), "architecture"_a, "dtype"_a, "num_layers"_a, "hidden_size"_a,
           "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "intermediate_size"_a, "vocab_size"_a,
           "rotary_dim"_a = py::none(), "rms_norm_eps"_a = 1e-6, "attention_scale"_a = py::none(),
           "activation"_a = "silu", "qkv_bias"_a = false, "o_bias"_a = false, "mlp_bias"_a = false, "qk_norm"_a = false,
           "qk_norm_over_heads"_a = false, "norm_weight_offset"_a = 0.0, "input_norms"_a = true,
           "output_norms"_a = false, "embed_scale"_a = 1.0, "attention_softcap"_a = 0.0, "window"_a = py::none(),
           "rope_table"_a = py::none(), "sparse"_a = py::none(), "num_experts"_a = 0, "experts_per_token"_a = 0,
           "moe_intermediate_size"_a = 0, "norm_topk"_a = false)
      .def_readonly("architecture", &ModelSpec::architecture)
      .def_property_readonly("dtype", [](const ModelSpec& spec) { return to_string(spec.dtype); })
      .def_readonly("num_layers", &ModelSpec::num_layers)
      .def_readonly("hidden_size", &ModelSpec::hidden_size)
      .def_readonly("num_heads", &ModelSpec::num_heads)
      .def_readonly("num_kv_heads", &ModelSpec::num_kv_heads)
      .def_readonly("head_dim", &ModelSpec::head_dim)
      .def_readonly("rotary_dim", &ModelSpec::rotary_dim)
      .def_readonly("intermediate_size", &ModelSpec::intermediate_size)
      .def_readonly("vocab_size", &ModelSpec::vocab_size)
      .def_readonly("rms_norm_eps", &ModelSpec::rms_norm_eps)
      .def_readonly("attention_scale", &ModelSpec::attention_scale)
      .def_property_readonly("activation", [](const ModelSpec& spec) { return to_string(spec.activation); })
      .def_readonly("qkv_bias", &ModelSpec::qkv_bias)
      .def_readonly("o_bias", &ModelSpec::o_bias)
      .def_readonly("mlp_bias", &ModelSpec::mlp_bias)
      .def_readonly("qk_norm", &ModelSpec::qk_norm)
      .def_readonly("qk_norm_over_heads", &ModelSpec::qk_norm_over_heads)
      .def_readonly("norm_weight_offset", &ModelSpec::norm_weight_offset)
      .def_readonly("input_norms", &ModelSpec::input_norms)
      .def_readonly("output_norms", &ModelSpec::output_norms)
      .def_readonly("embed_scale", &ModelSpec::embed_scale)
      .def_readonly("attention_softcap", &ModelSpec::attention_softcap)
      .def_property_readonly("rope_table", [](const ModelSpec& spec) { return as_tuple(spec.rope_table); })
      .def_property_readonly("sparse", [](const ModelSpec& spec) { return as_tuple(spec.sparse); })
      .def_readonly("num_experts", &ModelSpec::num_experts)
      .def_readonly("experts_per_token", &ModelSpec::experts_per_token)
      .def_readonly("moe_intermediate_size", &ModelSpec::moe_intermediate_size)
      .def_readonly("norm_topk", &ModelSpec::norm_topk)
      .def_property_readonly("window", [](const ModelSpec& spec) { return as_tuple(spec.window); })
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

// pop_ext.Plan derives from it and adds what is Python's: conversions, presets, files.
void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", "Which layers prefill omits, and for how many last rows it does not.")
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
  py::class_<SequenceShape>(m, "SequenceShape", "One sequence of a batch: row and position counts.")
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
      "spec"_a, "batch"_a, "Work of Hugging Face's full prefill: {flops, bytes, stages: {name: {flops, bytes}}}.");
  m.def(
      "plan_cost",
      [](const ModelSpec& spec, const Plan& plan, const std::vector<SequenceShape>& batch) {
        return as_dict(plan_cost(spec, plan, batch));
      },
      "spec"_a, "plan"_a, "batch"_a, "Work of the native runtime for a plan, in the same form.");
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
      "What was built with what; \"cuda\" is empty in a build without CUDA kernels.");
  pop::bind_model_spec(m);
  pop::bind_plan(m);
  pop::bind_cost(m);
}
