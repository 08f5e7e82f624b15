#pragma once

// Exchange of attention blocks inside a context-parallel group, as data. A plan is a pure function of an
// ExchangeProblem, so every rank can build, check and simulate the plans of all (exchange_build.h,
// exchange_simulate.h) and run its part (exchange_transport.h).
//
// Rank r of P owns a block: n local rows (tokens) of one sequence (or of a batch of sequences of equal
// layout: a row then carries all of them). A block is cut into chunks whose rows have affine global
// positions. Some rank computes each pair of chunks; where it owns neither the queries nor the keys, they
// come to it, and results go back to the queries' owner (outputs; gradients of queries) and to the keys'
// owner (gradients of keys and values). KV ring, forward, zigzag, P = 3, toward lower ranks (chunk c of 6:
// rank r owns r and 5 - r):
//
//     rank 0: | attend 0 0 | attend 0 1 | attend 0 2 |     block b arrives in one of two slots while
//     rank 1: | attend 1 1 | attend 1 2 | attend 1 0'|     the block before is being computed on;
//     rank 2: | attend 2 2 | attend 2 0'| attend 2 1'|     ' = front half only: its back half is masked here
//
// Token ring: the same picture with queries in the slots; the partial output of each goes home at once.

#include <cstdint>
#include <string>
#include <vector>

#include "annulus/base/pass.h"
#include "annulus/base/row_range.h"
#include "annulus/base/status.h"

namespace annulus {

// Rows [rows.begin, rows.end) of the block of cp rank `owner`.
struct Chunk {
  int owner = 0;
  RowRange rows;
  int64_t position = 0;  // global, of the first row: the order of chunks in the sequence
  int part = 0;          // which part of its layout chunk: plans may move parts on their own
  friend bool operator==(const Chunk&, const Chunk&) = default;
};

// What must be computed: which key rows of chunk j the queries of chunk i see.
struct ExchangeProblem {
  int ranks = 1;
  int64_t block_rows = 0;           // rows of every block
  int64_t heads = 1, kv_heads = 1;  // query head h reads KV head h / (heads / kv_heads)
  std::vector<Chunk> chunks = {};   // in order of (owner, rows.begin), covering each block
  // [chunks * chunks], index i * chunks + j. Rows of chunk j's owner; empty where all is masked.
  std::vector<RowRange> keys;
  std::vector<int64_t> pairs;  // unmasked (query, key) pairs of one head, for the cost
  friend bool operator==(const ExchangeProblem&, const ExchangeProblem&) = default;

