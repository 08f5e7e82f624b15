#include "annulus/train/batch.h"

#include "annulus/model/decoder.h"

namespace annulus {

SequenceLayout LayoutOf(const RunSpec& spec) {
  return SequenceLayout(spec.parallel.layout, spec.data.seq_len + spec.model.meta_tokens,
                        static_cast<int>(spec.parallel.cp), static_cast<int>(spec.parallel.tp));
}

MicroBatch MakeMicroBatch(const std::vector<Sequence>& sequences, const RunSpec& spec,
                          const SequenceLayout& layout, int cp_rank) {
  MicroBatch micro;
  SequenceBatch batch{.batch = static_cast<int64_t>(sequences.size()), .lengths = {}, .document_starts = {}};
  for (const Sequence& sequence : sequences) {
    batch.lengths.push_back(sequence.length);
    if (spec.data.document_mask) batch.document_starts.push_back(sequence.document_starts);
    for (int32_t target : sequence.targets) micro.counted_tokens += target != kIgnoredTarget;
  }
  micro.sequences = WithMetaTokens(spec.model, std::move(batch));
  for (const int64_t row_position : layout.LocalPositions(cp_rank)) {
    const int64_t position = row_position - spec.model.meta_tokens;
    const size_t p = static_cast<size_t>(position);
    for (const Sequence& sequence : sequences) {
      if (position < 0) {
        micro.tokens.push_back(static_cast<int32_t>(spec.model.vocab_size + row_position));
        micro.targets.push_back(kIgnoredTarget);
        continue;
      }
      const bool padding = position >= sequence.length;
      micro.tokens.push_back(padding ? 0 : sequence.tokens[p]);
      micro.targets.push_back(padding ? kIgnoredTarget : sequence.targets[p]);
    }
  }
  return micro;
}

absl::StatusOr<Batch> LoadBatch(const DataSet& data, const RunSpec& spec, const SequenceLayout& layout,
                                int64_t step, int dp_rank, int dp_size, int cp_rank) {
  const int64_t per_rank = spec.optim.sequences_per_step / dp_size;
  const int64_t first = step * spec.optim.sequences_per_step + dp_rank * per_rank;
  Batch batch;
  std::vector<Sequence> pending;
  for (int64_t i = 0; i < per_rank; ++i) {
    ANNULUS_ASSIGN_OR_RETURN(Sequence sequence, data.Train(first + i));
    pending.push_back(std::move(sequence));
    if (static_cast<int64_t>(pending.size()) == spec.optim.micro_batch || i + 1 == per_rank) {
      batch.push_back(MakeMicroBatch(pending, spec, layout, cp_rank));
      pending.clear();
    }
  }
  return batch;
}

}  // namespace annulus
