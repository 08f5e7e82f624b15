#include "emulation/products.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "emulation/block.h"

namespace annulus::emulation {
namespace {

constexpr int kRows = 16, kDepth = 16, kLanes = 32;  // of a warp's part of a product

float FromBf16(uint32_t bits) {
  bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The 128-byte swizzle: bits 7 to 9 of an address change bits 4 to 6.
uint32_t Swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Element (row, k) of an operand; row is a column of the product for the right one.
float Element(uint64_t descriptor, int major, int row, int k) {
  const auto field = [descriptor](int shift) {
    return static_cast<uint32_t>(descriptor >> shift & 0x3FFF) << 4;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 62 != 1) Fail("a descriptor without the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) Fail("a descriptor with a base offset");
  const auto r = static_cast<uint32_t>(row), d = static_cast<uint32_t>(k);
  // Eight rows of 128 bytes are repeated: along the rows of the operand, or along k, and with panels of 64 of
  // its rows.
  const uint32_t at = major == 0 ? start + r / 8 * stride + r % 8 * 128 + d * 2
                                 : start + r / 64 * leading + d / 8 * stride + d % 8 * 128 + r % 64 * 2;
  const uint32_t address = Swizzled(at);
  AsyncReadsShared("product", address, 2);
  uint16_t bits;
  std::memcpy(&bits, SharedAt(address, 2), sizeof bits);
  return FromBf16(bits);
}

// What a lane brings to a product.
struct Part {
  ProductStart start;
  std::array<uint32_t, 4> left;
  float* sums;  // the accumulators while they are in flight
  struct Product* product;
};

// One warp's part of one product.
struct Product {
  bool filled = false, done = false;
  int warp = 0;
  Product* before = nullptr;  // of the same warp
  ProductStart start;
  std::array<std::array<uint32_t, 4>, kLanes> left;
  std::array<float*, kLanes> sums;

  float Left(int row, int k) const {
    if (start.a_fragment == nullptr) return Element(start.a, start.a_major, warp % 4 * kRows + row, k);
    const uint32_t two =
        left[static_cast<size_t>(row % 8 * 4 + k % 8 / 2)][static_cast<size_t>(row / 8 + k / 8 * 2)];
    return FromBf16(k % 2 == 0 ? two & 0xFFFF : two >> 16);
  }

  void Execute() {
    if (done) return;
    done = true;
    if (before != nullptr) before->Execute();
    const int columns = start.blocks * 8;
    std::vector<float> a, b;
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) a.push_back(Left(row, k));
    }
    for (int column = 0; column < columns; ++column) {
      for (int k = 0; k < kDepth; ++k) b.push_back(Element(start.b, start.b_major, column, k));
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < start.blocks * 4; ++i) {
        const float* left_row = &a[static_cast<size_t>((lane / 4 + i % 4 / 2 * 8) * kDepth)];
        const float* right_row = &b[static_cast<size_t>((i / 4 * 8 + lane % 4 * 2 + i % 2) * kDepth)];
        float& sum = sums[static_cast<size_t>(lane)][i];
        if (start.keep == 0) sum = 0;
        for (int k = 0; k < kDepth; ++k) sum += left_row[k] * right_row[k];
      }
    }
  }
};

// A thread's products in flight.
struct Flight {
  struct Sums {
    std::vector<float> values;
    size_t group;  // the last one that adds to them
  };
  std::map<float*, Sums> sums;
  std::vector<Product*> groups;  // the last product of each committed group
  Product* last = nullptr;
  std::vector<std::unique_ptr<Product>> owned;  // of lane 0
};

}  // namespace

void StartProduct(const ProductStart& start) {
  auto& flight = ThreadLocal<Flight>();
  const auto count = static_cast<size_t>(start.blocks) * 4;
  Flight::Sums& sums = flight.sums[start.c];
  if (sums.values.empty()) sums.values.assign(start.c, start.c + count);
  if (sums.values.size() != count) Fail("accumulators of products of two widths");
  sums.group = flight.groups.size();
  std::fill_n(start.c, count, NAN);

  Part mine{start, {}, sums.values.data(), nullptr};
  if (start.a_fragment != nullptr) std::copy_n(start.a_fragment, 4, mine.left.begin());
  if (Lane() == 0) {
    flight.owned.push_back(std::make_unique<Product>());
    mine.product = flight.owned.back().get();
    mine.product->before = flight.last;
  }
  const Part* parts = MeetWarp("product", mine);
  Product* product = parts[0].product;
  if (!product->filled) {
    product->filled = true;
    product->warp = WarpOfBlock();
    product->start = start;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const Part& part = parts[lane];
      const ProductStart& other = part.start;
      if (other.blocks != start.blocks || other.a != start.a || other.b != start.b ||
          other.keep != start.keep || (other.a_fragment == nullptr) != (start.a_fragment == nullptr)) {
        Fail("lanes of a warp start different products");
      }
      product->left[lane] = part.left;
      product->sums[lane] = part.sums;
    }
    Later([product] { product->Execute(); });
  }
  flight.last = product;
}

