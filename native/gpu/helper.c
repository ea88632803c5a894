/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop of the helper: one thread takes requests from both rings, does what the socket asks for, and looks for errors of the GPU. It
 * waits for no copy: each ring has a stream, on which a write of `done` follows the copies.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../core/barrier.h"
#include "../core/parts.h"
#include "copy.h"
#include "memory.h"
#include "transferd/stage.h"

#define MASK (TFD_STAGE_ENTRIES - 1)
#define BATCH 16u /* entries of a ring that one write of `done` covers at most */
#define BATCH_BYTES (64u << 10) /* with so many bytes it is due: what is long is told of by itself */
#define SPIN_NS 200000u /* from the last request to sleeping */
#define LOOK_NS 1000000u /* between two looks at the socket, and for errors, while it is busy */
#define LOOK_MS 10 /* for errors, while it sleeps and copies are under way */
#define PORTABLE_DEVICEMAP 3u /* CU_MEMHOSTREGISTER_ */
#define NON_BLOCKING 1u /* CU_STREAM_ */

struct ring {
	struct tfd_stage_ring *shared;
	void *stream;
	uint64_t done_device; /* where the GPU has `done` */
	uint64_t head; /* entries below it are enqueued, or refused */
};

struct helper {
	struct tfd_cuda cuda;
	struct tfd_gpu_memories memories;
	struct tfd_stage *stage;
	uint8_t *pool;
	uint64_t pool_bytes;
	struct ring rings[TFD_STAGE_RINGS];
	int control_fd;
	int wake_fd;
	uint8_t seen[TFD_GPU_SEEN][TFD_GPU_UUID_BYTES]; /* GPUs that there are */
	struct tfd_error error; /* why it ends */
};

/* ---- requests ---- */

/* Looks at an entry before anything is done for it; 0, or what its status says. */
static uint32_t check(const struct helper *helper, const struct tfd_stage_copy *copy,
                      const struct tfd_gpu_memory *memory)
{
	uint64_t all = (uint64_t)copy->bytes * copy->rows;
	unsigned __int128 span = copy->bytes;

	if (!copy->bytes || !copy->rows || (copy->rows > 1 && copy->stride < copy->bytes))
		return EINVAL;
	if (!memory)
		return ENOENT;
	if (copy->rows > 1)
		span += (unsigned __int128)(copy->rows - 1) * copy->stride;
	if (copy->offset > memory->bytes || span > memory->bytes - copy->offset)
		return ERANGE;
	if (copy->pool_offset > helper->pool_bytes || all > helper->pool_bytes - copy->pool_offset)
		return ERANGE;
	return 0;
}

/* Whether the GPU is lost: a stream's error is never its own alone. */
static bool is_lost(struct helper *helper)
{
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++) {
		int result = helper->cuda.stream_query(helper->rings[i].stream);

		if (result && result != TFD_CUDA_NOT_READY) {
			(void)tfd_cuda_fail(&helper->cuda, &helper->error, "a copy", result);
			return true;
		}
	}
	return false;
}

/* 0, or -1: the GPU is lost. */
static int enqueue(struct helper *helper, uint32_t number, const struct tfd_stage_copy *copy,
                   uint32_t *status)
{
	struct ring *ring = &helper->rings[number];
	const struct tfd_gpu_memory *memory = tfd_gpu_memory_find(&helper->memories, copy->memory);
	struct tfd_gpu_rows rows;
	int result;

	*status = check(helper, copy, memory);
	if (*status || !memory)
		return 0;
	rows = (struct tfd_gpu_rows){ .host = helper->pool + copy->pool_offset,
	                              .device = memory->address + copy->offset,
	                              .stride = copy->stride,
	                              .bytes = copy->bytes,
	                              .rows = copy->rows };
	result = number == TFD_STAGE_D2H ? tfd_gpu_copy_out(&helper->cuda, ring->stream, &rows) :
	                                   tfd_gpu_copy_in(&helper->cuda, ring->stream, &rows);
	if (!result)
		return 0;
	*status = EIO;
	return is_lost(helper) ? -1 : 0;
}

/* Takes up to BATCH entries; how many, or -1: the GPU is lost. */
static int take(struct helper *helper, uint32_t number)
{
	struct ring *ring = &helper->rings[number];
	struct tfd_stage_ring *shared = ring->shared;
	/* pairs with the worker's store of it: the entries below it */
	uint64_t tail = tfd_load_acquire(&shared->tail);
	uint64_t bytes = 0;
	int taken = 0, result;

	while (ring->head != tail && taken < (int)BATCH && bytes < BATCH_BYTES) {
		struct tfd_stage_copy copy = shared->entries[ring->head & MASK];
		uint32_t status = 0;

		if (enqueue(helper, number, &copy, &status))
			return -1;
		/* The GPU's write of `done`, which the worker acquires, comes after the call below: so does this. */
		tfd_store_relaxed(&shared->status[ring->head & MASK], status);
		bytes += (uint64_t)copy.bytes * copy.rows;
		ring->head++;
		taken++;
	}
	if (!taken)
		return 0;
	result = helper->cuda.write_value(ring->stream, ring->done_device, ring->head, 0);
	if (result) {
		(void)tfd_cuda_fail(&helper->cuda, &helper->error, "cuStreamWriteValue64", result);
		return -1;
	}
	return taken;
}

