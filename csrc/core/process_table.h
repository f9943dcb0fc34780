// What every process on this host has booked of host memory that the kernel does not show as taken
// yet: a file that they share, and a lock on it. System calls only; nothing here touches CUDA.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/units.h"

namespace egm {

struct Booking {
  Bytes promised;  // to managed memory that is not populated yet
  Bytes pending;   // to requests that are being served
  Bytes carveout;  // held of the carve-out for the GPU
  // MemoryLimit::group of the limits that hold for the process; 0 where there are fewer.
  std::array<uint64_t, 4> groups{};
};

// The file has one entry per process, and a process holds a lock (fcntl F_SETLK) on its entry as
// long as it lives. The kernel drops the lock however the process ends, shows it in every PID
// namespace, where process ids say nothing, and does not hand it on to a forked child, as it would
// a lock of the open file description (F_OFD_SETLK). What is in an entry that nobody has locked
// does not count, and the entry is free.
//
// The file is read and written, not mapped: to truncate it, or to fill its file system, then kills
// nobody. Where it cannot be opened, as if no other process were there. Not for several threads at
// a time, nor for a forked child, which makes a table of its own. No other code of the process may
// open the file: closing any descriptor of it drops the locks.
class ProcessTable {
 public:
  // The number counts the layouts of the file.
  static constexpr const char* kUsualPath = "/dev/shm/egm_alloc.host_reserve.1";

  explicit ProcessTable(std::string path = kUsualPath);
  ~ProcessTable();
  ProcessTable(const ProcessTable&) = delete;
  ProcessTable& operator=(const ProcessTable&) = delete;

  // No other process decides on host memory during a turn. Waits for theirs, at most a second: a
  // process that was stopped in its turn must not stop the others.
  class Turn {
   public:
    explicit Turn(ProcessTable& table);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    ProcessTable& table_;
    bool held_ = false;
  };

  // Of the other processes that live.
  std::vector<Booking> others();
  // Tells the others. What is more than before belongs into a turn.
  void publish(const Booking& own);
  // Why other processes are not seen, if they are not.
  std::optional<std::string> problem();

 private:
  bool open();
  bool still_there();
  bool take_entry();
  bool lock(int type, size_t entry) const;

  const std::string path_;
  int file_ = -1;
  dev_t device_ = 0;
  ino_t inode_ = 0;
  // Of this process, or 0: that is the head of the file, whose lock is the turn.
  size_t entry_ = 0;
  std::string problem_;
};

// What the bookings that `group` concerns come to; all are for group 0, the whole host.
Booking sum_within(const std::vector<Booking>& bookings, uint64_t group);

}  // namespace egm
