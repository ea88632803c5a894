/* SPDX-License-Identifier: Apache-2.0 */
/* The helper of a GPU, as a thread, on the double of libcuda: what it copies, what it refuses, and how it ends. */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/barrier.h"
#include "core_fixture.h"
#include "tests/softcuda/softcuda.h"
#include "transferd/gpu.h"
#include "transferd/stage.h"

#define LIBRARY "libsoftcuda.so"
#define KIB 1024u
#define CHUNK (256u * KIB)
#define CHUNKS 2u
#define MEMORY (CHUNK * CHUNKS)
#define POOL (1024u * KIB)
#define NUMBER 77u
#define TRIES 200000u /* of 100 us */

/* What the tests call of the double themselves. */
static struct {
	int (*init)(unsigned);
	int (*retain)(void **, int);
	int (*set)(void *);
	int (*create)(uint64_t *, size_t, const struct soft_allocation *, uint64_t);
	int (*export)(void *, uint64_t, int, uint64_t);
	int (*release)(uint64_t);
	int (*reserve)(uint64_t *, size_t, size_t, uint64_t, uint64_t);
	int (*map)(uint64_t, size_t, size_t, uint64_t, uint64_t);
} cuda;

struct bench {
	struct tfd_gpu_options options;
	struct tfd_stage *stage;
	uint8_t *pool;
	int socket; /* the daemon's end */
	pthread_t thread;
	int status; /* what the helper returned */
	uint8_t *memory; /* of the "GPU", as its owner sees it */
	int chunk_fds[CHUNKS];
};

static char directory[] = "/tmp/tfd-softcuda-XXXXXX";

static void fault(const char *name, const char *text)
{
	char path[128];
	int fd;

	(void)snprintf(path, sizeof(path), "%s/%s", directory, name);
	fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0600);
	CHECK(fd >= 0);
	CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	(void)close(fd);
}

static void find(void *handle, const char *name, void *slot)
{
	void *found = dlsym(handle, name);

	CHECK(found);
	memcpy(slot, &found, sizeof(found));
}

static void load(void)
{
	void *handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
	void *context;

	CHECK(handle);
	find(handle, "cuInit", &cuda.init);
	find(handle, "cuDevicePrimaryCtxRetain", &cuda.retain);
	find(handle, "cuCtxSetCurrent", &cuda.set);
	find(handle, "cuMemCreate", &cuda.create);
	find(handle, "cuMemExportToShareableHandle", &cuda.export);
	find(handle, "cuMemRelease", &cuda.release);
	find(handle, "cuMemAddressReserve", &cuda.reserve);
	find(handle, "cuMemMap", &cuda.map);
	CHECK(cuda.init(0) == 0 && cuda.retain(&context, 0) == 0 && cuda.set(context) == 0);
}

static void *map_fd(int fd, size_t bytes)
{
	void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	CHECK(base != MAP_FAILED);
	return base;
}

static int make_fd(size_t bytes)
{
	int fd = memfd_create("test", MFD_CLOEXEC);

	CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
	return fd;
}

static void memory_make(struct bench *bench)
{
	const struct soft_allocation what = { .type = 1, .handle_types = 1, .location_type = 1 };
	uint64_t base, chunk;

	CHECK(cuda.reserve(&base, MEMORY, 0, 0, 0) == 0);
	for (uint32_t i = 0; i < CHUNKS; i++) {
		CHECK(cuda.create(&chunk, CHUNK, &what, 0) == 0);
		CHECK(cuda.map(base + i * CHUNK, CHUNK, 0, chunk, 0) == 0);
		CHECK(cuda.export(&bench->chunk_fds[i], chunk, 1, 0) == 0);
		CHECK(cuda.release(chunk) == 0);
	}
	bench->memory = (uint8_t *)(uintptr_t)base;
	for (uint32_t i = 0; i < MEMORY; i++)
		bench->memory[i] = (uint8_t)(i * 7 + i / 251);
}

static void *run(void *argument)
{
	struct bench *bench = argument;

	bench->status = tfd_gpu_helper_run(&bench->options);
	return NULL;
}

