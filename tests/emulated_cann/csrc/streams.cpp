// Streams, events and captured graphs. A call only queues its work. One thread, the device's, runs it in each stream's
// order, and as late as can be: not before somebody waits for it, so that whoever forgets to wait reads old memory.
// With EMULATED_CANN_STREAMS=prompt it runs as soon as it is queued.
#include "emulator.h"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <thread>

using emulated::Graph;
using emulated::Task;

namespace {

struct Stream;

struct Event {
  Stream* stream = nullptr;  // of the last record; null before the first
  uint64_t place = 0;        // of that record in its stream
  double recorded_ms = 0;
  Graph* captured_in = nullptr;
};

struct Queued {
  Task task;
  Stream* after = nullptr;  // waits until that stream has come to that place
  uint64_t after_place = 0;
};

struct Stream {
  int id, device;
  std::deque<Queued> queue;
  uint64_t submitted = 0, finished = 0, demanded = 0;  // counts of tasks since the stream was made
  aclError error = ACL_SUCCESS;                         // of a task; the rest of the queue is dropped
  Graph* capture = nullptr;
};

// Never destroyed: the thread lives as long as the process.
struct Queues {
  std::mutex mutex;
  std::condition_variable wanted, done;
  std::set<Stream*> streams;
  std::map<int, Stream*> of_device;  // the default stream of each, where a call names none
  int next_id = 1;
  bool prompt = false, started = false;
};

Queues& queues() {
  static auto* queues = new Queues;
  return *queues;
}

thread_local Graph* captured_by_thread = nullptr;
thread_local aclmdlRICaptureMode capture_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

double now_ms() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// With the mutex held: asks for a stream up to a place, and for what that waits for.
void demand(Stream* stream, uint64_t place) {
  if (stream->demanded >= place) return;
  stream->demanded = place;
  uint64_t at = stream->finished;
  for (auto& queued : stream->queue)
    if (++at <= place && queued.after) demand(queued.after, queued.after_place);
}

bool is_ready(const Stream* stream) {
  if (stream->queue.empty() || (!queues().prompt && stream->demanded <= stream->finished)) return false;
  auto& first = stream->queue.front();
  return !first.after || first.after->finished >= first.after_place;
}

void run_device() {
  Queues& all = queues();
  std::unique_lock<std::mutex> lock(all.mutex);
  while (true) {
    Stream* next = nullptr;
    for (Stream* stream : all.streams)
      if (is_ready(stream)) next = stream;
    if (!next) {
      all.wanted.wait(lock);
      continue;
    }
    Task task = std::move(next->queue.front().task);
    lock.unlock();
    aclError code = next->error ? next->error : task.run();
    task = {};
    lock.lock();
    next->error = code;
    next->queue.pop_front();
    ++next->finished;
    all.done.notify_all();
  }
}

// With the mutex held.
void start_device() {
  Queues& all = queues();
  if (all.started) return;
  all.started = true;
  const char* mode = std::getenv("EMULATED_CANN_STREAMS");
  all.prompt = mode && !std::strcmp(mode, "prompt");
  std::thread(run_device).detach();
}

Stream* new_stream(int device) {
  auto* stream = new Stream{queues().next_id++, device, {}};
  queues().streams.insert(stream);
  return stream;
}

// With the mutex held: the stream that a call names, or the default one of the current device.
Stream* named(aclrtStream stream) {
  if (stream) return static_cast<Stream*>(stream);
  Stream*& found = queues().of_device[emulated::current_device()];
  return found ? found : found = new_stream(emulated::current_device());
}

// With the lock held, which is given up while it waits.
aclError finish(std::unique_lock<std::mutex>& lock, Stream* stream) {
  uint64_t place = stream->submitted;
  demand(stream, place);
  queues().wanted.notify_all();
  queues().done.wait(lock, [&] { return stream->finished >= place; });
  return stream->error;
}

aclError enqueue(Stream* stream, Queued queued) {
  start_device();
  stream->queue.push_back(std::move(queued));
  ++stream->submitted;
  if (queues().prompt) queues().wanted.notify_all();
  return ACL_SUCCESS;
}

}  // namespace

