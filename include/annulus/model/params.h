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

// Where gradients of buckets lie.
enum class GradientMemory {
  kAll,    // each bucket has its own: several micro-batches can add to it
  kTurns,  // buckets that are far apart in a backward pass take turns; the pass must free them as it goes
};
// Elements of all gradients' memory, padding left out.
int64_t GradientElements(const ParamTable& table, GradientMemory memory);
// Elements of the buckets whose gradients must be out of the way before the pass is over: another bucket's
// come to lie in the same memory.
int64_t SharedGradientElements(const ParamTable& table, GradientMemory memory);

// Parameters in the compute dtype and their gradients in its accumulator dtype.
class ParamStore {
 public:
  // `dtype` is the compute dtype. Every bucket's memory is padded with zeros to a multiple of
  // `bucket_multiple` elements.
  ParamStore(Device device, DType dtype, ParamTable table, int64_t bucket_multiple,
             GradientMemory memory = GradientMemory::kAll);

  const ParamTable& table() const { return table_; }
  DType dtype() const { return dtype_; }
  TensorRef Value(int param) const { return Values(param, param); }
  TensorRef Grad(int param) const { return Grads(param, param); }
  // Parameters first..last, adjacent in memory and of equal row width, as one matrix of all their rows.
  TensorRef Values(int first, int last) const;
  TensorRef Grads(int first, int last) const;
  // A whole bucket, padding included.
  TensorRef BucketValues(int bucket) const { return values_[static_cast<size_t>(bucket)].ref(); }
  TensorRef BucketGrads(int bucket) const;
  // Buckets whose gradients lie in the same memory as those of `bucket`, itself left out.
  std::vector<int> SharingGrads(int bucket) const;
  int buckets() const { return static_cast<int>(values_.size()); }
  int64_t bytes() const;  // of the values
  int64_t gradient_bytes() const;

  // Fills every parameter with its initial values. On CPUs.
  void Initialize(uint64_t seed);

 private:
  TensorRef Slice(TensorRef bucket, int first, int last) const;
  ParamTable table_;
  DType dtype_;
  std::vector<Tensor> values_;
  std::vector<size_t> grad_buffers_;  // by bucket, in grads_
  std::vector<Tensor> grads_;
};

}  // namespace annulus
