#pragma once

// Exchange of attention blocks around a context-parallel group, as data. A plan is a pure function of an
// ExchangeProblem, so every rank can build, check and simulate the plans of all.
//
// Rank r of P owns a block: n local rows (tokens) of one sequence (or of a batch of sequences of equal
// layout: a row then carries all of them). A block is cut into chunks whose rows have affine global
// positions. KV ring, forward, zigzag, P = 3, toward lower ranks (chunk c of 6: rank r owns r and 5 - r):
//
//     rank 0: | attend 0 0 | attend 0 1 | attend 0 2 |     block b arrives in one of two ring slots while
//     rank 1: | attend 1 1 | attend 1 2 | attend 1 0'|     the block before is being computed on;
//     rank 2: | attend 2 2 | attend 2 0'| attend 2 1'|     ' = front half only: its back half is masked here
//
// Backward: KV travels again; the gradient of a block travels one step behind, in the accumulator dtype, each
// visited rank adding its part, and ends at home.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "annulus/comm/communicator.h"
#include "annulus/device/context.h"

namespace annulus {

// Half-open range of local rows of one block.
struct RowRange {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
  bool empty() const { return begin >= end; }
  friend bool operator==(const RowRange&, const RowRange&) = default;
};

// Rows [rows.begin, rows.end) of the block of cp rank `owner`.
struct Chunk {
  int owner = 0;
  RowRange rows;
  friend bool operator==(const Chunk&, const Chunk&) = default;
};

// What must be computed: which key rows of chunk j the queries of chunk i see.
struct ExchangeProblem {
  int ranks = 1;
  int64_t block_rows = 0;     // rows of every block
  std::vector<Chunk> chunks;  // in order of (owner, rows.begin), covering each block
  // [chunks * chunks], index i * chunks + j. Rows of chunk j's owner; empty where all is masked.
  std::vector<RowRange> keys;
  std::vector<int64_t> pairs;  // unmasked (query, key) pairs, for the cost
  friend bool operator==(const ExchangeProblem&, const ExchangeProblem&) = default;