static bool under_way(const struct helper *helper)
{
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++) {
		if (tfd_load_relaxed(&helper->rings[i].shared->done) != helper->rings[i].head)
			return true;
	}
	return false;
}

/* ---- the socket ---- */

static void say(const struct helper *helper, uint32_t type, int32_t result, uint64_t bytes, const char *text)
{
	struct tfd_gpu_message message = { .type = type, .result = result, .bytes = bytes };

	if (type != TFD_GPU_DONE)
		memcpy(message.seen, helper->seen, sizeof(message.seen));
	(void)snprintf(message.text, sizeof(message.text), "%s", text);
	(void)send(helper->control_fd, &message, sizeof(message), MSG_NOSIGNAL);
}

/* The streams are through with it, and what is requested from now on finds nothing. */
static int close_memory(struct helper *helper, uint64_t number, struct tfd_error *error)
{
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++) {
		int result = helper->cuda.stream_synchronize(helper->rings[i].stream);

		if (result)
			return tfd_cuda_fail(&helper->cuda, error, "a copy", result);
	}
	return tfd_gpu_memory_close(&helper->memories, number, error);
}

static int receive(struct helper *helper, struct tfd_gpu_message *message, int *fds, uint32_t *fd_count)
{
	char control[CMSG_SPACE(sizeof(int) * TFD_GPU_CHUNKS)];
	struct iovec data = { message, sizeof(*message) };
	struct msghdr header = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)
	};
	ssize_t size = recvmsg(helper->control_fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	const struct cmsghdr *part;

	if (size < 0)
		return errno == EAGAIN || errno == EINTR ? -EAGAIN : -errno;
	part = size ? CMSG_FIRSTHDR(&header) : NULL;
	if (part && part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS) {
		*fd_count = (uint32_t)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(part), *fd_count * sizeof(int));
	}
	return size == sizeof(*message) ? 0 : -EPIPE;
}

/* Does what the daemon asks for; 0, or -1: it has closed the socket. */
static int hear(struct helper *helper)
{
	struct tfd_gpu_message message;
	int fds[TFD_GPU_CHUNKS];
	uint32_t fd_count = 0;
	struct tfd_error error = { "" };
	int rc = receive(helper, &message, fds, &fd_count);

	if (rc)
		return rc == -EAGAIN ? 0 : -1;
	if (message.type == TFD_GPU_OPEN && message.chunk_count == fd_count)
		rc = tfd_gpu_memory_open(&helper->memories, &message, fds, &error);
	else if (message.type == TFD_GPU_CLOSE)
		rc = close_memory(helper, message.memory, &error);
	else
		rc = tfd_fail(&error, -EPROTO, "message %u with %u fds", message.type, fd_count);
	for (uint32_t i = 0; i < fd_count; i++)
		(void)close(fds[i]);
	say(helper, TFD_GPU_DONE, rc, 0, error.text);
	return 0;
}

/* ---- the loop ---- */

/* Until there is something to do; nothing is missed: whoever stores a tail looks at `sleeps` afterwards. */
static void doze(struct helper *helper)
{
	struct pollfd fds[] = { { .fd = helper->wake_fd, .events = POLLIN },
	                        { .fd = helper->control_fd, .events = POLLIN } };
	bool idle = true;
	uint64_t count;

	tfd_store_seq(&helper->stage->sleeps, 1); /* then the tails; the worker: tail, then this */
	for (uint32_t i = 0; i < TFD_STAGE_RINGS; i++)
		idle = idle && tfd_load_seq(&helper->rings[i].shared->tail) == helper->rings[i].head;
	if (idle)
		(void)poll(fds, 2, under_way(helper) ? LOOK_MS : -1);
	tfd_store_relaxed(&helper->stage->sleeps, 0);
	if (fds[0].revents)
		(void)!read(helper->wake_fd, &count, sizeof(count));
}

/* 0: the daemon has gone; -1: the GPU is lost. */
static int serve(struct helper *helper)
{
	uint64_t last = tfd_now_ns(), looked = last;

	for (;;) {
		int out = take(helper, TFD_STAGE_D2H);
		int in = out < 0 ? out : take(helper, TFD_STAGE_H2D);
		uint64_t now = tfd_now_ns();

		if (in < 0)
			return -1;
		if (out || in)
			last = now;
		if (now - looked >= LOOK_NS) {
			looked = now;
			if (hear(helper))
				return 0;
			if (is_lost(helper))
				return -1;
		}
		if (now - last < SPIN_NS) {
			if (!out && !in)
				(void)sched_yield();
			continue;
		}
		doze(helper);
		looked = 0; /* it may have been woken by the socket */
	}
}