void CommitProducts() {
  auto& flight = ThreadLocal<Flight>();
  flight.groups.push_back(flight.last);
}

void WaitProducts(int pending) {
  auto& flight = ThreadLocal<Flight>();
  if (flight.groups.size() <= static_cast<size_t>(pending)) return;
  const size_t complete = flight.groups.size() - static_cast<size_t>(pending);
  Product* last = flight.groups[complete - 1];
  WaitUntil("products", [last] { return last == nullptr || last->done; });
  for (auto it = flight.sums.begin(); it != flight.sums.end();) {
    if (it->second.group >= complete) {
      ++it;
      continue;
    }
    std::copy(it->second.values.begin(), it->second.values.end(), it->first);
    it = flight.sums.erase(it);
  }
}

}  // namespace annulus::emulation

namespace annulus::kernels {
namespace {

using emulation::Lane;

struct MatrixRow {
  uint32_t address;
  std::array<uint32_t, 4> registers;
};

// Which lane holds element (row, column) of an 8x8 matrix, in its low or high half.
struct Place {
  int lane, half;
};
Place PlaceOf(int row, int column) { return {row * 4 + column / 2, column % 2}; }
Place PlaceOfTransposed(int row, int column) { return PlaceOf(column, row); }

// Matrix i has its rows at the addresses of lanes 8 i ... 8 i + 7.
void Load(uint32_t (&r)[4], uint32_t address, Place (*place)(int, int)) {
  const uint32_t* addresses = emulation::MeetWarp("ldmatrix", address);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const Place at = place(row, column);
        if (at.lane != Lane()) continue;
        uint16_t bits;
        std::memcpy(&bits, emulation::SharedAt(addresses[matrix * 8 + row], 16) + column * 2, sizeof bits);
        const uint32_t mask = 0xFFFFu << (at.half * 16);
        r[matrix] = (r[matrix] & ~mask) | static_cast<uint32_t>(bits) << (at.half * 16);
      }
    }
  }
}

void Store(uint32_t address, const uint32_t (&r)[4], Place (*place)(int, int)) {
  const MatrixRow* rows = emulation::MeetWarp("stmatrix", MatrixRow{address, {r[0], r[1], r[2], r[3]}});
  const int matrix = Lane() / 8, row = Lane() % 8;
  unsigned char* to = emulation::SharedAt(address, 16);
  for (int column = 0; column < 8; ++column) {
    const Place at = place(row, column);
    const auto bits =
        static_cast<uint16_t>(rows[at.lane].registers[static_cast<size_t>(matrix)] >> (at.half * 16));
    std::memcpy(to + column * 2, &bits, sizeof bits);
  }
  emulation::WroteShared(address, 16);
}

}  // namespace

// By the fragments of mma_primitives.cuh.
void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments* all = emulation::MeetWarp("mma.sync", Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](uint32_t pair, int k) {
    return std::bit_cast<float>(k % 2 == 0 ? pair << 16 : pair & 0xFFFF0000);
  };
  const int lane = emulation::Lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int of_row = row * 4 + k % 8 / 2, of_column = column * 4 + k % 8 / 2;
      c[i] += half(all[of_row].a[i / 2 + k / 8 * 2], k) * half(all[of_column].b[k / 8], k);
    }
  }
}

void LoadMatrices(uint32_t (&r)[4], uint32_t address) { Load(r, address, PlaceOf); }
void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t address) { Load(r, address, PlaceOfTransposed); }
void StoreMatrices(uint32_t address, const uint32_t (&r)[4]) { Store(address, r, PlaceOf); }
void StoreMatricesTransposed(uint32_t address, const uint32_t (&r)[4]) {
  Store(address, r, PlaceOfTransposed);
}

}  // namespace annulus::kernels
