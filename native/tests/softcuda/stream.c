/* SPDX-License-Identifier: Apache-2.0 */
/* A stream is a thread that does what is enqueued, in order. Of a context that is lost it does nothing any more. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "core/barrier.h"
#include "soft.h"

#define POLL_US 50

enum work { COPY, WRITE, WAIT, END };

struct op {
	struct op *next;
	enum work work;
	uint8_t *to; /* COPY; the word of WRITE and WAIT */
	const uint8_t *from;
	uint64_t value;
	size_t width, height, to_pitch, from_pitch;
};

struct stream {
	struct stream *next;
	uint64_t number;
	void *context;
	pthread_mutex_t lock; /* guards what follows */
	pthread_cond_t changed;
	struct op *first, *last;
	uint64_t pending;
	pthread_t thread;
};

static pthread_mutex_t streams_lock = PTHREAD_MUTEX_INITIALIZER; /* guards the list */
static struct stream *streams;
/*
 * Added to before and after all work. Who waits for one stream's word may see it at another address than the stream, by another mapping
 * of the memory, which ThreadSanitizer takes for another word: then this tells it that what came after came after.
 */
static uint64_t ticks;

static void copy(const struct op *op)
{
	unsigned slow = soft_slow();

	if (slow)
		(void)usleep(slow);
	if (soft_fault("hold")) {
		while (!soft_broken())
			(void)usleep(POLL_US);
		return;
	}
	for (size_t row = 0; row < op->height; row++)
		memcpy(op->to + row * op->to_pitch, op->from + row * op->from_pitch, op->width);
}

/* CU_STREAM_WAIT_VALUE_GEQ */
static void wait_for(const struct op *op)
{
	while ((int64_t)(tfd_load_acquire((uint64_t *)op->to) - op->value) < 0 && !soft_broken())
		(void)usleep(POLL_US);
}

static void *run(void *argument)
{
	struct stream *stream = argument;
	bool over = false;

	while (!over) {
		struct op *op;

		(void)pthread_mutex_lock(&stream->lock);
		while (!stream->first)
			(void)pthread_cond_wait(&stream->changed, &stream->lock);
		op = stream->first;
		stream->first = op->next;
		(void)pthread_mutex_unlock(&stream->lock);
		(void)tfd_add_seq(&ticks, 1);
		if (soft_broken())
			; /* nothing is done any more */
		else if (op->work == COPY)
			copy(op);
		else if (op->work == WRITE)
			tfd_store_release((uint64_t *)op->to, op->value);
		else if (op->work == WAIT)
			wait_for(op);
		(void)tfd_add_seq(&ticks, 1);
		over = op->work == END;
		free(op);
		(void)pthread_mutex_lock(&stream->lock);
		stream->pending--;
		(void)pthread_cond_broadcast(&stream->changed);
		(void)pthread_mutex_unlock(&stream->lock);
	}
	return NULL;
}

static struct stream *known(void *handle)
{
	struct stream *found = NULL;

	(void)pthread_mutex_lock(&streams_lock);
	for (struct stream *stream = streams; stream; stream = stream->next) {
		if (stream == handle)
			found = stream;
	}
	(void)pthread_mutex_unlock(&streams_lock);
	return found;
}

static int enqueue(void *handle, const struct op *what)
{
	struct stream *stream = known(handle);
	struct op *op;

	if (!stream)
		return SOFT_INVALID_HANDLE;
	op = malloc(sizeof(*op));
	if (!op)
		return SOFT_OUT_OF_MEMORY;
	*op = *what;
	op->next = NULL;
	(void)pthread_mutex_lock(&stream->lock);
	if (stream->first)
		stream->last->next = op;
	else
		stream->first = op;
	stream->last = op;
	stream->pending++;
	(void)pthread_cond_broadcast(&stream->changed);
	(void)pthread_mutex_unlock(&stream->lock);
	return SOFT_SUCCESS;
}

static bool is_pending(struct stream *stream)
{
	bool pending;

	(void)pthread_mutex_lock(&stream->lock);
	pending = stream->pending != 0;
	(void)pthread_mutex_unlock(&stream->lock);
	return pending;
}

void soft_settle(void)
{
	for (;;) {
		bool pending = false;

		(void)pthread_mutex_lock(&streams_lock);
		for (struct stream *stream = streams; stream; stream = stream->next)
			pending = pending || is_pending(stream);
		(void)pthread_mutex_unlock(&streams_lock);
		if (!pending || soft_broken())
			return;
		(void)usleep(POLL_US);
	}
}

int cuStreamCreateWithPriority(void **out, unsigned flags, int priority)
{
	int result = soft_enter("cuStreamCreateWithPriority");
	struct stream *stream;

	(void)flags;
	(void)priority;
	if (result)
		return result;
	if (!soft_current())
		return SOFT_INVALID_CONTEXT;
	stream = calloc(1, sizeof(*stream));
	if (!stream)
		return SOFT_OUT_OF_MEMORY;
	stream->number = soft_number();
	stream->context = soft_current();
	(void)pthread_mutex_init(&stream->lock, NULL);
	(void)pthread_cond_init(&stream->changed, NULL);
	if (pthread_create(&stream->thread, NULL, run, stream)) {
		free(stream);
		return SOFT_OUT_OF_MEMORY;
	}
	(void)pthread_mutex_lock(&streams_lock);
	stream->next = streams;
	streams = stream;
	(void)pthread_mutex_unlock(&streams_lock);
	*out = stream;
	return SOFT_SUCCESS;
}

