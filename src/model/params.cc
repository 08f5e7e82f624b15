#include "annulus/model/params.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "annulus/base/random.h"

namespace annulus {

int64_t ParamTable::elements() const {
  int64_t n = 0;
  for (const Bucket& bucket : buckets) n += bucket.elements;
  return n;
}

int64_t ParamTable::logical_elements() const {
  int64_t n = 0;
  for (const ParamInfo& info : params) n += info.logical.elements();
  return n;
}

int ParamTable::IndexOf(absl::string_view name) const {
  for (size_t i = 0; i < params.size(); ++i) {
    if (params[i].name == name) return static_cast<int>(i);
  }
  ANNULUS_CHECK(false) << "no parameter " << name;
  return -1;
}

std::vector<LogicalRun> LogicalRuns(const ParamInfo& info, int64_t begin, int64_t end) {
  ANNULUS_CHECK(0 <= begin && begin <= end && end <= info.shape.elements()) << info.name;
  std::vector<LogicalRun> runs;
  if (begin == end) return runs;
  if (info.parts.empty()) return {{begin, begin, end - begin}};
  // Lines of elements, each cut by the same parts: one line of all rows, or a line for each row.
  const bool columns = info.axis == 1;
  const int64_t unit = columns || info.shape.rank() == 1 ? 1 : info.shape[1];
  const int64_t line = columns ? info.shape[1] : info.shape.elements();
  const int64_t whole_line = columns ? info.logical[1] : info.logical.elements();
  for (int64_t local = begin; local < end;) {
    int64_t part_begin = local / line * line;  // in local elements
    for (const auto& [first, last] : info.parts) {
      const int64_t part_end = part_begin + (last - first) * unit;
      if (local < part_end && local < end) {
        const int64_t logical = local / line * whole_line + first * unit + (local - part_begin);
        const int64_t elements = std::min(part_end, end) - local;
        const bool follows = !runs.empty() && runs.back().logical + runs.back().elements == logical;
        if (follows) {
          runs.back().elements += elements;
        } else {
          runs.push_back({local, logical, elements});
        }
        local += elements;
      }
      part_begin = part_end;
    }
  }
  return runs;
}

std::string Fingerprint(const ParamTable& table) {
  std::vector<std::string> lines;
  for (const ParamInfo& info : table.params) {
    lines.push_back(absl::StrCat(info.name, " ", ToString(info.logical), "\n"));
  }
  std::sort(lines.begin(), lines.end());
  return absl::StrJoin(lines, "");
}

bool SameParameters(absl::string_view a, absl::string_view b) {
  const auto lines = [](absl::string_view text) {
    std::vector<absl::string_view> all = absl::StrSplit(text, '\n');
    std::sort(all.begin(), all.end());
    return all;
  };
  return lines(a) == lines(b);
}

namespace {

double InitialValue(const ParamInfo& info, const RandomStream& random, uint64_t index) {
  switch (info.init) {
    case Init::kNormal:
      return info.stddev * random.Normal(index);
    case Init::kOnes:
      return 1;
    case Init::kZeros:
      return 0;
    case Init::kUniform:
      return info.stddev * (2 * random.Uniform(index) - 1);
    case Init::kMambaDecay:
      return std::log1p(15 * random.Uniform(index));
    case Init::kMambaTimeStep: {
      const double step = 1e-3 * std::pow(100.0, random.Uniform(index));
      return step + std::log(-std::expm1(-step));
    }
  }
  return 0;
}

}  // namespace

void InitialValues(const ParamInfo& info, uint64_t seed, int64_t begin, TensorRef out) {
  const RandomStream random(seed, absl::StrCat("init/", info.name));
  VisitFloat(out.dtype(), [&]<class T>() {
    T* values = out.data<T>();
    for (const LogicalRun& run : LogicalRuns(info, begin, begin + out.elements())) {
      for (int64_t i = 0; i < run.elements; ++i) {
        const double value = InitialValue(info, random, static_cast<uint64_t>(run.logical + i));
        values[run.local - begin + i] = static_cast<T>(value);
      }
    }
  });
}

namespace {

// The buffer of each bucket. In a backward pass layers follow each other, so that a few buffers in turn serve
// all: of three, one is written and two are on their way. Embedding and head are its two ends, unless they
// are one. What several layers add to is never out of the way before the pass is over.
std::vector<size_t> GradientBuffers(const ParamTable& table, GradientMemory memory) {
  constexpr size_t kTurns = 3;
  const bool own_head = std::any_of(table.params.begin(), table.params.end(),
                                    [](const ParamInfo& info) { return info.name == "head.weight"; });
  std::vector<size_t> buffers;
  size_t next = 1 + kTurns;
  for (size_t bucket = 0; bucket < table.buckets.size(); ++bucket) {
    const bool end = table.buckets[bucket].use == BucketUse::kEnds;
    if (memory == GradientMemory::kAll) {
      buffers.push_back(bucket);
    } else if (table.buckets[bucket].use == BucketUse::kShared) {
      buffers.push_back(next++);
    } else if (bucket == 0 || (end && own_head)) {
      buffers.push_back(0);
    } else {
      buffers.push_back(1 + bucket % kTurns);
    }
  }
  return buffers;
}

// Elements of each buffer: of its largest bucket.
std::vector<int64_t> SizesOf(const std::vector<size_t>& buffers, const std::vector<int64_t>& elements) {
  std::vector<int64_t> sizes(*std::max_element(buffers.begin(), buffers.end()) + 1);
  for (size_t bucket = 0; bucket < buffers.size(); ++bucket) {
    int64_t& size = sizes[buffers[bucket]];
    size = std::max(size, elements[bucket]);
  }
  return sizes;
}

std::vector<int64_t> ElementsOf(const std::vector<Bucket>& buckets) {
  std::vector<int64_t> elements;
  for (const Bucket& bucket : buckets) elements.push_back(bucket.elements);
  return elements;
}

}  // namespace

int64_t GradientElements(const ParamTable& table, GradientMemory memory) {
  int64_t elements = 0;
  for (const int64_t size : SizesOf(GradientBuffers(table, memory), ElementsOf(table.buckets)))
    elements += size;
  return elements;
}

int64_t SharedGradientElements(const ParamTable& table, GradientMemory memory) {
  const std::vector<size_t> buffers = GradientBuffers(table, memory);
  int64_t elements = 0;
  for (size_t bucket = 0; bucket < buffers.size(); ++bucket) {
    if (std::count(buffers.begin(), buffers.end(), buffers[bucket]) > 1)
      elements += table.buckets[bucket].elements;
  }
  return elements;
}

ParamStore::ParamStore(Device device, DType dtype, ParamTable table, int64_t bucket_multiple,
                       GradientMemory memory)
    : table_(std::move(table)), dtype_(dtype), grad_buffers_(GradientBuffers(table_, memory)) {
  std::vector<int64_t> padded;
  for (const Bucket& bucket : table_.buckets) {
    padded.push_back((bucket.elements + bucket_multiple - 1) / bucket_multiple * bucket_multiple);
    values_.emplace_back(device, bucket.wide ? AccumOf(dtype) : dtype, Shape{padded.back()});
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
  for (int i = first; i <= last; ++i) {
    const Shape& shape = table_.params[static_cast<size_t>(i)].shape;
    const bool fits = shape.rank() == begin.shape.rank() && (shape.rank() == 1 || shape[1] == begin.shape[1]);
    ANNULUS_CHECK(fits) << table_.params[static_cast<size_t>(i)].name << " beside " << begin.name;
  }
  if (begin.shape.rank() == 1) return flat;
  const int64_t columns = begin.shape[1];
  return flat.Reshaped({elements / columns, columns});
}

}  // namespace annulus
