// Streams, events and graphs. All work is done when it is issued, so nothing is ever pending;
// under `checking` vector clocks tell what a GPU might not have finished.
//
// Each piece of work on a stream gets the next number of that stream. A stream's clock holds, for
// every other stream, the number up to which it has waited: it grows by cudaStreamWaitEvent, and
// by what the host had waited for when the work was issued. Memory remembers its last writer;
// a reader whose clock does not reach that write is refused.
#include "common.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <vector>

namespace {

using Clock = std::map<uintptr_t, long>;  // of streams, by their handle

struct Write {
  uintptr_t first, end;  // addresses
  uintptr_t stream;
  long number;
  std::string what;
};

struct State {
  std::mutex mutex;
  std::map<uintptr_t, Clock> streams;  // what each has waited for, itself included
  std::map<uintptr_t, Clock> events;
  Clock host;
  std::map<uintptr_t, std::vector<Write>> writes;  // by the block's base
};

State& state() {
  static State* one = new State;
  return *one;
}

std::atomic<long> handles{1};
std::atomic<int> captures{0};

template <class Handle>
cudaError_t fresh(Handle* handle) {
  *handle = reinterpret_cast<Handle>(0x10000 + 16 * handles++);
  return cudaSuccess;
}

template <class Handle>
uintptr_t id(Handle handle) {
  return reinterpret_cast<uintptr_t>(handle);
}

void join(Clock& into, const Clock& other) {
  for (const auto& [stream, number] : other) {
    long& slot = into[stream];
    slot = std::max(slot, number);
  }
}

// The number of new work on a stream, which comes after all that the host has waited for.
long issue(State& s, uintptr_t stream) {
  Clock& clock = s.streams[stream];
  join(clock, s.host);
  return ++clock[stream];
}

std::string conflict(const std::vector<Write>& writes, const Clock& clock, uintptr_t stream,
                     uintptr_t first, uintptr_t end, const char* what, const char* does) {
  for (const Write& write : writes) {
    if (write.stream == stream || write.end <= first || end <= write.first) continue;
    const auto seen = clock.find(write.stream);
    if (seen != clock.end() && seen->second >= write.number) continue;
    return standin::words(
        "%s on stream %#lx %s memory that stream %#lx (%s) has not finished writing: no event or "
        "wait orders the two", what, stream, does, write.stream, write.what.c_str());
  }
  return "";
}

}  // namespace

void standin::forget_block(const Block& block) {
  if (!checking()) return;
  std::lock_guard<std::mutex> guard(state().mutex);
  state().writes.erase(block.base);
}

void standin::host_waits_for_all() {
  if (!checking()) return;
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  for (const auto& [stream, clock] : s.streams) join(s.host, clock);
}

std::string standin::read_on(uintptr_t stream, const void* pointer, size_t bytes,
                             const char* what) {
  Block block;
  if (!checking() || !bytes || !find_block(pointer, &block)) return "";
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  issue(s, stream);
  const auto first = id(pointer);
  return conflict(s.writes[block.base], s.streams[stream], stream, first, first + bytes, what,
                  "reads");
}

std::string standin::write_on(uintptr_t stream, const void* pointer, size_t bytes,
                              const char* what) {
  Block block;
  if (!checking() || !bytes || !find_block(pointer, &block)) return "";
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  const long number = issue(s, stream);
  const auto first = id(pointer), end = first + bytes;
  auto& writes = s.writes[block.base];
  const std::string line =
      conflict(writes, s.streams[stream], stream, first, end, what, "overwrites");
  if (!line.empty()) return line;
  std::erase_if(writes, [&](const Write& w) { return first <= w.first && w.end <= end; });
  writes.push_back({first, end, stream, number, what});
  return "";
}

// For the Python side, which computes on the memory itself: the line of a refusal or null.
STANDIN_API const char* standin_access(uintptr_t stream, const void* pointer, size_t bytes,
                                       int writes, const char* what) {
  thread_local std::string line;
  line = writes ? standin::write_on(stream, pointer, bytes, what)
                : standin::read_on(stream, pointer, bytes, what);
  return line.empty() ? nullptr : line.c_str();
}

STANDIN_API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return fresh(stream); }
STANDIN_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return fresh(stream);
}
STANDIN_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return fresh(stream);
}
STANDIN_API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaEventCreate(cudaEvent_t* event) { return fresh(event); }
STANDIN_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return fresh(event);
}
STANDIN_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.f;
  return cudaSuccess;
}

static cudaError_t record(cudaEvent_t event, cudaStream_t stream) {
  if (!standin::checking()) return cudaSuccess;
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  s.events[id(event)] = s.streams[id(stream)];
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return record(event, stream);
}
STANDIN_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return record(event, stream);
}
STANDIN_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!standin::checking()) return cudaSuccess;
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  join(s.streams[id(stream)], s.events[id(event)]);
  return cudaSuccess;
}

// Calls with which the host waits. cudaEventQuery is none: a watchdog thread asks it as well.
STANDIN_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  standin::count_host("cudaStreamSynchronize");
  if (!standin::checking()) return cudaSuccess;
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  join(s.host, s.streams[id(stream)]);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  standin::count_host("cudaEventSynchronize");
  if (!standin::checking()) return cudaSuccess;
  State& s = state();
  std::lock_guard<std::mutex> guard(s.mutex);
  join(s.host, s.events[id(event)]);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaDeviceSynchronize() {
  standin::count_host("cudaDeviceSynchronize");
  standin::host_waits_for_all();
  return cudaSuccess;
}

// Graphs: what is captured is done at once as well, and a replay does nothing.
STANDIN_API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  captures++;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  captures--;
  standin::note("graphs_captured", 1);
  return fresh(graph);
}
static cudaStreamCaptureStatus capture_status() {
  return captures > 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
STANDIN_API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capture_status();
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                                 unsigned long long* capture, cudaGraph_t* graph,
                                                 const cudaGraphNode_t** nodes,
                                                 const cudaGraphEdgeData** edges, size_t* number) {
  *status = capture_status();
  if (capture) *capture = 1;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(0x10);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t,
                                                      unsigned long long) {
  return fresh(graph);
}
STANDIN_API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) {
  *number = 1;
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  standin::count("cudaGraphLaunch");
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                              void* data, unsigned) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
STANDIN_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