static void start(struct bench *bench)
{
	int sockets[2];

	bench->options.ring_fd = make_fd(sizeof(struct tfd_stage));
	bench->options.pool_fd = make_fd(POOL);
	bench->options.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) == 0);
	bench->socket = sockets[0];
	bench->options.control_fd = sockets[1];
	if (!bench->options.uuid[0])
		memcpy(bench->options.uuid, "softcuda-uuid-00", TFD_GPU_UUID_BYTES);
	if (!bench->options.library[0])
		(void)snprintf(bench->options.library, sizeof(bench->options.library), LIBRARY);
	bench->stage = map_fd(bench->options.ring_fd, sizeof(struct tfd_stage));
	bench->pool = map_fd(bench->options.pool_fd, POOL);
	bench->stage->magic = TFD_STAGE_MAGIC;
	bench->stage->version = TFD_STAGE_VERSION;
	bench->stage->pool_bytes = POOL;
	CHECK(pthread_create(&bench->thread, NULL, run, bench) == 0);
}

/* The daemon goes; or the helper went. */
static int finish(struct bench *bench)
{
	(void)close(bench->socket);
	CHECK(pthread_join(bench->thread, NULL) == 0);
	(void)close(bench->options.control_fd);
	(void)close(bench->options.ring_fd);
	(void)close(bench->options.pool_fd);
	(void)close(bench->options.wake_fd);
	(void)munmap(bench->stage, sizeof(struct tfd_stage));
	(void)munmap(bench->pool, POOL);
	return bench->status;
}

static struct tfd_gpu_message hear(struct bench *bench)
{
	struct tfd_gpu_message message;

	CHECK(recv(bench->socket, &message, sizeof(message), 0) == sizeof(message));
	return message;
}

/* Both GPUs of the double, and zeros. */
static bool sees_all(const struct tfd_gpu_message *message)
{
	static const uint8_t none[TFD_GPU_UUID_BYTES];

	return !memcmp(message->seen[0], "softcuda-uuid-00", TFD_GPU_UUID_BYTES) &&
	       !memcmp(message->seen[1], "softcuda-uuid-01", TFD_GPU_UUID_BYTES) &&
	       !memcmp(message->seen[2], none, TFD_GPU_UUID_BYTES);
}

static void hello(struct bench *bench)
{
	struct tfd_gpu_message message = hear(bench);

	CHECK(sees_all(&message));
	CHECK(message.type == TFD_GPU_HELLO && message.bytes == 13000);
	CHECK(strcmp(message.text, "softcuda 0") == 0);
	CHECK(tfd_load_acquire(&bench->stage->state) == TFD_STAGE_READY);
}

static struct tfd_gpu_message ask(struct bench *bench, const struct tfd_gpu_message *message, const int *fds,
                                  uint32_t fd_count)
{
	char control[CMSG_SPACE(sizeof(int) * TFD_GPU_CHUNKS)] = { 0 };
	struct tfd_gpu_message sent = *message;
	struct iovec data = { &sent, sizeof(sent) };
	struct msghdr header = { .msg_iov = &data, .msg_iovlen = 1 };
	struct tfd_gpu_message answer;

	if (fd_count) {
		struct cmsghdr *part;

		header.msg_control = control;
		header.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
		part = CMSG_FIRSTHDR(&header);
		part->cmsg_level = SOL_SOCKET;
		part->cmsg_type = SCM_RIGHTS;
		part->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
		memcpy(CMSG_DATA(part), fds, sizeof(int) * fd_count);
	}
	CHECK(sendmsg(bench->socket, &header, 0) == sizeof(sent));
	answer = hear(bench);
	CHECK(answer.type == TFD_GPU_DONE);
	return answer;
}

/* By a message for each chunk. */
static void memory_open(struct bench *bench)
{
	for (uint32_t i = 0; i < CHUNKS; i++) {
		struct tfd_gpu_message message = { .type = TFD_GPU_OPEN,
		                                   .memory = NUMBER,
		                                   .bytes = MEMORY,
		                                   .chunk_count = 1,
		                                   .more = i + 1 < CHUNKS,
		                                   .chunk_bytes = { CHUNK } };
		struct tfd_gpu_message answer = ask(bench, &message, &bench->chunk_fds[i], 1);

		if (answer.result)
			(void)fprintf(stderr, "%s\n", answer.text);
		CHECK(answer.result == 0);
	}
}

