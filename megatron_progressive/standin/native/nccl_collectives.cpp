// Collectives of NCCL, which move and reduce bytes between processes through shared memory, a
// slot a rank at a time. Sums are taken in the order of ranks, in the tensors' own type.
#include "common.h"
#include "nccl_types.h"

#include <algorithm>
#include <cstring>

namespace {

using standin::Communicator;
using standin::Header;
using standin::kSlot;

enum Kind { kAllReduce = 1, kReduce, kReduceScatter, kAllGather, kBroadcast, kSplit = 8 };

struct Half {  // of either 16-bit type: arithmetic is in fp32, results are rounded to nearest even
  static float wide(uint16_t bits, bool brain) {
    if (!brain) {
      _Float16 half;
      memcpy(&half, &bits, sizeof half);
      return static_cast<float>(half);
    }
    const uint32_t whole = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &whole, sizeof value);
    return value;
  }
  static uint16_t narrow(float value, bool brain) {
    uint16_t bits;
    if (!brain) {
      const auto half = static_cast<_Float16>(value);
      memcpy(&bits, &half, sizeof bits);
      return bits;
    }
    if (value != value) return 0x7fc0;
    uint32_t whole;
    memcpy(&whole, &value, sizeof whole);
    return static_cast<uint16_t>((whole + 0x7fff + ((whole >> 16) & 1)) >> 16);
  }
};

template <class T>
T combine(T a, T b, int reduction) {
  switch (reduction) {
    case ncclMax: return std::max(a, b);
    case ncclMin: return std::min(a, b);
    case ncclProd: return static_cast<T>(a * b);
    default: return static_cast<T>(a + b);
  }
}

template <class T>
void reduce(char* into, const char* other, size_t count, int reduction) {
  auto* a = reinterpret_cast<T*>(into);
  const auto* b = reinterpret_cast<const T*>(other);
  for (size_t i = 0; i < count; i++) a[i] = combine(a[i], b[i], reduction);
}

void reduce_half(char* into, const char* other, size_t count, int reduction, bool brain) {
  auto* a = reinterpret_cast<uint16_t*>(into);
  const auto* b = reinterpret_cast<const uint16_t*>(other);
  for (size_t i = 0; i < count; i++) {
    a[i] = Half::narrow(combine(Half::wide(a[i], brain), Half::wide(b[i], brain), reduction), brain);
  }
}

void reduce_any(char* into, const char* other, size_t count, ncclDataType_t type, int reduction) {
  switch (type) {
    case ncclInt8: return reduce<int8_t>(into, other, count, reduction);
    case ncclUint8: return reduce<uint8_t>(into, other, count, reduction);
    case ncclInt32: return reduce<int32_t>(into, other, count, reduction);
    case ncclUint32: return reduce<uint32_t>(into, other, count, reduction);
    case ncclInt64: return reduce<int64_t>(into, other, count, reduction);
    case ncclUint64: return reduce<uint64_t>(into, other, count, reduction);
    case ncclFloat32: return reduce<float>(into, other, count, reduction);
    case ncclFloat64: return reduce<double>(into, other, count, reduction);
    case ncclFloat16: return reduce_half(into, other, count, reduction, false);
    case ncclBfloat16: return reduce_half(into, other, count, reduction, true);
  }
}

void divide(char* values, size_t count, ncclDataType_t type, int by) {
  for (size_t i = 0; i < count; i++) {
    switch (type) {
      case ncclFloat32: reinterpret_cast<float*>(values)[i] /= static_cast<float>(by); break;
      case ncclFloat64: reinterpret_cast<double*>(values)[i] /= by; break;
      case ncclFloat16:
      case ncclBfloat16: {
        auto& bits = reinterpret_cast<uint16_t*>(values)[i];
        const bool brain = type == ncclBfloat16;
        bits = Half::narrow(Half::wide(bits, brain) / static_cast<float>(by), brain);
        break;
      }
      default: break;  // NCCL divides integers as well; nobody asks for that
    }
  }
}

