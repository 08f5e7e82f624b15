#include "host_transport.h"

#include "binding.h"
#include "execute.h"

namespace annulus {
namespace {

class HostTransport : public ExchangeTransport {
 public:
  explicit HostTransport(Communicator cp) : cp_(std::move(cp)) {}

  TransportKind kind() const override { return TransportKind::kHost; }

  absl::StatusOr<std::vector<SlotMemory>> Slots(Context& ctx, const ExchangePlan& plan,
                                                const SlotSource& source) override {
    return ScratchSlots(ctx, plan, cp_.rank(), source);
  }

  absl::Status Execute(Context& ctx, const ExchangePlan& plan, const ExchangeBinding& binding,
                       ExchangeStats* stats) override {
    return ExecuteByHost(ctx, plan, cp_, binding, stats);
  }

  absl::Status Health() override { return cp_.Health(); }
  void Abort() override { cp_.Abort(); }

 private:
  Communicator cp_;
};

}  // namespace

std::unique_ptr<ExchangeTransport> MakeHostTransport(Communicator cp) {
  return std::make_unique<HostTransport>(std::move(cp));
}

}  // namespace annulus
