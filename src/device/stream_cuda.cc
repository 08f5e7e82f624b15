#include "annulus/device/stream.h"
#include "cuda_call.h"

namespace annulus {

Stream::Stream(Device device, StreamPriority priority) {
  if (device.kind == DeviceKind::kCpu) return;
  MakeCurrent(device);
  int least = 0, greatest = 0;
  ANNULUS_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const int value = priority == StreamPriority::kHigh ? greatest : least;
  ANNULUS_CUDA_CHECK(cudaStreamCreateWithPriority(&handle_, cudaStreamNonBlocking, value));
}

Stream::~Stream() {
  if (handle_ != nullptr) LogCudaFailure("cudaStreamDestroy", cudaStreamDestroy(handle_));
}

void Stream::Synchronize() const {
  if (handle_ != nullptr) ANNULUS_CUDA_CHECK(cudaStreamSynchronize(handle_));
}

Event::Event(Device device, EventTiming timing) {
  if (device.kind == DeviceKind::kCpu) return;
  MakeCurrent(device);
  const unsigned flags = timing == EventTiming::kTimed ? cudaEventDefault : cudaEventDisableTiming;
  ANNULUS_CUDA_CHECK(cudaEventCreateWithFlags(&handle_, flags));
}

Event::~Event() {
  if (handle_ != nullptr) LogCudaFailure("cudaEventDestroy", cudaEventDestroy(handle_));
}

void Event::Record(StreamHandle stream) {
  if (handle_ == nullptr) return;
  ANNULUS_CHECK(stream != nullptr) << "an event of a GPU is recorded on no stream";
  ANNULUS_CUDA_CHECK(cudaEventRecord(handle_, stream));
}

bool Event::Done() const {
  if (handle_ == nullptr) return true;
  const cudaError_t state = cudaEventQuery(handle_);
  if (state == cudaErrorNotReady) {
    cudaGetLastError();  // an answer, but CUDA would report it to the next kernel launch that is checked
    return false;
  }
  ANNULUS_CHECK(state == cudaSuccess) << CudaFailure("cudaEventQuery", state);
  return true;
}

void Event::Synchronize() const {
  if (handle_ != nullptr) ANNULUS_CUDA_CHECK(cudaEventSynchronize(handle_));
}

void Event::Hold(StreamHandle stream) const {
  if (handle_ == nullptr) return;
  ANNULUS_CHECK(stream != nullptr) << "an event of a GPU holds no stream";
  ANNULUS_CUDA_CHECK(cudaStreamWaitEvent(stream, handle_, cudaEventWaitDefault));
}

double Event::Seconds(const Event& begin, const Event& end) {
  if (begin.handle_ == nullptr || end.handle_ == nullptr) return 0;
  float milliseconds = 0;
  ANNULUS_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin.handle_, end.handle_));
  return static_cast<double>(milliseconds) / 1000;
}

}  // namespace annulus
