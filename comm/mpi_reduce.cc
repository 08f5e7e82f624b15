// MPI's own reductions pick their order of summation by message size and algorithm; this one does not, and
// moves the minimum of bytes: each rank sends and receives (size - 1) / size of the tensor once, and once
// more to gather.

#include <algorithm>
#include <array>
#include <cstring>

#include "mpi_internal.h"
#include "reduce.h"

namespace annulus {
namespace {

// Contributions travel in segments of 1 MiB of f32, so the memory for them does not grow with the tensor.
constexpr int64_t kSegmentElements = int64_t{1} << 18;
// While one segment is added up the next is on its way.
constexpr int64_t kSegmentsInFlight = 2;

class OrderedReduction : public RequestState, public PolledOperation {
 public:
  OrderedReduction(const MpiReduction& reduction, std::shared_ptr<CommProgress> progress)
      : r_(reduction), progress_(std::move(progress)) {
    MPI_Comm_rank(r_.comm, &rank_);
    MPI_Comm_size(r_.comm, &size_);
    int64_t largest = 0;
    for (int p = 0; p < size_; ++p) largest = std::max(largest, PartElements(p));
    segment_elements_ = std::min(largest, kSegmentElements);
    segments_ = largest == 0 ? 0 : (largest + segment_elements_ - 1) / segment_elements_;
    for (InFlight& slot : in_flight_) {
      slot.contributions.resize(static_cast<size_t>(size_ * segment_elements_ * SizeOf(r_.dtype)));
    }
    progress_->Add(this);
    Advance();
  }
  ~OrderedReduction() override { progress_->Remove(this); }

  absl::StatusOr<bool> Test() override {
    progress_->Poll();
    ANNULUS_RETURN_IF_ERROR(status_);
    return phase_ == Phase::kDone;
  }

  void Advance() override {
    if (!status_.ok() || phase_ == Phase::kDone) return;
    status_ = AdvancePhases();
  }

 private:
  enum class Phase { kReduce, kGather, kDone };
  struct InFlight {
    MpiParts parts;
    std::vector<char> contributions;  // [size * segment], by rank; this rank's own is not used
  };

  int64_t PartElements(int p) const {
    return r_.offsets[static_cast<size_t>(p) + 1] - r_.offsets[static_cast<size_t>(p)];
  }
  int64_t SegmentSize(int p, int64_t segment) const {
    return std::clamp<int64_t>(PartElements(p) - segment * segment_elements_, 0, segment_elements_);
  }
  const char* Contribution(int p, int64_t segment) const {
    const int64_t element = r_.offsets[static_cast<size_t>(p)] + segment * segment_elements_;
    return static_cast<const char*>(r_.in) + element * SizeOf(r_.dtype);
  }
  InFlight& SlotOf(int64_t segment) { return in_flight_[static_cast<size_t>(segment % kSegmentsInFlight)]; }
  char* ContributionOf(int p, int64_t segment) {
    return SlotOf(segment).contributions.data() + p * segment_elements_ * SizeOf(r_.dtype);
  }

  absl::Status AdvancePhases() {
    while (phase_ == Phase::kReduce) {
      while (started_ < segments_ && started_ < reduced_ + kSegmentsInFlight) {
        ANNULUS_RETURN_IF_ERROR(StartSegment(started_++));
      }
      if (reduced_ < segments_) {
        ANNULUS_ASSIGN_OR_RETURN(const bool arrived, SlotOf(reduced_).parts.Test());
        if (!arrived) return absl::OkStatus();
        ReduceSegment(reduced_++);
        continue;
      }
      phase_ = Phase::kGather;
      if (r_.gathered != nullptr) ANNULUS_RETURN_IF_ERROR(StartGather());
    }
    ANNULUS_ASSIGN_OR_RETURN(const bool gathered, gather_.Test());
    if (gathered) phase_ = Phase::kDone;
    return absl::OkStatus();
  }

  absl::Status StartSegment(int64_t segment) {
    MpiParts& parts = SlotOf(segment).parts;
    for (int step = 1; step < size_; ++step) {
      const int from = (rank_ - step + size_) % size_, to = (rank_ + step) % size_;
      ANNULUS_RETURN_IF_ERROR(parts.Receive(ContributionOf(from, segment), r_.dtype,
                                            SegmentSize(rank_, segment), from, r_.tag, r_.comm));
      ANNULUS_RETURN_IF_ERROR(
          parts.Send(Contribution(to, segment), r_.dtype, SegmentSize(to, segment), to, r_.tag, r_.comm));
    }
    return absl::OkStatus();
  }

  void ReduceSegment(int64_t segment) {
    std::vector<const void*> operands;
    for (int p = 0; p < size_; ++p)
      operands.push_back(p == rank_ ? Contribution(rank_, segment) : ContributionOf(p, segment));
    Reduce(r_.dtype, r_.op, operands, SegmentSize(rank_, segment),
           static_cast<char*>(r_.out) + segment * segment_elements_ * SizeOf(r_.dtype));
  }

  absl::Status StartGather() {
    for (int step = 1; step < size_; ++step) {
      const int from = (rank_ - step + size_) % size_, to = (rank_ + step) % size_;
      char* part = static_cast<char*>(r_.gathered) + r_.offsets[static_cast<size_t>(from)] * SizeOf(r_.dtype);
      ANNULUS_RETURN_IF_ERROR(gather_.Receive(part, r_.dtype, PartElements(from), from, r_.tag, r_.comm));
      ANNULUS_RETURN_IF_ERROR(gather_.Send(r_.out, r_.dtype, PartElements(rank_), to, r_.tag, r_.comm));
    }
    return absl::OkStatus();
  }

  const MpiReduction r_;
  const std::shared_ptr<CommProgress> progress_;
  int rank_ = 0, size_ = 1;
  int64_t segment_elements_ = 0, segments_ = 0, started_ = 0, reduced_ = 0;
  std::array<InFlight, kSegmentsInFlight> in_flight_;
  MpiParts gather_;
  Phase phase_ = Phase::kReduce;
  absl::Status status_;
};

}  // namespace

std::unique_ptr<RequestState> StartReduction(const MpiReduction& reduction,
                                             std::shared_ptr<CommProgress> progress) {
  return std::make_unique<OrderedReduction>(reduction, std::move(progress));
}

}  // namespace annulus