// What is wrong with the memory of an operation.
std::string memory_refusal(const void* pointer, size_t bytes, uintptr_t stream, bool writes,
                           const char* what) {
  if (!bytes) return "";
  const std::string freed = standin::freed_block(pointer);
  if (!freed.empty()) return std::string(what) + ": " + freed;
  standin::Block block;
  if (!standin::find_block(pointer, &block)) {
    return standin::words("%s was handed memory of the host (%p)", what, pointer);
  }
  if (reinterpret_cast<uintptr_t>(pointer) + bytes > block.base + block.bytes) {
    return standin::words("%s of %zu bytes goes past the end of a block", what, bytes);
  }
  return writes ? standin::write_on(stream, pointer, bytes, what)
                : standin::read_on(stream, pointer, bytes, what);
}

// The sum (or so) of what all ranks send, of which a rank keeps the bytes from `first` on.
std::string reduce_all(Communicator* c, const char* send, char* keep, size_t bytes,
                       size_t first, size_t kept, ncclDataType_t type, int reduction) {
  const size_t width = standin::bytes_of(type);
  if (!c->shared) {
    if (kept <= standin::copied_bytes() && send + first != keep) memmove(keep, send + first, kept);
    return "";
  }
  std::vector<char> total(kSlot);
  for (size_t at = 0; at < bytes; at += kSlot) {
    const size_t part = std::min(kSlot, bytes - at);
    memcpy(c->slots + static_cast<size_t>(c->rank) * kSlot, send + at, part);
    std::string failed = standin::barrier(c, "a reduction");
    if (!failed.empty()) return failed;
    const size_t low = std::max(at, first), high = std::min(at + part, first + kept);
    if (low < high) {
      memcpy(total.data(), c->slots + (low - at), high - low);
      for (int r = 1; r < c->size; r++) {
        reduce_any(total.data(), c->slots + static_cast<size_t>(r) * kSlot + (low - at),
                   (high - low) / width, type, reduction);
      }
      if (reduction == ncclAvg) divide(total.data(), (high - low) / width, type, c->size);
      memcpy(keep + (low - first), total.data(), high - low);
    }
    failed = standin::barrier(c, "a reduction");
    if (!failed.empty()) return failed;
  }
  return "";
}

// Checks that come before all collectives; the line of a refusal or an empty string.
std::string begin(ncclComm_t c, const Header& header, const void* read, size_t read_bytes,
                  void* written, size_t written_bytes, cudaStream_t stream) {
  const char* what = standin::name_of(header.kind);
  standin::count(what);
  const auto id = reinterpret_cast<uintptr_t>(stream);
  std::string failed = memory_refusal(read, read_bytes, id, false, what);
  if (failed.empty()) failed = memory_refusal(written, written_bytes, id, true, what);
  return failed.empty() ? standin::agree(c, header) : failed;
}

ncclResult_t answer(ncclComm_t c, const std::string& failed) {
  return failed.empty() ? ncclSuccess : standin::refuse(c, failed);
}

}  // namespace

size_t standin::bytes_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
  }
  return 1;  // eight-bit floats, which are moved and never summed here
}

const char* standin::name_of(int kind) {
  switch (kind) {
    case kAllReduce: return "ncclAllReduce";
    case kReduce: return "ncclReduce";
    case kReduceScatter: return "ncclReduceScatter";
    case kAllGather: return "ncclAllGather";
    case kBroadcast: return "ncclBroadcast";
    case kSplit: return "ncclCommSplit";
    default: return "an unknown collective";
  }
}

std::string standin::describe(const Header& h) {
  return words("%s of %lu elements of type %d, root %d, reduction %d", name_of(h.kind), h.count,
               h.type, h.root, h.reduction);
}

STANDIN_API ncclResult_t ncclAllReduce(const void* send, void* receive, size_t count,
                                       ncclDataType_t type, ncclRedOp_t reduction, ncclComm_t c,
                                       cudaStream_t stream) {
  const size_t bytes = count * standin::bytes_of(type);
  std::string failed =
      begin(c, {kAllReduce, type, 0, reduction, count}, send, bytes, receive, bytes, stream);
  if (failed.empty()) {
    failed = reduce_all(c, static_cast<const char*>(send), static_cast<char*>(receive), bytes, 0,
                        bytes, type, reduction);
  }
  return answer(c, failed);
}

