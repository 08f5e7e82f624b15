#include "annulus/model/params.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "annulus/base/random.h"

namespace annulus {
namespace {

class TableBuilder {
 public:
  void StartBucket() { table_.bucket_elements.push_back(0); }
  void Add(std::string name, Shape shape, Init init, double stddev, Decay decay) {
    int64_t& filled = table_.bucket_elements.back();
    const int bucket = static_cast<int>(table_.bucket_elements.size()) - 1;
    table_.params.push_back({std::move(name), shape, init, stddev, decay, bucket, filled});
    filled += shape.elements();
  }
  void AddMatrix(std::string name, int64_t out, int64_t in, double stddev) {
    Add(std::move(name), {out, in}, Init::kNormal, stddev, Decay::kWeightDecay);
  }
  void AddNorm(std::string name, int64_t d) { Add(std::move(name), {d}, Init::kOnes, 0, Decay::kNone); }
  ParamTable Take() { return std::move(table_); }

 private:
  ParamTable table_;
};

void AddLayer(const ModelSpec& spec, size_t index, TableBuilder& builder) {
  const std::string prefix = absl::StrCat("layers.", index, ".");
  const int64_t d = spec.d_model;
  // Branches add up in the residual stream: their outputs start smaller with depth (GPT-2's rule).
  const double residual_stddev = spec.init_stddev / std::sqrt(static_cast<double>(spec.layers.size()));
  builder.StartBucket();
  builder.AddNorm(prefix + "norm.weight", d);
  switch (spec.layers[index].kind) {
    case LayerKind::kAttention: {
      const int64_t q = spec.heads * spec.head_dim, kv = spec.kv_heads * spec.head_dim;
      builder.AddMatrix(prefix + "attention.q.weight", q, d, spec.init_stddev);
      builder.AddMatrix(prefix + "attention.k.weight", kv, d, spec.init_stddev);
      builder.AddMatrix(prefix + "attention.v.weight", kv, d, spec.init_stddev);
      builder.AddMatrix(prefix + "attention.o.weight", d, q, residual_stddev);
      break;
    }
    case LayerKind::kMlp:
      builder.AddMatrix(prefix + "mlp.gate.weight", spec.d_ff, d, spec.init_stddev);
      builder.AddMatrix(prefix + "mlp.up.weight", spec.d_ff, d, spec.init_stddev);
      builder.AddMatrix(prefix + "mlp.down.weight", d, spec.d_ff, residual_stddev);
      break;
  }
}

}  // namespace

int64_t ParamTable::elements() const {
  int64_t n = 0;
  for (int64_t bucket : bucket_elements) n += bucket;
  return n;
}

int ParamTable::IndexOf(absl::string_view name) const {
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].name == name) return static_cast<int>(i);
  }
  ANNULUS_CHECK(false) << "no parameter " << name;
  return -1;
}

ParamTable BuildParamTable(const ModelSpec& spec) {
  TableBuilder builder;
  builder.StartBucket();
  builder.AddMatrix("embed.weight", spec.vocab_size, spec.d_model, spec.init_stddev);
  for (size_t i = 0; i < spec.layers.size(); ++i) AddLayer(spec, i, builder);
  builder.StartBucket();
  builder.AddNorm("final_norm.weight", spec.d_model);
  if (!spec.tied_head) builder.AddMatrix("head.weight", spec.vocab_size, spec.d_model, spec.init_stddev);
  return builder.Take();
}

std::string Fingerprint(const ParamTable& table) {
  std::string text;
  for (const ParamInfo& info : table.params)
    absl::StrAppend(&text, info.name, " ", ToString(info.shape), "\n");
  return text;
}

void InitialValues(const ParamInfo& info, uint64_t seed, int64_t begin, TensorRef out) {
  const RandomStream random(seed, absl::StrCat("init/", info.name));
  VisitFloat(out.dtype(), [&]<class T>() {
    T* values = out.data<T>();
    for (int64_t i = 0; i < out.elements(); ++i) {
      const bool ones = info.init == Init::kOnes;
      values[i] = ones ? T{1} : static_cast<T>(info.stddev * random.Normal(static_cast<uint64_t>(begin + i)));
    }
  });
}

