#include "slot_fields.h"

#include <algorithm>
#include <numeric>

namespace annulus {
namespace {

enum class HeadsOfGroup { kQuery, kKv };

// Columns of one width for each head, one head after the other.
struct Section {
  HeadsOfGroup heads;
  int64_t columns;  // of a head
};
struct Field {
  DType dtype;
  std::vector<Section> sections;
};

std::vector<Field> FieldsOfPayload(const AttentionCase& layer, Pass pass, Payload payload, DType result) {
  const DType compute = layer.dtype, accum = AccumOf(layer.dtype);
  const Section q{HeadsOfGroup::kQuery, layer.head_dim}, v{HeadsOfGroup::kQuery, layer.v_head_dim},
      statistic{HeadsOfGroup::kQuery, 1};
  std::vector<Section> kv = {{HeadsOfGroup::kKv, layer.head_dim}, {HeadsOfGroup::kKv, layer.v_head_dim}};
  if (layer.latent.has_value()) kv = {{HeadsOfGroup::kKv, layer.latent->row()}};
  switch (payload) {
    case Payload::kQuery: {
      if (pass == Pass::kForward) return {{compute, {q}}};
      std::vector<Field> fields = {
          {compute, {q}}, {compute, {v}}, {accum, {statistic}}, {accum, {statistic}}};
      if (BackwardReadsOutput(layer)) fields.push_back({compute, {v}});
      return fields;
    }
    case Payload::kKv:
      return {{compute, kv}};
    case Payload::kOutput: {
      std::vector<Field> fields = {{result, {v}}, {accum, {statistic}}};
      if (CarriesSums(layer)) fields.push_back({accum, {statistic}});
      return fields;
    }
    case Payload::kQueryGrad:
      return {{result, {q}}};
    case Payload::kKvGrad:
      return {{layer.latent.has_value() ? accum : result, kv}};
  }
  return {};
}

int64_t HeadCount(const HeadGroup& group, HeadsOfGroup heads) {
  return heads == HeadsOfGroup::kQuery ? group.q_heads() : static_cast<int64_t>(group.kv_heads.size());
}

// Heads of the model, ascending.
std::vector<int64_t> HeadList(const HeadGroup& group, HeadsOfGroup heads) {
  if (heads == HeadsOfGroup::kKv) return group.kv_heads;
  std::vector<int64_t> list(static_cast<size_t>(group.q_heads()));
  std::iota(list.begin(), list.end(), group.q_begin);
  return list;
}

void AddRun(const ColumnRun& run, std::vector<ColumnRun>* runs) {
  if (!runs->empty()) {
    ColumnRun& last = runs->back();
    if (last.from + last.columns == run.from && last.to + last.columns == run.to) {
      last.columns += run.columns;
      return;
    }
  }
  runs->push_back(run);
}

}  // namespace

AttentionKernelCase KernelCaseOf(const AttentionCase& layer, Pass pass, MaskShape mask_shape) {
  return {.device = layer.device,
          .hopper = layer.hopper,
          .dtype = layer.dtype,
          .dim = layer.head_dim,
          .v_dim = layer.v_head_dim,
          .mask_shape = mask_shape,
          .pass = pass,
          .determinism = layer.determinism,
          .asked = layer.kernel};
}

bool BackwardReadsOutput(const AttentionCase& layer) {
  const auto by_library = [&](MaskShape shape) {
    return ChooseAttentionKernel(KernelCaseOf(layer, Pass::kBackward, shape)) == AttentionKernel::kCudnn;
  };
  return by_library(MaskShape::kFull) || by_library(MaskShape::kCausal) || by_library(MaskShape::kGeneral);
}

int64_t KvColumns(const AttentionCase& layer) {
  return layer.latent.has_value() ? layer.latent->row() : layer.head_dim + layer.v_head_dim;
}

bool CarriesSums(const AttentionCase& layer) { return layer.device == DeviceKind::kCpu; }

HeadGroup AllHeadsOf(const AttentionCase& layer) {
  HeadGroup all{.q_begin = 0, .q_end = layer.heads};
  all.kv_heads.resize(static_cast<size_t>(layer.kv_heads));
  std::iota(all.kv_heads.begin(), all.kv_heads.end(), 0);
  return all;
}

HeadGroup GroupOf(const AttentionCase& layer, const ExchangePlan& plan, const SlotSpec& slot) {
  return slot.group == kAllHeads ? AllHeadsOf(layer) : plan.groups[static_cast<size_t>(slot.group)];
}

std::vector<SlotField> FieldsOf(const AttentionCase& layer, Pass pass, const HeadGroup& group,
                                const SlotSpec& slot) {
  const DType result = slot.width == Width::kCompute ? layer.dtype : AccumOf(layer.dtype);
  std::vector<SlotField> fields;
  for (const Field& field : FieldsOfPayload(layer, pass, slot.payload, result)) {
    int64_t columns = 0;
    for (const Section& section : field.sections)
      columns += HeadCount(group, section.heads) * section.columns;
    fields.push_back({field.dtype, {layer.sequences.batch, columns}});
  }
  return fields;
}

int64_t BytesOfRow(const AttentionCase& layer, Pass pass, const HeadGroup& group, const SlotSpec& slot) {
  int64_t bytes = 0;
  for (const SlotField& field : FieldsOf(layer, pass, group, slot))
    bytes += field.row.elements() * SizeOf(field.dtype);
  return bytes;
}

std::vector<std::vector<ColumnRun>> RunsBetween(const AttentionCase& layer, Pass pass, Payload payload,
                                                const HeadGroup& from, const HeadGroup& to) {
  std::vector<std::vector<ColumnRun>> runs;
  for (const Field& field : FieldsOfPayload(layer, pass, payload, layer.dtype)) {
    std::vector<ColumnRun>& of_field = runs.emplace_back();
    int64_t from_begin = 0, to_begin = 0;
    for (const Section& section : field.sections) {
      const std::vector<int64_t> there = HeadList(from, section.heads), here = HeadList(to, section.heads);
      const int64_t columns = section.columns;
      for (size_t j = 0; j < here.size(); ++j) {
        auto [first, last] = std::equal_range(there.begin(), there.end(), here[j]);
        // A head that is named twice is two columns of its own where both sides are alike.
        if (from == to) first = there.begin() + static_cast<std::ptrdiff_t>(j), last = first + 1;
        for (auto i = first; i != last; ++i) {
          AddRun({.from = from_begin + (i - there.begin()) * columns,
                  .to = to_begin + static_cast<int64_t>(j) * columns,
                  .columns = columns},
                 &of_field);
        }
      }
      from_begin += HeadCount(from, section.heads) * columns;
      to_begin += HeadCount(to, section.heads) * columns;
    }
  }
  return runs;
}

}  // namespace annulus
