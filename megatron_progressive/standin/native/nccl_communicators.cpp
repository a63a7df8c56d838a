// Communicators of NCCL: made, split, counted, ended; how their ranks meet and agree.
#include "common.h"
#include "nccl_types.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace {

using standin::Communicator;

thread_local std::string last_error;

timespec in_a_while() {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  t.tv_nsec += 200'000'000;
  if (t.tv_nsec >= 1'000'000'000) t.tv_sec++, t.tv_nsec -= 1'000'000'000;
  return t;
}

void prepare(standin::Shared* shared) {
  pthread_mutexattr_t mutex;
  pthread_mutexattr_init(&mutex);
  pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(&shared->mutex, &mutex);
  pthread_condattr_t condition;
  pthread_condattr_init(&condition);
  pthread_condattr_setpshared(&condition, PTHREAD_PROCESS_SHARED);
  pthread_cond_init(&shared->changed, &condition);
  __atomic_store_n(&shared->ready, 1, __ATOMIC_RELEASE);
}

// Memory that the ranks share, under the name of the communicator until all have come.
std::string meet(Communicator* c) {
  const size_t control = (sizeof(standin::Shared) + 63) / 64 * 64;
  const size_t seats = (static_cast<size_t>(c->size) * sizeof(standin::Seat) + 4095) / 4096 * 4096;
  c->mapped = control + seats + static_cast<size_t>(c->size) * standin::kSlot;
  const std::string path = standin::job_folder() + "/" + c->id;
  const int file = open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(c->mapped)) != 0) {
    return standin::words("%s: %s", path.c_str(), strerror(errno));
  }
  void* at = mmap(nullptr, c->mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (at == MAP_FAILED) return standin::words("%s: %s", path.c_str(), strerror(errno));
  char* base = static_cast<char*>(at);
  c->shared = reinterpret_cast<standin::Shared*>(base);
  c->seats = reinterpret_cast<standin::Seat*>(base + control);
  c->slots = base + control + seats;
  c->seats[c->rank].pid = getpid();
  if (c->rank == 0) prepare(c->shared);
  for (long waited = 0; !__atomic_load_n(&c->shared->ready, __ATOMIC_ACQUIRE); waited++) {
    if (waited > 2000 * standin::timeout_s()) return "rank 0 did not come to a new communicator";
    usleep(500);
  }
  const std::string failed = standin::barrier(c, "a new communicator");
  if (c->rank == 0) unlink(path.c_str());
  return failed;
}

ncclResult_t make(ncclComm_t* out, int size, const std::string& id, int rank) {
  auto* c = new ncclComm;
  c->id = id;
  c->rank = rank;
  c->size = size;
  if (size > 1 && !standin::alone()) {
    const std::string failed = meet(c);
    if (!failed.empty()) return standin::refuse(c, failed);
  }
  standin::note("communicators_made", 1);
  standin::note("communicators_live", 1);
  standin::high_water("communicators_most", standin::number("communicators_live"));
  *out = c;
  return ncclSuccess;
}

ncclResult_t end(ncclComm_t c) {
  standin::note("communicators_live", -1);
  if (c->shared) {
    if (!c->seats[c->rank].left) c->seats[c->rank].left = 1;
    munmap(c->shared, c->mapped);
  }
  delete c;
  return ncclSuccess;
}

}  // namespace

bool standin::alone() {
  static const bool one_of_many = setting("STANDIN_ALONE", 0) != 0;
  return one_of_many;
}

ncclResult_t standin::refuse(const Communicator* c, const std::string& line) {
  if (c && c->seats) c->seats[c->rank].left = 2;
  last_error = c ? words("NCCL, rank %d of %d: ", c->rank, c->size) + line : line;
  say(last_error);
  return ncclInvalidUsage;
}

std::string standin::barrier(Communicator* c, const char* what) {
  Shared* s = c->shared;
  Waiting waiting(c, what);
  pthread_mutex_lock(&s->mutex);
  const long mine = ++c->seats[c->rank].arrived;
  pthread_cond_broadcast(&s->changed);
  std::vector<int> missing;
  for (;;) {
    missing.clear();
    for (int r = 0; r < c->size; r++) if (c->seats[r].arrived < mine) missing.push_back(r);
    if (missing.empty()) break;
    const timespec until = in_a_while();
    pthread_cond_timedwait(&s->changed, &s->mutex, &until);
    // A rank that has not even attached has no process to ask about yet.
    std::erase_if(missing, [&](int r) { return c->seats[r].pid == 0; });
    pthread_mutex_unlock(&s->mutex);
    const std::string reason = waiting.hopeless(missing);
    pthread_mutex_lock(&s->mutex);
    if (!reason.empty()) {
      pthread_mutex_unlock(&s->mutex);
      return reason;
    }
  }
  pthread_mutex_unlock(&s->mutex);
  return "";
}