  const RowRange& keys_of(size_t q_chunk, size_t kv_chunk) const {
    return keys[q_chunk * chunks.size() + kv_chunk];
  }
  int64_t pairs_of(size_t q_chunk, size_t kv_chunk) const {
    return pairs[q_chunk * chunks.size() + kv_chunk];
  }
};

// Heads that travel and are computed on together: all of them, or a part where heads are split over ranks.
// Query head q_begin + i reads the group's KV head i * kv_heads.size() / (q_end - q_begin).
struct HeadGroup {
  int64_t q_begin = 0, q_end = 0;  // query heads; empty: the group computes nothing
  std::vector<int64_t> kv_heads =
      {};  // of the model, one named twice where groups of query heads do not align
  int64_t q_heads() const { return q_end - q_begin; }
  friend bool operator==(const HeadGroup&, const HeadGroup&) = default;
};

// What a slot's rows hold.
enum class Payload {
  kQuery,      // operand: queries; in backward also what their gradient needs (output gradient, LSE, delta)
  kKv,         // operand: keys and values
  kOutput,     // result, forward: partial output with its LSE
  kQueryGrad,  // result, backward
  kKvGrad,     // result, backward
};
inline constexpr int kPayloads = 5;
inline bool IsResult(Payload payload) { return payload >= Payload::kOutput; }

// In which dtype a slot holds results. (An LSE is always in the accumulator dtype.)
enum class Width {
  kAccumulator,  // can be added to
  kCompute,      // rounded once, by the step that writes all of it
};

// A slot's rows.
enum class Span {
  kBlock,  // block_rows rows of one block, with their index in it
  kSuper,  // the rows of all blocks of one super-block, ordered by position: RankPlan's slots of head-split
           // plans
};

inline constexpr int kAllHeads = -1;

// Memory of rows on one rank.
struct SlotSpec {
  Payload payload = Payload::kKv;
  // The caller's memory of the rank's own block, all heads. Operands are there before the plan runs; results
  // are empty (output 0 with LSE -inf; gradient 0) and complete afterwards.
  bool home = false;
  int group = 0;  // of ExchangePlan::groups; kAllHeads: home slots of a plan with several groups
  Span span = Span::kBlock;
  Width width = Width::kAccumulator;  // of results
  friend bool operator==(const SlotSpec&, const SlotSpec&) = default;
};

enum class StepKind {
  kAttend,  // compute `pairs`
  // Between slots of one group head by head; else of the model's heads that both have.
  kCopy,     // into rows = slot rows
  kReduce,   // into rows += slot rows; outputs are merged by their LSE
  kSend,     // slot rows -> peer
  kReceive,  // peer -> slot rows
};

// Queries of chunk q_chunk against rows `keys` of chunk kv_chunk.
struct BlockPair {
  int q_chunk = 0;
  int kv_chunk = 0;
  RowRange keys;  // of the block, whatever the slot's span
  int64_t pairs = 0;
  friend bool operator==(const BlockPair&, const BlockPair&) = default;
};

// Rows of the block of cp rank `block`.
struct BlockRows {
  int block = -1;
  RowRange rows;
  friend bool operator==(const BlockRows&, const BlockRows&) = default;
};

// What kAttend does to a result slot.
enum class ResultWrite {
  kAccumulate,  // adds to rows that hold a (possibly empty) result
  kOverwrite,   // the rows that it names become its result alone, empty where no pair adds to them
};

// When keys that messages bring into an attend's KV slot have to be there.
enum class KeyArrival {
  kBefore,  // before it starts
  kDuring,  // it may start without those of receives that it comes after, and takes each as it comes, in any
            // order. Where kernels and transport know no such thing they are there before, as with kBefore
};

// Operands and results of kAttend. Queries and KV may come from one block each or, in slots of Span::kSuper,
// from several; rows of a slot are named by their block and their row in it.
struct Attend {
  int q_slot = -1, kv_slot = -1;
  int q_result = -1;   // kOutput; backward: kQueryGrad
  int kv_result = -1;  // backward: kKvGrad
  ResultWrite q_write = ResultWrite::kAccumulate, kv_write = ResultWrite::kAccumulate;
  KeyArrival arrival = KeyArrival::kBefore;
  std::vector<BlockRows> q_rows = {}, kv_rows = {};  // touched: around all of `pairs`
  std::vector<BlockPair> pairs = {};
  friend bool operator==(const Attend&, const Attend&) = default;
};

struct Step {
  StepKind kind = StepKind::kAttend;
  Attend attend = {};           // kAttend
  int slot = -1;                // all other kinds
  int into = -1;                // kCopy, kReduce
  BlockRows rows = {};          // all other kinds; of one chunk where a slot has Span::kSuper
  int peer = -1;                // kSend, kReceive
  int message = -1;             // kSend, kReceive: unique in the plan
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
  std::vector<HeadGroup> groups = {};  // at least one
  // By chunk: its first row in a slot of Span::kSuper; empty if no slot has that span.
  std::vector<int64_t> super_rows = {};
  int64_t super_size = 0;  // rows of such a slot
  std::vector<RankPlan> ranks = {};
};

// Whether a step of the rank, that starts while keys come, does not wait for this one of those it comes
// after.
bool ArrivesDuring(const RankPlan& rank, const Step& step, int before);

inline bool IsCompute(StepKind kind) { return kind <= StepKind::kReduce; }
inline bool IsTransfer(StepKind kind) { return kind >= StepKind::kSend; }

// Rows of a slot, and where in it a row of a chunk lies.
int64_t SlotRows(const ExchangePlan& plan, const SlotSpec& slot);
int64_t RowInSlot(const ExchangePlan& plan, const SlotSpec& slot,
                  const BlockRows& rows);  // of rows.rows.begin
// The chunk that holds all of the rows; -1 if none does.
int ChunkOf(const ExchangeProblem& problem, const BlockRows& rows);

uint64_t HashOf(const ExchangePlan& plan);

// Rows that a rank sends, by payload: index static_cast<size_t>(Payload).
std::vector<int64_t> RowsSent(const ExchangePlan& plan, int cp_rank);

// The plan as text: one line per rank and step with what moves where.
std::string ToString(const ExchangePlan& plan);

// Proves on one CPU, for the whole group: every unmasked (query, key) pair is computed exactly once for each
// head; each kAttend finds its rows in its slots; outputs and gradients of every pair reach home exactly
// once; sends and receives pair up in order and size for each (sender, receiver); no slot rows are
// overwritten or reused while another step that is not ordered with it by `after` may touch them; no deadlock
// even if a send completes only after its receive started. FailedPrecondition names rank, step and what is
// wrong.
absl::Status Validate(const ExchangePlan& plan);

}  // namespace annulus
