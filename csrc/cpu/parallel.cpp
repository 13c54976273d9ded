#include "cpu/parallel.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

// PyTorch's wheel brings its own OpenMP library. Linking against another copy would give the process two pools, whose
// waiting threads spin and take the cores from each other. So nothing is linked: the library that is already loaded is
// looked up by name, and its entry point GOMP_parallel, which GCC's, LLVM's and Intel's run-times all export, starts
// the team that PyTorch's own operators use. Where none is loaded, plain threads do.

namespace peftkern::cpu {
namespace {

using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct Runtime {
  GompParallel parallel = nullptr;
  std::string source = "std::thread";
};

#if defined(__linux__)
int collect_openmp(dl_phdr_info* info, size_t, void* data) {
  const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
  const std::string file = path.substr(path.rfind('/') + 1);
  for (const char* prefix : {"libgomp", "libiomp", "libomp"})
    if (file.rfind(prefix, 0) == 0) static_cast<std::vector<std::string>*>(data)->push_back(path);
  return 0;
}

// A look-up through libtorch_cpu searches the libraries that it depends on: the one that PyTorch uses, whatever else is
// loaded. Builds that link OpenMP otherwise are covered by the list of all loaded libraries.
void* find_gomp_parallel() {
  std::vector<std::string> paths = {"libtorch_cpu.so"};
  dl_iterate_phdr(collect_openmp, &paths);
  for (const std::string& path : paths) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) continue;
    if (void* symbol = dlsym(handle, "GOMP_parallel")) return symbol;
    dlclose(handle);
  }
  return nullptr;
}
#endif

Runtime find_runtime() {
  Runtime runtime;
#if defined(__linux__)
  if (void* symbol = find_gomp_parallel()) {
    Dl_info info;
    runtime.parallel = reinterpret_cast<GompParallel>(symbol);
    runtime.source = dladdr(symbol, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "GOMP_parallel";
  }
#endif
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

struct Team {
  const std::function<void(int64_t)>* run;
  int64_t tasks;
  std::atomic<int64_t> next_task{0};
  std::mutex mutex;
  std::exception_ptr failure;
};

void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  try {
    for (int64_t task = team.next_task.fetch_add(1); task < team.tasks; task = team.next_task.fetch_add(1))
      (*team.run)(task);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(team.mutex);
    team.failure = std::current_exception();
    team.next_task.store(team.tasks);
  }
}

void run_on_plain_threads(Team& team, int threads) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, &team);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, and this one, do all the tasks.
  }
  work(&team);
  for (std::thread& other : others) other.join();
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& run) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) run(task);
    return;
  }
  // Always the whole team, even for fewer tasks: OpenMP run-times end the threads that a smaller team leaves over, and
  // start new ones for the next large team.
  Team team;
  team.run = &run;
  team.tasks = tasks;
  if (runtime().parallel != nullptr)
    runtime().parallel(work, &team, static_cast<unsigned>(threads), 0);
  else
    run_on_plain_threads(team, threads);
  if (team.failure) std::rethrow_exception(team.failure);
}

const char* thread_source() { return runtime().source.c_str(); }

}  // namespace peftkern::cpu
