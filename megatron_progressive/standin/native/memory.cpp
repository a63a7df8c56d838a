// Device memory: lazily mapped memory of the host, limited per device, so that torch's own
// allocator counts and runs out as on a GPU. Copies move bytes at once.
//
// Under `checking` a freed block stays mapped without any access for a while, and what was freed
// is remembered: its use is told from that of a stray pointer.
#include "common.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>

namespace {

using standin::Block;

constexpr size_t kPage = 4096;
constexpr size_t kRemembered = 20000;  // freed blocks; the kernel allows some 65,000 mappings

struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;
  std::map<uintptr_t, size_t> freed;
  std::deque<uintptr_t> freed_order;
  std::map<int, size_t> used;  // by device
};

Memory& memory() {
  static Memory* one = new Memory;
  return *one;
}

// The entry of a map by base address that holds a pointer; end() where none does.
template <class Map, class Size>
auto holder(Map& map, uintptr_t pointer, Size size) {
  auto entry = map.upper_bound(pointer);
  if (entry == map.begin()) return map.end();
  --entry;
  return pointer < entry->first + size(entry->second) ? entry : map.end();
}

void forget_freed_at(Memory& m, uintptr_t base, size_t bytes) {
  auto entry = m.freed.lower_bound(base);
  while (entry != m.freed.end() && entry->first < base + bytes) entry = m.freed.erase(entry);
}

void remember(Memory& m, const Block& block) {
  m.freed[block.base] = block.bytes;
  m.freed_order.push_back(block.base);
  if (m.freed_order.size() > kRemembered) {
    const auto oldest = m.freed.find(m.freed_order.front());
    m.freed_order.pop_front();
    if (oldest == m.freed.end()) return;
    munmap(reinterpret_cast<void*>(oldest->first), oldest->second);
    m.freed.erase(oldest);
  }
}

cudaError_t allocate(void** pointer, size_t bytes) {
  bytes = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
  Memory& m = memory();
  std::lock_guard<std::mutex> guard(m.mutex);
  const int device = standin::current_device();
  size_t& used = m.used[device];
  *pointer = nullptr;
  if (used + bytes > standin::device_bytes()) return cudaErrorMemoryAllocation;
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return cudaErrorMemoryAllocation;
  madvise(at, bytes, MADV_NOHUGEPAGE);  // one touched element must not cost two MiB
  const auto base = reinterpret_cast<uintptr_t>(at);
  forget_freed_at(m, base, bytes);
  m.blocks[base] = {base, bytes, device};
  used += bytes;
  standin::note("memory_bytes", static_cast<long>(bytes));
  standin::high_water("memory_peak_bytes", static_cast<long>(used));
  *pointer = at;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  Memory& m = memory();
  Block block;
  {
    std::lock_guard<std::mutex> guard(m.mutex);
    const auto entry = m.blocks.find(reinterpret_cast<uintptr_t>(pointer));
    if (entry == m.blocks.end()) return cudaErrorInvalidValue;
    block = entry->second;
    m.blocks.erase(entry);
    m.used[block.device] -= block.bytes;
    standin::note("memory_bytes", -static_cast<long>(block.bytes));
    if (standin::checking()) {
      madvise(pointer, block.bytes, MADV_DONTNEED);
      mprotect(pointer, block.bytes, PROT_NONE);
      remember(m, block);
    } else {
      munmap(pointer, block.bytes);
    }
  }
  standin::forget_block(block);
  return cudaSuccess;
}