namespace emulated {

aclError submit(aclrtStream handle, Task task) {
  std::lock_guard<std::mutex> lock(queues().mutex);
  Stream* stream = named(handle);
  if (stream->capture) {
    stream->capture->tasks.push_back(std::move(task));
    return ACL_SUCCESS;
  }
  return enqueue(stream, {std::move(task)});
}

bool is_capturing(aclrtStream handle) {
  std::lock_guard<std::mutex> lock(queues().mutex);
  return named(handle)->capture != nullptr;
}

aclError finish_stream(aclrtStream handle) {
  std::unique_lock<std::mutex> lock(queues().mutex);
  return finish(lock, named(handle));
}

aclError finish_device(int device) {
  std::unique_lock<std::mutex> lock(queues().mutex);
  aclError first = ACL_SUCCESS;
  auto streams = queues().streams;
  for (Stream* stream : streams) {
    if (stream->device != device || stream->capture || !queues().streams.count(stream)) continue;
    aclError code = finish(lock, stream);
    first = first ? first : code;
  }
  return first;
}

aclError refuse_in_capture(const char* name) {
  if (!captured_by_thread || capture_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  captured_by_thread->invalid = true;
  return fail(ACL_ERROR_RT_STREAM_CAPTURED, std::string(name) + " waits for the device, which a capture does not allow");
}

}  // namespace emulated

// --- streams

API aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  CALLED(aclrtCreateStreamWithConfig);
  std::lock_guard<std::mutex> lock(queues().mutex);
  *stream = new_stream(emulated::current_device());
  return ACL_SUCCESS;
}

API aclError aclrtCreateStream(aclrtStream* stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

API aclError aclrtDestroyStream(aclrtStream handle) {
  CALLED(aclrtDestroyStream);
  std::unique_lock<std::mutex> lock(queues().mutex);
  auto* stream = static_cast<Stream*>(handle);
  aclError code = finish(lock, stream);
  queues().streams.erase(stream);  // kept in memory, since events may name it
  return code;
}

API aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

API aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { CALLED(aclrtSetStreamFailureMode); return ACL_SUCCESS; }

API aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) {
  CALLED(aclrtSetStreamAttribute);
  return ACL_SUCCESS;
}

API aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  CALLED(aclrtStreamGetId);
  std::lock_guard<std::mutex> lock(queues().mutex);
  *id = named(stream)->id;
  return ACL_SUCCESS;
}

API aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  CALLED(aclrtStreamQuery);
  std::lock_guard<std::mutex> lock(queues().mutex);
  Stream* stream = named(handle);
  *status = stream->finished == stream->submitted ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  demand(stream, stream->submitted);  // whoever asks again and again is answered in the end
  queues().wanted.notify_all();
  return ACL_SUCCESS;
}

API aclError aclrtSynchronizeStream(aclrtStream stream) {
  CALLED(aclrtSynchronizeStream);
  if (aclError code = emulated::refuse_in_capture("aclrtSynchronizeStream")) return code;
  return emulated::finish_stream(stream);
}

API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }

API aclError aclrtSynchronizeDevice() {
  CALLED(aclrtSynchronizeDevice);
  if (aclError code = emulated::refuse_in_capture("aclrtSynchronizeDevice")) return code;
  return emulated::finish_device(emulated::current_device());
}

API aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

API aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  CALLED(aclrtLaunchHostFunc);
  return emulated::submit(stream, {"host function", [=] { function(argument); return ACL_SUCCESS; }});
}

API aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType, aclrtStream stream) {
  CALLED(aclrtLaunchCallback);
  return emulated::submit(stream, {"callback", [=] { function(argument); return ACL_SUCCESS; }});
}

API aclError aclrtProcessReport(int32_t) {
  std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return ACL_ERROR_RT_REPORT_TIMEOUT;
}

API aclError aclrtSubscribeReport(uint64_t, aclrtStream) { CALLED(aclrtSubscribeReport); return ACL_SUCCESS; }
API aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { CALLED(aclrtUnSubscribeReport); return ACL_SUCCESS; }

// --- events

API aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
  CALLED(aclrtCreateEventExWithFlag);
  *event = new Event;
  return ACL_SUCCESS;
}

API aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventExWithFlag(event, flag); }

API aclError aclrtDestroyEvent(aclrtEvent handle) {
  CALLED(aclrtDestroyEvent);
  std::unique_lock<std::mutex> lock(queues().mutex);
  auto* event = static_cast<Event*>(handle);
  if (event->stream)  // the record that writes into it may still be queued
    demand(event->stream, event->place), queues().wanted.notify_all(),
        queues().done.wait(lock, [&] { return event->stream->finished >= event->place; });
  delete event;
  return ACL_SUCCESS;
}

API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  CALLED(aclrtRecordEvent);
  std::lock_guard<std::mutex> lock(queues().mutex);
  auto* event = static_cast<Event*>(handle);
  Stream* stream = named(stream_handle);
  event->captured_in = stream->capture;
  if (stream->capture) return ACL_SUCCESS;
  event->stream = stream;
  event->place = stream->submitted + 1;
  return enqueue(stream, {{"record", [event] { event->recorded_ms = now_ms(); return ACL_SUCCESS; }}});
}

