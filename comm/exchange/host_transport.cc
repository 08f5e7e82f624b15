#include "host_transport.h"

#include "binding.h"

namespace annulus {
namespace {

class HostTransport : public ExchangeTransport {
 public:
  explicit HostTransport(Communicator cp) : cp_(std::move(cp)) {}

  TransportKind kind() const override { return TransportKind::kHost; }

  absl::StatusOr<std::vector<TensorRef>> Slots(Context& ctx, const ExchangePlan& plan, TensorRef home_kv,
                                               TensorRef home_grad) override {
    return ScratchSlots(ctx, plan.ranks[static_cast<size_t>(cp_.rank())], home_kv, home_grad);
  }

  absl::Status Execute(Context& ctx, const ExchangePlan& plan, const ExchangeBinding& binding,
                       ExchangeStats* stats) override {
    return annulus::Execute(ctx, plan, cp_, binding, stats);
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