// What is wrong with a side of a copy: its memory was freed, or a stream still writes it.
bool refused(const std::string& line) {
  if (line.empty()) return false;
  standin::say(line);
  return true;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, uintptr_t stream) {
  const bool to_device = standin::is_device(to), from_device = standin::is_device(from);
  if (standin::checking()) {
    for (const void* side : {static_cast<const void*>(to), from}) {
      const std::string line = standin::freed_block(side);
      if (!line.empty() && refused(line)) return cudaErrorIllegalAddress;
    }
  }
  if ((kind == cudaMemcpyHostToDevice && !to_device) ||
      (kind == cudaMemcpyDeviceToHost && !from_device)) {
    standin::say("a copy names memory of the host where it should name memory of the device");
    return cudaErrorInvalidValue;
  }
  if (from_device && refused(standin::read_on(stream, from, bytes, "a copy"))) {
    return cudaErrorIllegalAddress;
  }
  if (to_device && refused(standin::write_on(stream, to, bytes, "a copy"))) {
    return cudaErrorIllegalAddress;
  }
  const char* name = to_device && from_device ? "copies_on_device"
                     : to_device              ? "copies_to_device"
                     : from_device            ? "copies_to_host"
                                              : "copies_on_host";
  standin::note(name, 1);
  standin::note((std::string(name) + "_bytes").c_str(), static_cast<long>(bytes));
  if (bytes <= standin::copied_bytes()) memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t fill(void* pointer, int value, size_t bytes, uintptr_t stream) {
  if (refused(standin::freed_block(pointer))) return cudaErrorIllegalAddress;
  if (refused(standin::write_on(stream, pointer, bytes, "a fill"))) return cudaErrorIllegalAddress;
  const auto base = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t first = (base + kPage - 1) / kPage * kPage, last = (base + bytes) / kPage * kPage;
  if (value == 0 && first < last) {
    // Pages that are given back read as zeros, and cost nothing until they are written.
    memset(pointer, 0, first - base);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    memset(reinterpret_cast<void*>(last), 0, base + bytes - last);
  } else if (bytes <= standin::copied_bytes()) {
    memset(pointer, value, bytes);
  }
  return cudaSuccess;
}

uintptr_t id(cudaStream_t stream) { return reinterpret_cast<uintptr_t>(stream); }

}  // namespace

bool standin::find_block(const void* pointer, Block* block) {
  Memory& m = memory();
  std::lock_guard<std::mutex> guard(m.mutex);
  const auto entry = holder(m.blocks, reinterpret_cast<uintptr_t>(pointer),
                            [](const Block& b) { return b.bytes; });
  if (entry == m.blocks.end()) return false;
  if (block) *block = entry->second;
  return true;
}

bool standin::is_device(const void* pointer) { return find_block(pointer, nullptr); }

std::string standin::freed_block(const void* pointer) {
  if (!checking()) return "";
  Memory& m = memory();
  std::lock_guard<std::mutex> guard(m.mutex);
  const auto entry = holder(m.freed, reinterpret_cast<uintptr_t>(pointer),
                            [](size_t bytes) { return bytes; });
  if (entry == m.freed.end()) return "";
  return words("use of device memory after it was freed: %p, of a block of %zu bytes", pointer,
               entry->second);
}

STANDIN_API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  return allocate(pointer, bytes);
}
STANDIN_API cudaError_t cudaFree(void* pointer) {
  standin::host_waits_for_all();  // as the runtime does
  return release(pointer);
}
STANDIN_API cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes);
}
STANDIN_API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
STANDIN_API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  std::lock_guard<std::mutex> guard(memory().mutex);
  *total = standin::device_bytes();
  *free_bytes = *total - memory().used[standin::current_device()];
  return cudaSuccess;
}

STANDIN_API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  standin::note("pinned_bytes_allocated", static_cast<long>(bytes));
  const int failed = posix_memalign(pointer, kPage, std::max<size_t>(bytes, 1));
  return failed ? cudaErrorMemoryAllocation : cudaSuccess;
}
STANDIN_API cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  return cudaHostAlloc(pointer, bytes, 0);
}
STANDIN_API cudaError_t cudaFreeHost(void* pointer) {
  free(pointer);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  memset(a, 0, sizeof *a);
  Block block{};
  const bool device = standin::find_block(pointer, &block);
  a->type = device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->device = device ? block.device : standin::current_device();
  void* plain = const_cast<void*>(pointer);
  a->devicePointer = device ? plain : nullptr;
  a->hostPointer = device ? nullptr : plain;
  return cudaSuccess;
}

STANDIN_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  standin::count_host("cudaMemcpy");
  standin::host_waits_for_all();
  return copy(to, from, bytes, kind, 0);
}
STANDIN_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes,
                                        cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, bytes, kind, id(stream));
}
STANDIN_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                            cudaStream_t stream) {
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice, id(stream));
}
STANDIN_API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from,
                                          size_t from_pitch, size_t width, size_t height,
                                          cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    const cudaError_t error =
        copy(static_cast<char*>(to) + row * to_pitch,
             static_cast<const char*>(from) + row * from_pitch, width, kind, id(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return fill(pointer, value, bytes, 0);
}
STANDIN_API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes,
                                        cudaStream_t stream) {
  return fill(pointer, value, bytes, id(stream));
}

// For the Python side, which computes on the memory itself: the line of a refusal or null.
STANDIN_API const char* standin_freed(const void* pointer) {
  thread_local std::string line;
  line = standin::freed_block(pointer);
  return line.empty() ? nullptr : line.c_str();
}
