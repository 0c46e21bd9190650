// Threads. The host (torch) already has a pool of OpenMP threads, which spin for a while after their work; a second
// pool would fight with them over the cores. So its entry points are looked up at run time, which is no link to it: a
// build needs no OpenMP. Where the host has none, threads are started for the call.
#include "parts.h"

#include <dlfcn.h>

#include <atomic>
#include <system_error>
#include <thread>

namespace layerwise {

namespace {

struct Pool {
  using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
  using Query = int (*)();
  Region region;
  Query number, count, inside;
};

const Pool& pool() {
  static const Pool found = [] {
    return Pool{reinterpret_cast<Pool::Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel")),
                reinterpret_cast<Pool::Query>(dlsym(RTLD_DEFAULT, "omp_get_thread_num")),
                reinterpret_cast<Pool::Query>(dlsym(RTLD_DEFAULT, "omp_get_num_threads")),
                reinterpret_cast<Pool::Query>(dlsym(RTLD_DEFAULT, "omp_in_parallel"))};
  }();
  return found;
}

bool has_pool() { return pool().region && pool().number && pool().count && pool().inside; }

struct Work {
  Body body;
  void* data;
};

void region(void* data) {
  const auto& work = *static_cast<Work*>(data);
  work.body(work.data, pool().number(), pool().count());  // fewer threads may have come than were asked for
}

}  // namespace

const char* thread_pool() { return has_pool() ? "the host's OpenMP threads" : "threads of its own"; }

void parallel(int threads, Body body, void* data) {
  if (threads <= 1) return body(data, 0, 1);
  if (has_pool()) {
    if (pool().inside()) return body(data, 0, 1);
    Work work = {body, data};
    return pool().region(region, &work, unsigned(threads), 0);
  }
  constexpr int kMost = 256;
  std::thread started[kMost];
  const int parts = threads < kMost ? threads : kMost;
  int running = 1;
  try {
    for (; running < parts; ++running) started[running] = std::thread(body, data, running, parts);
  } catch (const std::system_error&) {  // no more threads to be had: their parts are done below
  }
  body(data, 0, parts);
  for (int part = running; part < parts; ++part) body(data, part, parts);
  for (int part = 1; part < running; ++part) started[part].join();
}

void at_once(int threads, Body body, void* data) {
  if (threads <= 1 || has_pool()) return parallel(threads, body, data);
  struct Gate {  // how many there are is known when all have been started
    Body body;
    void* data;
    std::atomic<int> parts;
  } gate = {body, data, {0}};
  const auto wait = [](Gate* own, int part) {
    int parts;
    while ((parts = own->parts.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
    own->body(own->data, part, parts);
  };
  constexpr int kMost = 256;
  std::thread started[kMost];
  int running = 1;
  try {
    for (; running < (threads < kMost ? threads : kMost); ++running) started[running] = std::thread(wait, &gate, running);
  } catch (const std::system_error&) {  // no more threads to be had: fewer parts
  }
  gate.parts.store(running, std::memory_order_release);
  body(data, 0, running);
  for (int part = 1; part < running; ++part) started[part].join();
}

}  // namespace layerwise