std::string standin::agree(Communicator* c, const Header& header) {
  if (!c->shared) return "";
  c->seats[c->rank].header = header;
  std::string failed = barrier(c, name_of(header.kind));
  for (int r = 0; failed.empty() && r < c->size; r++) {
    const Header& other = c->seats[r].header;
    if (memcmp(&other, &header, sizeof header) != 0) {
      failed = words("collectives differ: rank %d has %s, rank %d has %s", c->rank,
                     describe(header).c_str(), r, describe(other).c_str());
    }
  }
  if (!failed.empty()) return failed;
  return barrier(c, name_of(header.kind));
}

STANDIN_API ncclResult_t ncclGetVersion(int* version) {
  *version = STANDIN_NCCL_VERSION;
  return ncclSuccess;
}
STANDIN_API const char* ncclGetErrorString(ncclResult_t error) {
  return error == ncclSuccess ? "no error" : "refused by the stand-in";
}
STANDIN_API const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }
STANDIN_API ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> number{0};
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "c_%d_%d_%lx_%lx", getpid(), number++,
           static_cast<long>(t.tv_sec), static_cast<long>(t.tv_nsec));
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int size, ncclUniqueId id, int rank,
                                                void*) {
  return make(c, size, id.internal, rank);
}
STANDIN_API ncclResult_t ncclCommInitRankScalable(ncclComm_t* c, int size, int rank, int,
                                                  ncclUniqueId* ids, void*) {
  return make(c, size, ids[0].internal, rank);
}
STANDIN_API ncclResult_t ncclCommInitRank(ncclComm_t* c, int size, ncclUniqueId id, int rank) {
  return make(c, size, id.internal, rank);
}
STANDIN_API ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t* out,
                                       void*) {
  *out = nullptr;
  const long number = parent->splits++;
  const std::string id = parent->id + "_s" + std::to_string(number) + "_" + std::to_string(color);
  if (!parent->shared) return color < 0 ? ncclSuccess : make(out, parent->size, id, key);
  parent->seats[parent->rank].color = color;
  parent->seats[parent->rank].key = key;
  std::string failed = standin::agree(parent, {8, 0, 0, 0, 0});
  if (!failed.empty()) return standin::refuse(parent, failed);
  std::vector<std::pair<int, int>> members;  // key, rank of the parent
  for (int r = 0; r < parent->size; r++) {
    if (parent->seats[r].color == color) members.emplace_back(parent->seats[r].key, r);
  }
  std::sort(members.begin(), members.end());
  failed = standin::barrier(parent, "ncclCommSplit");  // before colours are written again
  if (!failed.empty()) return standin::refuse(parent, failed);
  if (color < 0) return ncclSuccess;
  const auto mine = std::find(members.begin(), members.end(), std::make_pair(key, parent->rank));
  return make(out, static_cast<int>(members.size()), id,
              static_cast<int>(mine - members.begin()));
}
STANDIN_API ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
STANDIN_API ncclResult_t ncclCommDestroy(ncclComm_t c) { return end(c); }
STANDIN_API ncclResult_t ncclCommAbort(ncclComm_t c) {
  standin::note("communicators_aborted", 1);
  return end(c);
}
STANDIN_API ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t* error) {
  *error = ncclSuccess;
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclCommCount(const ncclComm_t c, int* size) {
  *size = c->size;
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclCommUserRank(const ncclComm_t c, int* rank) {
  *rank = c->rank;
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclCommCuDevice(const ncclComm_t, int* device) {
  *device = standin::current_device();
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclMemAlloc(void** pointer, size_t bytes) {
  return cudaMalloc(pointer, bytes) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
STANDIN_API ncclResult_t ncclMemFree(void* pointer) {
  return cudaFree(pointer) == cudaSuccess ? ncclSuccess : ncclUnhandledCudaError;
}