  const RowRange& keys_of(size_t q_chunk, size_t kv_chunk) const {
    return keys[q_chunk * chunks.size() + kv_chunk];
  }
  int64_t pairs_of(size_t q_chunk, size_t kv_chunk) const {
    return pairs[q_chunk * chunks.size() + kv_chunk];
  }
};

enum class Pass { kForward, kBackward };

// What a slot's rows hold.
enum class Payload {
  kKv,      // keys and values, compute dtype
  kKvGrad,  // their gradients, accumulator dtype
};

// A buffer of block_rows rows on one rank. Rows keep their index of the owner's block.
struct SlotSpec {
  Payload payload = Payload::kKv;
  // Holds the rank's own block before (kKv) or after (kKvGrad) the plan runs. The plan adds to a home
  // kKvGrad: the caller zeroes it.
  bool home = false;
  friend bool operator==(const SlotSpec&, const SlotSpec&) = default;
};

enum class StepKind {
  kAttend,      // compute `pairs` with the KV in `slot`; backward also writes their gradient into `grad_slot`
  kReduce,      // grad_slot rows += slot rows
  kSend,        // slot rows -> peer
  kReceive,     // peer -> slot rows
  kCollective,  // every rank of the group, in the same order
};

// Queries of chunk q_chunk against rows `keys` of chunk kv_chunk.
struct BlockPair {
  int q_chunk = 0;
  int kv_chunk = 0;
  RowRange keys;
  int64_t pairs = 0;
  friend bool operator==(const BlockPair&, const BlockPair&) = default;
};

// What kAttend does to grad_slot in backward.
enum class GradWrite { kAccumulate, kOverwrite };

struct Step {
  StepKind kind = StepKind::kAttend;
  int slot = -1;
  int grad_slot = -1;
  GradWrite grad_write = GradWrite::kAccumulate;  // kOverwrite zeroes `rows` of grad_slot first
  int block = -1;                                 // owner of the rows
  RowRange rows = {};                             // rows touched
  int peer = -1;                                  // kSend, kReceive
  int message = -1;                               // kSend, kReceive: unique in the plan
  std::vector<BlockPair> pairs = {};              // kAttend
  std::vector<int> after = {};  // earlier steps of the same rank that must be complete before this one starts
  friend bool operator==(const Step&, const Step&) = default;
};

struct RankPlan {
  std::vector<SlotSpec> slots = {};
  std::vector<Step> steps = {};  // computing steps run in this order; transfers start once `after` allows
  friend bool operator==(const RankPlan&, const RankPlan&) = default;
};

struct ExchangePlan {
  std::string name;  // "kv_ring toward lower ranks"
  Pass pass = Pass::kForward;
  ExchangeProblem problem;
  std::vector<RankPlan> ranks = {};
};

// ---- Build --------------------------------------------------------------------------------------

// Direction in which KV blocks move: toward lower or higher ranks, or whichever moves fewer rows.
enum class RingDirection { kFewestBytes, kTowardLower, kTowardHigher };

// KV ring (Liu et al. 2023, "Ring Attention with Blockwise Transformers"), pruned: a block visits only ranks
// that see some of its rows, each hop carries only the rows that some later rank on its way needs, and
// gradient rows go home after the last rank that adds to them. For causal zigzag that is 0.75 of the full
// ring's bytes. The name tells the direction. At most 8 slots a rank, whatever the number of ranks.
ExchangePlan BuildKvRing(const ExchangeProblem& problem, Pass pass,
                         RingDirection direction = RingDirection::kFewestBytes);

uint64_t HashOf(const ExchangePlan& plan);

// ---- Validate -----------------------------------------------------------------------------------

// Proves on one CPU, for the whole group: every unmasked (query, key) pair is computed exactly once; each
// kAttend finds its rows in its slot; gradients of every pair reach home exactly once; sends and receives
// pair up in order and size for each (sender, receiver); no slot rows are overwritten or reused while another
// step that is not ordered with it by `after` may touch them; no deadlock even if a send completes only after
// its receive started. FailedPrecondition names rank, step and what is wrong.
absl::Status Validate(const ExchangePlan& plan);

// ---- Simulate -----------------------------------------------------------------------------------

struct ExchangeCost {
  double seconds_per_pair = 0;  // one (query, key) pair over all heads and sequences of the batch, this pass
  double kv_row_bytes = 0;      // one row of kKv
  double grad_row_bytes = 0;    // one row of kKvGrad
  double bytes_per_second = 0;  // of one rank's egress, and of its ingress; 0: unlimited
  double message_seconds = 0;   // from the end of a send to the end of its receive
  double reduce_bytes_per_second = 0;  // of kReduce, in gradient bytes added; 0: unlimited
};

struct StepTiming {
  double start = 0, end = 0;  // seconds
};

struct Simulation {
  double makespan = 0;
  std::vector<double> compute;      // per rank, seconds spent in kAttend and kReduce
  std::vector<double> exposed;      // per rank, seconds its computing waited for transfers, the tail included
  std::vector<int64_t> bytes_sent;  // per rank
  std::vector<std::vector<StepTiming>> steps;  // [rank][step]
};

// Discrete-event run of a valid plan: one compute lane a rank, transfers share egress and ingress in order of
// start.
Simulation Simulate(const ExchangePlan& plan, const ExchangeCost& cost);

// Bytes that rank sends in one run of the plan.
int64_t BytesSent(const ExchangePlan& plan, int cp_rank, int64_t kv_row_bytes, int64_t grad_row_bytes);

// The plan as text: one line per rank and step with what moves where, and as a timeline of `columns`
// characters for a simulation.
std::string ToString(const ExchangePlan& plan);
std::string Timeline(const ExchangePlan& plan, const Simulation& simulation, int columns = 100);

// ---- Execute ------------------------------------------------------------------------------------

struct ExchangeBinding {
  std::vector<TensorRef> slots = {};  // one per SlotSpec, [block_rows, elements of a row]
  // kAttend of this rank. On CPUs it must call ctx.Poll() at least every few hundred microseconds; on GPUs it
  // enqueues on ctx.stream().
  // The step is the one in the plan that Execute was given, so its place there identifies it.
  std::function<absl::Status(const Step&)> attend = {};
  // kReduce, to += from, in pieces of a slot's rows; undefined: done by Execute, on CPUs.
  std::function<absl::Status(ConstTensorRef from, TensorRef to)> reduce = {};
};

struct ExchangeStats {
  double exposed_seconds = 0;  // computing waited for transfers, the tail included; on GPUs in ctx.waits only
  int64_t bytes_sent = 0;
};

// Runs this rank's part. Transfers start before the compute that hides them and progress through ctx.progress
// while computing (the previous ctx.progress is restored afterwards). Waiting is counted in ctx.waits,
// computing noted in ctx.recorder. `stats` are added to. Other ways to move the messages:
// exchange_transport.h.
absl::Status Execute(Context& ctx, const ExchangePlan& plan, Communicator& cp, const ExchangeBinding& binding,
                     ExchangeStats* stats);

// InvalidArgument on every rank unless all ranks of the group hold plans with the same hash.
absl::Status AgreeOnPlan(const ExchangePlan& plan, Communicator& cp);

}  // namespace annulus