STANDIN_API ncclResult_t ncclReduce(const void* send, void* receive, size_t count,
                                    ncclDataType_t type, ncclRedOp_t reduction, int root,
                                    ncclComm_t c, cudaStream_t stream) {
  const size_t bytes = count * standin::bytes_of(type), kept = c->rank == root ? bytes : 0;
  std::string failed =
      begin(c, {kReduce, type, root, reduction, count}, send, bytes, receive, kept, stream);
  if (failed.empty()) {
    failed = reduce_all(c, static_cast<const char*>(send), static_cast<char*>(receive), bytes, 0,
                        kept, type, reduction);
  }
  return answer(c, failed);
}

STANDIN_API ncclResult_t ncclReduceScatter(const void* send, void* receive, size_t count,
                                           ncclDataType_t type, ncclRedOp_t reduction,
                                           ncclComm_t c, cudaStream_t stream) {
  const size_t kept = count * standin::bytes_of(type), bytes = kept * static_cast<size_t>(c->size);
  std::string failed =
      begin(c, {kReduceScatter, type, 0, reduction, count}, send, bytes, receive, kept, stream);
  if (failed.empty()) {
    failed = reduce_all(c, static_cast<const char*>(send), static_cast<char*>(receive), bytes,
                        kept * static_cast<size_t>(c->rank), kept, type, reduction);
  }
  return answer(c, failed);
}

STANDIN_API ncclResult_t ncclAllGather(const void* send, void* receive, size_t count,
                                       ncclDataType_t type, ncclComm_t c, cudaStream_t stream) {
  const size_t bytes = count * standin::bytes_of(type);
  auto* out = static_cast<char*>(receive);
  const auto* from = static_cast<const char*>(send);
  const std::string failed = begin(c, {kAllGather, type, 0, 0, count}, send, bytes, receive,
                                   bytes * static_cast<size_t>(c->size), stream);
  if (!failed.empty()) return answer(c, failed);
  if (!c->shared) {
    if (bytes <= standin::copied_bytes()) memmove(out + bytes * static_cast<size_t>(c->rank), from, bytes);
    return ncclSuccess;
  }
  for (size_t at = 0; at < bytes; at += kSlot) {
    const size_t part = std::min(kSlot, bytes - at);
    memcpy(c->slots + static_cast<size_t>(c->rank) * kSlot, from + at, part);
    std::string late = standin::barrier(c, "ncclAllGather");
    if (!late.empty()) return answer(c, late);
    for (size_t r = 0; r < static_cast<size_t>(c->size); r++) {
      memcpy(out + r * bytes + at, c->slots + r * kSlot, part);
    }
    late = standin::barrier(c, "ncclAllGather");
    if (!late.empty()) return answer(c, late);
  }
  return ncclSuccess;
}

STANDIN_API ncclResult_t ncclBroadcast(const void* send, void* receive, size_t count,
                                       ncclDataType_t type, int root, ncclComm_t c,
                                       cudaStream_t stream) {
  const size_t bytes = count * standin::bytes_of(type);
  const bool sends = c->rank == root;
  const std::string failed = begin(c, {kBroadcast, type, root, 0, count}, send, sends ? bytes : 0,
                                   receive, bytes, stream);
  if (!failed.empty() || !c->shared) return answer(c, failed);
  for (size_t at = 0; at < bytes; at += kSlot) {
    const size_t part = std::min(kSlot, bytes - at);
    if (sends) memcpy(c->slots, static_cast<const char*>(send) + at, part);
    std::string late = standin::barrier(c, "ncclBroadcast");
    if (!late.empty()) return answer(c, late);
    memcpy(static_cast<char*>(receive) + at, c->slots, part);
    late = standin::barrier(c, "ncclBroadcast");
    if (!late.empty()) return answer(c, late);
  }
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root,
                                   ncclComm_t c, cudaStream_t stream) {
  return ncclBroadcast(buffer, buffer, count, type, root, c, stream);
}

// A sum of products with a number of each rank's own (torch's premul_sum) is not modelled.
STANDIN_API ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t*, void*, ncclDataType_t, int,
                                                  ncclComm_t c) {
  return standin::refuse(c, "ncclRedOpCreatePreMulSum is not part of the stand-in");
}

// For nccl_messages.cpp.
namespace standin {
std::string refusal_of_memory(const void* pointer, size_t bytes, cudaStream_t stream, bool writes,
                              const char* what) {
  return memory_refusal(pointer, bytes, reinterpret_cast<uintptr_t>(stream), writes, what);
}
}  // namespace standin