static int memory_close(struct bench *bench)
{
	const struct tfd_gpu_message message = { .type = TFD_GPU_CLOSE, .memory = NUMBER };

	return ask(bench, &message, NULL, 0).result;
}

/* Requests one copy and waits for it; its status. */
static uint32_t copy(struct bench *bench, uint32_t number, const struct tfd_stage_copy *what)
{
	struct tfd_stage_ring *ring = &bench->stage->rings[number];
	uint64_t tail = tfd_load_relaxed(&ring->tail), one = 1;
	uint32_t tries = 0;

	ring->entries[tail % TFD_STAGE_ENTRIES] = *what;
	tfd_store_seq(&ring->tail, tail + 1);
	if (tfd_load_seq(&bench->stage->sleeps))
		CHECK(write(bench->options.wake_fd, &one, sizeof(one)) == sizeof(one));
	while (tfd_load_acquire(&ring->done) != tail + 1) {
		CHECK(tries++ < TRIES);
		(void)usleep(100);
	}
	return tfd_load_relaxed(&ring->status[tail % TFD_STAGE_ENTRIES]);
}

static void until_asleep(struct bench *bench)
{
	uint32_t tries = 0;

	while (!tfd_load_seq(&bench->stage->sleeps)) {
		CHECK(tries++ < TRIES);
		(void)usleep(100);
	}
}

/* Every length in turn, at odd places, each way; nothing beside the range is touched. */
static void test_lengths(void)
{
	static const uint32_t lengths[] = { 2,     3,     4,     7,     15,        16,           17,
	                                    63,    64,    65,    1000,  4096,      4099,         32767,
	                                    32768, 40001, 65536, CHUNK, CHUNK + 5, CHUNK + 70001 };
	struct bench bench = { 0 };
	uint8_t *image = malloc(MEMORY);

	CHECK(image);
	memory_make(&bench);
	start(&bench);
	hello(&bench);
	memory_open(&bench);
	for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
		struct tfd_stage_copy what = { .memory = NUMBER,
		                               .offset = 3 * i,
		                               .pool_offset = 11 * i,
		                               .bytes = lengths[i],
		                               .rows = 1 };

		if (i % 4 == 0) /* the others find it awake, mostly */
			until_asleep(&bench);
		memset(bench.pool, 0xee, POOL);
		CHECK(copy(&bench, TFD_STAGE_D2H, &what) == 0);
		CHECK(memcmp(bench.pool + what.pool_offset, bench.memory + what.offset, what.bytes) == 0);
		CHECK(bench.pool[what.pool_offset + what.bytes] == 0xee);
		for (uint32_t j = 0; j < what.bytes; j++)
			bench.pool[what.pool_offset + j] = (uint8_t)random();
		memcpy(image, bench.memory, MEMORY);
		memcpy(image + what.offset, bench.pool + what.pool_offset, what.bytes);
		CHECK(copy(&bench, TFD_STAGE_H2D, &what) == 0);
		CHECK(memcmp(image, bench.memory, MEMORY) == 0);
	}
	CHECK(memory_close(&bench) == 0);
	CHECK(finish(&bench) == 0);
	free(image);
}

static void test_rows(void)
{
	static const struct {
		uint32_t bytes, rows;
		uint64_t stride;
	} shapes[] = {
		{ 64, 100, 200 }, { 4096, 32, 8192 }, { 4096, 32, 4096 }, { 1, 500, 3 }, { 100, 7, 100 }
	};
	struct bench bench = { 0 };
	uint8_t *image = malloc(MEMORY);

	CHECK(image);
	memory_make(&bench);
	start(&bench);
	hello(&bench);
	memory_open(&bench);
	for (uint32_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
		uint32_t bytes = shapes[i].bytes, rows = shapes[i].rows;
		struct tfd_stage_copy what = { .memory = NUMBER,
		                               .offset = 1000,
		                               .pool_offset = 64,
		                               .stride = shapes[i].stride,
		                               .bytes = bytes,
		                               .rows = rows };

		memset(bench.pool, 0xee, POOL);
		CHECK(copy(&bench, TFD_STAGE_D2H, &what) == 0);
		for (uint32_t row = 0; row < rows; row++)
			CHECK(memcmp(bench.pool + 64 + row * bytes, bench.memory + 1000 + row * what.stride,
			             bytes) == 0);
		memcpy(image, bench.memory, MEMORY);
		for (uint32_t j = 0; j < bytes * rows; j++)
			bench.pool[64 + j] = (uint8_t)random();
		for (uint32_t row = 0; row < rows; row++)
			memcpy(image + 1000 + row * what.stride, bench.pool + 64 + row * bytes, bytes);
		CHECK(copy(&bench, TFD_STAGE_H2D, &what) == 0);
		CHECK(memcmp(image, bench.memory, MEMORY) == 0);
	}
	CHECK(finish(&bench) == 0);
	free(image);
}