namespace {

// The buffer of each bucket. In a backward pass layers follow each other, so that a few buffers in turn serve
// all: of three, one is written and two are on their way. Embedding and head are its two ends, unless they
// are one.
std::vector<size_t> GradientBuffers(const ParamTable& table, GradientMemory memory) {
  constexpr size_t kTurns = 3;
  const size_t buckets = table.bucket_elements.size();
  const bool own_head = std::any_of(table.params.begin(), table.params.end(),
                                    [](const ParamInfo& info) { return info.name == "head.weight"; });
  std::vector<size_t> buffers;
  for (size_t bucket = 0; bucket < buckets; ++bucket) {
    const bool first = bucket == 0, last = bucket + 1 == buckets;
    if (memory == GradientMemory::kAll) {
      buffers.push_back(bucket);
    } else if (first || (last && own_head)) {
      buffers.push_back(0);
    } else {
      buffers.push_back(1 + bucket % kTurns);
    }
  }
  return buffers;
}

// Elements of each buffer: of its largest bucket.
std::vector<int64_t> SizesOf(const std::vector<size_t>& buffers,
                             const std::vector<int64_t>& bucket_elements) {
  std::vector<int64_t> sizes(*std::max_element(buffers.begin(), buffers.end()) + 1);
  for (size_t bucket = 0; bucket < buffers.size(); ++bucket) {
    int64_t& size = sizes[buffers[bucket]];
    size = std::max(size, bucket_elements[bucket]);
  }
  return sizes;
}

}  // namespace

int64_t GradientElements(const ParamTable& table, GradientMemory memory) {
  int64_t elements = 0;
  for (const int64_t size : SizesOf(GradientBuffers(table, memory), table.bucket_elements)) elements += size;
  return elements;
}

int64_t SharedGradientElements(const ParamTable& table, GradientMemory memory) {
  const std::vector<size_t> buffers = GradientBuffers(table, memory);
  int64_t elements = 0;
  for (size_t bucket = 0; bucket < buffers.size(); ++bucket) {
    if (std::count(buffers.begin(), buffers.end(), buffers[bucket]) > 1)
      elements += table.bucket_elements[bucket];
  }
  return elements;
}

ParamStore::ParamStore(Device device, DType dtype, ParamTable table, int64_t bucket_multiple,
                       GradientMemory memory)
    : table_(std::move(table)), dtype_(dtype), grad_buffers_(GradientBuffers(table_, memory)) {
  std::vector<int64_t> padded;
  for (int64_t elements : table_.bucket_elements) {
    padded.push_back((elements + bucket_multiple - 1) / bucket_multiple * bucket_multiple);
    values_.emplace_back(device, dtype, Shape{padded.back()});
  }
  for (const int64_t size : SizesOf(grad_buffers_, padded)) {
    grads_.emplace_back(device, AccumOf(dtype), Shape{size});
  }
}

TensorRef ParamStore::Values(int first, int last) const {
  return Slice(BucketValues(table_.params[static_cast<size_t>(first)].bucket), first, last);
}

TensorRef ParamStore::Grads(int first, int last) const {
  return Slice(BucketGrads(table_.params[static_cast<size_t>(first)].bucket), first, last);
}

TensorRef ParamStore::BucketGrads(int bucket) const {
  return grads_[grad_buffers_[static_cast<size_t>(bucket)]].ref().Rows(0, BucketValues(bucket).elements());
}

std::vector<int> ParamStore::SharingGrads(int bucket) const {
  std::vector<int> others;
  for (int other = 0; other < buckets(); ++other) {
    const bool same = grad_buffers_[static_cast<size_t>(other)] == grad_buffers_[static_cast<size_t>(bucket)];
    if (same && other != bucket) others.push_back(other);
  }
  return others;
}

int64_t ParamStore::bytes() const {
  int64_t bytes = 0;
  for (const Tensor& bucket : values_) bytes += bucket.ref().bytes();
  return bytes;
}

int64_t ParamStore::gradient_bytes() const {
  int64_t bytes = 0;
  for (const Tensor& buffer : grads_) bytes += buffer.ref().bytes();
  return bytes;
}

void ParamStore::Initialize(uint64_t seed) {
  for (size_t i = 0; i < table_.params.size(); ++i) {
    InitialValues(table_.params[i], seed, 0, Value(static_cast<int>(i)));
  }
}

TensorRef ParamStore::Slice(TensorRef bucket, int first, int last) const {
  const ParamInfo& begin = table_.params[static_cast<size_t>(first)];
  const ParamInfo& end = table_.params[static_cast<size_t>(last)];
  ANNULUS_CHECK(first <= last && begin.bucket == end.bucket);
  const int64_t elements = end.offset + end.shape.elements() - begin.offset;
  const TensorRef flat = bucket.Rows(begin.offset, begin.offset + elements);
  if (begin.shape.rank() == 1) return flat;
  const int64_t columns = begin.shape[1];
  ANNULUS_CHECK(elements % columns == 0);
  return flat.Reshaped({elements / columns, columns});
}

}  // namespace annulus