API aclError aclrtResetEvent(aclrtEvent, aclrtStream) { CALLED(aclrtResetEvent); return ACL_SUCCESS; }

API aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  CALLED(aclrtStreamWaitEvent);
  std::lock_guard<std::mutex> lock(queues().mutex);
  auto* event = static_cast<Event*>(handle);
  Stream* stream = named(stream_handle);
  if (event->captured_in && event->captured_in != stream->capture)
    return emulated::fail(ACL_ERROR_RT_EVENT_CAPTURED, "a capture over several streams is not emulated");
  if (stream->capture || !event->stream) return ACL_SUCCESS;
  return enqueue(stream, {{"wait", [] { return ACL_SUCCESS; }}, event->stream, event->place});
}

API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  CALLED(aclrtSynchronizeEvent);
  if (aclError code = emulated::refuse_in_capture("aclrtSynchronizeEvent")) return code;
  std::unique_lock<std::mutex> lock(queues().mutex);
  auto* event = static_cast<Event*>(handle);
  if (!event->stream) return ACL_SUCCESS;
  demand(event->stream, event->place);
  queues().wanted.notify_all();
  queues().done.wait(lock, [&] { return event->stream->finished >= event->place; });
  return event->stream->error;
}

API aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  CALLED(aclrtQueryEventStatus);
  std::lock_guard<std::mutex> lock(queues().mutex);
  auto* event = static_cast<Event*>(handle);
  bool complete = !event->stream || event->stream->finished >= event->place;
  *status = complete ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  if (!complete) demand(event->stream, event->place), queues().wanted.notify_all();
  return ACL_SUCCESS;
}

API aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  CALLED(aclrtQueryEventWaitStatus);
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

API aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
  CALLED(aclrtEventElapsedTime);
  *ms = static_cast<float>(static_cast<Event*>(end)->recorded_ms - static_cast<Event*>(start)->recorded_ms);
  return ACL_SUCCESS;
}

API aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* nanoseconds) {
  CALLED(aclrtEventGetTimestamp);
  *nanoseconds = static_cast<uint64_t>(static_cast<Event*>(event)->recorded_ms * 1e6);
  return ACL_SUCCESS;
}

// --- graphs: a capture collects the tasks of its stream and runs none, an execution queues them all

API aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  CALLED(aclmdlRICaptureBegin);
  std::lock_guard<std::mutex> lock(queues().mutex);
  Stream* stream = named(handle);
  if (stream->capture) return emulated::fail(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is captured already");
  stream->capture = captured_by_thread = new Graph;
  capture_mode = mode;
  return ACL_SUCCESS;
}

API aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
  CALLED(aclmdlRICaptureGetInfo);
  std::lock_guard<std::mutex> lock(queues().mutex);
  Graph* capture = named(handle)->capture;
  *status = !capture           ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : capture->invalid ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                               : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  if (graph) *graph = capture;
  return ACL_SUCCESS;
}

API aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* graph) {
  std::lock_guard<std::mutex> lock(queues().mutex);
  Stream* stream = named(handle);
  Graph* capture = stream->capture;
  stream->capture = captured_by_thread = nullptr;
  *graph = capture;
  CALLED(aclmdlRICaptureEnd);
  if (!capture) return emulated::fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not captured");
  if (capture->invalid) return emulated::fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "the capture was invalidated");
  return ACL_SUCCESS;
}

API aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  CALLED(aclmdlRICaptureThreadExchangeMode);
  std::swap(*mode, capture_mode);
  return ACL_SUCCESS;
}

API aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
  CALLED(aclmdlRIExecuteAsync);
  auto& tasks = static_cast<Graph*>(handle)->tasks;
  emulated::log("replay %zu", tasks.size());
  if (emulated::fault("replay", "nothing")) return ACL_SUCCESS;
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (i == tasks.size() / 2 && emulated::fault("replay", "incomplete")) continue;
    if (aclError code = emulated::submit(stream, tasks[i])) return code;
  }
  return ACL_SUCCESS;
}

API aclError aclmdlRIDestroy(aclmdlRI graph) {
  CALLED(aclmdlRIDestroy);
  if (aclError code = emulated::finish_device(emulated::current_device())) return code;
  delete static_cast<Graph*>(graph);
  return ACL_SUCCESS;
}

API aclError aclmdlRIGetId(aclmdlRI, uint32_t* id) {
  CALLED(aclmdlRIGetId);
  *id = 1;
  return ACL_SUCCESS;
}

API aclError aclmdlRIDebugPrint(aclmdlRI) { CALLED(aclmdlRIDebugPrint); return ACL_SUCCESS; }