static void test_refusals(void)
{
	const struct tfd_stage_copy good = { .memory = NUMBER, .bytes = 64, .rows = 1 };
	struct tfd_gpu_message message = { .type = TFD_GPU_OPEN, .memory = 5, .bytes = MEMORY };
	struct tfd_gpu_message answer;
	struct bench bench = { 0 };
	struct tfd_stage_copy what;

	memory_make(&bench);
	start(&bench);
	hello(&bench);
	CHECK(copy(&bench, TFD_STAGE_D2H, &good) == ENOENT);
	memory_open(&bench);
#define REFUSED(ring, expected, ...)                          \
	do {                                                  \
		what = good;                                  \
		__VA_ARGS__;                                  \
		CHECK(copy(&bench, ring, &what) == expected); \
	} while (0)
	REFUSED(TFD_STAGE_D2H, ENOENT, what.memory = 78);
	REFUSED(TFD_STAGE_H2D, ENOENT, what.memory = 0);
	REFUSED(TFD_STAGE_H2D, EINVAL, what.bytes = 0);
	REFUSED(TFD_STAGE_H2D, EIO, what.bytes = 1); /* the stream would wait */
	REFUSED(TFD_STAGE_D2H, 0, what.bytes = 1);
	REFUSED(TFD_STAGE_D2H, EINVAL, what.rows = 0);
	REFUSED(TFD_STAGE_D2H, EINVAL, what.rows = 2; what.stride = 63);
	REFUSED(TFD_STAGE_H2D, ERANGE, what.offset = MEMORY - 63);
	REFUSED(TFD_STAGE_H2D, ERANGE, what.offset = UINT64_MAX);
	REFUSED(TFD_STAGE_H2D, ERANGE, what.pool_offset = POOL - 63);
	REFUSED(TFD_STAGE_D2H, ERANGE, what.pool_offset = UINT64_MAX);
	REFUSED(TFD_STAGE_D2H, ERANGE, what.rows = UINT32_MAX; what.stride = UINT64_MAX);
	REFUSED(TFD_STAGE_D2H, ERANGE, what.rows = 3; what.stride = MEMORY / 2);
	CHECK(copy(&bench, TFD_STAGE_D2H, &good) == 0);

	answer = ask(&bench, &message, NULL, 0); /* a handle that nobody made */
	CHECK(answer.result == -EIO && strstr(answer.text, "cuIpcOpenMemHandle failed with"));
	message.memory = NUMBER;
	CHECK(ask(&bench, &message, NULL, 0).result == -EEXIST);
	message = (struct tfd_gpu_message){ .type = TFD_GPU_OPEN,
	                                    .memory = 6,
	                                    .bytes = CHUNK + 1,
	                                    .chunk_count = 1,
	                                    .chunk_bytes = { CHUNK } };
	CHECK(ask(&bench, &message, bench.chunk_fds, 1).result == -ERANGE); /* less than it says */
	message.bytes = CHUNK - 1;
	CHECK(ask(&bench, &message, bench.chunk_fds, 1).result == -ERANGE); /* more */
	message.bytes = CHUNK / 2;
	message.chunk_bytes[0] = CHUNK / 2;
	CHECK(ask(&bench, &message, bench.chunk_fds, 1).result == -EIO); /* the driver says so */
	CHECK(ask(&bench, &message, bench.chunk_fds, 2).result == -EPROTO);
	message.type = 99;
	CHECK(ask(&bench, &message, bench.chunk_fds, 1).result == -EPROTO);
	CHECK(memory_close(&bench) == 0);
	CHECK(memory_close(&bench) == 0); /* once more is no error */
	CHECK(copy(&bench, TFD_STAGE_D2H, &good) == ENOENT);
	CHECK(finish(&bench) == 0);
}

