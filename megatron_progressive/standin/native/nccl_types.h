// NCCL's types as far as they are needed here (nccl.h 2.x), and the communicator of the stand-in.
#pragma once
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sys/types.h>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

extern "C" {
typedef struct { char internal[128]; } ncclUniqueId;
typedef enum {
  ncclSuccess = 0, ncclUnhandledCudaError = 1, ncclSystemError = 2, ncclInvalidArgument = 4,
  ncclInvalidUsage = 5, ncclRemoteError = 6,
} ncclResult_t;
typedef enum {
  ncclInt8 = 0, ncclUint8 = 1, ncclInt32 = 2, ncclUint32 = 3, ncclInt64 = 4, ncclUint64 = 5,
  ncclFloat16 = 6, ncclFloat32 = 7, ncclFloat64 = 8, ncclBfloat16 = 9,
} ncclDataType_t;
typedef enum { ncclSum = 0, ncclProd = 1, ncclMax = 2, ncclMin = 3, ncclAvg = 4 } ncclRedOp_t;
}

namespace standin {

// What a rank is about to do; all ranks of a communicator must say the same.
struct Header {
  int kind, type, root, reduction;
  unsigned long count;
};

// One for each rank, in memory that all ranks of a communicator share.
struct Seat {
  pid_t pid;
  int left;      // 1: has destroyed or aborted the communicator; 2: was refused an operation
  long arrived;  // barriers that this rank has come to
  Header header;
  int color, key;  // of ncclCommSplit
};

struct Shared {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  int ready;
};

constexpr size_t kSlot = 1 << 20;  // bytes that a rank shows to others at a time

struct Communicator {
  std::string id;
  int rank, size;
  Shared* shared = nullptr;  // null: alone, as one rank of many without peers
  Seat* seats = nullptr;
  char* slots = nullptr;
  size_t mapped = 0;
  std::map<int, long> sent, received;  // messages, by peer
  long splits = 0;
};

const char* name_of(int kind);
std::string describe(const Header& header);
size_t bytes_of(ncclDataType_t type);

// The last refusal of this thread, which ncclGetLastError returns; says it too.
ncclResult_t refuse(const Communicator* c, const std::string& line);

// nccl_waits.cpp: who waits for whom, so that a deadlock is named and a dead rank is noticed.
class Waiting {
 public:
  Waiting(const Communicator* c, std::string what);
  ~Waiting();
  // Called again and again while waiting for ranks of the communicator: a reason to give up.
  std::string hopeless(const std::vector<int>& ranks);

 private:
  const Communicator* communicator_;
  std::string what_, seen_;
  double started_, looked_;
  bool written_ = false;
};
std::string job_folder();  // for messages and notes of who waits; made when first asked for

// All ranks come, or the reason why they will not.
std::string barrier(Communicator* c, const char* what);
// Whether all ranks are about to do the same; at the end their headers may be written again.
std::string agree(Communicator* c, const Header& header);
bool alone();

}  // namespace standin

struct ncclComm : standin::Communicator {};
typedef ncclComm* ncclComm_t;
