#pragma once

// Names, shapes, initialisation, decay and place of every parameter, from the model spec alone; and the
// memory of parameters and gradients. Parameters live in buckets, one per block of the model: a bucket is one
// contiguous piece of memory, reduced, updated and gathered as a whole.

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/device/buffer.h"
#include "annulus/model/spec.h"

namespace annulus {

enum class Init { kNormal, kOnes };
enum class Decay { kNone, kWeightDecay };  // matrices decay, norm weights do not

struct ParamInfo {
  std::string name;  // "layers.3.attention.q.weight"
  Shape shape;       // [out, in] for matrices
  Init init = Init::kNormal;
  double stddev = 0;
  Decay decay = Decay::kWeightDecay;
  int bucket = 0;
  int64_t offset = 0;  // elements from the start of the bucket
};

struct ParamTable {
  std::vector<ParamInfo> params;         // in bucket order, offsets ascending without gaps
  std::vector<int64_t> bucket_elements;  // embedding, each layer, final norm and head

  int64_t elements() const;
  int IndexOf(absl::string_view name) const;  // the parameter must exist
};

ParamTable BuildParamTable(const ModelSpec& spec);

// "name [shape] ..." of every parameter; equal for models that can read each other's checkpoints.
std::string Fingerprint(const ParamTable& table);

// Initial values of elements [begin, begin + n) of a parameter, from (seed, name, global index): the same
// whatever the number of ranks.   out: n values of f32 or f64
void InitialValues(const ParamInfo& info, uint64_t seed, int64_t begin, TensorRef out);

// Parameters in the compute dtype and their gradients in its accumulator dtype.
class ParamStore {
 public:
  // `dtype` is the compute dtype. Every bucket's memory is padded with zeros to a multiple of
  // `bucket_multiple` elements.
  ParamStore(Device device, DType dtype, ParamTable table, int64_t bucket_multiple);

  const ParamTable& table() const { return table_; }
  DType dtype() const { return dtype_; }
  TensorRef Value(int param) const { return Slice(values_, param, param); }
  TensorRef Grad(int param) const { return Slice(grads_, param, param); }
  // Parameters first..last, adjacent in memory and of equal row width, as one matrix of all their rows.
  TensorRef Values(int first, int last) const { return Slice(values_, first, last); }
  TensorRef Grads(int first, int last) const { return Slice(grads_, first, last); }
  // A whole bucket, padding included.
  TensorRef BucketValues(int bucket) const { return values_[static_cast<size_t>(bucket)].ref(); }
  TensorRef BucketGrads(int bucket) const { return grads_[static_cast<size_t>(bucket)].ref(); }
  int buckets() const { return static_cast<int>(values_.size()); }
  int64_t bytes() const;  // of the values

  // Fills every parameter with its initial values. On CPUs.
  void Initialize(uint64_t seed);

 private:
  TensorRef Slice(const std::vector<Tensor>& buckets, int first, int last) const;
  ParamTable table_;
  DType dtype_;
  std::vector<Tensor> values_, grads_;
};

}  // namespace annulus