/* It has said why it ends. */
static void check_dead(struct bench *bench, const char *why)
{
	struct tfd_stage *stage = map_fd(bench->options.ring_fd, sizeof(*stage)); /* beyond finish() */

	CHECK(finish(bench) == 1);
	CHECK(tfd_load_acquire(&stage->state) == TFD_STAGE_DEAD);
	CHECK(strncmp(stage->reason, why, sizeof(stage->reason) - 1) == 0);
	(void)munmap(stage, sizeof(*stage));
}

/* It never gets ready, and says why, and which GPUs it saw before that. */
static void fails_with(struct bench *bench, const char *text, bool sees)
{
	static const struct tfd_gpu_message blind;
	struct tfd_gpu_message message;

	start(bench);
	message = hear(bench);
	CHECK(message.type == TFD_GPU_ERROR);
	CHECK(sees ? sees_all(&message) : !memcmp(message.seen, blind.seen, sizeof(blind.seen)));
	if (!strstr(message.text, text))
		(void)fprintf(stderr, "%s\n", message.text);
	CHECK(strstr(message.text, text));
	check_dead(bench, message.text);
}

static void test_starts_that_fail(void)
{
	struct bench bench = { .options = { .library = "/nowhere/libcuda.so.1" } };

	fails_with(&bench, "host memory works without it", false);
	bench = (struct bench){ .options = { .library = "libc.so.6" } };
	fails_with(&bench, "has no cuInit", false);
	CHECK(setenv("SOFTCUDA_VERSION", "11080", 1) == 0);
	bench = (struct bench){ 0 };
	fails_with(&bench, "of CUDA 11.8, staging needs 12.0", false);
	CHECK(unsetenv("SOFTCUDA_VERSION") == 0);
	bench = (struct bench){ .options = { .uuid = "no such GPU" } };
	fails_with(&bench, "none of the 2 GPUs", true);
	fault("cuMemHostRegister_v2", "2");
	bench = (struct bench){ 0 };
	fails_with(&bench, "cuMemHostRegister failed with CUDA_ERROR_OUT_OF_MEMORY (2)", true);
	fault("cuInit", "100");
	bench = (struct bench){ 0 };
	fails_with(&bench, "no GPU is visible", false);
}

/* A call that fails alone costs that request; one behind which the context is lost costs the helper. The last: the double stays broken. */
static void test_errors(void)
{
	const struct tfd_stage_copy good = { .memory = NUMBER, .bytes = 64, .rows = 1 };
	struct tfd_gpu_message message;
	struct bench bench = { 0 };

	memory_make(&bench);
	start(&bench);
	hello(&bench);
	memory_open(&bench);
	fault("cuMemcpyDtoHAsync_v2", "1");
	CHECK(copy(&bench, TFD_STAGE_D2H, &good) == EIO);
	CHECK(copy(&bench, TFD_STAGE_D2H, &good) == 0);
	until_asleep(&bench);
	fault("context", "700");
	tfd_store_seq(&bench.stage->rings[TFD_STAGE_D2H].tail, bench.stage->rings[TFD_STAGE_D2H].tail + 1);
	CHECK(write(bench.options.wake_fd, &(uint64_t){ 1 }, 8) == 8);
	message = hear(&bench);
	CHECK(message.type == TFD_GPU_ERROR && strstr(message.text, "CUDA_ERROR_ILLEGAL_ADDRESS (700)"));
	check_dead(&bench, message.text);
}

int main(void)
{
	CHECK(mkdtemp(directory) && setenv("SOFTCUDA_FAULTS", directory, 1) == 0);
	load();
	test_lengths();
	test_rows();
	test_refusals();
	test_starts_that_fail();
	test_errors();
	CHECK(rmdir(directory) == 0); /* each fault was met */
	return 0;
}
