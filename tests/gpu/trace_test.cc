// Names in a profiler's timeline. The profiler is this program: NVTX gives it every range, also without a
// GPU.

#include "annulus/device/trace.h"

#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <mutex>

#include "trainer/trainer_testing.h"

namespace annulus::testing {
namespace {

// Ranges in the order of their begin, each with how many were open around it.
struct Recording {
  std::mutex mutex;
  bool on = false;
  int depth = 0;
  std::vector<std::pair<int, std::string>> ranges;
};

Recording& TheRecording() {
  static Recording recording;
  return recording;
}

int NVTX_API Push(const char* name) {
  Recording& recording = TheRecording();
  const std::lock_guard<std::mutex> lock(recording.mutex);
  if (recording.on) recording.ranges.emplace_back(recording.depth++, name);
  return 0;
}

int NVTX_API Pop() {
  Recording& recording = TheRecording();
  const std::lock_guard<std::mutex> lock(recording.mutex);
  if (recording.on) --recording.depth;
  return 0;
}

int NVTX_API Inject(NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  if (callbacks == nullptr) return 0;
  if (callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size) == 0) return 0;
  if (size <= NVTX_CBID_CORE_RangePop) return 0;
  *table[NVTX_CBID_CORE_RangePushA] = reinterpret_cast<NvtxFunctionPointer>(Push);
  *table[NVTX_CBID_CORE_RangePop] = reinterpret_cast<NvtxFunctionPointer>(Pop);
  return 1;
}

// NVTX looks here at its first call, before which this must have been set.
[[maybe_unused]] const bool kInstalled = [] {
  InitializeInjectionNvtx2_fnptr = Inject;
  return true;
}();

// One rank, so that ranges of one thread are not mixed with those of another.
TEST(Trace, NamesPhasesAndLayersOfAStep) {
  const RunSpec spec = SmallRun({"optim.micro_batch=12"});
  TheRecording().on = true;
  OnMesh(spec, MeshShape{}, [&](RankOfRun rank) {
    const absl::StatusOr<Batch> batch = LoadBatch(rank.data, spec, rank.trainer.layout(), 0, 0, 1, 0);
    ANNULUS_CHECK(batch.ok()) << batch.status();
    ANNULUS_CHECK_OK(rank.trainer.Step(*batch, 0).status());
  });
  TheRecording().on = false;
  EXPECT_EQ(TheRecording().depth, 0);
  using Ranges = std::vector<std::pair<int, std::string>>;
  EXPECT_EQ(TheRecording().ranges, (Ranges{{0, "step 1"},
                                           {1, "forward"},
                                           {2, "layers.0.attention forward"},
                                           {2, "layers.1.mlp forward"},
                                           {1, "backward"},
                                           {2, "head and loss"},
                                           {2, "layers.1.mlp backward"},
                                           {2, "layers.0.attention backward"},
                                           {1, "gradient norm"},
                                           {1, "AdamW"}}));
}

}  // namespace
}  // namespace annulus::testing
