#pragma once

// The inside of a residual branch, y = x + mixer(RMSNorm(x)). SequenceMixer is the one open interface of the
// model: attention, latent attention, state-space layers. The MLP is the mixer that mixes nothing along the
// sequence.
//
// Tokens are ordered (row, batch item) with row = this cp rank's local row. Between mixers the ranks of a
// tensor-parallel group split them evenly in that order: x and y of a mixer are [tokens / tp, d_model]. A
// mixer gathers what it needs and returns sums over the group (annulus/parallel/tensor_parallel.h).

#include <compare>
#include <map>
#include <memory>

#include "annulus/device/span_clock.h"
#include "annulus/model/params.h"
#include "annulus/model/spec.h"
#include "annulus/parallel/context_attention.h"
#include "annulus/parallel/tensor_parallel.h"

namespace annulus {

// What attention layers whose exchange is the same have in common.
struct AttentionClass {
  BranchKind branch = BranchKind::kAttention;  // or kLatentAttention
  int64_t window = 0;                          // 0 = all keys
  int64_t latent_groups = 1;
  friend auto operator<=>(const AttentionClass&, const AttentionClass&) = default;
};

// How long attention with its exchange took; of latent attention each branch of the latent by itself.
class AttentionClocks {
 public:
  explicit AttentionClocks(Device device) : device_(device) {}
  SpanClock& Of(const AttentionClass& layers, Pass pass) {
    return clocks_.try_emplace({layers, pass}, device_).first->second;
  }

 private:
  Device device_;
  std::map<std::pair<AttentionClass, Pass>, SpanClock> clocks_;
};

// Keys and values that later layers attend to as well (kv_layers_back); in ctx.saved.
struct SharedKv {
  TensorRef kv;  // [rows, batch, 2 kv_heads * head_dim] of this tp rank's heads
  TensorRef
      dkv;  // accumulator dtype; consumers, which come first in backward, add to it. Zeroed by the owner
};

// What all layers of one pass share.
struct ModelStep {
  AttentionGeometry& geometry;
  ExchangeStats stats = {};                   // added to
  int64_t state_bytes = 0;                    // of stats.bytes_sent those of states and of convolutions
  AttentionClocks* clocks = nullptr;          // null: nothing is timed
  TensorParallel tensor = {};                 // one rank
  std::map<size_t, SharedKv> shared_kv = {};  // by the layer that owns them

  void AddStateBytes(int64_t bytes) { stats.bytes_sent += bytes, state_bytes += bytes; }

  int64_t rows() const { return geometry.layout().local_rows(); }
  int64_t batch() const { return geometry.sequences().batch; }
  int64_t tokens() const { return rows() * batch(); }  // of this cp rank: tensor.size() times those of x
};

// Whether backward follows. Without it nothing is kept.
enum class Keep { kNothing, kForBackward };

class SequenceMixer {
 public:
  virtual ~SequenceMixer() = default;

  // y += mixer(x). With kForBackward keeps in ctx.saved what the recompute policy says; one forward is in
  // flight.
  virtual absl::Status Forward(Context& ctx, ModelStep& step, ConstTensorRef x, Keep keep, TensorRef y) = 0;

  // dx (overwritten) and parameter gradients (added to) from x as given to Forward and dy. Branches side by
  // side may have one dx: it is whole when the last of them is done (SharedTokens), so it is written by
  // step.tensor alone.
  virtual absl::Status Backward(Context& ctx, ModelStep& step, ConstTensorRef x, ConstTensorRef dy,
                                TensorRef dx) = 0;
};

// What a mixer is made from. Parameters are found by name, behind ParamPrefix.
struct MixerArgs {
  const ModelSpec& spec;
  size_t layer = 0, branch = 0;  // index in spec.layers and in its branches
  Recompute recompute = Recompute::kAttentionOutput;
  const ParamStore& params;
  TensorShard shard = {};

  const BranchSpec& branch_spec() const { return spec.layers[layer].branches[branch]; }
  std::string prefix() const { return ParamPrefix(spec, layer, branch); }
};
std::unique_ptr<SequenceMixer> MakeMixer(const MixerArgs& args);

// One for each kind of branch.
std::unique_ptr<SequenceMixer> MakeAttention(const MixerArgs& args);
std::unique_ptr<SequenceMixer> MakeLatentAttention(const MixerArgs& args);
std::unique_ptr<SequenceMixer> MakeMamba(const MixerArgs& args);
std::unique_ptr<SequenceMixer> MakeLightning(const MixerArgs& args);
std::unique_ptr<SequenceMixer> MakeBased(const MixerArgs& args);
std::unique_ptr<SequenceMixer> MakeDeltaNet(const MixerArgs& args);
std::unique_ptr<SequenceMixer> MakeMlp(const MixerArgs& args);

}  // namespace annulus