/* Waits for its work, as the driver does not. */
int cuStreamDestroy_v2(void *handle)
{
	const struct op end = { .work = END };
	struct stream *stream = handle;
	int result = enqueue(handle, &end);

	if (result)
		return result;
	(void)pthread_mutex_lock(&streams_lock);
	for (struct stream **link = &streams; *link; link = &(*link)->next) {
		if (*link == stream) {
			*link = stream->next;
			break;
		}
	}
	(void)pthread_mutex_unlock(&streams_lock);
	(void)pthread_join(stream->thread, NULL);
	(void)pthread_mutex_destroy(&stream->lock);
	(void)pthread_cond_destroy(&stream->changed);
	free(stream);
	return SOFT_SUCCESS;
}

int cuStreamQuery(void *handle)
{
	int result = soft_enter("cuStreamQuery");
	struct stream *stream = known(handle);

	if (result)
		return result;
	if (!stream)
		return SOFT_INVALID_HANDLE;
	return is_pending(stream) ? SOFT_NOT_READY : SOFT_SUCCESS;
}

int cuStreamSynchronize(void *handle)
{
	int result;

	while ((result = cuStreamQuery(handle)) == SOFT_NOT_READY)
		(void)usleep(POLL_US);
	return result;
}

int cuStreamGetCtx(void *handle, void **context)
{
	struct stream *stream = known(handle);

	if (!stream)
		return SOFT_INVALID_HANDLE;
	*context = stream->context;
	return SOFT_SUCCESS;
}

int cuStreamGetId(void *handle, uint64_t *id)
{
	struct stream *stream = known(handle);

	if (!stream)
		return SOFT_INVALID_HANDLE;
	*id = stream->number;
	return SOFT_SUCCESS;
}

int cuStreamIsCapturing(void *handle, int *out)
{
	*out = 0;
	return known(handle) ? SOFT_SUCCESS : SOFT_INVALID_HANDLE;
}

int cuThreadExchangeStreamCaptureMode(int *mode)
{
	*mode = 0;
	return SOFT_SUCCESS;
}

/* A word of registered memory, or of a device's. */
static int word_op(const char *call, enum work work, void *stream, uint64_t address, uint64_t value)
{
	const struct op op = { .work = work, .to = (uint8_t *)(uintptr_t)address, .value = value };
	int result = soft_enter(call);

	if (result)
		return result;
	if (address % 8 || (!soft_may_copy(address, 8, true) && !soft_may_copy(address, 8, false)))
		return SOFT_INVALID_VALUE;
	return enqueue(stream, &op);
}

int cuStreamWaitValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags)
{
	(void)flags;
	return word_op("cuStreamWaitValue64_v2", WAIT, stream, address, value);
}

int cuStreamWriteValue64_v2(void *stream, uint64_t address, uint64_t value, unsigned flags)
{
	(void)flags;
	return word_op("cuStreamWriteValue64_v2", WRITE, stream, address, value);
}

static int copy_op(const char *call, uint64_t to, bool to_host, uint64_t from, bool from_host, size_t bytes,
                   void *stream)
{
	const struct op op = { .work = COPY,
	                       .to = (uint8_t *)(uintptr_t)to,
	                       .from = (const uint8_t *)(uintptr_t)from,
	                       .width = bytes,
	                       .height = 1 };
	int result = soft_enter(call);

	if (result)
		return result;
	if (!soft_may_copy(to, bytes, to_host) || !soft_may_copy(from, bytes, from_host))
		return SOFT_INVALID_VALUE;
	return enqueue(stream, &op);
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream)
{
	return copy_op("cuMemcpyDtoDAsync_v2", to, false, from, false, bytes, stream);
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream)
{
	return copy_op("cuMemcpyHtoDAsync_v2", to, false, (uint64_t)(uintptr_t)from, true, bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream)
{
	return copy_op("cuMemcpyDtoHAsync_v2", (uint64_t)(uintptr_t)to, true, from, false, bytes, stream);
}

int cuMemcpy2DAsync_v2(const struct soft_copy_2d *what, void *stream)
{
	bool from_host = what->src_type == 1, to_host = what->dst_type == 1;
	uint64_t from = from_host ? (uint64_t)(uintptr_t)what->src_host : what->src_device;
	uint64_t to = to_host ? (uint64_t)(uintptr_t)what->dst_host : what->dst_device;
	const struct op op = { .work = COPY,
	                       .to = (uint8_t *)(uintptr_t)to,
	                       .from = (const uint8_t *)(uintptr_t)from,
	                       .width = what->width,
	                       .height = what->height,
	                       .to_pitch = what->dst_pitch,
	                       .from_pitch = what->src_pitch };
	int result = soft_enter("cuMemcpy2DAsync_v2");
	size_t rows = what->height;

	if (result)
		return result;
	if (!rows || !what->width || (what->src_pitch && what->src_pitch < what->width) ||
	    (what->dst_pitch && what->dst_pitch < what->width) || what->src_x || what->src_y || what->dst_x ||
	    what->dst_y)
		return SOFT_INVALID_VALUE;
	if (!soft_may_copy(from, (rows - 1) * what->src_pitch + what->width, from_host) ||
	    !soft_may_copy(to, (rows - 1) * what->dst_pitch + what->width, to_host))
		return SOFT_INVALID_VALUE;
	return enqueue(stream, &op);
}