/* ---- its start ---- */

static int map_shared(struct helper *helper, const struct tfd_gpu_options *options)
{
	struct stat ring, pool;

	if (fstat(options->ring_fd, &ring) != 0 || (size_t)ring.st_size < sizeof(*helper->stage) ||
	    fstat(options->pool_fd, &pool) != 0)
		return tfd_fail(&helper->error, -EINVAL, "the rings are too small");
	helper->stage =
		mmap(NULL, (size_t)ring.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, options->ring_fd, 0);
	helper->pool_bytes = (uint64_t)pool.st_size;
	helper->pool =
		mmap(NULL, helper->pool_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, options->pool_fd, 0);
	if (helper->stage == MAP_FAILED || helper->pool == MAP_FAILED)
		return tfd_fail(&helper->error, -ENOMEM, "mapping the pool failed: %s", strerror(errno));
	if (helper->stage->magic != TFD_STAGE_MAGIC || helper->stage->version != TFD_STAGE_VERSION)
		return tfd_fail(&helper->error, -EINVAL, "the rings are of another version of transferd");
	return 0;
}

static int make_stream(struct helper *helper, struct ring *ring, int priority)
{
	const struct tfd_cuda *cuda = &helper->cuda;
	int result = cuda->stream_create(&ring->stream, NON_BLOCKING, priority);

	if (result)
		return tfd_cuda_fail(cuda, &helper->error, "cuStreamCreateWithPriority", result);
	result = cuda->host_pointer(&ring->done_device, &ring->shared->done, 0);
	if (result)
		return tfd_cuda_fail(cuda, &helper->error, "cuMemHostGetDevicePointer", result);
	return 0;
}

static int start_gpu(struct helper *helper, const struct tfd_gpu_options *options)
{
	const struct tfd_cuda *cuda = &helper->cuda;
	int least = 0, greatest = 0, result, rc;

	rc = tfd_cuda_load(options->library, &helper->cuda, &helper->error);
	if (!rc)
		rc = tfd_cuda_enter(cuda, options->uuid, helper->seen, &helper->memories.device,
		                    &helper->error);
	if (rc)
		return rc;
	helper->memories.cuda = cuda;
	result = cuda->host_register(helper->pool, helper->pool_bytes, PORTABLE_DEVICEMAP);
	if (!result)
		result = cuda->host_register(helper->stage, sizeof(*helper->stage), PORTABLE_DEVICEMAP);
	if (result)
		return tfd_cuda_fail(cuda, &helper->error, "pinning the staging pool: cuMemHostRegister",
		                     result);
	(void)cuda->priorities(&least, &greatest);
	for (uint32_t i = 0; !rc && i < TFD_STAGE_RINGS; i++) {
		helper->rings[i].shared = &helper->stage->rings[i];
		rc = make_stream(helper, &helper->rings[i], greatest);
	}
	return rc;
}

static void greet(struct helper *helper)
{
	char name[128] = "";
	int version = 0;

	(void)helper->cuda.device_name(name, sizeof(name), helper->memories.device);
	(void)helper->cuda.version(&version);
	tfd_store_release(&helper->stage->state, TFD_STAGE_READY); /* pairs with the worker's look at it */
	say(helper, TFD_GPU_HELLO, 0, (uint64_t)version, name);
}

int tfd_gpu_helper_run(const struct tfd_gpu_options *options)
{
	struct helper helper = { .control_fd = options->control_fd, .wake_fd = options->wake_fd };
	int rc;

	if (options->parent) { /* it ends with the daemon, whatever that dies of, and whatever it is doing */
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != options->parent)
			return 0;
	}
	rc = map_shared(&helper, options);
	if (!rc)
		rc = start_gpu(&helper, options);
	if (!rc) {
		greet(&helper);
		rc = serve(&helper);
	}
	tfd_gpu_memories_fini(&helper.memories);
	if (!rc)
		return 0;
	say(&helper, TFD_GPU_ERROR, rc, 0, helper.error.text); /* before the worker has the daemon end it */
	if (helper.stage && helper.stage != MAP_FAILED) {
		(void)snprintf(helper.stage->reason, sizeof(helper.stage->reason), "%.*s",
		               (int)sizeof(helper.stage->reason) - 1, helper.error.text);
		/* pairs with the worker's look at it: the reason */
		tfd_store_release(&helper.stage->state, TFD_STAGE_DEAD);
	}
	return 1;
}
