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

enum class Init {
  kNormal,
  kOnes,
  kZeros,
  kUniform,        // in [-stddev, stddev)
  kMambaDecay,     // log of uniform [1, 16): A_log
  kMambaTimeStep,  // softplus^-1 of log-uniform [1e-3, 0.1): dt_bias
};
enum class Decay { kNone, kWeightDecay };  // matrices decay; norm weights, A_log, D, biases do not

// A rank's place among those that split matrices between them (tensor parallelism).
struct TensorShard {
  int rank = 0, size = 1;
};

// Tensor-parallel latent attention: ranks as head groups x latent groups,
//   rank = head_group * latent_groups + latent_group.
// Branch b of the latent is computed by the ranks of latent group b % latent_groups, for the heads of their
// head group. One branch, or fewer than ranks: the other ranks split heads.
struct LatentShard {
  int head_groups = 1, head_group = 0;
  int latent_groups = 1, latent_group = 0;

  bool Holds(int64_t latent_branch) const { return latent_branch % latent_groups == latent_group; }
};
LatentShard LatentShardOf(TensorShard shard, int64_t latent_groups);

struct ParamInfo {
  std::string name;  // "layers.3.attention.q.weight"
  Shape shape;       // [out, in] for matrices; of what this rank holds
  Shape logical;     // of the whole parameter, as in a checkpoint
  // Rows (axis 0) or columns (axis 1) [begin, end) of the whole that are here, in their order; none: all of
  // it is on every rank of the tensor-parallel group, and gradients are summed over that group. A rank that
  // holds nothing has one part that is empty.
  int axis = 0;
  std::vector<std::pair<int64_t, int64_t>> parts = {};
  Init init = Init::kNormal;
  double stddev = 0;
  Decay decay = Decay::kWeightDecay;
  int bucket = 0;
  int64_t offset = 0;  // elements from the start of the bucket
};

// A piece of a parameter's local elements that are consecutive in the whole parameter as well.
struct LogicalRun {
  int64_t local = 0, logical = 0, elements = 0;
};
// Those of local elements [begin, end), in order.
std::vector<LogicalRun> LogicalRuns(const ParamInfo& info, int64_t begin, int64_t end);

enum class BucketUse {
  kEnds,    // embedding; final norm and head: the two ends of a pass
  kLayer,   // one layer
  kShared,  // several layers: from the first to the last of a pass
};
struct Bucket {
  int64_t elements = 0;
  int64_t replicated = 0;  // the first so many elements are of parameters without parts
  BucketUse use = BucketUse::kLayer;
  bool wide = false;  // held in the accumulator dtype: A_log, D, dt_bias
};

struct ParamTable {
  std::vector<ParamInfo> params;  // in bucket order, offsets ascending without gaps
  // Embedding, each layer, final norm and head; then those of tied branches and of wide parameters, where
  // there are such.
  std::vector<Bucket> buckets;

  int64_t elements() const;                   // here
  int64_t logical_elements() const;           // of the whole model
  int IndexOf(absl::string_view name) const;  // the parameter must exist
};

// What names of a branch's parameters begin with: "layers.3.attention.", of a tied branch
// "tied.<name>.attention.".
std::string ParamPrefix(const ModelSpec& spec, size_t layer, size_t branch);

// `spec` is valid for this many ranks (ValidateShards).
ParamTable BuildParamTable(const ModelSpec& spec, TensorShard shard = {});

// "name [logical shape]" of every parameter, a line each, sorted: equal for models that can read each other's
// checkpoints, whatever the number of ranks.
std::string Fingerprint(const ParamTable& table);
// Whether two fingerprints are of the same parameters, in whatever order: older ones are not sorted.
bool SameParameters(absl::string_view a, absl::string_view b);

// Initial values of local elements [begin, begin + n) of a parameter, from (seed, name, index in the whole
// parameter): the same whatever the number of ranks.   out: n values of f32 or f64
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
